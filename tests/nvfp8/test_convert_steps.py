"""What changes from step to step without a hook in the loop: when weights are cast, when the history rolls, what is saved."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nvfp8 import convert, converted, load_scaling_state, scaling_state

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cuda":
    pytestmark = [pytest.mark.gpu]


def network(recipe: str = "delayed") -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).to(DEVICE)
    convert(model, recipe, emulate=True)
    return model


def batch(seed: int) -> Tensor:
    return torch.randn(16, 64, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


class Careless(torch.optim.Optimizer):
    """Writes through `.data`, which raises no version counter."""

    def __init__(self, parameters: Iterator[nn.Parameter], lr: float):
        super().__init__(parameters, {"lr": lr})

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=-group["lr"])


class ByHand:
    """No optimizer at all."""

    def __init__(self, parameters: Iterator[nn.Parameter], lr: float):
        self.parameters, self.lr = list(parameters), lr

    @torch.no_grad()
    def step(self) -> None:
        for p in self.parameters:
            p.sub_(self.lr * p.grad)


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "foreach": lambda p, lr: torch.optim.AdamW(p, lr, foreach=True),
    # Raises no version counter either.
    "fused": lambda p, lr: torch.optim.AdamW(p, lr, fused=True),
    "fused SGD": lambda p, lr: torch.optim.SGD(p, lr, fused=True),
    ".data": Careless,
    "by hand": ByHand,
}


@pytest.fixture
def weights_cast(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A layer's casts, whenever its weight is cast."""
    seen: list[Any] = []
    original = converted.Casts._cast_weight
    monkeypatch.setattr(converted.Casts, "_cast_weight", lambda self, *more: seen.append(self) or original(self, *more))
    return seen


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("recipe", ["delayed", "rowwise"])
def test_weights_are_cast_once_a_step_whoever_updates_them(recipe: str, optimizer: str, weights_cast: list[Any]) -> None:
    model = network(recipe)
    update = OPTIMIZERS[optimizer](model.parameters(), 0.01)
    for step in range(3):
        for micro in range(4):
            model(batch(4 * step + micro)).square().sum().backward()
        assert weights_cast == [model[0].casts, model[2].casts]
        # A copy made of the weights as they are now casts the same numbers: nothing is stale.
        fresh = network(recipe)
        fresh.load_state_dict(model.state_dict())
        for cast, again in zip((model[0], model[2]), (fresh[0], fresh[2]), strict=True):
            ours = cast.casts.weight(cast.weight, True, False)
            theirs = again.casts._cast_weight(again.weight.detach(), True, True)[0] if recipe == "rowwise" else None
            if theirs is not None:
                assert torch.equal(ours.data.float(), theirs.data.float())
            else:
                scale = 448 / cast.weight.detach().abs().max()
                assert torch.equal(ours.q.float(), (cast.weight.detach() * scale).clamp(-448, 448).to(ours.q.dtype).float())
        weights_cast.clear()
        update.step()
        model.zero_grad()


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "by hand"])
@pytest.mark.parametrize("recipe", ["delayed", "rowwise"])
def test_weights_are_cast_once_a_step_with_optimizers_in_backward(recipe: str, optimizer: str, weights_cast: list[Any]) -> None:
    """One a parameter, which steps as soon as the gradient is there: the same numbers as one that steps behind backward."""
    after, within = network(recipe), network(recipe)
    update = OPTIMIZERS[optimizer](after.parameters(), 0.01)
    for parameter in within.parameters():
        own = OPTIMIZERS[optimizer](iter([parameter]), 0.01)

        def step_alone(parameter: Tensor, own: Any = own) -> None:
            own.step()
            parameter.grad = None

        parameter.register_post_accumulate_grad_hook(step_alone)
    for step in range(3):
        for model in (after, within):
            weights_cast.clear()
            model(batch(step)).square().sum().backward()
            assert weights_cast == [model[0].casts, model[2].casts]
        update.step()
        after.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(after.parameters(), within.parameters(), strict=True))
    shared = within[0].casts.shared
    assert shared.turn == 2 and torch.equal(shared.scaling.history, after[0].casts.shared.scaling.history)


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_the_history_rolls_once_a_step(optimizer: str) -> None:
    """However many micro-batches a step has, its entry is the largest amax of all; the scale of the next step follows from it."""
    model = network()
    update = OPTIMIZERS[optimizer](model.parameters(), 1e-3)
    amaxes, shared = [], model[0].casts.shared
    for step in range(3):
        x = [batch(4 * step + micro) * (micro + 1) for micro in range(4)]
        for it in x:
            model(it).square().sum().backward()
        assert shared.turn == step
        amaxes.insert(0, float(max(it.abs().max() for it in x)))
        update.step()
        model.zero_grad()
    model(batch(0))
    assert shared.turn == 3
    history = shared.scaling.history
    assert history[:3, 0].tolist() == pytest.approx(amaxes) and not history[3:].any()
    assert float(shared.scaling.scale[0]) == pytest.approx(448 / max(amaxes))
    assert all(shared.scaling.seen)


def test_a_step_that_an_optimizer_skips_is_part_of_the_next_one() -> None:
    """As GradScaler does: no step, no new entry."""
    model = network()
    shared = model[0].casts.shared
    for _ in range(2):
        model(batch(0)).sum().backward()
        model.zero_grad()
    assert shared.turn == 0


def test_frozen_layers_have_a_history_too() -> None:
    """Their weights never change: the optimizer of others ends their step."""
    model = network()
    for p in model[0].parameters():
        p.requires_grad_(False)
    optimizer = torch.optim.AdamW(model[2].parameters(), 1e-3)
    for step in range(3):
        model(batch(step)).square().sum().backward()
        optimizer.step()
    model(batch(3))
    assert int((model[0].casts.shared.scaling.history[:, 0] > 0).sum()) == 3


def test_layers_that_are_not_called_do_not_hold_up_the_others() -> None:
    model = nn.ModuleList(nn.Linear(64, 64) for _ in range(3)).to(DEVICE)
    convert(model, emulate=True)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for step in range(4):
        out = model[2](model[step % 2](batch(step)))
        out.sum().backward()
        optimizer.step()
    shared = model[0].casts.shared
    assert shared.turn == 3
    history = shared.scaling.history[:3, [0, 3, 6]] > 0  # newest first; the inputs of the three layers
    assert history.tolist() == [[True, False, True], [False, True, True], [True, False, True]]


def test_the_host_waits_for_the_first_amaxes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for places that no tensor comes by: a frozen first layer's gradient, a layer that is not called, both then used late."""
    model = nn.ModuleList(nn.Linear(64, 64) for _ in range(3)).to(DEVICE)
    convert(model, emulate=True)
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    scaling, original, copied, waits = model[0].casts.shared.scaling, Tensor.tolist, [], []
    monkeypatch.setattr(Tensor, "tolist", lambda self: copied.append(self) or original(self))
    for step in range(12):
        x = batch(step).requires_grad_(step >= 5)
        copied.clear()
        hidden = model[1](model[0](x))
        waits += [step] * len(copied)
        (model[2](hidden) if step >= 8 else hidden).square().sum().backward()
        optimizer.step()
        if step == 4:
            assert [site.ready for site in model[0].casts.sites] == [True, False, False]
    # At the first forward after: the inputs and the second layer's gradient, the first's gradient, and the third layer.
    assert waits == [1, 6, 9]
    for layer in model:
        assert [site.ready for site in layer.casts.sites] == [True, False, True]
    assert all(scaling.seen)


def test_layers_on_two_devices_are_refused() -> None:
    model = network()
    model(batch(0))
    with pytest.raises(RuntimeError, match="convert what is on each device by itself"):
        model[0].casts.shared.begin(torch.device("meta"))


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        (model(batch(step) * (1 + step)) / (1 + step)).square().sum().backward()  # each with a larger amax than those before
        optimizer.step()
        model.zero_grad()


@pytest.mark.parametrize("has_run", [False, True], ids=["fresh", "has run"])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("recipe", ["delayed", "current", "rowwise"])
def test_a_resumed_run_is_the_same_bit_for_bit(recipe: str, optimizer: str, has_run: bool) -> None:
    """The last step's amaxes, the largest so far, are in what is saved, though no forward has entered them yet."""
    whole, first, second = network(recipe), network(recipe), network(recipe)
    whole_update, first_update, second_update = (OPTIMIZERS[optimizer](it.parameters(), 1e-3) for it in (whole, first, second))
    train(whole, whole_update, range(6))
    train(first, first_update, range(3))
    if has_run:
        train(second, second_update, range(7, 9))
    saved = {name: tensor.clone() for name, tensor in scaling_state(first).items()}
    assert bool(saved) == (recipe == "delayed")
    second.load_state_dict(first.state_dict())
    if hasattr(first_update, "state_dict"):
        second_update.load_state_dict(copy.deepcopy(first_update.state_dict()))
    load_scaling_state(nn.ModuleDict({"module": second}), saved)  # whatever wraps it
    for model, update in ((second, second_update), (first, first_update)):  # and to save changes nothing
        train(model, update, range(3, 6))
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))
        assert torch.equal(whole[0].casts.shared.scaling.history, model[0].casts.shared.scaling.history)


def test_another_recipe_goes_on_with_scales_of_its_own() -> None:
    """The first gradients after `delayed` are as good in `e4m3` as measured ones; E5M2's scales would saturate."""
    first, second, fresh = network("delayed"), network("e4m3"), network("e4m3")
    train(first, torch.optim.SGD(first.parameters(), 1e-4), range(3))
    for model in (second, fresh):
        model.load_state_dict(first.state_dict())
    load_scaling_state(second, scaling_state(first))
    plain = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).to(DEVICE)
    plain.load_state_dict(first.state_dict())
    for model in (second, fresh, plain):
        model(batch(3)).square().sum().backward()
    assert all(site.ready for layer in (second[0], second[2]) for site in (layer.casts.x, layer.casts.dy))
    for ours, measured, exact in zip(second.parameters(), fresh.parameters(), plain.parameters(), strict=True):
        known, unknown = ((it.grad - exact.grad).norm() for it in (ours, measured))
        # Batches that were up to three times as large have left a scale a few times smaller: E4M3 is as exact there.
        assert known < 1.5 * unknown and known < 0.1 * exact.grad.norm()


def test_micro_batches_before_a_step_are_not_in_what_is_saved() -> None:
    model = network()
    train(model, torch.optim.SGD(model.parameters(), 1e-3), range(1))
    whole = {name: value.clone() for name, value in scaling_state(model).items()}
    assert model[0].casts.shared.turn == 1 and whole["0.amax_history"][0].all()
    model(100 * batch(1)).sum().backward()
    assert all(torch.equal(whole[name], value) for name, value in scaling_state(model).items())
    assert model[0].casts.shared.turn == 1


def test_a_state_of_another_model_is_refused() -> None:
    model = network()
    train(model, torch.optim.SGD(model.parameters(), 1e-3), range(2))
    saved = scaling_state(model)
    with pytest.raises(ValueError, match=r"the scaling state of 2: scale is missing"):
        load_scaling_state(network(), {name: it for name, it in saved.items() if name.startswith("0")})
    with pytest.raises(ValueError, match="no layer of this Linear is converted"):
        scaling_state(nn.Linear(16, 16))
    parts = nn.ModuleList((network(), network()))
    with pytest.raises(ValueError, match="names layers of two conversions: convert the whole model at once"):
        scaling_state(parts)


def test_the_state_dict_is_the_one_it_was_both_ways() -> None:
    torch.manual_seed(0)
    plain, model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).to(DEVICE), network()
    train(model, torch.optim.SGD(model.parameters(), 1e-3), range(2))
    assert list(model.state_dict()) == list(plain.state_dict()) and not list(model.buffers())
    plain.load_state_dict(model.state_dict())
    x = batch(9)
    assert torch.equal(plain(x), model.eval()(x))
    other = network()
    other(x)
    other.load_state_dict(plain.state_dict())
    again = network()
    again.load_state_dict(plain.state_dict(), assign=True)
    again(x)
    for it in (other, again):
        assert torch.equal(it[0].casts.weight(it[0].weight, True, False).q.float(), model.train()[0].casts.weight(
            model[0].weight, True, False).q.float())  # fmt: skip


def test_casting_and_moving_the_model_leaves_the_scales_in_fp32() -> None:
    model = network()
    train(model, torch.optim.SGD(model.parameters(), 1e-3), range(2))
    before = model[0].casts.shared.scaling.scale.clone()
    model.bfloat16()
    assert model(batch(0).bfloat16()).dtype == torch.bfloat16
    after = model[0].casts.shared.scaling.scale
    assert after.dtype == torch.float32 and after.shape == before.shape
