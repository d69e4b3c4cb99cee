"""Polar Express by each kind of product: singular values and vectors, and how far rounding takes them on hard spectra."""

import math

import pytest
import torch
from torch import Tensor

from nvfp8 import polar_express as module
from nvfp8.polar_express import polar_express, room

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WAYS = ["full", "half", "gram"]


def twins_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp64 is for twins: no kernel multiplies it."""
    from nvfp8 import reference

    monkeypatch.setattr(module, "ops", lambda x: reference)


@pytest.mark.parametrize("products", WAYS)
def test_singular_values_come_near_one_and_vectors_stay(products: str, monkeypatch: pytest.MonkeyPatch) -> None:
    twins_only(monkeypatch)
    torch.manual_seed(2)
    for shape in ((3, 16, 16), (2, 16, 40), (2, 40, 16), (2, 1, 12)):
        x = torch.randn(shape, dtype=torch.float64)
        x = x / (1.01 * x.norm(dim=(-2, -1), keepdim=True))
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        y = polar_express(x.clone(), products)
        inner = u.mT @ y @ vh.mT
        diagonal = inner.diagonal(dim1=-2, dim2=-1)
        assert (inner - torch.diag_embed(diagonal)).abs().max() < 1e-9
        assert diagonal.min() > 0.5
        assert diagonal.max() < 1.2
        torch.testing.assert_close(y, polar_express(x.clone(), "full"), rtol=1e-9, atol=1e-9)


def spectra(m: int, k: int) -> dict[str, Tensor]:
    """m × k matrices of norm 1/1.01 in fp64: Gaussian, decaying, and of low rank with noise."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, m, generator=generator, dtype=torch.float64))[0] for n in (m, k))
    noise = torch.randn(m, k, generator=generator, dtype=torch.float64) / math.sqrt(k)
    result = {"gaussian": noise}
    for exponent in (3, 4, 6):
        result[f"decay to 1e-{exponent}"] = u * torch.logspace(0, -exponent, m, dtype=torch.float64) @ v.mT
    low = (torch.arange(m) < m // 32).double()
    for size in (1e-1, 1e-2, 1e-3):
        result[f"rank {m // 32}, noise {size}"] = u * low @ v.mT + size * noise
    result["1/i"] = u / torch.arange(1, m + 1) @ v.mT
    return {name: x / (1.01 * x.norm()) for name, x in result.items()}


def deviations(products: str, tall: bool) -> dict[str, float]:
    """Of each spectrum, how far the worst singular value is from fp64's, of the matrix that bf16 makes of it."""
    result = {}
    for name, x in spectra(96, 384).items():
        given = x[None].bfloat16()
        given = given.mT.contiguous() if tall else given
        exact = torch.linalg.svdvals(polar_express(given.double(), "full"))
        ours = polar_express(given.to(DEVICE), products)
        assert ours.dtype == (torch.float16 if products == "gram" else torch.bfloat16)
        result[name] = float((torch.linalg.svdvals(ours.cpu().double()) - exact).abs().max())
    return result


@pytest.mark.parametrize("tall", [False, True])
def test_on_hard_spectra_the_gram_form_in_fp16_is_no_worse_than_bf16(tall: bool) -> None:
    """The bound is what training has accepted: the worst that today's bf16 products do to any of these spectra."""
    full, half, gram = (deviations(products, tall) for products in WAYS)
    bound = max(full.values())
    assert 2**-7 < bound < 2**-4  # some roundings to bf16, 2^-9 each
    assert max(gram.values()) <= bound
    assert all(value <= 1.5 * full[name] + 2**-9 for name, value in half.items())
    for name in full:
        if name.startswith("decay"):  # bf16 loses small singular values here, fp16 keeps them
            assert gram[name] <= full[name]


@pytest.mark.parametrize("restart", [1, 2, 4, 5])
def test_another_restart_is_worse(restart: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = max(deviations("full", False).values())
    monkeypatch.setattr(module, "RESTART", restart)
    assert max(deviations("gram", False).values()) > 1.5 * bound


@pytest.mark.parametrize("products", WAYS)
@pytest.mark.parametrize("shape", [(3, 32, 128), (2, 128, 32), (2, 64, 64)])
def test_no_more_memory_than_said(products: str, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    n, r, c = shape
    made: list[Tensor] = []
    empty_like, new_empty = torch.empty_like, Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: made.append(empty_like(*a, **k)) or made[-1])
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: made.append(new_empty(*a, **k)) or made[-1])
    x = torch.randn(shape, device=DEVICE).bfloat16() / math.sqrt(2 * r * c)
    polar_express(x, products)
    taken = sum(t.numel() * t.element_size() for t in (x, *made))
    assert taken == n * room(r, c, torch.bfloat16, products)
