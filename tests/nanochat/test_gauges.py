"""Peaks of mixed formats by hand, and NVML as far as a machine without a board can pretend to have one."""

import sys
from types import SimpleNamespace

import pytest
import torch

from nanochat import gauges
from nanochat.gpt import GPT, GPTConfig
from nvfp8.hardware import Peaks
from nvfp8.precision import Precision, bf16, fp8, fp32, te
from nvfp8.recipe import recipe

PEAKS = Peaks(bf16=1e12, fp8=2e12, bandwidth=1e11, memory=1, power=1, capability=(9, 0))


def model(precision: Precision) -> GPT:
    with torch.device("meta"):
        return GPT(GPTConfig.from_depth(2, aspect_ratio=64, head_dim=64, sequence_len=64, vocab_size=256), precision)


def test_a_mixture_is_between_the_peaks_of_its_formats() -> None:
    """Two blocks of 12 · 128² parameters (their gates are bf16), and 256 · 128 of lm_head, 6 FLOPs each."""
    counts = model(bf16()).flop_counts()
    assert gauges.model_peak(model(bf16()), PEAKS) == pytest.approx(1e12)
    blocks, head = 6 * 2 * 12 * 128**2, 6 * 256 * 128
    for precision, halved in (
        (fp8(recipe("delayed")), blocks + head),
        (fp8(recipe("delayed"), recompute=True), blocks + head),
        (fp8(recipe("delayed", bf16=("lm_head:wgrad",))), blocks + 2 / 3 * head),
        (fp8(recipe("delayed", bf16=("h.0", "lm_head"))), blocks / 2),
        (fp8(recipe("rowwise")), blocks),
        (te(recipe("delayed")), blocks),
        (te(recipe("delayed"), te_head=True), blocks + head),
    ):
        seconds = (counts["total"] - halved) / 1e12 + halved / 2e12
        assert gauges.model_peak(model(precision), PEAKS) == pytest.approx(counts["total"] / seconds)


def test_no_peak_is_made_up() -> None:
    assert gauges.model_peak(model(fp32()), PEAKS) is None
    assert gauges.model_peak(model(bf16()), None) is None
    assert gauges.model_peak(model(fp8(recipe("delayed"))), Peaks(1e12, None, 1e11, 1, 1, (8, 0))) is None
    assert gauges.peaks(torch.device("cpu")) is None and gauges.mfu(1e6, model(bf16()), 1) is None


def test_a_cpu_has_no_board_and_its_process_memory_is_in_gib() -> None:
    assert gauges.board(torch.device("cpu")) == "a CPU has no board to ask"
    before = gauges.peak_gib(torch.device("cpu"))
    held = torch.ones(2**28)  # 1 GiB, written
    assert gauges.peak_gib(torch.device("cpu")) >= min(before + 0.1, 1.0)
    del held


class NVMLError(Exception):
    pass


class NotSupported(NVMLError):
    pass


def pretend(monkeypatch: pytest.MonkeyPatch, **functions: object) -> None:
    def refuse(handle: object) -> None:
        raise NotSupported

    def by_uuid(uuid: str) -> str:
        return uuid

    given = {
        "NVMLError": NVMLError, "NVMLError_NotSupported": NotSupported, "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": by_uuid, "nvmlDeviceGetMemoryInfo": refuse,
        "nvmlDeviceGetTotalEnergyConsumption": refuse, **functions,
    }  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(**given))  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="ab-cd"))


def test_a_board_is_found_by_its_uuid_and_read_in_si_units(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    pretend(
        monkeypatch,
        nvmlDeviceGetMemoryInfo=lambda handle: seen.append(handle) or SimpleNamespace(used=3 * 2**30, total=2**40),  # type: ignore[func-returns-value]
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 2500,
    )
    board = gauges.board(torch.device("cuda"))
    assert isinstance(board, gauges.Board)
    assert board.used() == 3 * 2**30 and board.joules() == 2.5 and seen == ["GPU-ab-cd"]


def test_what_a_board_does_not_count_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    board = gauges.board(torch.device("cuda"))
    assert isinstance(board, gauges.Board) and board.used() is None and board.joules() is None


def test_a_board_that_cannot_be_asked_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> None:
        raise NVMLError("Driver Not Loaded")

    pretend(monkeypatch, nvmlInit=no_driver)
    assert gauges.board(torch.device("cuda")) == "NVML: Driver Not Loaded"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py is not installed" in str(gauges.board(torch.device("cuda")))


@pytest.mark.gpu
def test_the_real_board_counts_energy_and_memory() -> None:
    board = gauges.board(torch.device("cuda"))
    assert isinstance(board, gauges.Board), board
    joules, taken = board.joules(), list[float]()
    for _ in range(5):  # other processes may give memory back meanwhile
        before = board.used()
        held = torch.ones(2**28, device="cuda")
        for _ in range(300):
            held.mul_(1.0)
        torch.cuda.synchronize()
        after = board.used()
        assert before is not None and after is not None
        taken.append((after - before) / held.nbytes)
        del held
        torch.cuda.empty_cache()
    assert max(taken) >= 0.9, taken
    more = board.joules()
    assert joules is not None and more is not None and more >= joules > 0
