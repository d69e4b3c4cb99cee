"""What a layer tells the norm before it: the sum along each row that the norm's gradient subtracts."""

import importlib
from typing import Any

import pytest
import torch
from one_block import WIDTH, inputs, run_attention
from test_fp8_layers import DEVICE, WAYS, made_of, step
from torch import Tensor

from nvfp8 import reference
from nvfp8.precision import fp8
from nvfp8.recipe import RECIPES

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


@pytest.mark.parametrize("emulated", WAYS)
def test_norms_are_told_the_sums_along_their_rows(emulated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Σ dy·y from behind the linear layer is Σ dx̂·x̂, but for what FP8 rounds: of some thousand terms little is left of that."""
    seen: list[float] = []
    module = reference if emulated else importlib.import_module("nvfp8.kernels")

    def watched(name: str, position: int) -> None:
        original = getattr(module, name)

        def call(*arguments: Any, along: Tensor | None = None) -> Any:
            if along is not None:
                d_normed, x, rstd = (arguments[i].double() for i in (position, *((3, 6) if position else (1, 2))))
                true = (d_normed * x).sum(-1) * rstd
                size = d_normed.norm(dim=-1) * x.norm(dim=-1) * rstd
                seen.append(float((along.double().sum(0).view_as(true) - true).norm() / size.norm()))
            return original(*arguments, along=along)

        monkeypatch.setattr(module, name, call)

    watched("norm_backward_quantize", 0)
    watched("mix_norm_backward_quantize", 1)
    precision = fp8(RECIPES["delayed"], emulated=emulated)
    made, scaling = made_of(precision, table=True)
    given = inputs(DEVICE, torch.bfloat16)
    for steps in (1, 2):
        step(precision, made, given, run_attention)
        assert scaling.update() == []
        # A gradient that points anywhere has 1 / √WIDTH of its length along x̂.
        assert len(seen) == 2 * steps and max(seen) < 0.15 / WIDTH**0.5, seen
