"""Converted models on two ranks, gloo and CPU: DDP averages what each rank computes, FSDP2 shards and gathers without a stale cast.

The processes run this file as a script (see the end).
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from nvfp8 import convert, scaling_state

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="gloo and CPU tensors")
STEPS = 4


def network(recipe: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 64), nn.Linear(64, 32, bias=False))
    convert(model, recipe, emulate=True)
    return model


def loss(model: nn.Module, step: int, rank: int, micro: int = 0) -> Tensor:
    """Of 6 tokens whose magnitude differs from rank to rank, so scales do too."""
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(100 * step + 10 * micro + rank)) * (1 + 3 * rank)
    return model(x).square().mean()


def optimizers(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-2, fused=kind == "fused", foreach=kind == "foreach")


def by_hand(recipe: str, rank: int, kind: str, micros: int = 1) -> nn.Module:
    """What DDP does, without it: each rank's own model and scales, gradients averaged, the same update."""
    model = network(recipe)
    optimizer = optimizers(kind, model)
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(micros):
            loss(model, step, rank, micro).backward()
        for p in model.parameters():
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()
        optimizer.step()
    return model


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """But for the order of sums. Equal weights after four steps: a scale or a weight of another step would be 1e-3 off."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def under_ddp(rank: int, recipe: str, kind: str) -> None:
    model = network(recipe)
    wrapped = DistributedDataParallel(model)
    optimizer = optimizers(kind, model)
    for step in range(STEPS):
        optimizer.zero_grad()
        with wrapped.no_sync():
            loss(wrapped, step, rank, 0).backward()
        loss(wrapped, step, rank, 1).backward()
        optimizer.step()
    alone = by_hand(recipe, rank, kind, 2)
    close(model.state_dict(), alone.state_dict())
    mine, its = scaling_state(model), scaling_state(alone)
    close(mine, its)
    if recipe == "delayed":
        # Rank 1's inputs are larger, and stay so: nobody has sent it rank 0's scales.
        scales = [torch.zeros(3) for _ in range(2)]
        dist.all_gather(scales, mine["0.scale"].contiguous())
        assert scales[0][0] > 2 * scales[1][0]


def under_fsdp2(rank: int, recipe: str, kind: str) -> None:
    model = network(recipe)
    names = list(model.state_dict())
    for part in (model[0], model[3]):
        fully_shard(part)
    fully_shard(model)
    assert list(model.state_dict()) == names
    optimizer = optimizers(kind, model)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(model, step, rank).backward()
        optimizer.step()
        assert all(layer.casts._copies is None for layer in (model[0], model[3], model[4]))  # whole weights are not kept
    alone = by_hand(recipe, rank, kind)
    whole = {name: it.full_tensor() if isinstance(it, DTensor) else it for name, it in model.state_dict().items()}
    close(whole, alone.state_dict())
    close(scaling_state(model), scaling_state(alone))


def under_fsdp2_by_hand(rank: int, recipe: str, kind: str) -> None:
    """No optimizer: the shards are updated in place, and what is gathered of them has the version it always had."""
    sharded, plain = network(recipe), network(recipe)
    fully_shard(sharded[0])
    fully_shard(sharded)
    for step in range(2):
        outs = []
        for model in (sharded, plain):
            model.zero_grad()
            outs.append(loss(model, step, 0))  # the same tokens on both ranks
            outs[-1].backward()
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(0.5 * p.grad)
        assert (outs[0] - outs[1]).abs() < 1e-5


def under_fsdp2_mixed(rank: int, recipe: str, kind: str) -> None:
    model = network(recipe)
    for part in (model[0], model[3]):
        fully_shard(part, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    optimizer = optimizers(kind, model)
    first = None
    for _ in range(20):
        optimizer.zero_grad()
        out = loss(model, 0, rank)
        assert out.dtype == torch.bfloat16
        out.backward()
        optimizer.step()
        first = out.item() if first is None else first
    assert out.item() < 0.5 * first


WORK: list[tuple[Callable[..., None], str, str]] = [
    (under_ddp, "delayed", "foreach"), (under_ddp, "rowwise", "fused"), (under_fsdp2, "delayed", "foreach"),
    (under_fsdp2, "delayed", "fused"), (under_fsdp2, "current", "fused"), (under_fsdp2, "rowwise", "foreach"),
    (under_fsdp2_by_hand, "current", "foreach"), (under_fsdp2_mixed, "delayed", "foreach"),
]  # fmt: skip


def test_two_ranks(two_ranks: Callable[..., list[Any]]) -> None:
    """All work in one pair of processes: to start one takes longer than what it has to do."""
    for process in two_ranks(__file__):
        output, error = process.communicate(timeout=300)
        assert process.returncode == 0, error[-3000:]
        assert output.split() == [work.__name__ for work, _, _ in WORK]


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for work, *how in WORK:
        work(dist.get_rank(), *how)
        print(work.__name__, flush=True)
    # Every rank has done and printed everything. Threads of gloo now and then abort a process that ends the usual way after this
    # many reducers and sharded modules (rarely, "terminate called without an active exception"), which is not what is tested.
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)
