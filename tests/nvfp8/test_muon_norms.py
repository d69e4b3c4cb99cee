"""Muon's sums and scales: kernels against twins, twins against what they are to bring about."""

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from nvfp8 import polar_express as products
from nvfp8 import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
kernels = pytest.importorskip("nvfp8.kernels", reason="Triton is not installed")
muon_norms = pytest.importorskip("nvfp8.kernels.muon_norms", reason="Triton is not installed")

# A gate; a column; tall and wide, odd; rows of two tiles; columns of three partial sums, and rows that 128 divides
SHAPES = [(4, 1, 12), (3, 9, 1), (3, 7, 5), (3, 5, 7), (2, 17, 9), (2, 40, 700), (2, 70, 256), (1, 600, 640), (1, 640, 600)]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of very different norms."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (x * torch.logspace(-2, 2, shape[1])[:, None]).to(DEVICE, dtype)


def means(n: int, r: int, c: int) -> Tensor:
    x = torch.rand((n, r, 1) if r >= c else (n, 1, c), generator=torch.Generator().manual_seed(9))
    return (x * 0.01).to(DEVICE)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several walks over sums, and partial sums, of small matrices."""
    monkeypatch.setattr(muon_norms, "SUMS", 128)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_both_scales_are_the_twins(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, start = random(*shape, seed=1, dtype=dtype), means(*shape)
    # Up to 600 · 640 squares, summed in fp32 in two orders, and the roots and quotients of a GPU: 2^-23 each, some tens of them.
    near = {"rtol": 1e-5, "atol": 0.0}
    torch.testing.assert_close(kernels.equilibrating_scale(x), reference.equilibrating_scale(x), **near)
    ours, twins = start.clone(), start.clone()
    torch.testing.assert_close(kernels.normuon_scale(x, ours, 0.1), reference.normuon_scale(x, twins, 0.1), **near)
    torch.testing.assert_close(ours, twins, **near)
    assert not torch.equal(ours, start)


@pytest.mark.parametrize("module", [kernels, reference])
def test_rows_come_to_equal_norm_and_matrices_to_one(module: ModuleType) -> None:
    x = random(2, 40, 300, seed=1)
    scaled = x.double() * module.equilibrating_scale(x)
    norms = scaled.norm(dim=-1)
    torch.testing.assert_close(norms, torch.full_like(norms, 1 / 1.01 / math.sqrt(40)), rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("module", [kernels, reference])
@pytest.mark.parametrize("shape", [(2, 40, 24), (2, 24, 40)])
def test_normuon_divides_by_the_root_of_the_average_and_keeps_the_norm(module: ModuleType, shape: tuple[int, int, int]) -> None:
    x, start = random(*shape, seed=1), means(*shape)
    moment = start.clone()
    scaled = x.double() * module.normuon_scale(x, moment, 0.25)
    wanted = x.double() * math.sqrt(24) / x.double().norm(dim=(-2, -1), keepdim=True)
    expected = 0.75 * start.double() + 0.25 * wanted.square().mean(dim=-1 if shape[1] > shape[2] else -2, keepdim=True)
    torch.testing.assert_close(moment.double(), expected, rtol=2e-6, atol=0.0)
    wanted = wanted / expected.sqrt()
    wanted = wanted * math.sqrt(24) / wanted.norm(dim=(-2, -1), keepdim=True)
    torch.testing.assert_close(scaled, wanted, rtol=4e-6, atol=0.0)


@pytest.mark.parametrize("module", [kernels, reference])
def test_zeros_stay_finite_and_nan_reaches_its_matrix_alone(module: ModuleType) -> None:
    x = random(3, 20, 30, seed=1)
    x[0], x[1, 3, 4] = 0, torch.nan
    rows, moment = module.equilibrating_scale(x), means(3, 20, 30)
    columns = module.normuon_scale(x, moment, 0.1)
    for scale in (rows, columns):
        assert scale[[0, 2]].isfinite().all() and scale[1].isnan().all()
    assert moment[[0, 2]].isfinite().all() and moment[1].isnan().all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("given", "written"), [(torch.bfloat16, torch.float16), (torch.float32, torch.float32)], ids=str)
@pytest.mark.parametrize("scaled", [True, False])
def test_rows_are_scaled_with_one_rounding(
    shape: tuple[int, int, int], given: torch.dtype, written: torch.dtype, scaled: bool
) -> None:
    x = random(*shape, seed=1, dtype=given)
    scale = torch.rand(*shape[:2], 1, generator=torch.Generator().manual_seed(2)).to(DEVICE) if scaled else None
    outs = [
        module.scale_rows_(x, scale, 32.0, torch.full(shape, torch.nan, dtype=written, device=DEVICE))
        for module in (kernels, reference)
    ]
    assert torch.equal(*outs)


def test_rows_are_scaled_in_place() -> None:
    x, scale = random(2, 40, 30, seed=1), torch.rand(2, 40, 1, device=DEVICE)
    expected = x * scale
    assert kernels.scale_rows_(x, scale, 1.0, x) is x and torch.equal(x, expected)


@pytest.mark.parametrize("way", ["full", "half", "gram"])
def test_polar_express_takes_rows_with_their_scale(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "ops", lambda x: reference)
    x = random(2, 12, 24, seed=1).cpu()
    scale = reference.equilibrating_scale(x)
    torch.testing.assert_close(
        products.polar_express(x.clone(), way, scale), products.polar_express(x * scale, way), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(6, 6, 12), (3, 12, 12), (2, 32, 20), (2, 5, 32), (2, 1, 7)])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_small_matrix_goes_all_steps_in_one_kernel(shape: tuple[int, int, int], scaled: bool) -> None:
    n, r, c = shape
    memory = torch.full((n + 2, r, c), 5.0, device=DEVICE)
    x = memory[1:-1].copy_(random(*shape, seed=1))
    scale = reference.equilibrating_scale(x) if scaled else None
    if not scaled:
        x /= 1.01 * x.norm(dim=(-2, -1), keepdim=True)
    truth = products._small(x.double().cpu(), None if scale is None else scale.double().cpu())
    steps = tuple(factor for step in products.POLAR_EXPRESS for factor in step)
    assert kernels.polar_express_(x, scale, steps) is x
    # fp32 rounds to 2^-24; the polynomials multiply small singular values, and what was rounded beside them, by 8, 4, 4, 3 and 2.
    assert (x.cpu() - truth).norm() <= 2**-24 * 8 * 4 * 4 * 3 * 2 * truth.norm()
    assert (memory[[0, -1]] == 5).all()


def test_the_kernels_refuse_what_they_would_get_wrong() -> None:
    x = random(2, 8, 12, seed=1)
    with pytest.raises(AssertionError, match="a row has one scale"):
        kernels.scale_rows_(x, torch.ones(2, 1, 12, device=DEVICE), 1.0, x)
    with pytest.raises(AssertionError, match="one mean a row or column"):
        kernels.normuon_scale(x, torch.ones(2, 12, 1, device=DEVICE), 0.1)
    with pytest.raises(AssertionError, match="contiguous"):
        kernels.equilibrating_scale(x.mT)
