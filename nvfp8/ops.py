"""Which implementation runs: Triton kernels on a GPU, their PyTorch twins on a CPU. Nothing else decides it."""

from types import ModuleType

from torch import Tensor

from nvfp8 import reference


def ops(x: Tensor) -> ModuleType:
    """The module whose functions run on x's device: `nvfp8.kernels` for CUDA, `nvfp8.reference` otherwise."""
    if x.is_cuda:
        from nvfp8 import kernels  # needs Triton, which a CPU installation may lack

        return kernels
    return reference
