"""Gradients travel between layers in FP8, and only as what they are."""

import pytest
import torch
from one_block import decibels
from torch import Tensor, nn

from nvfp8.layers import Linear, Pending
from nvfp8.precision import fp8
from nvfp8.quantize import ask, asked, gradient, hand, hand_only
from nvfp8.recipe import RECIPES

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE != "cpu" else []


def leaf(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, torch.bfloat16).requires_grad_()


def filled(layer: Linear) -> Linear:
    layer.to(DEVICE).weight.data.copy_(leaf(*layer.weight.shape, seed=0).detach() / layer.weight.shape[1] ** 0.5)
    return layer


def test_part_of_a_gradient_is_not_taken_for_all_of_it() -> None:
    """What is read twice has a gradient that nobody made in FP8."""
    precision = fp8(RECIPES["delayed"], emulated=True)
    linear = filled(precision.linear(32, 32))
    joined = precision.norm_linear(filled(precision.linear(32, 32)))
    scaling = precision.scaling(nn.ModuleList([linear, joined]))
    x, stream, x0 = leaf(16, 32, seed=1), leaf(16, 32, seed=2), leaf(16, 32, seed=3)
    lambdas = torch.tensor([1.0, 0.5], device=DEVICE)

    def gradient_of(twice: bool) -> Tensor:
        with precision.autocast(1.0):
            pending = Pending(stream, linear(x))
            assert asked(pending.branch) is not None
            loss = joined(pending, x0, lambdas, 0)[3].float().square().sum()
            if twice:
                loss = loss + 100 * pending.branch.float().sum()
        return torch.autograd.grad(loss, linear.weight)[0]

    gradient_of(True)
    scaling.update()
    added = 100 * x.detach().float().sum(0).expand(32, 32)
    both, one = gradient_of(True).float(), gradient_of(False).float()
    assert decibels(both - one, added.double()) > 20


def test_what_was_handed_over_counts_for_the_tensor_as_it_was() -> None:
    precision = fp8(RECIPES["delayed"], emulated=True)
    layer = filled(precision.linear(32, 32))
    scaling = precision.scaling(layer)
    site = layer.projections[0].dy
    scaling.begin(torch.device(DEVICE), 1.0)
    dy = leaf(16, 32, seed=1).detach()
    q, t = (torch.zeros(shape, device=DEVICE).to(site.dtype) for shape in ((16, 32), (32, 16)))
    hand(dy, site, q, t)
    assert gradient(dy * 1, site).q is not q and gradient(dy, layer.projections[0].x).q is not q
    assert gradient(dy, site)[:2] == (q, t)
    assert gradient(dy, site).q is not q, "it was taken"
    hand(dy, site, q, t)
    dy.add_(1)
    assert gradient(dy, site).q is not q


def test_a_gradient_in_fp8_only_cannot_be_used_as_one() -> None:
    precision = fp8(RECIPES["delayed"], emulated=True)
    layer = filled(precision.linear(32, 32))
    scaling = precision.scaling(layer)
    scaling.begin(torch.device(DEVICE), 1.0)
    site = layer.projections[0].dy
    q = torch.zeros(16, 32, device=DEVICE).to(site.dtype)
    dy = hand_only(torch.Size((2, 8, 32)), torch.bfloat16, site, q, q.t().contiguous())
    assert dy.shape == (2, 8, 32) and dy.untyped_storage().nbytes() == 2
    assert gradient(dy, site).q is q and bool((dy + 1).isnan().all())
    with pytest.raises(ValueError, match="multiples of 16"):
        w = layer.projections[0].weight()
        layer.projections[0].dgrad(gradient(dy[..., :24], site), w.t, w.inverse, torch.bfloat16)


def test_views_carry_no_mark() -> None:
    precision = fp8(RECIPES["delayed"], emulated=True)
    layer = filled(precision.linear(32, 32))
    precision.scaling(layer)
    x = ask(leaf(16, 32, seed=1) * 1, layer.projections[0].dy)
    assert asked(x) is layer.projections[0].dy and asked(x.view(2, 8, 32)) is None and asked(x + 1) is None and asked(None) is None
