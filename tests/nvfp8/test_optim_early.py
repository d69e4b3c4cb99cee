"""Updates in the middle of backward: what stops them, and what they refuse. That they change nothing else: test_optim.py."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nvfp8.optim import AdamW, Muon, UpdateEarly

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


def weight() -> nn.Parameter:
    return nn.Parameter(torch.ones(8, device=DEVICE))


def test_an_update_that_was_refused_whole_does_not_count() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(DEVICE)
    optimizer = AdamW(model.named_parameters())
    update = UpdateEarly([optimizer])
    before = [p.detach().clone() for p in model.parameters()]
    update.begin()
    (model(torch.ones(2, 4, device=DEVICE)) * torch.inf).sum().backward()
    update.finish()
    assert update.bad in ("1.bias", "1.weight") and update.updated == 0
    assert all(float(state["step"]) == 0 for state in optimizer.state.values())
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_the_norm_of_a_step_with_a_bad_loss_shows_it() -> None:
    p = weight()
    update = UpdateEarly([AdamW([p])])
    update.begin()
    update.bad = "the loss"
    assert math.isnan(update.finish()) and (p == 1).all()


def test_a_gradient_after_an_early_stop_is_not_applied_and_the_norm_is_not_finite() -> None:
    a, b = weight(), weight()
    update = UpdateEarly([AdamW([("a", a), ("b", b)])])
    update.begin()
    (b.sum() * torch.inf).backward()
    (a * 2).sum().backward()
    assert not math.isfinite(update.finish())
    assert (update.bad, update.updated) == ("b", 0) and (a == 1).all() and a.grad is None and b.grad is None


def test_what_no_hook_has_seen_is_updated_whole_or_not_at_all() -> None:
    for last, updated in ((1.0, 2), (torch.nan, 0)):
        a, b = weight(), weight()
        update = UpdateEarly([AdamW([("a", a), ("b", b)])])
        update.begin()
        a.grad, b.grad = torch.ones_like(a), torch.full_like(b, last)
        norm = update.finish()
        assert update.updated == updated and bool((a == 1).all()) == (updated == 0) and a.grad is None
        assert update.bad == (None if updated else "b") and math.isfinite(norm) == bool(updated)


def test_a_parameter_without_gradient_is_left_alone_and_not_counted() -> None:
    a, b = weight(), weight()
    optimizer = AdamW([a, b])
    update = UpdateEarly([optimizer])
    update.begin()
    a.sum().backward()
    assert update.finish() == pytest.approx(8**0.5)
    assert update.updated == 1 and (b == 1).all() and float(optimizer.state[b]["step"]) == 0


def test_two_optimizers_without_names_do_not_hide_each_others_gradients() -> None:
    a, b = weight(), nn.Parameter(torch.eye(8, device=DEVICE))
    update = UpdateEarly([AdamW([a]), Muon([b], compute_dtype=torch.float32)])
    update.begin()
    a.grad, b.grad = torch.full_like(a, torch.nan), torch.ones_like(b)
    assert math.isnan(update.finish()) and update.updated == 0


def test_a_second_gradient_in_one_step_is_refused() -> None:
    p = weight()
    update = UpdateEarly([AdamW([("p", p)])])
    update.begin()
    (p * 1).sum().backward()
    with pytest.raises(RuntimeError, match="p got a gradient twice in one step"):
        (p * 1).sum().backward()
    layer = nn.Linear(8, 8, device=DEVICE)
    update = UpdateEarly([AdamW(layer.named_parameters())])
    x = torch.randn(4, 8, device=DEVICE, requires_grad=True)
    y = checkpoint(layer, checkpoint(layer, x, use_reentrant=True), use_reentrant=True)
    update.begin()
    with pytest.raises(RuntimeError, match=r"got a gradient twice .* \(use_reentrant=False\)"):
        y.square().sum().backward()


def test_gradients_from_before_and_parameters_from_after_are_refused() -> None:
    p, q = weight(), weight()
    optimizer = AdamW([("p", p)])
    update = UpdateEarly([optimizer])
    p.sum().backward()
    with pytest.raises(ValueError, match="p has a gradient before its step's backward"):
        update.begin()
    p.grad = None
    optimizer.add_param_group({"params": [("q", q)]})
    with pytest.raises(ValueError, match="has got parameters since UpdateEarly was made"):
        update.begin()


def test_several_processes_and_dtensors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvfp8.optim.early.placed", lambda tensor: True)
    with pytest.raises(ValueError, match=r"0\.0 is a DTensor: updates in backward are for whole tensors"):
        UpdateEarly([AdamW([weight()])])
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    with pytest.raises(ValueError, match="are for one process, here are 4"):
        UpdateEarly([AdamW([weight()])])
