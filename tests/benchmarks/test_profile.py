"""The profile puts each kernel into one family, and its sums are per micro-batch."""

import os
import subprocess
import sys

import pytest

from benchmarks.profile import OURS, family, table


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
        ("void at::native::(anonymous namespace)::vectorized_gather_kernel<16, long>(...)", "other"),
        ("triton_poi_fused_add_0", "other"),
    ],
)  # fmt: skip
def test_families_of_kernels(kernel: str, expected: str) -> None:
    assert family(kernel) == expected


def test_our_kernels_are_read_from_their_sources() -> None:
    assert {"_norm_forward", "_norm_backward", "_heads_forward", "_heads_backward", "_relu_squared_forward"} <= OURS
    assert all(name.isidentifier() for name in OURS)


def test_sums_are_per_micro_batch_and_complete() -> None:
    lines = table([("nvjet_a", 8, 60.0), ("nvjet_b", 4, 20.0), ("_norm_forward", 4, 16.0), ("strange", 2, 4.0)], 4, largest=2)
    assert [line.split() for line in lines[1:5]] == [
        ["GEMMs", "20.00", "80.0%", "3"],
        ["our", "Triton", "kernels", "4.00", "16.0%", "1"],
        ["other", "1.00", "4.0%", "0"],
        ["sum", "of", "kernels", "25.00"],
    ]
    assert [line.split() for line in lines[6:]] == [
        ["15.00", "ms", "2", "x", "GEMMs:", "nvjet_a"],
        ["5.00", "ms", "1", "x", "GEMMs:", "nvjet_b"],
    ]


@pytest.mark.gpu
def test_a_small_model_is_profiled() -> None:
    command = [sys.executable, "-m", "benchmarks.profile", "--depth", "2", "--batch", "2", "--micro-batches", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    for fragment in ("GEMMs", "attention", "our Triton kernels", "casts and copies", "sum of kernels"):
        assert fragment in done.stdout
