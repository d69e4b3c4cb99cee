"""One transformer block for tests of FP8 layers, whoever makes them: values, inputs, losses, its truth in fp64, and the bar."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nvfp8.attention import causal_attention, project_heads
from nvfp8.layers import Pending
from nvfp8.precision import Precision, fp32
from nvfp8.recipe import RECIPES

WIDTH, HIDDEN, TOKENS = 256, 1024, 512

# A tensor rounded to a format has this signal-to-noise ratio; a gradient here has seen up to 16 roundings: 11 of activations and
# weights, 5 of gradients. Their noise adds up: E4M3 alone 19.5 dB, with E5M2 gradients 16.6 dB, E2M1 in blocks of 16 7.5 dB.
_ROUNDING_DB = {"e4m3": 31.5, "e5m2": 25.5, "e2m1": 19.5}


def least_db(name: str) -> float:
    """The least ratio that a gradient must keep, from what its recipe rounds to."""
    forward, backward = RECIPES[name].fprop.left.format, RECIPES[name].dgrad.left.format
    noise = 11 * 10 ** (-_ROUNDING_DB[forward] / 10) + 5 * 10 ** (-_ROUNDING_DB[backward] / 10)
    return -10 * math.log10(noise)


def least_db_of_output(name: str) -> float:
    """The same of what comes out of the block, which no gradient's rounding has been through."""
    return _ROUNDING_DB[RECIPES[name].fprop.left.format] - 10 * math.log10(11)


def widened(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a recipe with blocks of weights a block as wide as they want it."""
    if RECIPES[name].fprop.right.scaling == "block128x128":
        monkeypatch.setattr(f"{__name__}.WIDTH", 512)
        monkeypatch.setattr(f"{__name__}.HIDDEN", 2048)


def block(precision: Precision, device: str = "cpu", table: bool = False) -> nn.ModuleDict:
    """One transformer block's projections and MLP, with a value embedding if wanted, from the same values in every precision."""
    with torch.device(device):
        parts = {name: precision.linear(WIDTH, WIDTH) for name in ("c_q", "c_k", "c_v", "c_proj")}
        # Of a block with a table `project_heads` reads q, k and v, and nobody else (`run_attention`).
        joined = precision.norm_linear(parts["c_q"], parts["c_k"], parts["c_v"], head_size=WIDTH // 4 if table else 0)
        last = precision.linear(WIDTH, WIDTH)
        following = {"last": last, "next": precision.norm_linear(last)}
        mlp, norm = precision.mlp(WIDTH, HIDDEN), precision.norm(WIDTH)
        made = nn.ModuleDict({**parts, "qkv": joined, "mlp": mlp, "norm": norm, **following})
        if table:
            made["table"] = precision.embedding(64, WIDTH)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(made.named_parameters()):
            value = torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[-1])
            parameter.copy_(torch.ones_like(parameter) if name.endswith("norm_weight") else value.bfloat16())
    return made


def inputs(device: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, x0, weigh = (torch.randn(TOKENS, WIDTH, generator=generator).bfloat16() for _ in range(3))
    lambdas = torch.tensor([1.125, 0.1875])
    tensors = [x.to(device, dtype), x0.to(device, dtype), lambdas.to(device, torch.promote_types(dtype, torch.float32))]
    return [t.requires_grad_() for t in tensors] + [weigh.to(device, dtype) / TOKENS]


def run(made: nn.ModuleDict, given: list[Tensor]) -> Tensor:
    """Forward of the block with q + v·gate in attention's place, so that every output has a gradient."""
    x, x0, lambdas, weigh = given
    stream, x0, head, qkv = made["qkv"](made["norm"](x), x0, lambdas, 12)
    q, k, v = qkv.split(WIDTH, -1)
    mixed = q + v * head.mean(-1, keepdim=True).sigmoid() + k
    x = made["mlp"](Pending(stream, made["c_proj"](mixed)), settle=False)
    # Once more in front of the next block, which adds what the MLP left pending.
    stream, x0, _, projected = made["next"](x, x0, lambdas, 12)
    out = stream + 0.1 * projected + 0.1 * x0
    return (out * weigh).sum()


def run_attention(made: nn.ModuleDict, given: list[Tensor]) -> Tensor:
    """The block as a model has it, attention and value embedding included, and the mix of the next."""
    x, x0, lambdas, weigh = given
    rows, heads = 2, (4, 4)
    size, length = WIDTH // heads[0], TOKENS // rows
    angle = torch.outer(torch.arange(length), 100_000 ** -(torch.arange(size // 2) / (size // 2)))
    cos, sin = angle.cos().to(x), angle.sin().to(x)
    ids = torch.arange(TOKENS).view(rows, length).to(x.device) % 64
    table = made["table"].weight if "table" in made else None
    stream, x0, head, qkv = made["qkv"](made["norm"](x).view(rows, length, WIDTH), x0.view(rows, length, WIDTH), lambdas, 12)
    gate = 3 * head[..., :4].sigmoid() if table is not None else None
    q, k, v = project_heads(qkv, cos, sin, heads, gate, table, None if table is None else ids)
    out = causal_attention(q, k, v, length, "sdpa" if x.is_cuda else "plain")
    x = made["mlp"](Pending(stream, made["c_proj"](out.flatten(2))), settle=False)
    stream, x0, _, projected = made["next"](x, x0, lambdas, 12)
    out = stream + 0.1 * projected + 0.1 * x0
    return (out.view(TOKENS, WIDTH) * weigh).sum()


def gradients(made: nn.ModuleDict, given: list[Tensor]) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in made.named_parameters()} | dict(
        zip(("x", "x0", "lambdas"), (t.grad for t in given), strict=False)
    )
    return {name: grad for name, grad in found.items() if grad is not None}


def decibels(value: Tensor, truth: Tensor) -> float:
    exact = truth.detach().cpu()
    noise = (value.detach().double().cpu() - exact).norm()
    return float(20 * torch.log10(exact.norm() / noise))


def truth(loss: Callable[[nn.ModuleDict, list[Tensor]], Tensor] = run) -> tuple[Tensor, dict[str, Tensor]]:
    """What comes out of the block, which is the gradient of what weighs it, and all other gradients."""
    made, given = block(fp32(), table=loss is run_attention).double(), inputs("cpu", torch.float64)
    given[3].requires_grad_()
    loss(made, given).backward()
    assert given[3].grad is not None
    return given[3].grad, gradients(made, given)
