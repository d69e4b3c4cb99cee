"""Gradients of a block beside Transformer Engine's and torchao's, from the same values: in decibels, against fp64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from one_block import block, decibels, gradients, inputs, run_attention, truth
from test_fp8_layers import WAYS, step
from torch import Tensor, nn

from nvfp8 import te
from nvfp8.layers import Pending, RMSNorm, mix
from nvfp8.precision import bf16, fp8
from nvfp8.precision import te as te_precision
from nvfp8.recipe import RECIPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def after_three_steps(precision: Any, made: nn.ModuleDict, exact: dict[str, Tensor]) -> dict[str, float]:
    """Signal to noise of every gradient, in dB, once scales have a history."""
    scaling, given = precision.scaling(made), inputs(DEVICE, torch.bfloat16)
    for _ in range(3):
        step(precision, made, given, run_attention)
        scaling.update()
    found = gradients(made, given)
    return {key: decibels(found[key], exact[key]) for key in exact}


def assert_not_below(ours: dict[str, float], theirs: dict[str, float]) -> None:
    print(ours, theirs, sep="\n")
    # Two numbers' error is a matter of luck, in both.
    assert {key: value for key, value in theirs.items() if ours[key] < value - 1 and key != "lambdas"} == {}


@pytest.mark.parametrize("emulated", WAYS)
@pytest.mark.skipif(te.unavailable() is not None, reason=str(te.unavailable()))
@pytest.mark.gpu
def test_no_gradient_is_more_than_1_db_below_transformer_engines(emulated: bool) -> None:
    te.reset()  # buffers are global: those of an earlier test's modules must not be updated with ours
    _, exact = truth(run_attention)
    theirs, ours = (
        after_three_steps(precision, block(precision, DEVICE, table=True), exact)
        for precision in (te_precision(RECIPES["delayed"]), fp8(RECIPES["delayed"], emulated=emulated))
    )
    assert_not_below(ours, theirs)


class Float8Blocks:
    """The same block with torchao's Float8Linear for every Linear, tensorwise, its default recipe."""

    def __init__(self) -> None:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        plain, made = block(bf16(), DEVICE, table=True), nn.ModuleDict()
        for name in ("c_q", "c_k", "c_v", "c_proj", "last", "c_fc", "mlp_proj"):
            of = {"c_fc": plain["mlp"].c_fc, "mlp_proj": plain["mlp"].c_proj}.get(name) or plain[name]
            made[name] = nn.Linear(*reversed(of.weight.shape), bias=False, device=DEVICE, dtype=torch.bfloat16)
            made[name].weight.data.copy_(of.weight)
        made = convert_to_float8_training(made, config=Float8LinearConfig.from_recipe_name("tensorwise"))
        made["table"], self.made = plain["table"], made
        self.parts = {"norm": RMSNorm(), "table": made["table"], "c_proj": made["c_proj"], "mlp": self.mlp}
        self.parts |= {"qkv": self.joined("c_q", "c_k", "c_v"), "next": self.joined("last")}

    def joined(self, *names: str) -> Callable[..., Any]:
        def forward(x: Any, x0: Tensor, lambdas: Tensor, width: int) -> Any:
            stream, branch, x0, head = mix(x, x0, lambdas, width)
            normed = RMSNorm()(branch)
            return stream, x0, head, torch.cat([self.made[name](normed) for name in names], -1)

        return forward

    def mlp(self, x: Pending, settle: bool) -> Pending:
        stream = x.stream + x.branch
        return Pending(stream, self.made["mlp_proj"](self.made["c_fc"](RMSNorm()(stream)).relu().square()))

    def decibels(self, exact: dict[str, Tensor]) -> dict[str, float]:
        given = inputs(DEVICE, torch.bfloat16)
        run_attention(self.parts, given).backward()  # type: ignore[arg-type]
        found = gradients(self.made, given)
        names = {"mlp.c_fc.weight": "c_fc.weight", "mlp.c_proj.weight": "mlp_proj.weight"}
        return {key: decibels(found[names.get(key, key)], exact[key]) for key in exact}


@pytest.mark.parametrize("name", ["delayed", "current"])
@pytest.mark.gpu
def test_no_gradient_is_more_than_1_db_below_torchaos(name: str) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    _, exact = truth(run_attention)
    precision = fp8(RECIPES[name])
    assert_not_below(after_three_steps(precision, block(precision, DEVICE, table=True), exact), Float8Blocks().decibels(exact))
