"""Kernels that write FP8 against their twins, and the twins against fp64 and autograd.

On a CPU the kernels run in Triton's interpreter, in fp32 (its bf16 truncates) with a cast assembled from integers; on a GPU as
compiled. Codes must be the twin's in 99.9% of places, and one code off in the rest: another order of a sum, or a fused
multiply-add, moves a value over the border between two codes now and then.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp8 import reference
from nvfp8.reference_math import rotate
from nvfp8.rounding import FORMATS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.usefixtures("poisoned_memory"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]
STREAMS = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# Inside one tile; over tiles of every kernel with ends in all of them; multiples of 16, which are read in wide loads; rows that are
# long enough for other tiles
SHAPES = [(2, 5, 33), (1, 131, 270), (2, 48, 144), (1, 35, 1040)]

kernels = pytest.importorskip("nvfp8.kernels", reason="Triton is not installed")


@pytest.fixture(params=STREAMS, ids=str)
def stream(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=[E4M3, E5M2], ids=["e4m3", "e5m2"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, device=DEVICE)


def ordinals(codes: Tensor) -> Tensor:
    """FP8 numbers as integers in their order; both zeros are 0."""
    bits = codes.contiguous().view(torch.uint8).to(torch.int32)
    return torch.where(bits < 128, bits, 128 - bits)


def assert_codes(ours: Tensor, theirs: Tensor, exactly: bool = False) -> None:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.is_contiguous()
    nan = theirs.float().isnan()
    assert torch.equal(ours.float().isnan(), nan)
    apart = (ordinals(ours) - ordinals(theirs)).abs()[~nan]
    assert apart.numel() == 0 or apart.max() <= (0 if exactly else 1)
    assert (apart > 0).sum() <= 1 + 1e-3 * apart.numel()


def error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact.detach().double()).norm() / exact.detach().double().norm())


def assert_same(ours: tuple[Tensor | None, ...], theirs: tuple[Tensor | None, ...]) -> None:
    """FP8 by codes, the rest within a rounding of its dtype."""
    for mine, twin in zip(ours, theirs, strict=True):
        if mine is None or twin is None:
            assert mine is None and twin is None
        elif mine.dtype in (E4M3, E5M2):
            assert_codes(mine, twin)
        else:
            assert mine.shape == twin.shape and mine.dtype == twin.dtype
            assert twin.numel() == 0 or error(mine, twin) < (1e-3 if mine.dtype == torch.bfloat16 else 2e-6)


def codes(exact: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What an exact value is quantized to."""
    largest = FORMATS[dtype][2]
    return (exact * scale.double()).clamp(-largest, largest).float().to(dtype)


def both(exact: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    q = codes(exact.flatten(0, -2), scale, dtype)
    return q, q.t().contiguous()


# The cast


def every_number() -> Tensor:
    """All bf16 numbers and their fp32 neighbours, (384, 512): every border between two codes is a bf16 number."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    return torch.stack((bits - 1, bits, bits + 1)).view(torch.float32).view(384, 512).to(DEVICE)


@pytest.mark.parametrize("factor", [1.0, 2.0**-9, 3.0])
def test_cast_over_every_number(dtype: torch.dtype, factor: float) -> None:
    x, scale = every_number(), scalar(factor)
    ours, ours_t = kernels.quantize(x, scale, dtype, None, rows=True, columns=True)
    twin, _ = reference.quantize(x, scale, dtype, None, rows=True, columns=False)
    assert_codes(ours, twin, exactly=True)
    assert torch.equal(ours_t.view(torch.uint8), ours.view(torch.uint8).t())
    finite = ours.float()[x.isfinite()]
    assert finite.isfinite().all() and finite.abs().max() == FORMATS[dtype][2]


def test_the_twin_rounds_to_nearest_and_clamps(dtype: torch.dtype) -> None:
    smallest, mantissa, largest = FORMATS[dtype]
    tiny = 2.0 ** (smallest - mantissa)
    inf = float("inf")
    x = torch.tensor([[0.0, tiny, tiny / 2, 1.5 * tiny, 0.51 * tiny, largest, 1e9, inf, -inf, -1e-30, float("nan")]])
    expected = [0.0, tiny, 0.0, 2 * tiny, tiny, largest, largest, largest, -largest, 0.0]
    q, _ = reference.quantize(x, torch.tensor(1.0), dtype, None, rows=True, columns=False)
    assert q is not None
    assert q[0, :-1].float().tolist() == expected and q[0, -1].float().isnan()


@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (131, 270), (256, 128)])
@pytest.mark.parametrize(("rows", "columns"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("of_rows", [False, True], ids=["", "rows of factors"])
def test_quantize(
    shape: tuple[int, int], rows: bool, columns: bool, of_rows: bool, dtype: torch.dtype, stream: torch.dtype
) -> None:
    x, amax, twin_amax = 100 * random(*shape, dtype=stream, seed=1), scalar(0.0), scalar(0.0)
    factors = torch.rand(shape[0], device=DEVICE) if of_rows else None
    ours = kernels.quantize(x, scalar(0.37), dtype, amax, rows=rows, columns=columns, factors=factors)
    twin = reference.quantize(x, scalar(0.37), dtype, twin_amax, rows=rows, columns=columns, factors=factors)
    for mine, theirs in zip(ours, twin, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert_codes(mine, theirs, exactly=True)
    assert amax == twin_amax == x.abs().max()


# One row and many, short ones that share a program, one that is walked in pieces, and sizes that divide nothing.
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (131, 128), (3, 1536), (2, 9001)])
def test_quantize_rows(shape: tuple[int, int], dtype: torch.dtype, stream: torch.dtype) -> None:
    x = (random(*shape, seed=1) * torch.logspace(-30, 30, shape[0], device=DEVICE)[:, None]).to(stream)
    x[-1, -1], x[0] = -3.0 * x[-1].abs().max(), 0.0 if shape[0] > 1 else 1e-40  # … and one whose scale is the largest there is
    (ours, inverse), (twin, twin_inverse) = (module.quantize_rows(x, dtype) for module in (kernels, reference))
    assert_codes(ours, twin, exactly=True)
    assert torch.equal(inverse, twin_inverse)
    exact = x.double()
    amax = exact.abs().amax(1)
    largest = FORMATS[dtype][2]
    expected = torch.where(amax > 0, amax / largest, 1.0).clamp(min=2.0**-126)
    torch.testing.assert_close(inverse.double(), expected, rtol=1e-6, atol=0)
    # Half a unit in the last place of the format, but of numbers below its smallest normal one.
    smallest, mantissa, _ = FORMATS[dtype]
    step = torch.maximum(exact.abs(), expected[:, None] * 2.0**smallest) * 2.0 ** -(mantissa + 1)
    assert bool(((ours.double() * inverse.double()[:, None] - exact).abs() <= step * (1 + 1e-5)).all())


@pytest.mark.parametrize("module", [kernels, reference], ids=["kernel", "twin"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_nan_and_no_other(bad: float, module: Any, stream: torch.dtype) -> None:
    x = random(5, 130, dtype=stream, seed=1)
    x[3, 7] = bad
    q, inverse = module.quantize_rows(x, E4M3)
    expected = torch.tensor([False, False, False, True, False], device=DEVICE)
    assert torch.equal(q.float().isnan(), expected[:, None].expand(5, 130)) and torch.equal(inverse.isnan(), expected)


@pytest.mark.parametrize("module", [kernels, reference], ids=["kernel", "twin"])
@pytest.mark.parametrize("values", [[], [3.0], [-7.0], [float("inf"), 3.0], [3.0, -float("inf")], [float("nan"), float("inf")]])
def test_amax_is_raised_and_shows_what_is_not_finite(module: object, values: list[float], stream: torch.dtype) -> None:
    x = torch.zeros(3, 100, dtype=stream, device=DEVICE)
    x[1, 5 : 5 + len(values)] = torch.tensor(values, dtype=stream, device=DEVICE)
    expected = x.float().abs().max()  # NaN if there is one
    for before in (0.0, 5.0):
        for measure in (
            lambda amax: module.amax_(x, amax),
            lambda amax: module.quantize(x, scalar(1.0), E4M3, amax, rows=True, columns=True),
        ):
            amax = scalar(before)
            measure(amax)
            assert torch.equal(amax, torch.maximum(expected, scalar(before))) or (amax.isnan() and expected.isnan())
    amax = scalar(float("nan"))
    module.amax_(x, amax)
    assert amax.isnan(), "what was seen before stays"


# Twins against fp64; names as in the modules


def norm(x: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=2.0**-23)


def leaf(x: Tensor) -> Tensor:
    return x.double().requires_grad_()


def parts_along(d_normed: Tensor, normed: Tensor) -> Tensor:
    """Σ d_normed·x̂ of every token in three parts, as a layer behind the norm would know it."""
    sums = (d_normed.double() * normed.detach().double()).sum(-1).flatten()
    return torch.stack((0.5 * sums, 2 * sums, -1.5 * sums)).float()


@pytest.mark.parametrize("with_pending", [True, False])
def test_twins_of_the_mix(with_pending: bool, dtype: torch.dtype) -> None:
    shape, width, scale, normed_scale = (3, 7, 48), 5, scalar(0.37), scalar(31.0)
    x, x0, d_stream, d_normed, d_x0 = (random(*shape, seed=seed) for seed in range(5))
    pending = random(*shape, seed=6) if with_pending else None
    d_head = random(3, 7, width, seed=7) if with_pending else None
    lambdas, amax = torch.tensor([1.1, 0.2], device=DEVICE), scalar(0.0)
    result = reference.mix_norm_quantize(x, pending, x0, lambdas, width, normed_scale, E4M3, amax)
    wide_x, wide_x0, wide_lambdas = leaf(x), leaf(x0), leaf(lambdas)
    before = wide_x if pending is None else wide_x + pending.double()
    mixed = wide_lambdas[0] * before + wide_lambdas[1] * wide_x0
    normed = norm(mixed)
    assert error(result[0], mixed) < 1e-6 and error(result[2], normed[..., :width]) < 1e-6
    assert error(result[3], (mixed.square().mean(-1) + 2.0**-23).rsqrt()) < 1e-6
    assert_codes(result[1], codes(normed.flatten(0, 1), normed_scale, E4M3))
    assert abs(amax / normed.abs().max() - 1) < 1e-6

    loss = (mixed * d_stream.double()).sum() + (normed * d_normed.double()).sum()
    if d_head is not None:
        loss = loss + (normed[..., :width] * d_head.double()).sum()
    dx, dx0, d_lambdas = torch.autograd.grad(loss, (wide_x, wide_x0, wide_lambdas))
    for along in (None, parts_along(d_normed, normed)):
        amax = scalar(0.0)
        found = reference.mix_norm_backward_quantize(
            d_stream, d_normed, d_head, result[0], x0, lambdas, result[3], d_x0 if with_pending else None,
            normed_scale, E4M3, scale, dtype, amax, along=along,
        )  # fmt: skip
        assert error(found[0], dx) < 1e-6 and error(found[2], d_lambdas) < 1e-4
        assert error(found[1], dx0 + d_x0.double() if with_pending else dx0) < 1e-6
        for ours, exact in zip(found[3:], (both(normed, normed_scale, E4M3)[1], *both(dx, scale, dtype)), strict=True):
            assert_codes(ours, exact)
        assert abs(amax / dx.abs().max() - 1) < 2e-6


def test_twins_of_the_norm(dtype: torch.dtype) -> None:
    shape, scale, normed_scale = (3, 7, 48), scalar(0.37), scalar(31.0)
    stream, branch, d_stream, d_normed = (random(*shape, seed=seed) for seed in range(4))
    x, q, rstd = reference.add_norm_quantize(stream, branch, normed_scale, E4M3, None)
    wide = leaf(stream.double() + branch.double())
    normed = norm(wide)
    assert error(x, wide) < 1e-6
    assert_codes(q, codes(normed.flatten(0, 1), normed_scale, E4M3))
    (dx,) = torch.autograd.grad((normed * d_normed.double() + wide * d_stream.double()).sum(), wide)
    amax = scalar(0.0)
    for along in (None, parts_along(d_normed, normed)):
        found = reference.norm_backward_quantize(d_normed, x, rstd, d_stream, normed_scale, E4M3, scale, dtype, amax, along=along)
        assert error(found[0], dx) < 1e-6 and abs(amax / dx.abs().max() - 1) < 2e-6
        for ours, exact in zip(found[1:], (both(normed, normed_scale, E4M3)[1], *both(dx, scale, dtype)), strict=True):
            assert_codes(ours, exact)


def test_twins_of_the_mlp(dtype: torch.dtype) -> None:
    m, n, k = 40, 56, 48
    x, w = (random(rows, k, seed=rows).to(E4M3) for rows in (m, n))
    inverses, a_scale, scale, amax = (scalar(2.0), scalar(0.25)), scalar(0.37), scalar(0.11), scalar(0.0)
    h = leaf(0.5 * (x.double() @ w.double().t()))
    exact = h.relu().square()
    for found in (
        reference.gemm_relu_squared(x, w, *inverses, a_scale, E4M3, True, amax),
        reference.relu_squared_quantize(h.detach().float(), a_scale, E4M3, amax),
    ):
        for ours, theirs in zip(found, both(exact, a_scale, E4M3), strict=True):
            assert_codes(ours, theirs)
        assert abs(amax / exact.max() - 1) < 2e-6
    a_t = found[1]
    dy, w_t = random(m, k, seed=3).to(dtype), random(n, k, seed=4).to(E4M3)
    d_a = 0.5 * (dy.double() @ w_t.double().t())
    dh = 2 * d_a * (a_t.double().t() / a_scale.double()).sqrt()
    for found in (
        reference.gemm_relu_squared_backward(dy, w_t, *inverses, a_t, a_scale, scale, dtype, False, None),
        reference.relu_squared_backward_quantize(d_a.float(), a_t, a_scale, scale, dtype, None),
    ):
        for ours, theirs in zip(found[:2], both(dh, scale, dtype), strict=True):
            assert_codes(ours, theirs)
        assert error(found[2].sum(0), (dh * (a_t.double().t() / a_scale.double()).sqrt()).sum(1)) < 1e-6
    # And what that is good for: the gradient of relu², but for the rounding of a.
    assert error(dh, torch.autograd.grad((exact * d_a).sum(), h)[0]) < 0.03


def heads_arguments(stream: torch.dtype, values: bool, heads: tuple[int, int], size: int) -> tuple[Tensor | None, ...]:
    batch, length, rows = 2, 37, 11
    n_head, n_kv = heads
    qkv = random(batch, length, (n_head + 2 * n_kv) * size, dtype=stream, seed=1)
    angle = random(length, size // 2, seed=2)
    cos, sin = angle.cos().to(stream), angle.sin().to(stream)
    gate = random(batch, length, n_kv, dtype=stream, seed=4) if values else None
    table = random(rows, n_kv * size, dtype=stream, seed=5) if values else None
    ids = (torch.arange(batch * length, device=DEVICE) % rows).view(batch, length) if values else None
    # One head's queries are so small that eps counts in their norm.
    qkv[..., :size] *= 2.0**-12
    q, k, v, rstd = reference.heads_forward(qkv, cos, sin, heads, gate, table, ids)
    gradients = (random(*t.shape, dtype=stream, seed=6 + i) for i, t in enumerate((q, k, v)))
    return (*gradients, q, k, v, rstd, cos, sin, gate, table, ids)


@pytest.mark.parametrize("values", [True, False])
def test_twin_of_the_heads(values: bool, dtype: torch.dtype) -> None:
    arguments, scale, amax = heads_arguments(torch.float32, values, (3, 2), 16), scalar(0.37), scalar(0.0)
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in arguments]
    d_qkv, d_gate = reference.heads_backward(*wide[:5], *wide[6:])
    found = reference.heads_backward_quantize(*arguments, scale, dtype, amax)
    for ours, exact in zip(found[:2], both(d_qkv, scale, dtype), strict=True):
        assert_codes(ours, exact)
    assert abs(amax / d_qkv.abs().max() - 1) < 1e-6
    assert (found[2] is None) == (not values) and (d_gate is None or error(found[2], d_gate) < 1e-6)
    # Of qkv as it was: q and k without their norms, v without the value embedding.
    _, _, _, q, k, v, rstd, cos, sin, gate, table, ids = wide
    before = [rotate(t / reference.QK_SCALE / r[..., None], cos, -sin) for t, r in ((q, rstd[:, :, :3]), (k, rstd[:, :, 3:]))]
    before.append(v if gate is None else v - gate[..., None] * table[ids].view_as(v))
    true = (d_qkv.unflatten(2, (-1, 16)) * torch.cat(before, 2)).sum(-1).flatten(0, 1).t()
    assert error(found[3], true) < 1e-6 and error(found[3][:5], true[:5]) < 1e-2 and true[0].norm() > 0.1 * true[-1].norm()


ALONG = ("relu_squared_backward_quantize", "gemm_relu_squared_backward", "heads_backward_quantize")


def compare(name: str, *arguments: object, exact: Tensor | None = None, **more: object) -> tuple[Tensor | None, ...]:
    """Run a kernel and its twin: outputs and amax must agree, be the same again, and an amax that is large already must stay.

    Without amax it is another kernel, of whose a·b + c·d the compiler may fuse the other product: that one agrees, no more.
    With `exact`, which both results are copies of, neither may err more than 1.05 times as much as the twin.
    """
    amaxes = scalar(0.0), scalar(0.0)
    ours, theirs = (
        getattr(module, name)(*arguments, amax, **more) for module, amax in zip((kernels, reference), amaxes, strict=True)
    )
    if name in ALONG:  # in as many parts as a kernel likes
        *ours, along = ours
        *theirs, of_twin = theirs
        assert along.dtype == of_twin.dtype == torch.float32
        # Cheap roots are off by 1.3e-7 each; a tensor core's sum of products by up to 0.13 % (docs/results.md).
        assert error(along.sum(0), of_twin.double().sum(0)) < (2e-6 if exact is None else 3e-3)
    if exact is None:
        assert_same(ours, theirs)
        assert abs(amaxes[0] / amaxes[1] - 1) < 2e-6 or (amaxes[0] == amaxes[1] == 0), (name, amaxes)
    else:
        assert torch.equal(ours[1].view(torch.uint8), ours[0].view(torch.uint8).t())
        assert error(ours[0].float(), exact) <= 1.05 * error(theirs[0].float(), exact)
        assert abs(amaxes[0] / amaxes[1] - 1) < 1e-2, (name, amaxes)
    high = scalar(1e9)
    again = getattr(kernels, name)(*arguments, high, **more)
    assert high == 1e9
    for a, b in zip(ours, again, strict=name not in ALONG):
        assert a is b is None or torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8)), "deterministic"
    if name in ALONG:
        assert torch.equal(along, again[-1]), "deterministic"
    assert_same(getattr(kernels, name)(*arguments, None, **more)[: len(ours)], ours)
    return theirs


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("complete", [True, False])
def test_mix(shape: tuple[int, ...], complete: bool, stream: torch.dtype) -> None:
    x, x0, d_stream, d_normed, d_x0 = (random(*shape, dtype=stream, seed=seed) for seed in range(5))
    pending = random(*shape, dtype=stream, seed=6) if complete else None
    width = 12 if complete else 0
    d_head = random(*shape[:-1], width, dtype=stream, seed=7) if complete else None
    # Short mantissas: products are exact, so a fused multiply-add rounds the bf16 stream as the twin does.
    lambdas, normed_scale = torch.tensor([1.125, 0.1875], device=DEVICE), scalar(31.0)
    mixed, _, _, rstd = compare("mix_norm_quantize", x, pending, x0, lambdas, width, normed_scale, E4M3)
    arguments = (d_stream, d_normed, d_head, mixed, x0, lambdas, rstd, d_x0 if complete else None)
    for along in (None, parts_along(d_normed, mixed * rstd[..., None])):
        check_mix_backward(along, mixed, x0, (*arguments, normed_scale, E4M3, scalar(0.37), E5M2))


def check_mix_backward(along: Tensor | None, mixed: Tensor, x0: Tensor, arguments: tuple[object, ...]) -> None:
    amaxes = scalar(0.0), scalar(0.0)
    ours, twin = (
        module.mix_norm_backward_quantize(*arguments, amax, along=along)
        for module, amax in zip((kernels, reference), amaxes, strict=True)
    )
    # dλ is a sum with much cancellation: its error is measured against the size of its terms, not of what is left.
    terms = twin[0].double().norm() * torch.stack((mixed.double().norm(), x0.double().norm())).norm()
    assert (ours[2] - twin[2]).norm() < 1e-6 * terms
    assert_same((*ours[:2], *ours[3:]), (*twin[:2], *twin[3:]))
    assert abs(amaxes[0] / amaxes[1] - 1) < 2e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_norm(shape: tuple[int, ...], dtype: torch.dtype, stream: torch.dtype) -> None:
    branch, before, d_stream, d_normed = (random(*shape, dtype=stream, seed=seed) for seed in range(4))
    x, q, rstd = compare("add_norm_quantize", before, branch, scalar(31.0), dtype)
    assert_same((kernels.norm_quantize(x, scalar(31.0), dtype),), (q,))
    for along in (None, parts_along(d_normed, x * rstd[..., None])):
        compare("norm_backward_quantize", d_normed, x, rstd, d_stream, scalar(31.0), E4M3, scalar(0.37), dtype, along=along)


@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (131, 270), (256, 128)])
def test_relu_squared(shape: tuple[int, int], dtype: torch.dtype, stream: torch.dtype) -> None:
    h, d_a = (random(*shape, dtype=stream, seed=seed) for seed in range(2))
    _, a_t = compare("relu_squared_quantize", h, scalar(31.0), E4M3)
    compare("relu_squared_backward_quantize", d_a, a_t, scalar(31.0), scalar(0.37), dtype)


@pytest.mark.parametrize(("heads", "size"), [((2, 1), 20), ((3, 3), 32), ((4, 2), 128)])
@pytest.mark.parametrize("values", [True, False])
def test_heads(heads: tuple[int, int], size: int, values: bool, dtype: torch.dtype, stream: torch.dtype) -> None:
    compare("heads_backward_quantize", *heads_arguments(stream, values, heads, size), scalar(0.37), dtype)


# Multiples of 16, all that TMA takes. On a GPU also more tiles than it has processors, so that programs walk over several; a
# tensor core does not add as exactly as the twin, so there both are measured by the exact product.
GEMMS = [(16, 16, 16), (48, 112, 80), (80, 144, 32)]
if DEVICE == "cuda":
    GEMMS += [(2048, 3072 + 16, 272), (4096 + 16, 2048, 768)]


@pytest.mark.parametrize(("m", "n", "k"), GEMMS)
@pytest.mark.parametrize("fast", [True, False])
def test_gemm(m: int, n: int, k: int, fast: bool, dtype: torch.dtype) -> None:
    x, w, w_t, dy = (random(rows, k, seed=i).to(E4M3) for i, rows in enumerate((m, n, n, m)))
    dy = dy.float().to(dtype)
    # Scales that use the formats' range: what is squared is up to 5σ, σ² = K / 16.
    inverses, a_scale, scale = (scalar(2.0), scalar(0.125)), scalar(100 / k), scalar(10 / k)
    exact = None
    if DEVICE == "cuda":
        exact = (0.25 * (x.double() @ w.double().t())).relu().square() * a_scale.double()
    _, a_t = compare("gemm_relu_squared", x, w, *inverses, a_scale, E4M3, fast, exact=exact)
    both, rows, columns = (
        kernels.gemm_relu_squared(x, w, *inverses, a_scale, E4M3, fast, None, rows=of[0], columns=of[1])
        for of in ((1, 1), (1, 0), (0, 1))
    )
    assert (
        rows[1] is columns[0] is None
        and torch.equal(rows[0].float(), both[0].float())
        and torch.equal(columns[1].float(), both[1].float())
    )
    if exact is not None:
        exact = 0.25 * (dy.double() @ w_t.double().t()) * 2 * (a_t.double().t() / a_scale.double()).sqrt() * scale.double()
    compare("gemm_relu_squared_backward", dy, w_t, *inverses, a_t, a_scale, scale, dtype, fast, exact=exact)
