"""What a device tells of a run from outside: peak memory, the part of its peak FLOP/s that is used, board memory and energy.

The allocator's peak counts tensors. NVML, the library beneath nvidia-smi, counts what the board really gives away: CUDA's context,
loaded kernels and what the allocator reserves and cannot use included. Its energy counter integrates the board's power from the
moment the driver was loaded, in mJ, so two readings cost nothing and give the energy between them, idle power included.
"""

import resource
from typing import Any

import torch

from nanochat.gemm_formats import flops_in_fp8
from nanochat.gpt import GPT
from nvfp8 import hardware


def peak_gib(device: torch.device, hidden: int = 0) -> float:
    """Peak memory so far, GiB: of the GPU's allocator, or of this process.

    Args:
        device: of the run.
        hidden: bytes that CUDA graphs hold and the allocator counts as free (`micro_batches.py`).
    """
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated(device) + hidden) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def peaks(device: torch.device) -> hardware.Peaks | None:
    """Peak rates of a device; None for a CPU, and for a GPU whose rates are not known."""
    return hardware.peaks(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def mfu(tokens_per_second: float, model: GPT, ranks: int) -> float | None:
    """Model FLOP/s over the bf16 peak of all devices, as nanochat counts it; None where there is no known peak."""
    known = peaks(model.cos.device)
    return None if known is None else tokens_per_second * model.flops_per_token() / (known.bf16 * ranks)


def model_peak(model: GPT, known: hardware.Peaks | None) -> float | None:
    """The FLOP/s that a model cannot exceed: each of its FLOPs at the peak of the format it is computed in.

    A model in FP8 has FLOPs of both kinds, so neither peak is right by itself: over bf16's the utilization flatters, over FP8's
    attention, which stays in bf16, counts as twice as fast as it can be. The time of a token at the peaks is
    FP8 FLOPs / FP8 peak + all others / bf16 peak, and the peak of the mixture its FLOPs over that.

    Args:
        model: its precision says which GEMMs are in FP8 (`gemm_formats.flops_in_fp8`). Those that backward makes again are no work
            of the model and count in neither.
        known: of the device.

    Returns:
        FLOP/s; None without a known peak, which fp32 has none of here.
    """
    if known is None or model.precision.compute_dtype == torch.float32:
        return None
    total, in_fp8 = model.flops_per_token(), flops_in_fp8(model)
    if in_fp8 and known.fp8 is None:
        return None
    return total / ((total - in_fp8) / known.bf16 + (in_fp8 / known.fp8 if known.fp8 else 0))


class Board:
    """One GPU's board through NVML."""

    def __init__(self, nvml: Any, handle: Any):
        """Keep the library and the board's handle; made by `board`."""
        self._nvml, self._handle = nvml, handle

    def used(self) -> int | None:
        """Bytes of the board's memory that are taken, by all processes; None where it has none of its own (DGX Spark)."""
        try:
            return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
        except self._nvml.NVMLError_NotSupported:
            return None

    def joules(self) -> float | None:
        """Energy since the driver was loaded; None where the board does not count it."""
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
        except self._nvml.NVMLError_NotSupported:
            return None


def board(device: torch.device) -> Board | str:
    """The board of a device, or why NVML cannot be asked for it.

    CUDA and NVML number boards differently; both know a board's UUID.
    """
    if device.type != "cuda":
        return "a CPU has no board to ask"
    try:
        import pynvml
    except ImportError:
        return "nvidia-ml-py is not installed: pip install -c constraints.txt -e '.[cuda]'"
    try:
        pynvml.nvmlInit()
        return Board(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}"))
    except pynvml.NVMLError as error:
        return f"NVML: {error}"
