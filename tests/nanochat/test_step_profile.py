"""A step's profile: kernels in one family each, sums, floors by hand, and what a run with --profile leaves behind."""

import errno
import gzip
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._C._autograd import DeviceType

from nanochat import idle, metrics
from nanochat.dataset import base_dir
from nanochat.errors import BadInput
from nanochat.gpt import GPTConfig
from nanochat.idle import Span
from nanochat.memory import Counted, Setup
from nanochat.roofline import work
from nanochat.step_profile import (
    OURS,
    TABLE,
    TRACE,
    Floor,
    Recorded,
    begin,
    by_family,
    family,
    floor,
    recorded,
    table,
    without_profiler,
    write,
)
from nanochat.train import Run, train
from nanochat.train_config import TrainConfig
from nvfp8.hardware import Peaks
from nvfp8.precision import fp8
from nvfp8.recipe import recipe

PEAKS = Peaks(bf16=1e12, fp8=2e12, bandwidth=1e11, memory=1, power=1, capability=(9, 0))


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNT", "GEMMs"),
        ("nvjet_qqtst_128x256_128x4_2x1_v_bz_TNT", "GEMMs"),
        ("sm90_xmma_gemm_bf16f32_bf16f32_f32_nt_n_tilesize128x128x64_execute_segment_k_off_kernel__5x_cublas", "GEMMs"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, false>(...)", "GEMMs"),
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm90<cutlass::gemm::kernel::GemmUniversal>>", "GEMMs"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0", "attention"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 128>(...)", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, cutlass::bfloat16_t>>", "attention"),
        ("fmha_cutlassB_bf16_aligned_128x64_k128_sm80(...)", "attention"),
        ("_norm_backward", "our Triton kernels"),
        ("_softcap_cross_entropy", "our Triton kernels"),
        ("void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<...>(...)", "embedding gradients"),
        ("void at::native::(anonymous namespace)::compute_grad_weight<c10::BFloat16, long>(...)", "embedding gradients"),
        ("void at::native::(anonymous namespace)::sum_and_scatter<c10::BFloat16, long>(...)", "embedding gradients"),
        ("void at::native::unrolled_elementwise_kernel<at::native::bfloat16_copy_kernel_cuda(...)::{lambda}>", "casts and copies"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy_vectorized<...>(...)", "casts and copies"),
        ("Memcpy DtoD (Device -> Device)", "casts and copies"),
        ("void transformer_engine::cast_transpose_general_kernel<float, __nv_fp8_e4m3>(...)", "Transformer Engine"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>(...)", "additions (gradients)"),
        ("void at::native::multi_tensor_apply_kernel<..., BinaryOpListAlphaFunctor<float, 2, 2, 0>>(...)", "additions (gradients)"),
        ("void at::native::elementwise_kernel<..., at::native::gpu_kernel_impl_nocast<at::native::BinaryFunctor<...>>>", "other"),
        ("void at::native::(anonymous namespace)::vectorized_gather_kernel<16, long>(...)", "other"),
        ("triton_poi_fused_add_0", "other"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("ncclDevKernel_Broadcast_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("gloo:all_reduce", "communication"),
        ("_adamw", "optimizers' kernels"),
        ("_gemm_relu_squared", "GEMMs"),
        ("_gemm_heads", "GEMMs"),
        ("aten::addmm", "GEMMs"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
    ],
)  # fmt: skip
def test_families_of_kernels(kernel: str, expected: str) -> None:
    assert family(kernel) == expected


def test_our_kernels_are_read_from_their_sources() -> None:
    assert {"_norm_forward", "_norm_backward", "_heads_forward", "_heads_backward", "_relu_squared_forward"} <= OURS.keys()
    assert all(name.isidentifier() for name in OURS)
    assert set(OURS.values()) == {"our Triton kernels", "GEMMs", "optimizers' kernels"}


LEAST = Floor(
    {"FP8": 4e10, "bf16": 1e10}, 4e9, {"optimizers' kernels": 2e8, "additions (gradients)": 1e8, "all else": 5e8}
)  # fmt: skip
KERNELS = [("nvjet_a", 8, 60.0), ("nvjet_b", 4, 20.0), ("flash", 2, 10.0), ("_norm_forward", 4, 8.0), ("strange", 2, 2.0)]


def test_families_are_summed_and_divided() -> None:
    assert by_family(KERNELS, 2) == {"GEMMs": (6, 40.0), "attention": (1, 5.0), "our Triton kernels": (2, 4.0), "other": (1, 1.0)}


def test_a_table_by_hand() -> None:
    """1e10 bf16 FLOPs take 10 ms at 1e12/s, 4e10 in FP8 20 ms at 2e12/s, attention's 4e9 4 ms, 1e8 bytes 1 ms."""
    kernels = [*KERNELS, ("_adamw", 1, 4.0), ("_column_squares", 1, 1.0), ("x CUDAFunctor_add<float>", 3, 2.0)]
    lines = table(kernels, LEAST, PEAKS)
    assert [line.split() for line in lines[1:]] == [
        ["GEMMs", "80.00", "74.8%", "12", "0.1", "TFLOP", "30.00", "37.5%"],
        ["attention", "10.00", "9.3%", "2", "0.0", "TFLOP", "4.00", "40.0%"],
        ["optimizers'", "kernels", "5.00", "4.7%", "2", "0.2", "GB", "2.00", "40.0%"],
        ["additions", "(gradients)", "2.00", "1.9%", "3", "0.1", "GB", "1.00", "50.0%"],
        ["all", "else", "10.00", "9.3%", "6", "0.5", "GB", "5.00", "50.0%"],
        ["our", "Triton", "kernels", "8.00", "7.5%", "4"],
        ["other", "2.00", "1.9%", "2"],
        ["sum", "107.00", "42.00", "39.3%"],
    ]


def test_what_ranks_send_each_other_has_no_floor() -> None:
    alone, least = KERNELS, LEAST
    lines = [line.split() for line in table([*alone, ("ncclDevKernel_Reduce_Sum_bf16_RING_LL", 3, 100.0)], least, PEAKS)]
    assert ["communication", "100.00", "50.0%", "3", "-", "-", "-"] in lines
    assert ["all", "else", "10.00", "5.0%", "6", "0.5", "GB", "5.00", "50.0%"] in lines  # as without it
    assert lines[-1] == ["sum", "200.00", "42.00", "21.0%"]


def test_without_peaks_there_is_no_floor() -> None:
    lines = table(KERNELS, LEAST, None)
    assert lines[1].split() == ["GEMMs", "80.00", "80.0%", "12", "0.1", "TFLOP", "-", "-"]
    assert lines[-1].split() == ["sum", "100.00"]
    assert table([], None, None)[-1].split() == ["sum", "0.00"]


def test_a_floor_counts_what_queries_see_and_the_optimizers_once() -> None:
    shape = GPTConfig.from_depth(2, aspect_ratio=64, head_dim=64, sequence_len=64, vocab_size=256, window_pattern="L")
    done = work(Counted(Setup(shape, fp8(recipe("delayed")), 2)), 2)
    once, thrice = floor(done, shape, 2, 1), floor(done, shape, 2, 3)
    pairs = 64 * 65 / 2  # of a query and a key it sees, in one row
    assert once.attention == pytest.approx(12 * 128 * 2 * 2 * pairs)  # width, rows, layers
    assert thrice.attention == 3 * once.attention and thrice.gemms["FP8"] == 3 * once.gemms["FP8"] == 3 * done.fp8
    assert thrice.gemms["bf16"] - once.gemms["bf16"] == pytest.approx(2 * done.bf16)
    assert sum(thrice.moved.values()) - sum(once.moved.values()) == pytest.approx(2 * done.moved)
    assert thrice.moved["optimizers' kernels"] == once.moved["optimizers' kernels"] == done.updated
    assert once.moved["additions (gradients)"] == done.added == 3 * 2 * 256 * 128  # lm_head's: FP8 GEMMs add others


@pytest.mark.skipif(torch.cuda.is_available(), reason="of what a CPU can record")
def test_a_step_on_a_cpu_is_recorded(tmp_path: Path) -> None:
    x, calls, cpu, least = torch.randn(64, 64), [], torch.device("cpu"), Floor({"bf16": 1.0}, 1.0, {"all else": 1.0})
    begin(tmp_path / "profile", cpu)
    done = recorded(lambda: calls.append(x @ x), cpu)
    lines = write(done, tmp_path / "profile", least, 0.25)
    assert len(calls) == 1
    assert "the step before, without it: 250 ms" in lines and not any("idle" in line for line in lines)
    assert "GEMMs" in lines[1] and any("neither bytes nor a floor" in line for line in lines)
    assert lines[1].split()[-3:] == ["-", "-", "-"]
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {TRACE, TABLE}
    events = json.loads(gzip.decompress((tmp_path / "profile" / TRACE).read_bytes()))["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"--profile cannot write into .*file"):
        begin(tmp_path / "file", cpu)
    with pytest.raises(BadInput, match=r"--profile cannot write into .*gone"):
        write(recorded(lambda: x @ x, cpu), tmp_path / "gone", least, 0.25)


# Two streams: "b" runs inside "a", "c" begins while "a" runs and outlasts it; then gaps of 4 µs, 2 ms and 0.5 ms.
SPANS = [
    Span("a", 10, 20), Span("b", 11, 12), Span("c", 19, 25), Span("d", 25.004, 30), Span("e", 32, 33), Span("f", 33.5, 36),
]  # fmt: skip


def test_idle_is_where_no_stream_runs_anything() -> None:
    found = idle.idle(reversed(SPANS))
    assert (found.whole, found.waited, found.busy) == (26, pytest.approx(2.504), pytest.approx(23.496))
    assert (found.gaps, found.in_gaps) == (2, 2.5)
    assert (found.longest, found.around) == (2, ("d", "e"))
    assert idle.idle([Span("long", 0, 10), Span("short", 1, 2), Span("next", 9, 11)]).waited == 0


def test_what_is_idle_is_printed_for_the_step_and_its_parts() -> None:
    lines = [" ".join(line.split()) for line in idle.lines(SPANS, 31.9)]
    assert lines == [
        "GPU idle 2.50 9.6% of 26.00 ms; 2 gaps above 10 µs take 2.50, the longest 2.000 between d and e",
        "micro-batches 0.00 0.0% of 20.00 ms; no gap above 10 µs",
        "optimizers 0.50 12.5% of 4.00 ms; 1 gaps above 10 µs take 0.50, the longest 0.500 between e and f",
    ]
    assert len(idle.lines(SPANS, None)) == 1 and idle.lines([], None) == []
    assert idle.lines(SPANS[:1], None)[0].endswith("0.0%  of 10.00 ms; no gap above 10 µs")


def test_what_the_kernels_leave_of_an_unwatched_step() -> None:
    assert without_profiler(SPANS, 24.0) == "24.00 ms; kernels take 23.50 of it, for the other 0.50 (2.1%) the GPU waits"


def test_spans_are_what_ran_on_the_gpu_and_marks_are_no_work() -> None:
    def event(name: str, kind: DeviceType, start: float, end: float, mark: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            name=name, device_type=kind, time_range=SimpleNamespace(start=start, end=end), is_user_annotation=mark
        )

    events = [
        event("aten::mm", DeviceType.CPU, 0, 5),
        event("Optimizer.step#AdamW.step", DeviceType.CPU, 5, 9, True),
        event("nvjet", DeviceType.CUDA, 4000, 5500),
        event("Memset (Device)", DeviceType.CUDA, 6000, 6500),
        event("Optimizer.step#Muon.step", DeviceType.CUDA, 7000, 9000, True),
        event("Optimizer.step#AdamW.step", DeviceType.CUDA, 6000, 6500, True),
        event("ProfilerStep#0", DeviceType.CUDA, 4000, 9000, True),
    ]
    done = Recorded(SimpleNamespace(events=lambda: events), torch.device("cuda"), 1.0)  # type: ignore[arg-type]
    assert done.spans() == [("nvjet", 4.0, 5.5), ("Memset (Device)", 6.0, 6.5)]
    assert done.updates_from() == 6.0
    del events[4:6]
    assert done.updates_from() is None


@pytest.mark.gpu
def test_a_gpu_that_waits_for_the_host_is_seen() -> None:
    """20 ms of sleep between two products, then an optimizer's step."""
    parameter = torch.nn.Parameter(torch.randn(1024, 1024, device="cuda"))
    optimizer = torch.optim.SGD([parameter], lr=0.1)

    def step() -> None:
        (parameter @ parameter).sum().backward()
        torch.cuda.synchronize()
        time.sleep(0.02)
        torch.mm(parameter.detach(), parameter.detach())
        optimizer.step()

    step()
    done = recorded(step, torch.device("cuda"))
    whole, since = idle.idle(done.spans()), done.updates_from()
    assert 20 <= whole.longest <= whole.waited < whole.whole
    assert since is not None
    parts = [" ".join(line.split()) for line in idle.lines(done.spans(), since)]
    assert [part.split()[0] for part in parts] == ["GPU", "micro-batches", "optimizers"]
    assert idle.idle(span for span in done.spans() if span.start >= since).whole < 5


TINY = TrainConfig(
    depth=1, aspect_ratio=32, head_dim=32, max_seq_len=32, device_batch_size=4, total_batch_size=128, num_iterations=4,
    warmup_steps=1, eval_every=-1, sample_every=-1, core_metric_every=-1, model_tag="profiled", profile=True,
)  # fmt: skip


def test_a_run_profiles_one_step_and_goes_on(torch_texts: str) -> None:
    train(replace(TINY, data=torch_texts))
    records = metrics.read(base_dir() / "base_checkpoints" / "profiled")
    told = [record for record in records if record["kind"] == "event" and record["text"].startswith("profile of one step")]
    assert [record["step"] for record in told] == [3] and "GEMMs" in told[0]["text"]
    assert ("GPU idle" in told[0]["text"]) == torch.cuda.is_available()
    before = next(record["seconds"] for record in records if record["kind"] == "step" and record["step"] == 2)
    text = re.search(r"the step before, without it: ([\d.]+) ms", told[0]["text"])
    assert text is not None and float(text[1]) == pytest.approx(1e3 * before, abs=0.6)
    assert [record["step"] for record in records if record["kind"] == "step"] == [0, 1, 2, 3]
    names = {path.name for path in (base_dir() / "base_checkpoints" / "profiled" / "profile").iterdir()}
    assert names == {TRACE, TABLE} | ({"memory.pickle"} if torch.cuda.is_available() else set())


def test_a_step_that_fails_is_no_failure_of_the_profile(torch_texts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that cannot be read is an OSError too."""
    real = Run.step

    def step(self: Run) -> None:
        if self.progress.step == 3:
            raise OSError(errno.EIO, "shard 5")
        real(self)

    monkeypatch.setattr(Run, "step", step)
    with pytest.raises(OSError, match="shard 5"):
        train(replace(TINY, data=torch_texts))


def test_a_run_too_short_to_be_profiled_is_refused(torch_texts: str) -> None:
    with pytest.raises(BadInput, match="--profile looks at a step behind 3 of warm-up"):
        train(replace(TINY, data=torch_texts, num_iterations=3))
