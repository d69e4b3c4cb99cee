"""Muon's sums and scales: kernels against twins, twins against what they are to bring about."""

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from nvfp8 import polar_express as products
from nvfp8 import reference
from nvfp8.state import STATE_DTYPES, codec

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


def equilibrating(module: ModuleType, x: Tensor) -> Tensor:
    """The scale of x itself: with μ = 0 it is the gradient."""
    scale: Tensor = module.equilibrating_scale(list(x), torch.zeros(x.shape, device=x.device), None, 1.0, 0.0)
    return scale


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
    torch.testing.assert_close(equilibrating(kernels, x), equilibrating(reference, x), **near)
    ours, twins = start.clone(), start.clone()
    torch.testing.assert_close(kernels.normuon_scale(x, ours, 0.1), reference.normuon_scale(x, twins, 0.1), **near)
    torch.testing.assert_close(ours, twins, **near)
    assert not torch.equal(ours, start)


@pytest.mark.parametrize("module", [kernels, reference])
def test_rows_come_to_equal_norm_and_matrices_to_one(module: ModuleType) -> None:
    x = random(2, 40, 300, seed=1)
    scaled = x.double() * equilibrating(module, x)
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
    rows, moment = equilibrating(module, x), means(3, 20, 30)
    columns = module.normuon_scale(x, moment, 0.1)
    for scale in (rows, columns):
        assert scale[[0, 2]].isfinite().all() and scale[1].isnan().all()
    assert moment[[0, 2]].isfinite().all() and moment[1].isnan().all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", STATE_DTYPES)
def test_the_scale_is_of_what_the_next_pass_writes(shape: tuple[int, int, int], name: str) -> None:
    """Of x by a momentum in each format, and nothing is written; x then comes in rows of one norm, rounded once."""
    n, r, _ = shape
    stored = codec(name).allocate(shape, DEVICE, stacked=True)
    keys = list(range(n))
    kernels.muon_nesterov_(list(random(*shape, seed=1)), *stored, torch.empty(shape, device=DEVICE), 0.5, 0.9, keys)
    gradients, before = list(random(*shape, seed=2).bfloat16()), [None if s is None else s.clone() for s in stored]
    scale = kernels.equilibrating_scale(gradients, *stored, 0.1, 0.9)
    for one, other in zip(stored, before, strict=True):
        assert one is other is None or torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    twin = reference.equilibrating_scale(gradients, *stored, 0.1, 0.9)
    torch.testing.assert_close(scale, twin, rtol=1e-5, atol=0.0)
    written, exact = (torch.full(shape, torch.nan, dtype=dtype, device=DEVICE) for dtype in (torch.float16, torch.float32))
    for module, x in ((kernels, written), (reference, exact)):
        again = [None if s is None else s.clone() for s in stored]
        module.muon_nesterov_(gradients, *again, x, 0.1, 0.9, keys, scale, 32.0)
    torch.testing.assert_close(written.float(), exact, rtol=2**-11 + 2**-18, atol=2**-24)  # fp16's, and its smallest number
    norms = exact.double().norm(dim=-1)
    torch.testing.assert_close(norms, norms[:, :1].expand_as(norms), rtol=1e-5, atol=0.0)
    # What is added to a norm before it divides, 1e-6, shows in small ones.
    torch.testing.assert_close(norms, torch.full_like(norms, 32 / 1.01 / math.sqrt(r)), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("way", ["half", "gram"])
def test_polar_express_takes_what_is_lifted_already(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "ops", lambda x: reference)
    x = random(2, 12, 24, seed=1).cpu()
    x = x * equilibrating(reference, x)
    dtype, factor = products.worked_in(way, x.dtype)
    assert (dtype, factor) == (torch.float32, 32.0)
    assert torch.equal(products.polar_express(x * factor, way, lifted=True), products.polar_express(x.clone(), way))


def test_only_symmetric_products_are_lifted_and_in_fp16() -> None:
    assert [products.worked_in(way, torch.bfloat16) for way in ("full", "small", "half", "gram")] == [
        (torch.bfloat16, 1.0), (torch.bfloat16, 1.0), (torch.float16, 32.0), (torch.float16, 32.0)
    ]  # fmt: skip


@pytest.mark.parametrize("shape", [(6, 6, 12), (3, 12, 12), (2, 32, 20), (2, 5, 32), (2, 1, 7)])
def test_a_small_matrix_goes_all_steps_in_one_kernel(shape: tuple[int, int, int]) -> None:
    n, r, c = shape
    memory = torch.full((n + 2, r, c), 5.0, device=DEVICE)
    x = memory[1:-1].copy_(random(*shape, seed=1))
    x /= 1.01 * x.norm(dim=(-2, -1), keepdim=True)
    truth = products._small(x.double().cpu())
    steps = tuple(factor for step in products.POLAR_EXPRESS for factor in step)
    assert kernels.polar_express_(x, steps) is x
    # fp32 rounds to 2^-24; the polynomials multiply small singular values, and what was rounded beside them, by 8, 4, 4, 3 and 2.
    assert (x.cpu() - truth).norm() <= 2**-24 * 8 * 4 * 4 * 3 * 2 * truth.norm()
    assert (memory[[0, -1]] == 5).all()


def test_the_kernels_refuse_what_they_would_get_wrong() -> None:
    x = random(2, 8, 12, seed=1)
    with pytest.raises(AssertionError, match="a row has one scale"):
        kernels.muon_nesterov_(list(x), x.clone(), None, x, 0.1, 0.9, rows=torch.ones(2, 1, 12, device=DEVICE))
    with pytest.raises(AssertionError, match="one mean a row or column"):
        kernels.normuon_scale(x, torch.ones(2, 12, 1, device=DEVICE), 0.1)
    with pytest.raises(AssertionError, match="contiguous"):
        kernels.equilibrating_scale(list(x.mT), x.mT, None, 0.1, 0.9)
    with pytest.raises(AssertionError, match="FP8 state, and no other, has scales"):
        kernels.equilibrating_scale(list(x), x, torch.ones(2, 1, device=DEVICE), 0.1, 0.9)
