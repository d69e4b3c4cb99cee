"""FP8 products: what they equal, and what is refused on every device."""

import math

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


# One FP8 instruction of Hopper adds 32 products to what is summed so far, and cuts each of these 33 below the largest one's 14
# highest bits (arXiv 2412.19437, sections 3.3.2 and 3.5.2): by at most CUT of it each.
TERMS, CUT = 33, 2.0**-13
WAYS = pytest.mark.parametrize("emulated", [True, pytest.param(False, marks=pytest.mark.skipif(not NATIVE, reason="no FP8 unit"))])


@WAYS
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
    # Cuts are spread evenly between 0 and CUT, of terms of either sign, so the errors of 4 instructions add up as squares do. The
    # largest term is no larger than the sum, in the mean. Promotion every 128 terms would change nothing here.
    bound = 2**-8 if out == torch.bfloat16 else 1e-6 if emulated else math.sqrt(4 * TERMS / 3) * CUT
    assert float((result.double() - exact).norm() / exact.norm()) < bound
    whole = torch.full((96, 32), torch.nan, dtype=out, device=DEVICE)
    assert fp8_matmul(a, b, *inverses, out, fast, emulated=emulated, out=whole[16:64]).data_ptr() == whole[16:].data_ptr()
    assert torch.equal(whole[16:64], result) and bool(whole[[*range(16), *range(64, 96)]].isnan().all())


@WAYS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_is_added_to_what_there_is(dtype: torch.dtype, emulated: bool) -> None:
    a, b, one = operand(48, 128, 1, E5M2), operand(32, 128, 2, E4M3), torch.ones((), device=DEVICE)
    out = torch.full((48, 32), 100.0, dtype=dtype, device=DEVICE)
    assert fp8_matmul(a, b, one, one, dtype, False, emulated=emulated, out=out, add=True) is out
    exact = 100 + a.double() @ b.double().t()
    assert float((out.double() - exact).norm() / exact.norm()) < (2**-8 if dtype == torch.bfloat16 else 2**-12)
    product = fp8_matmul(a, b, one, one, dtype, False, emulated=emulated)
    if emulated or dtype == torch.float32:  # in 16 bits the library may leave out the product's own rounding
        assert torch.equal(out, torch.full_like(out, 100.0) + product), "as by a GEMM and an addition"
    with pytest.raises(ValueError, match="added to what there is"):
        fp8_matmul(a, b, one, one, dtype, False, emulated=emulated, add=True)
    with pytest.raises(ValueError, match=r"is written to torch\.float16"):
        fp8_matmul(a, b, one, one, torch.float16, False, emulated=emulated, out=out)


@WAYS
@pytest.mark.parametrize("formats", [(E5M2, E4M3), (E4M3, E4M3)])
def test_a_long_sum_of_one_sign_is_promoted_to_fp32(formats: tuple[torch.dtype, torch.dtype], emulated: bool) -> None:
    """What a weight gradient needs: with fast accumulation 32,768 terms of one sign err by 37 % (docs/architecture.md)."""
    terms = 32_768
    a, b = (operand(rows, terms, rows, dtype).float().abs().to(dtype) for rows, dtype in zip((48, 32), formats, strict=True))
    one = torch.ones((), device=DEVICE)
    result = fp8_matmul(a, b, one, one, torch.float32, False, emulated=emulated)
    exact = a.double() @ b.double().t()
    # All cuts lower the sum: those of 4 instructions, then it goes to fp32 and starts anew. fp32 itself errs by 2^-24 a term.
    bound = terms * 2.0**-24 + (0 if emulated else 4 * TERMS * CUT)
    assert float((result.double() / exact - 1).abs().max()) < bound


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
