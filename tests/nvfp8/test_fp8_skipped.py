"""Single GEMMs of FP8 layers left in bf16: those are bf16's, bit for bit, the others FP8's, and what is read arrives unrounded."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from one_block import TOKENS, block, decibels, gradients, inputs, least_db, run_attention, truth, widened
from torch import Tensor, nn

from nvfp8.fp8_layers import FP8Linear
from nvfp8.precision import Precision, bf16, fp8
from nvfp8.recipe import GEMMS, parse_recipe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CAPABILITY = torch.cuda.get_device_capability() if DEVICE == "cuda" else (0, 0)
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
RECIPE_NAMES = ["delayed", "current", "e4m3", "rowwise", "blockwise"]
# A result of bf16 GEMMs over bf16 operands keeps 40 dB or more, one that an FP8 GEMM took part in less than 32 (`one_block.py`).
BF16_DB = 36


def tensor(*shape: int, seed: int, factor: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (factor * torch.randn(*shape, generator=generator)).to(DEVICE, torch.bfloat16)


def filled(layer: nn.Module) -> nn.Module:
    layer.to(DEVICE)
    for seed, p in enumerate(layer.parameters()):
        p.data = tensor(*p.shape, seed=seed, factor=p.shape[-1] ** -0.5)
    return layer


LEFT = [*({gemm} for gemm in GEMMS), {"fprop", "dgrad"}, {"dgrad", "wgrad"}, {"fprop", "wgrad"}]


@pytest.mark.parametrize("left", LEFT, ids=lambda left: "+".join(sorted(left)))
@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_what_is_left_in_bf16_is_bf16s_and_the_rest_fp8s(name: str, left: set[str]) -> None:
    def results(precision: Precision) -> list[dict[str, Tensor]]:
        """Of two steps, the second of which knows scales: y, dx and dW by the GEMM that made them."""
        layer = filled(precision.at("a").linear(512, 1024))
        scaling, steps = precision.scaling(layer), []
        for step in range(2):
            x, dy = tensor(2, 64, 512, seed=10 + step).requires_grad_(), tensor(2, 64, 1024, seed=20 + step)
            layer.weight.grad = None
            with precision.autocast(1.0):
                y = layer(x)
            y.backward(dy)
            steps.append({"fprop": y.detach(), "dgrad": x.grad, "wgrad": layer.weight.grad.to(torch.bfloat16)})
            assert scaling.update() == []
        return steps

    text = name + ":bf16=" + "+".join(f"a:{gemm}" for gemm in sorted(left))
    ours, in_fp8 = (results(fp8(parse_recipe(each), emulated=True)) for each in (text, name))
    in_bf16 = results(bf16())
    for step in range(2):
        for gemm in GEMMS:
            expected, other = (in_bf16, in_fp8) if gemm in left else (in_fp8, in_bf16)
            assert torch.equal(ours[step][gemm], expected[step][gemm]), (step, gemm)
            assert not torch.equal(ours[step][gemm], other[step][gemm]), (step, gemm)


def test_weights_are_cast_in_the_layouts_that_gemms_in_fp8_read() -> None:
    for left, layouts in (("fprop", (False, True)), ("dgrad", (True, False)), ("wgrad", (True, True))):
        precision = fp8(parse_recipe(f"delayed:bf16=*:{left}"), emulated=True)
        layer = filled(precision.at("a").linear(32, 64))
        assert isinstance(layer, FP8Linear)
        precision.scaling(layer)
        with precision.autocast(1.0):
            layer(tensor(16, 32, seed=1))
        copies = layer.projections[0].weight()
        assert (copies.q is not None, copies.t is not None) == layouts


def in_full_precision(
    precision: Precision, layer: nn.Module, ours: Callable[..., Tensor], exact: Callable[..., Tensor], tensors: list[Tensor]
) -> list[bool]:
    """Whether the output and each gradient, of `tensors` and the weights, are as good as bf16's; else they are as good as FP8's."""
    scaling, weights = precision.scaling(layer), list(layer.parameters())
    for _ in range(2):
        with precision.autocast(1.0):
            out = ours(*tensors)
        dy = tensor(*out.shape, seed=99)
        found = [out, *torch.autograd.grad(out, [*tensors, *weights], dy)]
        wide = [t.detach().double().requires_grad_() for t in (*tensors, *weights)]
        exact_out = exact(*wide)
        true = [exact_out, *torch.autograd.grad(exact_out, wide, dy.double())]
        report = [decibels(a, b) for a, b in zip(found, true, strict=True)]
        print([round(ratio, 1) for ratio in report])
        assert min(report) > 19
        scaling.update()
    return [ratio > BF16_DB for ratio in report]


def norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 2.0**-23).sqrt()


@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_joined_projections(name: str, gemm: str) -> None:
    precision = fp8(parse_recipe(f"{name}:bf16=qkv:{gemm}"), emulated=True).at("qkv")
    parts = filled(nn.ModuleList([precision.linear(512, rows) for rows in (512, 256, 256)]))
    layer = precision.norm_linear(*parts)
    x, x0 = (tensor(2, 64, 512, seed=seed).requires_grad_() for seed in (10, 11))
    lambdas = torch.tensor([1.125, 0.1875], device=DEVICE)

    def exact(x: Tensor, *weights: Tensor) -> Tensor:
        return F.linear(norm(x * 1.125 + x0.detach().double() * 0.1875), torch.cat(weights))

    result = in_full_precision(precision, nn.ModuleList([parts, layer]), lambda x: layer(x, x0, lambdas, 0)[3], exact, [x])
    assert result == [gemm == "fprop", gemm == "dgrad", *[gemm == "wgrad"] * 3]


@pytest.mark.parametrize(
    ("left", "expected"),  # of the output, of dx, of the gradients of c_fc and c_proj
    [
        ("mlp.c_fc+mlp.c_proj:fprop", [True, False, False, False]),
        ("mlp.c_fc+mlp.c_proj:dgrad", [False, True, True, False]),
        ("mlp.c_fc+mlp.c_proj:wgrad", [False, False, False, True]),
        ("mlp:fprop", [True, False, False, False]),
        ("mlp:fprop+mlp:dgrad", [True, True, False, False]),
        ("mlp:fprop+mlp:dgrad+mlp.c_fc:wgrad", [True, True, True, False]),
    ],
)
@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_mlp(name: str, left: str, expected: list[bool]) -> None:
    precision = fp8(parse_recipe(f"{name}:bf16={left}"), emulated=True)
    layer = filled(precision.at("mlp").mlp(512, 2048))
    x = tensor(2, 64, 512, seed=10).requires_grad_()

    def ours(x: Tensor) -> Tensor:
        out: Tensor = layer(x, settle=False).branch
        return out

    def exact(x: Tensor, w_fc: Tensor, w_proj: Tensor) -> Tensor:
        return F.linear(F.linear(norm(x), w_fc).relu().square(), w_proj)

    assert in_full_precision(precision, layer, ours, exact, [x]) == expected


@pytest.mark.parametrize("left", ["mlp.c_fc:wgrad", "mlp.c_proj:wgrad", "mlp.c_fc:dgrad", "mlp.c_proj"])
def test_what_is_left_of_an_mlp_does_not_change_how_the_norms_output_is_scaled(left: str) -> None:
    """It is at most √D by itself, fused or not: no history, nothing measured."""
    for text in ("delayed", f"delayed:bf16={left}"):
        precision = fp8(parse_recipe(text), emulated=True)
        layer = filled(precision.at("mlp").mlp(512, 2048))
        scaling = precision.scaling(layer)
        for _ in range(2):
            with precision.autocast(1.0):
                layer(tensor(2, 64, 512, seed=10)).sum().backward()
            (index,) = (index for index, name in enumerate(scaling.names) if name.startswith("the input of") and "c_fc" in name)
            assert scaling.scale[index] == 448 / math.sqrt(512) and scaling.sites[index].ready
            assert scaling.update() == []


@pytest.mark.parametrize(
    "emulated", [True, pytest.param(False, marks=pytest.mark.skipif(CAPABILITY != (9, 0), reason="no Hopper"))]
)
@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_in_a_block_gradients_arrive_in_bf16_where_bf16_reads_them(
    name: str, gemm: str, emulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """d(q, k, v) exists in FP8 only where FP8 alone reads it: what is handed on in its place is NaN."""
    widened(name, monkeypatch)
    _, exact = truth(run_attention)
    precision = fp8(parse_recipe(f"{name}:bf16=*:{gemm}"), emulated=emulated)
    made, given = block(precision, DEVICE, table=True), inputs(DEVICE, torch.bfloat16)
    scaling = precision.scaling(made)
    for _ in range(3):
        for p in [*made.parameters(), *given[:3]]:
            p.grad = None
        with precision.autocast(1 / TOKENS):
            out = run_attention(made, given)
        out.backward()
        assert scaling.update() == []
    report = {key: round(decibels(value, exact[key]), 1) for key, value in gradients(made, given).items()}
    least = least_db(name) - 1  # as in test_fp8_layers.py: softmax's gradient costs a dB, and lambdas are two numbers
    assert {key: value for key, value in report.items() if value < least - (6 if key == "lambdas" else 0)} == {}
