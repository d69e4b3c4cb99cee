"""One converted layer: its numbers against products of decoded FP8 tensors, what it computes and when it casts."""

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nvfp8 import convert, converted
from nvfp8 import fp8_fine_layers as fine
from nvfp8.converted import ConvertedLinear
from nvfp8.recipe import RECIPES

RECIPE_NAMES = ["delayed", "current", "e4m3", "rowwise"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WAYS = [pytest.param(True, id="emulated")]
if DEVICE == "cuda":
    pytestmark = [pytest.mark.gpu]
    no_fp8 = pytest.mark.skipif(torch.cuda.get_device_capability() < (8, 9), reason="no FP8 units")
    WAYS.append(pytest.param(False, id="native", marks=no_fp8))
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}
FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def layer(recipe: str = "delayed", k: int = 64, n: int = 48, bias: bool = True, emulate: bool = True, **more: Any) -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(k, n, bias, device=DEVICE, **more)
    convert(made, recipe, emulate=emulate)
    return made


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype).requires_grad_()


def decoded(x: Tensor, format: str, along: int | None = None) -> Tensor:
    """x after a cast by its own amax, of the whole or along a dimension, in fp64."""
    x = x.detach().float()
    amax = x.abs().amax() if along is None else x.abs().amax(along, keepdim=True)
    # A row's scale is a quotient; a tensor's is rounded twice, as PyTorch divides a number by a tensor.
    scale = LARGEST[format] / amax if along is None else torch.full_like(amax, LARGEST[format]) / amax
    return (x * scale).clamp(-LARGEST[format], LARGEST[format]).to(FP8[format]).double() / scale.double()


def expected(recipe: str, x: Tensor, w: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx, dW as exact products of what was cast: the summed dimension of each operand is what a row's scale spans."""
    x, dy = x.flatten(0, -2), dy.flatten(0, -2)
    gradient = RECIPES[recipe].dgrad.left.format
    by_row = recipe == "rowwise"
    first, last = (0, 1) if by_row else (None, None)
    y = decoded(x, "e4m3", last) @ decoded(w, "e4m3", last).t()
    dx = decoded(dy, gradient, last) @ decoded(w, "e4m3", first)
    dw = decoded(dy, gradient, first).t() @ decoded(x, "e4m3", first)
    return y, dx, dw


def off(found: Tensor, exact: Tensor) -> float:
    """Largest error beside the largest element."""
    return float((found.detach().double() - exact.reshape(found.shape)).abs().max() / exact.abs().max())


# Sums of 64 products: fp32 errs by 1e-6 of the largest at most; a rounding to bf16 by 2^-9, to fp16 by 2^-12, of each element.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("emulate", WAYS)
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("shape", [(64,), (16, 64), (3, 7, 64), (2, 2, 5, 64)], ids=str)
@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_products_of_what_was_cast(recipe: str, shape: tuple[int, ...], dtype: torch.dtype, emulate: bool) -> None:
    """Before there is a history every recipe measures, so what is cast is known; tokens that 16 does not divide change nothing."""
    made, x = layer(recipe, bias=False, emulate=emulate, dtype=dtype), inputs(*shape, dtype=dtype)
    y = made(x)
    dy = torch.randn(*shape[:-1], 48, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    y.backward(dy)
    given = [t.detach().reshape(-1, t.shape[-1]) for t in (x, dy)]
    exact = expected(recipe, given[0], made.weight, given[1])
    assert y.shape == (*shape[:-1], 48) and y.dtype == x.grad.dtype == made.weight.grad.dtype == dtype
    # The tensor core's own sum in fprop keeps about 13 bits.
    tolerance = ROUNDING[dtype] if emulate else max(ROUNDING[dtype], 2**-12)
    assert [off(found, true) < tolerance for found, true in zip((y, x.grad, made.weight.grad), exact, strict=True)] == [True] * 3


@pytest.mark.parametrize("recipe", ["delayed", "rowwise"])
def test_bias_is_added_and_its_gradient_is_exact(recipe: str) -> None:
    made, x = layer(recipe), inputs(5, 64)
    without = layer(recipe, bias=False)
    assert torch.equal(made.weight, without.weight)
    y = made(x)
    y.backward(dy := torch.randn_like(y))
    assert torch.equal(y, without(x) + made.bias)
    torch.testing.assert_close(made.bias.grad, dy.sum(0))


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """(M, N, K) of every FP8 product."""
    seen: list[tuple[int, ...]] = []

    def counted(original: Callable[..., Tensor], of: Callable[[Any], Tensor]) -> Callable[..., Tensor]:
        def call(a: Any, b: Any, *more: Any, **named: Any) -> Tensor:
            seen.append((len(of(a)), len(of(b)), of(a).shape[1]))
            return original(a, b, *more, **named)

        return call

    monkeypatch.setattr(converted, "fp8_matmul", counted(converted.fp8_matmul, lambda it: it))
    monkeypatch.setattr(fine, "product", counted(fine.product, lambda it: it.data))
    return seen


FPROP, DGRAD, WGRAD = (32, 48, 64), (32, 64, 48), (48, 64, 32)


@pytest.mark.parametrize("recipe", ["delayed", "rowwise"])
@pytest.mark.parametrize(("train_x", "train_w", "wanted"), [
    (True, True, [FPROP, DGRAD, WGRAD]), (True, False, [FPROP, DGRAD]), (False, True, [FPROP, WGRAD]),
])  # fmt: skip
def test_only_wanted_gradients_are_computed(
    recipe: str, train_x: bool, train_w: bool, wanted: list[tuple[int, ...]], products: list[tuple[int, ...]]
) -> None:
    whole, x = layer(recipe), inputs(32, 64)
    whole(x).square().sum().backward()
    dx, products[:] = x.grad, []
    part, x = layer(recipe), inputs(32, 64)
    part.weight.requires_grad_(train_w)
    x.requires_grad_(train_x)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = part(x)
    # Of the input xᵀ in FP8 alone, a byte an element, with a scale or one a row; of a frozen layer nothing.
    scales = 4 * (64 if recipe == "rowwise" else 1)
    assert sum(t.nbytes for t in saved if t is not part.weight and t is not part.handle) == (32 * 64 + scales) * train_w
    out.square().sum().backward()
    assert products == wanted
    assert (part.weight.grad is not None) == train_w and (x.grad is not None) == train_x
    if train_x:
        assert torch.equal(x.grad, dx)
    if train_w:
        assert torch.equal(part.weight.grad, whole.weight.grad)


def test_without_gradients_nothing_is_kept_and_the_output_is_the_same(products: list[tuple[int, ...]]) -> None:
    made, x = layer(), inputs(32, 64)
    with torch.no_grad():
        y = made(x)
    assert torch.equal(y, made(x)) and not y.requires_grad
    with torch.inference_mode():
        assert torch.equal(y, made(x))
    made(x).sum().backward()


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_evaluation_is_the_layer_it_was(recipe: str, products: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(64, 48, device=DEVICE)
    made, x = layer(recipe).eval(), inputs(5, 64)
    assert torch.equal(made(x), plain(x))
    made(x).sum().backward()
    assert products == [] and made.weight.grad is not None
    made.train()(x)
    assert len(products) == 1


def test_no_tokens() -> None:
    made, x = layer(), inputs(0, 64)
    y = made(x)
    y.sum().backward()
    assert y.shape == (0, 48) and x.grad.shape == (0, 64) and not made.weight.grad.any()


@pytest.mark.parametrize("bias", [True, False])
def test_outputs_may_be_changed_in_place(bias: bool) -> None:
    made, x = layer(bias=bias), inputs(5, 64)
    out = made(x)
    apart = out.detach().clone().requires_grad_()
    out += 1
    torch.relu_(out).square().sum().backward()
    (apart + 1).relu().square().sum().backward()
    other, same = layer(bias=bias), inputs(5, 64)
    other(same).backward(apart.grad)
    assert torch.equal(x.grad, same.grad) and torch.equal(made.weight.grad, other.weight.grad)


def test_autocast_computes_in_its_dtype() -> None:
    made, x = layer(), inputs(16, 64)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = made(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == made.weight.grad.dtype == torch.float32
    other, same = layer(), x.detach().bfloat16().float()
    with torch.no_grad():  # the emulation inside is not autocast: its sums are fp32's, rounded once
        assert off(y.float(), (other(same)).double()) < 2**-7


def test_two_dtypes_without_autocast_are_refused_as_by_any_linear() -> None:
    with pytest.raises(RuntimeError, match=r"input is torch.bfloat16, the weight torch.float32: use torch.autocast"):
        layer()(inputs(16, 64, dtype=torch.bfloat16))


@pytest.mark.skipif(DEVICE == "cuda", reason="about devices without FP8 units")
def test_nothing_is_emulated_unasked() -> None:
    made = layer()
    made.casts.emulated = False
    with pytest.raises(RuntimeError, match="cpu devices have no FP8 units: convert with emulate=True"):
        made(inputs(16, 64))


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_visible_and_leaves_no_trace(recipe: str, bad: float) -> None:
    made, untouched = layer(recipe), layer(recipe)
    for it in (made, untouched):
        it(inputs(16, 64)).sum().backward()
        torch.optim.SGD(it.parameters(), lr=0.0).step()
    x = inputs(16, 64).detach()
    x[3, 5] = bad
    y = made(x)
    assert not y[3].isfinite().any()
    y.sum().backward()
    assert not made.weight.grad.isfinite().all()
    # A loop that skips the step goes on with the next batch; scales are those of a run that never saw it.
    for it in (made, untouched):
        it.zero_grad()
        it(inputs(16, 64)).square().sum().backward()
    assert torch.equal(made.weight.grad, untouched.weight.grad)
    torch.optim.SGD(made.parameters(), lr=0.0).step()
    torch.optim.SGD(untouched.parameters(), lr=0.0).step()
    assert made(inputs(16, 64)).isfinite().all()
    assert made.casts.shared.scaling.history.isfinite().all()


@pytest.mark.parametrize("recipe", ["delayed", "rowwise"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(recipe: str, reentrant: bool) -> None:
    found = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).to(DEVICE)
        convert(model, recipe, emulate=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            x = inputs(5, 64)
            out = checkpoint(model, x, use_reentrant=reentrant) if recomputed else model(x)
            optimizer.zero_grad()
            out.square().sum().backward()
            optimizer.step()
        shared = model[0].casts.shared
        found.append([*model.parameters(), x.grad, shared.scaling.history])
        assert shared.turn == 2
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_backward_does_not_need_the_layer_and_then_nothing_is_left() -> None:
    made, x = layer(), inputs(16, 64)
    casts = weakref.ref(made.casts)
    out = made(x).square().sum()
    del made
    gc.collect()
    out.backward()
    assert x.grad.any()
    del out
    gc.collect()
    assert casts() is None


def test_copies_are_layers_of_their_own() -> None:
    made, x = layer(), inputs(16, 64)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    made(x).sum().backward()
    optimizer.step()
    made(x)
    stream = io.BytesIO()
    torch.save(made, stream)
    stream.seek(0)
    for other in (copy.deepcopy(made), torch.load(stream, weights_only=False)):
        assert isinstance(other, ConvertedLinear) and int(other.handle) != int(made.handle)
        y = made(x)
        assert torch.equal(other(x), y)
        step = torch.optim.SGD(other.parameters(), lr=0.1)
        for _ in range(2):
            other(2 * x).sum().backward()
            step.step()
        other(x)
        assert torch.equal(made(x), y) and not torch.equal(other(x), y)
        # Sites raise and read what their own scaling renews.
        for it, largest in ((made, x.abs().max()), (other, 2 * x.abs().max())):
            assert it.casts.shared.scaling.history[:, 0].max() == largest
