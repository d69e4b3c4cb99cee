"""Milliseconds of a GPU alone, millijoules of its board, and the rate at which it copies, beside which a pass is judged."""

import statistics
import time
from collections.abc import Callable

import torch

from nanochat.errors import BadInput
from nanochat.gauges import board

WARM = 3  # calls before the measured ones: kernels are compiled, memory is taken


def check_fp8() -> None:
    """Refuse to time FP8 GEMMs where there are none.

    Raises:
        BadInput: the GPU has none, or there is no GPU.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        raise BadInput("this times FP8 GEMMs, and torch finds no CUDA device that has them (8.9 or newer)")


def gpu_milliseconds(work: Callable[[], object], repeats: int, prepare: Callable[[], object] = lambda: None) -> float:
    """Median of what `work` takes on the GPU; memory filled before it gives the host time to be ahead."""
    ahead = torch.empty(2**29, dtype=torch.uint8, device="cuda")  # 0.2 ms to fill, on an H200
    times = []
    for _ in range(WARM + repeats):
        prepare()
        for _ in range(40):
            ahead.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[WARM:])


def copy_bandwidth(repeats: int = 20) -> float:
    """Bytes read and written a second by a copy of 1 GiB."""
    source = torch.zeros(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-3 * gpu_milliseconds(lambda: target.copy_(source), repeats))


def gpu_millijoules(work: Callable[[], object], seconds: float = 1.0) -> tuple[float, float]:
    """What a call of `work` takes of the board's energy, idle power included, and of time, where it is called without end.

    A GPU at its power limit is slower so than in `gpu_milliseconds`. NVML's counter moves some ten times a second.

    Args:
        work: launches kernels; captured in a CUDA graph, ten times, so that the host is never late.
        seconds: how long, and before that a third of it, unmeasured.

    Returns:
        mJ, ms.

    Raises:
        BadInput: this board's energy cannot be had.
    """
    gpu = board(torch.device("cuda", torch.cuda.current_device()))
    if isinstance(gpu, str):
        raise BadInput(f"no energy: {gpu}")
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            work()

    def joules() -> float:
        if (now := gpu.joules()) is None:
            raise BadInput("no energy: this board does not count it")
        return now

    def go_on(seconds: float) -> tuple[float, float]:
        calls, begun, before = 0, time.perf_counter(), joules()
        while (took := time.perf_counter() - begun) < seconds:
            for _ in range(10):
                graph.replay()
            torch.cuda.synchronize()
            calls += 100
        return 1e3 * (joules() - before) / calls, 1e3 * took / calls

    go_on(seconds / 3)
    return go_on(seconds)
