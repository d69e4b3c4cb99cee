"""What a run changes for the whole process, and puts back at its end, so that the next run in it starts like the first."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nvfp8 import te

_memory: Any = torch.utils.deterministic  # its attribute is a property that type checkers do not see
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def restored() -> Iterator[None]:
    """At the end of the block the garbage collector, torch's determinism, cuBLAS's and Transformer Engine's are as before it."""
    collecting, workspace = gc.isenabled(), os.environ.get(_WORKSPACE)
    deterministic, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = _memory.fill_uninitialized_memory
    try:
        yield
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        _memory.fill_uninitialized_memory = fill
        if workspace is None:
            os.environ.pop(_WORKSPACE, None)
        te.reset()


def make_deterministic() -> None:
    """Only kernels that give the same bits every time. Call it before the process's first GEMM on a GPU.

    cuBLAS and torch look at the variable once, when the first GEMM makes cuBLAS's handle; 8 buffers of 4 MiB are what torch
    takes on Hopper anyway. Without it torch refuses the GEMM. Uninitialized memory stays so: nothing reads it.
    """
    os.environ.setdefault(_WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(True)
    _memory.fill_uninitialized_memory = False


def stop_collecting() -> None:
    """End Python's search for cycles: with what a run holds it takes up to half a second at a time and finds nothing."""
    gc.collect()
    gc.freeze()
    gc.disable()
