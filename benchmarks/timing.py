"""Milliseconds of a GPU alone, and the rate at which it copies, beside which a pass over memory is judged."""

import statistics
from collections.abc import Callable

import torch

WARM = 3  # calls before the measured ones: kernels are compiled, memory is taken


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
