"""AdamW over DTensors: FSDP2's shards train as the whole does, torch's distributed checkpoints save, load and reshard its state.

The processes run this file as a script (see the end).
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nvfp8.optim import AdamW, Muon, UpdateEarly
from nvfp8.optim.shards import beside

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="gloo and CPU tensors")
FP8: dict[str, Any] = {"exp_avg_dtype": "e4m3", "exp_avg_sq_dtype": "e4m3", "master_weights": "bf16+8"}
VECTORS: dict[str, Any] = {"exp_avg_dtype": "fp32", "exp_avg_sq_dtype": "fp32"}
SMALL, REFUSED = "over another number of shards", "Size mismatch"


class Gain(nn.Module):
    """One row: of two shards the second is empty."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 128))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 128), Gain()).to(dtype)


def train(model: nn.Module, optimizer: AdamW, steps: int, begin: int = 0) -> list[float]:
    losses = []
    for step in range(begin, begin + steps):
        x = torch.randn(16, 128, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
        loss = nn.functional.mse_loss(model(x).float(), x.roll(1, 1).float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def groups(model: nn.Module, formats: dict[str, Any], vectors: dict[str, Any]) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    matrices, rest = ([pair for pair in named if (pair[1].ndim == 2) == wanted] for wanted in (True, False))
    return [{"params": matrices, **formats}, {"params": rest, **formats, **vectors}]


def fully_sharded(model: nn.Module, *mesh: int) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    made = init_device_mesh("cpu", mesh, mesh_dim_names=("replicas", "shards")[-len(mesh) :])
    for layer in (model[0], model[3]):  # type: ignore[index]
        fully_shard(layer, mesh=made)
    return fully_shard(model, mesh=made)


# What the ranks do


def sequence_parallel(rank: int, out: Path) -> None:
    """A norm over halves of a sequence: its weight is replicated, and its gradient a sum that nobody has made yet."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

    mesh, x = init_device_mesh("cpu", (2,)), torch.randn(4, 8, generator=torch.Generator().manual_seed(5))
    model = parallelize_module(nn.Sequential(nn.LayerNorm(8)), mesh, {"0": SequenceParallel(sequence_dim=0)})
    optimizer = AdamW(model.named_parameters(), lr=1e-2)
    for _ in range(3):
        model(distribute_tensor(x, mesh, [Shard(0)])).to_local().pow(3).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save((model[0].weight.to_local(), optimizer._key(model[0].weight)), out / f"norm{rank}.pt")


def sharded(rank: int, out: Path) -> None:
    for name, formats in (("fp32", {}), ("fp8", FP8)):
        model = fully_sharded(network(torch.bfloat16 if formats else torch.float32), 2)
        optimizer = AdamW(model.named_parameters(), lr=3e-3, **formats)
        losses = train(model, optimizer, 4)
        again = AdamW(model.named_parameters(), lr=3e-3, **formats)
        again.load_state_dict(optimizer.state_dict())
        losses += train(model, again, 2, begin=4)
        weights = {key: value.full_tensor() for key, value in model.state_dict().items()}
        keys = [optimizer._key(p) for p in model.parameters()]
        torch.save({"losses": torch.tensor(losses), "weights": weights, "keys": keys}, out / f"{name}{rank}.pt")
    refusals = []
    for refused in (lambda: Muon([model[0].weight]), lambda: UpdateEarly([again])):  # type: ignore[index]
        try:
            refused()
        except ValueError as error:
            refusals.append(str(error))
    (out / f"refused{rank}").write_text("\n".join(refusals))


def whole_state(optimizer: AdamW) -> dict[str, Tensor]:
    """All of it by name, in whole tensors; FP8 as bytes."""
    found = {}
    for p, entries in optimizer.state.items():
        for what, value in entries.items():
            if isinstance(value, DTensor):
                part = value.to_local()
                if part.element_size() == 1:  # gloo gathers no FP8
                    part = part.view(torch.uint8)
                value = beside(value, part).full_tensor()
            found[f"{optimizer.name_of(p)}.{what}"] = value
    return found


def checkpoints(rank: int, out: Path) -> None:
    """Save with two shards; load with two, and with one on each rank."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, get_state_dict, set_state_dict

    lines = []
    for name, formats, vectors in (("fp32", {}, {}), ("fp8", FP8, VECTORS), ("fp8 vectors", FP8, {})):
        dtype = torch.bfloat16 if formats else torch.float32
        model = fully_sharded(network(dtype), 2)
        optimizer = AdamW(groups(model, formats, vectors), lr=3e-3)
        train(model, optimizer, 3)
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"weights": weights, "state": state}, checkpoint_id=out / name)
        for what, mesh in (("over the same number", (2,)), (SMALL, (2, 1))):
            other = fully_sharded(network(dtype), *mesh)
            again = AdamW(groups(other, formats, vectors), lr=1.0, seed=7)
            weights, state = get_state_dict(other, again)
            try:
                dcp.load({"weights": weights, "state": state}, checkpoint_id=out / name)
            except dcp.api.CheckpointException as error:
                lines.append(f"{name}, {what}: {REFUSED if REFUSED in str(error) else error}")
                continue
            set_state_dict(other, again, model_state_dict=weights, optim_state_dict=state)
            one, two = whole_state(optimizer), whole_state(again)
            same = one.keys() == two.keys() and all(
                torch.equal(value.flatten()[: two[key].numel()], two[key].flatten()) for key, value in one.items()
            )
            rates = [(group["lr"], group["seed"]) for group in again.param_groups] == [(3e-3, 0)] * 2
            lines.append(f"{name}, {what}: {'the same' if same and rates else 'another'}")
        if name == "fp32":  # gloo gathers no FP8
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            full, sharded = get_optimizer_state_dict(model, optimizer, options=options), whole_state(optimizer)
            if rank == 0:
                single = AdamW(groups(network(), {}, {}), lr=1.0)
                single.load_state_dict(full)
                torch.save((sharded, whole_state(single)), out / "whole.pt")
    (out / f"lines{rank}").write_text("\n".join(lines))


# What comes of it


@pytest.fixture
def ranks(two_ranks: Callable[..., list[Any]], tmp_path: Path) -> Callable[[Callable[[int, Path], None]], Path]:
    def run(work: Callable[[int, Path], None]) -> Path:
        for process in two_ranks(__file__, work.__name__, str(tmp_path)):
            _, error = process.communicate(timeout=300)
            assert process.returncode == 0, error
        return tmp_path

    return run


def test_a_gradient_that_is_placed_otherwise_is_brought_to_its_parameters_place(ranks: Callable[..., Path]) -> None:
    out = ranks(sequence_parallel)
    x, norm = torch.randn(4, 8, generator=torch.Generator().manual_seed(5)), nn.LayerNorm(8)
    optimizer = AdamW(norm.named_parameters(), lr=1e-2)
    for _ in range(3):
        norm(x).pow(3).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    keys = []
    for rank in range(2):
        weight, key = torch.load(out / f"norm{rank}.pt", weights_only=False)
        torch.testing.assert_close(weight, norm.weight.detach())
        keys.append(key)
    assert keys[0] == keys[1], "replicas are rounded alike"


def test_fsdp2_shards_train_as_the_whole_model_does(ranks: Callable[..., Path]) -> None:
    out = ranks(sharded)
    whole, small = network(), network(torch.bfloat16)
    losses = train(whole, AdamW(whole.named_parameters(), lr=3e-3), 6)
    low = train(small, AdamW(small.named_parameters(), lr=3e-3, **FP8), 6)
    found = {name: torch.load(out / f"{name}.pt", weights_only=True) for name in ("fp320", "fp321", "fp80", "fp81")}
    for rank in range(2):
        plain, fp8 = found[f"fp32{rank}"], found[f"fp8{rank}"]
        assert plain["losses"].tolist() == pytest.approx(losses, rel=1e-4)
        assert fp8["losses"].tolist() == pytest.approx(low, rel=0.02)
        for name, weight in whole.state_dict().items():
            torch.testing.assert_close(plain["weights"][name], weight, rtol=1e-3, atol=1e-4)
        muon, early = (out / f"refused{rank}").read_text().splitlines()
        assert "is a DTensor: keep it out of fully_shard, or give it to AdamW" in muon
        assert early == "updates in backward are for one process, here are 2: gradients are not summed"
    for first, second in zip(found["fp80"]["keys"], found["fp81"]["keys"], strict=True):
        assert first != second, "shards of one tensor draw other bits"


def test_distributed_checkpoints_hold_every_shards_state_and_reshard_it(ranks: Callable[..., Path]) -> None:
    out = ranks(checkpoints)
    for rank in range(2):
        assert (out / f"lines{rank}").read_text().splitlines() == [
            "fp32, over the same number: the same",
            f"fp32, {SMALL}: the same",
            "fp8, over the same number: the same",
            f"fp8, {SMALL}: the same",
            "fp8 vectors, over the same number: the same",
            f"fp8 vectors, {SMALL}: {REFUSED}",
        ]
    sharded, single = torch.load(out / "whole.pt", weights_only=True)
    assert sharded.keys() == single.keys() and all(torch.equal(value, single[key]) for key, value in sharded.items())


if __name__ == "__main__":
    dist.init_process_group("gloo")
    work = {function.__name__: function for function in (sequence_parallel, sharded, checkpoints)}[sys.argv[1]]
    work(dist.get_rank(), Path(sys.argv[2]))
    # Every rank has done everything. gloo's threads now and then abort a process that ends the usual way on a busy machine
    # ("terminate called without an active exception"), which is not what is tested.
    dist.barrier()
    os._exit(0)
