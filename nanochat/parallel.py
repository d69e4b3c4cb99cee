"""Several processes on one model: every parameter has one owner, who alone keeps its optimizer state.

After the last micro-batch each gradient is summed to its owner; the owner updates; the new weights are broadcast. That
moves as many bytes as a reduce-scatter and an all-gather (ZeRO-1, arXiv 1910.02054), but cuts no tensor in two: Muon
needs whole matrices, and an optimizer here never knows that there are other processes. Gradients are summed, so the
loss of each process must already be divided by the number of processes. For one process everything here does nothing.

A process that fails alone must not leave the others waiting in a collective: they meet in `agree`, and all end.
"""

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat import errors
from nanochat.errors import BadInput


@dataclass(frozen=True)
class World:
    """This process among all: its rank, how many there are, and its device."""

    rank: int
    size: int
    device: torch.device


def _environment(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise BadInput(f"{name} is {text!r} but WORLD_SIZE is set; start several processes with torchrun")
    return int(text)


def init(device_type: str = "") -> World:
    """Join the processes that torchrun started (NCCL on cuda, Gloo on cpu); without torchrun there is one process.

    Args:
        device_type: "cuda" or "cpu"; "" takes cuda where there is one.

    Raises:
        BadInput: no such device, more processes than GPUs, or an environment that torchrun did not make.
    """
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    if device_type not in ("cuda", "cpu"):
        raise BadInput(f"--device-type must be cuda or cpu, not {device_type!r}")
    if device_type == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device-type cuda: this PyTorch sees no GPU; use --device-type cpu")
    several = "WORLD_SIZE" in os.environ
    size = _environment("WORLD_SIZE") if several else 1
    rank, local = (_environment("RANK"), _environment("LOCAL_RANK")) if several else (0, 0)
    if rank >= size:
        raise BadInput(f"RANK is {rank} of WORLD_SIZE {size}; start several processes with torchrun")
    device = torch.device("cpu")
    if device_type == "cuda":
        if local >= torch.cuda.device_count():
            raise BadInput(f"process {local} of this machine has no GPU, there are {torch.cuda.device_count()}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise BadInput(f"{name} is not set but WORLD_SIZE is; start several processes with torchrun")
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    return World(rank, size, device)


def _world() -> tuple[int, int]:
    """Return (rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def shutdown() -> None:
    """Leave the group; the last call of a run."""
    if dist.is_initialized():
        dist.destroy_process_group()


def total(value: Tensor) -> Tensor:
    """Sum `value`, a tensor on this process's device, over all processes, in place; return it. Nobody waits."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def any_rank(flag: bool) -> bool:
    """Return whether `flag` is true on any process; the host waits for it."""
    return agree(None, flag)


def agree(failure: Exception | None, flag: bool = False, group: dist.ProcessGroup | None = None) -> bool:
    """Return whether `flag` is true on any process, if no process has met a failure; else none of them returns.

    The first rank with a failure raises it, the only one to speak; the others exit in silence with the same status.

    Args:
        failure: what this process met since the processes last agreed.
        flag: any question that can travel along.
        group: of all processes; None for the one that `init` made.
    """
    if not dist.is_initialized():
        if failure is not None:
            raise failure
        return flag
    rank, world = _world()
    told = torch.zeros(world + 1, device="cuda" if dist.get_backend(group) == "nccl" else "cpu")
    told[rank] = 0 if failure is None else errors.status(failure)
    told[world] = float(flag)
    dist.all_reduce(told, group=group)
    *statuses, flags = told.tolist()
    first = next((r for r, status in enumerate(statuses) if status), None)
    if first is not None:
        if failure is not None and first == rank:
            raise failure
        sys.exit(int(statuses[first]))
    return flags > 0


@contextmanager
def together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """What any process fails with in this block ends all of them at its end, as in `agree`, instead of leaving them waiting.

    Every process enters the block, which must not wait for another: no collective, no other `together`.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    agree(failure, group=group)


def from_rank_0(work: Callable[[], str]) -> str:
    """Return on every process what `work` returns on rank 0, where alone it runs; its failure ends all of them."""
    rank, world = _world()
    box = [""]
    with together():
        if rank == 0:
            box[0] = work()
    if world > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def owners(sizes: Mapping[str, int], world: int) -> dict[str, int]:
    """Return the owning rank of each name so that every rank gets about as many elements.

    Greedy: the largest first, each to the rank with the least so far. Equal sizes go by name, so that every process
    comes to the same answer.
    """
    loads = [0] * world
    result = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        result[name] = loads.index(min(loads))
        loads[result[name]] += sizes[name]
    return result


def reduce_gradients(parameters: Mapping[str, Tensor], owner: Mapping[str, int]) -> None:
    """Sum each parameter's gradient over all processes into its owner's `.grad`; elsewhere `.grad` becomes None.

    A gradient that a process lacks counts as zeros. All transfers are in flight together; `parameters` must come in the
    same order everywhere, as `named_parameters` gives them.
    """
    rank, world = _world()
    if world == 1:
        return
    pending = []
    for name, p in parameters.items():
        p.grad = torch.zeros_like(p, dtype=p.grad_dtype) if p.grad is None else p.grad.contiguous()
        pending.append(dist.reduce(p.grad, dst=owner[name], op=dist.ReduceOp.SUM, async_op=True))
    for work in pending:
        work.wait()
    for name, p in parameters.items():
        if owner[name] != rank:
            p.grad = None  # what a reduction leaves here is no gradient


@torch.no_grad()
def broadcast_parameters(parameters: Mapping[str, Tensor], owner: Mapping[str, int]) -> None:
    """Copy each parameter from its owner to all processes, in place. Also makes them equal after initialization.

    Raises:
        ValueError: a parameter is not contiguous, which a broadcast cannot write into.
    """
    rank, world = _world()
    if world == 1:
        return
    pending = []
    for name, p in parameters.items():
        if not p.is_contiguous():
            raise ValueError(f"the parameter {name} is not contiguous")
        pending.append(dist.broadcast(p.detach(), src=owner[name], async_op=True))
    for work in pending:
        work.wait()
    # No collective does. What a process owns has not changed: FP8 copies of it that its optimizer has written stay good.
    torch.autograd.graph.increment_version([p for name, p in parameters.items() if owner[name] != rank])


@dataclass(frozen=True)
class GradientCheck:
    """What `check_gradients` found, equal on all processes.

    Attributes:
        norm: L2 norm of all gradients together; inf or nan if one of them is.
        bad: name of the first parameter whose gradient is not finite, None if all are.
        loss: sum of the processes' losses.
    """

    norm: float
    bad: str | None
    loss: float


def check_gradients(parameters: Mapping[str, Tensor], owner: Mapping[str, int], loss: Tensor) -> GradientCheck:
    """Measure the summed gradients, and bring the loss along: a step's one transfer to the host, which waits here.

    One read of every gradient in fp32 (4.1 GB at d24 with fp32 gradients of matrices: 1 ms), one number a tensor. With
    several processes each measures what it owns, after `reduce_gradients`, and one all-reduce joins the numbers. No
    gradient counts as 0. A norm over 1.8e19, whose square fp32 cannot hold, counts as not finite.

    Args:
        parameters: all of the model's, by name, in the same order on every process.
        owner: by name.
        loss: 0-D, this process's share of the step's loss.
    """
    rank, _ = _world()
    by_dtype: dict[torch.dtype, dict[int, Tensor]] = {}  # one fused launch takes only one dtype
    for i, (name, p) in enumerate(parameters.items()):
        if p.grad is not None and owner[name] == rank:
            by_dtype.setdefault(p.grad.dtype, {})[i] = p.grad
    numbers = [loss.detach().new_zeros((), dtype=torch.float32)] * len(parameters)
    for gradients in by_dtype.values():
        measured = torch._foreach_norm(list(gradients.values()), 2, dtype=torch.float32)
        for i, norm in zip(gradients, measured, strict=True):
            numbers[i] = norm
    *norms, loss_sum = total(torch.stack([*numbers, loss.detach().float()])).tolist()
    bad = next((name for name, norm in zip(parameters, norms, strict=True) if not math.isfinite(norm)), None)
    return GradientCheck(math.hypot(*norms) if bad is None else sum(norms), bad, loss_sum)
