"""What is not finite in the input of a kernel that writes FP8 is in its amax, although the cast hides it."""

from collections.abc import Callable

import pytest
import torch
from test_fp8_kernels import DEVICE, E4M3, heads_arguments, random, scalar, stream
from torch import Tensor

from nvfp8 import reference

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]
kernels = pytest.importorskip("nvfp8.kernels", reason="Triton is not installed")
__all__ = ["stream"]  # a fixture


def fp8_calls(bad: float, stream: torch.dtype) -> dict[str, Callable[[object, Tensor], object]]:
    """A call of every kernel with one bad number in what it reads."""
    x = random(2, 16, 32, dtype=stream, seed=1)
    worse, one, lambdas = x.clone(), scalar(1.0), torch.tensor([1.0, 0.1], device=DEVICE)
    worse[1, 3, 7] = bad
    flat, rstd = worse.flatten(0, 1), torch.ones(2, 16, device=DEVICE)
    arguments = heads_arguments(stream, False, (1, 1), 16)
    arguments[1][1, 2, 0, 3] = bad
    a_t, x_q = torch.ones(32, 32, device=DEVICE).to(E4M3), flat.float().clamp(-448, 448).to(E4M3)
    return {
        "mix_norm": lambda m, amax: m.mix_norm_quantize(x, worse, x, lambdas, 0, one, E4M3, amax),
        "add_norm": lambda m, amax: m.add_norm_quantize(x, worse, one, E4M3, amax),
        "relu_squared": lambda m, amax: m.relu_squared_quantize(flat, one, E4M3, amax),
        "relu_squared_backward": lambda m, amax: m.relu_squared_backward_quantize(flat, a_t, one, one, E4M3, amax),
        "norm_backward": lambda m, amax: m.norm_backward_quantize(x, x, rstd, worse, one, E4M3, one, E4M3, amax),
        "mix_backward": lambda m, amax: m.mix_norm_backward_quantize(
            worse, x, None, x, x, lambdas, rstd, None, one, E4M3, one, E4M3, amax
        ),
        "heads": lambda m, amax: m.heads_backward_quantize(*arguments, one, E4M3, amax),
        "gemm": lambda m, amax: m.gemm_relu_squared(x_q, x_q, scalar(bad), one, one, E4M3, True, amax),
    }


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_in_amax(bad: float, stream: torch.dtype) -> None:
    for name, call in fp8_calls(bad, stream).items():
        for module in (kernels, reference):
            amax = scalar(0.0)
            call(module, amax)
            assert not amax.isfinite(), name
