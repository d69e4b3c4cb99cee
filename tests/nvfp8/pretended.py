"""A GPU that is not there, shared by the scripts that have Triton compile kernels without one."""

import torch
from triton.backends.compiler import GPUTarget


class Pretended:
    """As much of a Triton driver as choosing and compiling a kernel needs."""

    def __init__(self, capability: int):
        self.capability = capability  # such as 90

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")
