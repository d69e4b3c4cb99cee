"""FP8 products: what they equal, and what is refused on every device."""

import pytest
import torch
from torch import Tensor

from nvfp8.matmul import fp8_matmul

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
NATIVE = CUDA and torch.cuda.get_device_capability() >= (8, 9)
pytestmark = [pytest.mark.gpu] if CUDA else []
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def operand(rows: int, columns: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(DEVICE).to(dtype)


@pytest.mark.parametrize("emulated", [True, pytest.param(False, marks=pytest.mark.skipif(not NATIVE, reason="no FP8 unit"))])
@pytest.mark.parametrize("out", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("formats", [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)])
@pytest.mark.parametrize("fast", [True, False])
def test_it_is_the_product_of_what_the_codes_stand_for(
    formats: tuple[torch.dtype, torch.dtype], out: torch.dtype, fast: bool, emulated: bool
) -> None:
    a, b = operand(48, 128, 1, formats[0]), operand(32, 128, 2, formats[1])
    inverses = (torch.tensor(0.25, device=DEVICE), torch.tensor(3.0, device=DEVICE))
    result = fp8_matmul(a, b, *inverses, out, fast, emulated=emulated)
    exact = a.double() @ b.double().t() * 0.75
    assert result.dtype == out and result.shape == (48, 32)
    bound = 2**-8 if out == torch.bfloat16 else 3e-3 if fast and not emulated else 1e-6
    assert float((result.double() - exact).norm() / exact.norm()) < bound


def test_what_tensor_cores_do_not_multiply_is_refused() -> None:
    one = torch.ones((), device=DEVICE)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return fp8_matmul(a, b, one, one, torch.bfloat16, False)

    a, b = operand(16, 64, 1, E4M3), operand(32, 64, 2, E4M3)
    with pytest.raises(ValueError, match="e5m2 times e5m2"):
        product(operand(16, 64, 1, E5M2), operand(32, 64, 1, E5M2))
    with pytest.raises(ValueError, match=r"\(16, 64\) times \(24, 64\)ᵀ: N and K must be multiples of 16"):
        product(a, operand(24, 64, 1, E4M3))
    with pytest.raises(ValueError, match="multiples of 16"):
        product(operand(16, 24, 1, E4M3), operand(16, 24, 1, E4M3))
    with pytest.raises(ValueError, match="multiples of 16"):
        product(a, operand(32, 32, 1, E4M3))
    with pytest.raises(ValueError, match="contiguous along the summed axis"):
        product(a, operand(64, 32, 1, E4M3).t())
    assert product(a, b).shape == (16, 32)
