"""FP8 with a scale a row or a block: against fp64, cast once a step, bf16 outside, and what finer scales are for."""

import weakref
from typing import Any

import pytest
import torch
from one_block import TOKENS, block, decibels, gradients, inputs, least_db, run, run_attention, truth, widened
from torch import Tensor

from nvfp8 import fp8_fine_layers
from nvfp8.fp8_fine_layers import FineFP8, FineLinear, cast, product
from nvfp8.precision import fp8
from nvfp8.recipe import RECIPES, Operand, parse_recipe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CAPABILITY = torch.cuda.get_device_capability() if DEVICE == "cuda" else (0, 0)
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


def ways(name: str) -> list[Any]:
    native = CAPABILITY == (9, 0) if name == "blockwise" else CAPABILITY >= (8, 9)
    return [(name, True)] + ([(name, False)] if native else [])


@pytest.mark.parametrize(("name", "emulated"), [*ways("rowwise"), *ways("blockwise")])
@pytest.mark.parametrize("loss", [run, run_attention], ids=["layers", "attention"])
def test_every_gradient(name: str, emulated: bool, loss: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    widened(name, monkeypatch)
    _, exact = truth(loss)
    precision = fp8(RECIPES[name], emulated=emulated)
    made = block(precision, DEVICE, loss is run_attention)
    scaling, given = precision.scaling(made), inputs(DEVICE, torch.bfloat16)
    with precision.autocast(1 / TOKENS):
        out = loss(made, given)
    out.backward()
    assert scaling.update() == [] and scaling.state() == {}
    report = {key: round(decibels(value, exact[key]), 1) for key, value in gradients(made, given).items()}
    print(report)
    assert report.keys() == exact.keys()
    least = least_db(name) - (loss is run_attention)
    assert {key: value for key, value in report.items() if value < least - (6 if key == "lambdas" else 0)} == {}


@pytest.mark.parametrize(
    ("operand", "shape", "stride"),
    [
        (Operand("e4m3", "row"), (256, 1), (1, 1)),
        (Operand("e5m2", "row"), (256, 1), (1, 1)),
        (Operand("e4m3", "block1x128"), (256, 3), (1, 256)),
        (Operand("e4m3", "block128x128"), (2, 3), (3, 1)),
    ],
)
def test_scales_are_of_their_rows_and_blocks(operand: Operand, shape: tuple[int, int], stride: tuple[int, int]) -> None:
    x = torch.randn(256, 384, device=DEVICE) * torch.logspace(-6, 3, 256, device=DEVICE)[:, None]
    x[5] = 0
    made, transposed = cast(x, operand), cast(x.t().contiguous().t(), operand)
    for each in (made, transposed):
        assert each.inverse.shape == shape and each.inverse.stride() == stride and each.inverse.dtype == torch.float32
        assert each.data.is_contiguous()
    assert torch.equal(made.data.view(torch.uint8), transposed.data.view(torch.uint8))
    assert torch.equal(made.inverse, transposed.inverse)
    rows, columns = 256 // shape[0], 384 // shape[1]
    expected = x.view(shape[0], rows, shape[1], columns).abs().amax((1, 3)) / {"e4m3": 448, "e5m2": 57344}[operand.format]
    torch.testing.assert_close(made.inverse, torch.where(expected > 0, expected, 1.0), rtol=1e-6, atol=0)
    if operand.format == "e4m3" and rows == 1:
        back = product(made, cast(torch.eye(384, device=DEVICE), operand), torch.float32, False, True)
        assert decibels(back, x.double()) > 31 and not back[5].any()
        assert decibels(back[:64], x[:64].double()) > 31  # rows of 1e-6 beside rows of 1e3


def test_an_outlier_costs_its_own_row_only() -> None:
    x = torch.randn(256, 256, device=DEVICE)
    x[3, 7] = 1e6
    one = torch.eye(256, device=DEVICE)
    fine = product(cast(x, Operand("e4m3", "row")), cast(one, Operand("e4m3", "row")), torch.float32, False, True)
    assert decibels(fine[4:], x[4:].double()) > 31
    coarse = (x * (448 / 1e6)).to(torch.float8_e4m3fn).float() / (448 / 1e6)
    assert decibels(coarse[4:], x[4:].double()) < 1


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_visible(bad: float) -> None:
    x = torch.randn(128, 512, device=DEVICE)
    x[2, 3] = bad
    for scaling in ("row", "block1x128", "block128x128"):
        operand = Operand("e4m3", scaling)  # type: ignore[arg-type]
        assert bool(product(cast(x, operand), cast(x, operand), torch.float32, False, True)[2].isnan().any())


def test_what_tensor_cores_do_not_multiply_is_refused() -> None:
    x, w = (cast(torch.randn(16, 16, device=DEVICE), Operand(name, "row")) for name in ("e5m2", "e4m3"))
    with pytest.raises(ValueError, match="e5m2 times e5m2"):
        product(x, x, torch.bfloat16, False, False)
    with pytest.raises(ValueError, match="contiguous along the summed axis"):
        product(x, w._replace(data=w.data.t()), torch.bfloat16, False, False)
    tokens, weight = torch.randn(128, 640, device=DEVICE), Operand("e4m3", "block128x128")
    with pytest.raises(ValueError, match="come in fours: 640 summed must be a multiple of 512"):
        product(cast(tokens, Operand("e4m3", "block1x128")), cast(tokens, weight), torch.bfloat16, False, False)


def test_weights_are_cast_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def counted(x: Tensor, operand: Operand, emulated: bool) -> FineFP8:
        seen.append(tuple(x.shape))
        return cast(x, operand, emulated)

    monkeypatch.setattr(fp8_fine_layers, "cast", counted)
    precision = fp8(RECIPES["rowwise"], emulated=True)
    layer = precision.linear(32, 64).to(DEVICE)
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(16, 32, device=DEVICE, dtype=torch.bfloat16)
    for count in (2, 2, 4):
        if count == 4:
            layer.weight.data = layer.weight.data.clone()
        with precision.autocast(1.0):
            layer(x).sum().backward()
        assert sum(shape in ((64, 32), (32, 64)) for shape in seen) == count


@pytest.mark.parametrize("recipe", ["rowwise", "blockwise", "rowwise:bf16=*:wgrad"])
def test_a_graph_that_somebody_holds_lets_the_steps_copies_of_weights_go(recipe: str) -> None:
    precision = fp8(parse_recipe(recipe), emulated=True)
    layer = precision.at("a").linear(512, 512).to(DEVICE)
    assert isinstance(layer, FineLinear) and layer.projection is not None
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(128, 512, device=DEVICE, dtype=torch.bfloat16)
    with precision.autocast(1.0):
        out = layer(x)
    out.sum().backward()
    old = [weakref.ref(t) for copy in layer.projection.copies() if copy is not None for t in copy]
    with torch.no_grad():
        layer.weight.mul_(0.5)
    with precision.autocast(1.0):
        layer(x).sum().backward()
    assert out.grad_fn is not None and old and all(held() is None for held in old)


def test_outside_autocast_and_by_name_it_is_bf16() -> None:
    _, exact = truth()
    for recipe, training in (("blockwise", False), ("rowwise:bf16=a", True)):
        precision = fp8(parse_recipe(recipe), emulated=True).at("a")
        made, given = block(precision, DEVICE), inputs(DEVICE, torch.bfloat16)
        precision.scaling(made)
        with precision.autocast(1 / TOKENS) if training else torch.enable_grad():
            out = run(made, given)
        out.backward()
        assert min(decibels(value, exact[key]) for key, value in gradients(made, given).items()) > 36


@pytest.mark.parametrize("scaling", ["row", "block1x128"])
def test_what_is_cast_lies_as_the_gemm_reads_it(scaling: Any) -> None:
    """A transposed input too: cuBLAS takes rows that are contiguous."""
    x = torch.randn(128, 256, device=DEVICE)
    across = cast(x.t(), Operand("e4m3", scaling))
    assert across.data.is_contiguous() and across.data.shape == (256, 128)
    assert torch.equal(across.data.float(), cast(x.t().contiguous(), Operand("e4m3", scaling)).data.float())
