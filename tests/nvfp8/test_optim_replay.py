"""A step's launches made again with other numbers are a step: on a CPU the launches themselves are repeated in a graph's place."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nvfp8 import reference
from nvfp8.optim import AdamW, Muon
from nvfp8.optim.stored import StoredOptimizer
from nvfp8.optim.update import Replayed, repeatable

kernels = pytest.importorskip("nvfp8.kernels", reason="Triton is not installed")

FORMATS: list[dict[str, Any]] = [
    {"dtype": torch.float32, "state": "fp32", "master": "fp32"},
    {"dtype": torch.bfloat16, "state": "e4m3", "master": "bf16+8"},
    {"dtype": torch.bfloat16, "state": "bf16", "master": "bf16"},
]


class Model:
    """Matrices for Muon and vectors and a table for AdamW, with gradients that stay where they are."""

    def __init__(self, dtype: torch.dtype, state: str, master: str):
        generator = torch.Generator().manual_seed(0)
        shapes = {"a": (12, 40), "b": (40, 12), "c": (12, 40), "d": (24, 24), "e": (12, 40), "table": (30, 8), "one": (1,)}
        self.parameters = {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()}
        first, second = ([(n, p) for n, p in self.parameters.items() if (len(n) == 1) is single] for single in (False, True))
        self.adamw = AdamW(first, lr=0.1, exp_avg_dtype=state, exp_avg_sq_dtype=state, master_weights=master)
        # Of (12, 40) two go together, and one alone.
        self.muon = Muon(
            second, momentum_dtype=state, master_weights=master, compute_dtype=torch.float32, workspace=2 * 4 * (2 * 480 + 2 * 144)
        )
        self.optimizers: list[StoredOptimizer] = [self.adamw, self.muon]
        for p in self.parameters.values():
            p.grad = torch.empty_like(p)

    def set(self, step: int) -> None:
        """Gradients and rates of a step."""
        generator = torch.Generator().manual_seed(1 + step)
        for p in self.parameters.values():
            assert p.grad is not None
            p.grad.copy_(torch.randn(p.shape, generator=generator))
        self.adamw.param_groups[0].update(lr=0.1 / (1 + step), betas=(0.8 + 0.01 * step, 0.95), weight_decay=0.01 * step)
        self.muon.param_groups[0].update(lr=0.02 * (1 + step), momentum=0.85 + 0.01 * step, weight_decay=0.1 * step, beta2=0.9)

    def everything(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = dict(self.parameters)
        for optimizer in self.optimizers:
            for p, state in optimizer.state.items():
                found |= {f"{optimizer.name_of(p)}.{what}": value for what, value in state.items()}
        return found


def assert_equal(one: Model, other: Model) -> None:
    for (name, x), (_, y) in zip(one.everything().items(), other.everything().items(), strict=True):
        assert x.dtype == y.dtype and torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8)), name


def again(launch: Callable[[], None]) -> Callable[[], None]:
    """In a graph's place: what was launched, launched again; nothing is run while it is captured."""
    return launch


def not_now(launch: Callable[[], None]) -> Callable[[], None]:
    raise AssertionError("a second capture")


@pytest.mark.parametrize("module", [reference, kernels], ids=["twins", "kernels"])
@pytest.mark.parametrize("formats", FORMATS, ids=lambda f: f["state"])
def test_replayed_steps_are_steps(formats: dict[str, Any], module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for where in ("adamw", "muon"):
        monkeypatch.setattr(f"nvfp8.optim.{where}.ops", lambda x: module)
    monkeypatch.setattr("nvfp8.polar_express.ops", lambda x: module)
    one, other = Model(**formats), Model(**formats)
    replayed = Replayed(other.optimizers)
    assert [len(update._parameters) for update in replayed._updates] == [2, 5]
    for step in range(4):
        one.set(step), other.set(step)
        versions = {name: p._version for name, p in other.parameters.items()}
        for optimizer in one.optimizers:
            optimizer.step()
        if step == 2:  # rates of a step that is not made
            other.set(9), replayed.prepare(), other.set(step)
        assert replayed.step(again if step == 0 else not_now, replayed.prepare() if step == 1 else None)
        assert_equal(one, other)
        for name, p in other.parameters.items():
            assert p._version == one.parameters[name]._version > versions[name]
    assert {int(state["step"]) for optimizer in other.optimizers for state in optimizer.state.values()} == {4}


@pytest.mark.parametrize("formats", FORMATS[:2], ids=lambda f: f["state"])
def test_state_that_is_loaded_goes_on_in_the_same_launches(formats: dict[str, Any]) -> None:
    """It is copied to where state lies; steps, by which rounding and bias corrections go, come along."""
    one, other = Model(**formats), Model(**formats)
    replayed = Replayed(other.optimizers)
    for _ in range(3):
        other.set(5)  # elsewhere than the one, and then back to where that is
        replayed.step(again)
    for step in range(2):
        one.set(step)
        for optimizer in one.optimizers:
            optimizer.step()
    with torch.no_grad():
        for name, p in other.parameters.items():
            p.copy_(one.parameters[name])
    for mine, theirs in zip(other.optimizers, one.optimizers, strict=True):
        mine.load_state_dict(theirs.state_dict())
    one.set(7), other.set(7)
    for optimizer in one.optimizers:
        optimizer.step()
    assert replayed.step(not_now)
    assert_equal(one, other)


def other_gradient(model: Model) -> None:
    p = model.parameters["c"]
    assert p.grad is not None
    p.grad = p.grad.clone()


def gradient_of_another_type(model: Model) -> None:
    p = model.parameters["c"]
    assert p.grad is not None
    p.grad = p.grad.double()


def no_gradient(model: Model) -> None:
    model.parameters["one"].grad = None


def strided_gradient(model: Model) -> None:
    p = model.parameters["d"]
    assert p.grad is not None
    p.grad = p.grad.t()


def other_state(model: Model) -> None:
    state = model.muon.state[model.parameters["b"]]
    state["second_moment"] = state["second_moment"].clone()


def other_master(model: Model) -> None:
    state = model.adamw.state[model.parameters["table"]]
    state["master"] = state["master"].clone()


def other_weight(model: Model) -> None:
    model.parameters["d"].data = model.parameters["d"].data.clone()


def other_group(model: Model) -> None:
    p = nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    model.adamw.add_param_group({"params": [("more", p)]})


def other_workspace(model: Model) -> None:
    model.muon.workspace = 1


def other_rounding(model: Model) -> None:
    model.adamw.param_groups[0]["stochastic"] = False


IMPOSSIBLE = (gradient_of_another_type, no_gradient, strided_gradient)


@pytest.mark.parametrize(
    "change",
    [other_gradient, other_state, other_master, other_weight, other_group, other_workspace, other_rounding, *IMPOSSIBLE],
    ids=lambda change: change.__name__,
)
def test_what_moves_is_seen(change: Callable[[Model], None]) -> None:
    model = Model(torch.bfloat16, "bf16", "fp32")
    replayed = Replayed(model.optimizers)
    model.set(0)
    assert replayed.step(again) and replayed.step(not_now)
    if change is gradient_of_another_type:
        model.parameters["c"].grad_dtype = None  # any
    change(model)
    before = {name: x.clone() for name, x in model.everything().items()}
    assert replayed.prepare() is None and not replayed.step(not_now)
    assert all(torch.equal(x, before[name]) for name, x in model.everything().items()), "a step that is refused does nothing"
    assert repeatable(model.optimizers) == (change not in IMPOSSIBLE)
