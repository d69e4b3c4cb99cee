"""An update by any optimizer is seen by layers that hold FP8 copies of weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nvfp8.optim import AdamW
from nvfp8.precision import fp8
from nvfp8.recipe import RECIPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "fused AdamW": lambda p: torch.optim.AdamW(p, 0.1, fused=True),
    "fused SGD": lambda p: torch.optim.SGD(p, 0.5, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, 0.1, foreach=True),
    "ours": lambda p: AdamW(p, 0.1),
}


@pytest.mark.parametrize("recipe", ["delayed", "rowwise"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_layer_computes_with_the_new_weight(kind: str, recipe: str) -> None:
    precision = fp8(RECIPES[recipe], emulated=True)
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": precision.linear(128, 128)}).to(DEVICE)
    nn.init.normal_(model["layer"].weight, std=0.1)
    scaling: Any = precision.scaling(model)
    x, weight = torch.randn(16, 128, device=DEVICE).bfloat16(), model["layer"].weight
    optimizer = OPTIMIZERS[kind]([weight])
    for _ in range(3):
        with precision.autocast(1e-3):
            out = model["layer"](x)
        exact = x.double() @ weight.detach().double().t()
        assert float((out.detach().double() - exact).norm() / exact.norm()) < 0.06
        out.float().square().mean().backward()
        scaling.update()
        version = weight._version
        optimizer.step()
        assert weight._version > version
        optimizer.zero_grad()
