"""Polar Express by each kind of product: singular values and vectors, and how far rounding takes them on hard spectra."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp8 import polar_express as module
from nvfp8.polar_express import fastest_products, polar_express, room, together

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WAYS = ["full", "half", "gram"]


def twins_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp64 is for twins: no kernel multiplies it."""
    from nvfp8 import reference

    monkeypatch.setattr(module, "ops", lambda x: reference)


@pytest.mark.parametrize("products", [*WAYS, "small"])
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
    result["half at 1e-2"] = u * torch.where(torch.arange(m) < m // 2, 1.0, 1e-2) @ v.mT
    for power in (1, 1.5, 2):
        result[f"1/i^{power}"] = u / torch.arange(1, m + 1) ** power @ v.mT
    return {name: x / (1.01 * x.norm()) for name, x in result.items()}


def errors(products: str, shape: tuple[int, int]) -> dict[str, tuple[float, float]]:
    """Of each spectrum, of the matrix that bf16 makes of it, against fp64: the worst singular value's, the matrix's (relative)."""
    result, tall = {}, shape[0] > shape[1]
    for name, x in spectra(min(shape), max(shape)).items():
        given = x[None].bfloat16()
        given = given.mT.contiguous() if tall else given
        exact = polar_express(given.double(), "full")
        ours = polar_express(given.to(DEVICE), products)
        assert ours.dtype == (torch.bfloat16 if products == "full" else torch.float16)
        ours = ours.cpu().double()
        worst = (torch.linalg.svdvals(ours) - torch.linalg.svdvals(exact)).abs().max()
        result[name] = float(worst), float((ours - exact).norm() / exact.norm())
    return result


def deviations(products: str, tall: bool) -> dict[str, float]:
    """The singular values' of `errors`."""
    return {name: worst for name, (worst, _) in errors(products, (384, 96) if tall else (96, 384)).items()}


@pytest.mark.parametrize("shape", [(96, 384), (384, 96), (160, 160)])
def test_half_the_products_in_fp16_err_less_than_all_of_them_in_bf16(shape: tuple[int, int]) -> None:
    """fp16 rounds to an eighth of what bf16 rounds to; but P's diagonal, of 8 in the first step, is rounded too, by up to 2^-8."""
    full, half = errors("full", shape), errors("half", shape)
    for name, (worst, error) in half.items():
        assert worst <= full[name][0] and error <= full[name][1] / 4, (name, full[name], half[name])


@pytest.mark.parametrize("tall", [False, True])
def test_on_hard_spectra_the_gram_form_in_fp16_is_no_worse_than_bf16(tall: bool) -> None:
    """The bound is what training has accepted: the worst that today's bf16 products do to any of these spectra."""
    full, gram = (deviations(products, tall) for products in ("full", "gram"))
    bound = max(full.values())
    assert 2**-7 < bound < 2**-4  # some roundings to bf16, 2^-9 each
    assert max(gram.values()) <= bound
    for name in full:
        if name.startswith("decay"):  # bf16 loses small singular values here, fp16 keeps them
            assert gram[name] <= full[name]


@pytest.mark.parametrize("shape", [(96, 384), (96, 192)])
def test_the_gram_form_errs_less_than_bf16_in_all(shape: tuple[int, int]) -> None:
    """Power laws included, where a rounded G lets a singular value run away."""
    full, gram = errors("full", shape), errors("gram", shape)
    assert max(worst for worst, _ in gram.values()) <= max(worst for worst, _ in full.values())
    assert all(error <= full[name][1] / 2 for name, (_, error) in gram.items())


@pytest.mark.gpu
def test_the_gram_form_errs_less_than_bf16_on_d24s_matrices() -> None:
    """Tensor cores' own sums, at the real size: wide and tall.

    1/i² is off by 0.026 (CPU), as with two restarts: Q of the first two, nearly 33·I, is rounded alike in all of its diagonal.
    """
    bound, found = 0.0, []
    for name, x in spectra(1536, 6144).items():
        given = x[None].bfloat16().to(DEVICE)
        exact = polar_express(given.double(), "full")
        values = torch.linalg.eigvalsh(exact @ exact.mT).clamp_min(0).sqrt()
        results = polar_express(given.clone(), "full"), polar_express(given.clone(), "gram")
        tall = polar_express(given.mT.contiguous(), "gram").mT
        full, *grams = (
            (
                float((torch.linalg.eigvalsh(y.double() @ y.double().mT).clamp_min(0).sqrt() - values).abs().max()),
                float((y.double() - exact).norm() / exact.norm()),
            )
            for y in (*results, tall)
        )
        bound = max(bound, full[0])
        found += [(name, full, gram) for gram in grams]
    for name, full, gram in found:
        assert gram[0] <= (2**-5 if name == "1/i^2" else bound), (name, full, gram)
        assert gram[1] <= full[1] / 2, (name, full, gram)


def test_the_gram_form_without_the_rest_of_g_is_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = errors("gram", (96, 384))
    monkeypatch.setattr(module, "REST", math.inf)
    lost = errors("gram", (96, 384))
    for name in lost:
        if name.startswith(("decay", "half")) or name in ("1/i^1.5", "1/i^2"):
            assert lost[name][1] > 1.5 * kept[name][1], (name, lost[name], kept[name])


def test_the_gram_form_with_symmetric_products_alone_is_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = max(deviations("full", False).values())
    product = module._product

    def mirrored(out: Tensor, left: Tensor, right: Tensor, *more: Any) -> None:
        product(out, left, right, *more)
        if right.size(1) == right.size(2):
            out.copy_(out.triu() + out.triu(1).mT)

    monkeypatch.setattr(module, "_product", mirrored)
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


@pytest.mark.parametrize(
    ("shape", "dtype", "capability", "way"),
    [
        ((1536, 1536), torch.bfloat16, (9, 0), "half"), ((768, 1528), torch.bfloat16, (9, 0), "half"),
        ((1536, 6144), torch.bfloat16, (9, 0), "gram"), ((3072, 768), torch.bfloat16, (9, 0), "gram"),
        ((6, 12), torch.bfloat16, (8, 0), "small"), ((32, 32), torch.bfloat16, (12, 0), "small"),
        ((6, 12), torch.bfloat16, None, "full"), ((6, 12), torch.float32, (9, 0), "full"),
        ((33, 8), torch.bfloat16, (9, 0), "full"), ((760, 6144), torch.bfloat16, (9, 0), "full"),
        ((772, 3072), torch.bfloat16, (9, 0), "full"), ((768, 3076), torch.bfloat16, (9, 0), "full"),
        ((1536, 1536), torch.float32, (9, 0), "full"), ((1536, 6144), torch.bfloat16, (8, 0), "full"),
        ((1536, 6144), torch.bfloat16, (12, 0), "full"), ((1536, 6144), torch.bfloat16, None, "full"),
    ],
)  # fmt: skip
def test_the_way_for_a_shape(shape: tuple[int, int], dtype: torch.dtype, capability: tuple[int, int] | None, way: str) -> None:
    assert fastest_products(*shape, dtype, capability) == way


@pytest.mark.parametrize(
    ("count", "shape", "products", "gib", "size"),
    [
        (96, (1536, 1536), "half", 0.5, 27),  # 8 + 8 + 8 + 5 rounds; 24 at once take 8 four times, the 28 that fit 9 + 9 + 9 + 4
        (24, (6144, 1536), "gram", 0.5, 9),  # 3 + 3 + 2
        (24, (1536, 6144), "gram", 1.5, 24),  # 8
        (48, (768, 768), "half", 0.5, 48),
        (96, (1536, 1536), "full", 0.5, 24),  # 28 fit
        (24, (6144, 1536), "gram", 0.01, 1),
    ],
)
def test_what_goes_together_fills_rounds_of_tiles(count: int, shape: tuple[int, int], products: str, gib: float, size: int) -> None:
    found = together(count, int(gib * 2**30), *shape, torch.bfloat16, products)
    assert found == size
    assert found == 1 or found * room(*shape, torch.bfloat16, products) <= gib * 2**30
