"""Ownership, and two Gloo processes that must give one process's updates.

The processes run this file as a script (see the end), as torchrun would start it.
"""

import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanochat import parallel
from nanochat.adamw import AdamW
from nanochat.errors import BadInput
from nanochat.muon import Muon
from nanochat.param_groups import owned, ownership

MATRICES = {"q": (8, 8), "k": (8, 8), "fc": (16, 8), "proj": (8, 16), "gate": (4, 4)}
TABLES = {"wte": (10, 8), "ve": (10, 4), "lambda": (1,)}
STEPS = 3


def build() -> tuple[dict[str, torch.nn.Parameter], list[dict[str, Any]]]:
    torch.manual_seed(5)
    params = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in {**MATRICES, **TABLES}.items()}
    params["ve"] = torch.nn.Parameter(params["ve"].detach().bfloat16())
    common = {"lr": 0.05, "weight_decay": 0.1}
    return params, [
        {"kind": "muon", "momentum": 0.9, "beta2": 0.9, **common, **share(params, MATRICES)},
        {"kind": "adamw", "betas": (0.8, 0.95), "eps": 1e-10, "master": False, **common, **share(params, TABLES)},
    ]


def share(params: dict[str, torch.nn.Parameter], names: dict[str, Any]) -> dict[str, Any]:
    return {"param_names": list(names), "params": [params[n] for n in names]}


def gradients(step: int, rank: int, params: dict[str, torch.nn.Parameter]) -> dict[str, Tensor | None]:
    """What `rank` of two finds at `step`; neither finds any for "k" at step 1, only rank 1 for "lambda"."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    made: dict[str, Tensor | None] = {name: torch.randn(p.shape, generator=generator).to(p.dtype) for name, p in params.items()}
    if step == 1:
        made["k"] = None
    if rank == 0:
        made["lambda"] = None
    return made


def train(params: dict[str, torch.nn.Parameter], made: list[dict[str, Any]], ranks: list[int]) -> list[float]:
    """Run the steps on this process's share; returns the global gradient norms."""
    world = 2 if len(ranks) == 1 else 1
    owner, rank = ownership(made, world), ranks[0] if world == 2 else 0
    optimizers = Muon(owned(made, "muon", owner, rank), torch.float32), AdamW(owned(made, "adamw", owner, rank))
    norms = []
    for step in range(STEPS):
        for r in ranks:
            for name, g in gradients(step, r, params).items():
                if g is not None:
                    params[name].grad = g if params[name].grad is None else params[name].grad + g
        parallel.reduce_gradients(params, owner)
        check = parallel.check_gradients(params, owner, torch.tensor(step + 0.25 * sum(ranks)))
        assert check.bad is None
        assert check.loss == (0.25 + 2 * step if world == 2 else step + 0.25)
        norms.append(check.norm)
        for optimizer in optimizers:
            optimizer.step()
        for p in params.values():
            p.grad = None
        before = {name: p._version for name, p in params.items()}
        parallel.broadcast_parameters(params, owner)
        # What was received is another version; what was sent is not, or its FP8 copies would have to be made again.
        assert all((p._version > before[name]) == (world > 1 and owner[name] != rank) for name, p in params.items())
    return norms


def test_two_processes_give_one_processs_updates(two_ranks: Any, tmp_path: Path) -> None:
    for process in two_ranks(__file__, str(tmp_path)):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    params, made = build()
    norms = train(params, made, [0, 1])
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, p in params.items():
        assert torch.equal(results[0][name], results[1][name])
        torch.testing.assert_close(results[0][name], p.detach(), rtol=1e-6, atol=1e-6)
    for result in results:
        assert result["norms"].tolist() == pytest.approx(norms, rel=1e-6)


def test_owners_balance_and_do_not_depend_on_order() -> None:
    sizes = {"a": 5, "b": 5, "c": 4, "d": 3, "e": 3, "f": 0}
    owner = parallel.owners(sizes, 2)
    assert owner == parallel.owners(dict(reversed(sizes.items())), 2)
    assert owner == {"a": 0, "b": 1, "c": 0, "d": 1, "e": 1, "f": 0}
    assert set(parallel.owners(sizes, 1).values()) == {0}
    assert parallel.owners({"a": 1}, 4) == {"a": 0}
    assert parallel.owners({"a": 1, "b": 1, "c": 9}, 2) == {"c": 0, "a": 1, "b": 1}


def test_one_process_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert parallel.init("cpu") == parallel.World(0, 1, torch.device("cpu"))
    p = torch.nn.Parameter(torch.ones(2))
    parallel.reduce_gradients({"p": p}, {"p": 0})
    parallel.broadcast_parameters({"p": p}, {"p": 0})
    parallel.shutdown()
    assert p.grad is None
    assert parallel.any_rank(True) is True
    assert parallel.any_rank(False) is False
    assert parallel.total(torch.ones(2)).tolist() == [1.0, 1.0]
    assert parallel.from_rank_0(lambda: "text") == "text"


def test_one_process_raises_its_own_failure() -> None:
    with pytest.raises(BadInput, match="mine"), parallel.together():
        raise BadInput("mine")
    with pytest.raises(KeyError):
        parallel.agree(KeyError("mine"), flag=True)
    assert parallel.agree(None, flag=True)


def check(grads: dict[str, Tensor | None]) -> parallel.GradientCheck:
    params = {name: torch.nn.Parameter(torch.zeros(3, dtype=g.dtype if g is not None else None)) for name, g in grads.items()}
    for name, g in grads.items():
        params[name].grad = g
    return parallel.check_gradients(params, dict.fromkeys(params, 0), torch.tensor(2.5, dtype=torch.bfloat16))


def test_gradients_are_measured_in_fp32() -> None:
    a, b = torch.tensor([3.0, 0, 0]), torch.tensor([0, 4.0, 12.0]).bfloat16()
    found = check({"a": a, "none": None, "b": b})
    assert (found.bad, found.loss) == (None, 2.5)
    assert found.norm == pytest.approx(13.0, rel=1e-7)
    many = torch.full((3,), 1.0078125).bfloat16()
    assert check({"m": many}).norm == pytest.approx(1.0078125 * math.sqrt(3), rel=1e-6)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_the_first_gradient_that_is_not_finite_is_named(value: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        bad = torch.tensor([1.0, value, 0.0], dtype=dtype)
        found = check({"fine": torch.ones(3), "first": bad, "second": bad.clone()})
        assert found.bad == "first"
        assert not math.isfinite(found.norm)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'.*torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK is ''.*torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, "RANK is 2 of WORLD_SIZE 2"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, "MASTER_ADDR is not set.*torchrun"),
    ],
)
def test_an_environment_that_torchrun_did_not_make(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=message):
        parallel.init("cpu")


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="--device-type must be cuda or cpu, not 'mps'"):
        parallel.init("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match="sees no GPU"):
        parallel.init("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match="process 1 of this machine has no GPU, there are 1"):
        parallel.init("cuda")


def worker(out: Path) -> None:
    """One of two processes: trains its share, tries the small collectives, writes what it ended with."""
    world = parallel.init("cpu")
    params, made = build()
    if world.rank == 1:  # only the broadcast can make these equal again
        with torch.no_grad():
            for p in params.values():
                p.zero_()
    parallel.broadcast_parameters(params, dict.fromkeys(params, 0))
    norms = train(params, made, [world.rank])
    bad = params["q"]  # owned by one rank, reported by both
    bad.grad = torch.full_like(bad, math.nan)
    owner = ownership(made, 2)
    parallel.reduce_gradients(params, owner)
    assert (bad.grad is not None) == (owner["q"] == world.rank)
    assert parallel.check_gradients(params, owner, torch.tensor(0.0)).bad == "q"
    assert parallel.from_rank_0(lambda: f"found by {world.rank}") == "found by 0"
    assert parallel.agree(None, flag=world.rank == 1)
    for ranks, failure in (([1], BadInput("mine")), ([0, 1], BadInput("ours")), ([0], KeyError("a bug"))):
        try:
            parallel.agree(failure if world.rank in ranks else None)
            raise AssertionError("nobody goes on")
        except (BadInput, KeyError) as error:
            assert error is failure and world.rank == ranks[0]  # one speaks
        except SystemExit as exit_:
            assert exit_.code == (2 if isinstance(failure, BadInput) else 1) and world.rank != ranks[0]
    assert parallel.any_rank(world.rank == 1)
    assert not parallel.any_rank(False)
    assert parallel.total(torch.tensor([1.0 + world.rank])).item() == 3.0
    torch.save({"norms": torch.tensor(norms), **{k: p.detach() for k, p in params.items()}}, out / f"{world.rank}.pt")
    assert not parallel.any_rank(False)


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
    os._exit(0)  # gloo's threads now and then abort a process that ends the usual way on a busy machine (docs/log.md)
