"""Muon: momentum whose update is made nearly orthogonal, for every matrix of the blocks.

Per matrix (r x c), the steps and where they come from:
    momentum   m ← m + (1 - μ)(g - m),  x = g + μ(m - g)                      (Nesterov)
    rows       each row of x scaled to the RMS row norm ‖x‖_F / √r            (arXiv 2603.28254)
    polar      x / (1.01 ‖x‖_F + 1e-6), then five Polar Express steps         (arXiv 2505.16932)
    norm       ‖x‖_F set to √min(r, c)                                        (arXiv 2602.21545)
    NorMuon    each row (column if r < c) over the root of an EMA of its mean square, norm kept   (arXiv 2510.05491)
    descend    w ← w - lr·(u + wd·w where u·w ≥ 0),  lr times √max(1, r/c)    (cautious, decoupled decay)

All matrices of one shape go through Polar Express (`nvfp8/polar_express.py`) as one batch, in chunks that keep the workspace
bounded. On either side of it stands one kernel that takes a whole chunk in one launch, gradients and weights where they are,
through a table of addresses (`nvfp8/kernels/muon.py`): stacking them would move 24 bytes more a parameter, and a call for each
matrix made the host the slowest part of a d12 step (docs/log.md). Squares of x are summed before it is there, of what it is made
of, so that it is written once, scaled and in the fp16 that Polar Express works in; NorMuon's after (`nvfp8/kernels/muon_norms.py`).

Bytes a parameter moved by one step, with fp32 gradients and a 16-bit workspace:
    sums of squares of rows                           g 4, and the momentum
    momentum + Nesterov + scale + cast, one kernel    g 4, x 2, and the momentum twice
    Polar Express, beside its GEMMs' operands         "full" 5 (X copied into the GEMM's output) x 4 = 20, "half" and "gram" none
    sums of squares for NorMuon                       2
    descend, one kernel                               x 2, and the weight twice; 2 for FP8 copies where a layer has them
    momentum                 fp32 4    bf16 2    e4m3, e5m2 1.03 (fp32 scales of 128 elements are 3 %)
    weight                   fp32 4    bf16 beside an fp32 master 6    bf16 2    bf16+8 3    bf16+16 4
By "half" and "gram" 34 in all where all is fp32, 23 with an e4m3 momentum and bf16+8 weights, and 20 more by "full"; 2 more for FP8
copies, 4 less with bf16 gradients. At d24 (680 M) 19 are 13 GB, 3.1 ms at the 4.2 TB/s that an H200 copies, beside 13.9 TFLOP of
GEMMs ("half" for square matrices, "gram" for 1:4).

What lasts between two steps at d24, momentum and what is kept beside bf16 weights: 5.1 GiB as fp32 with fp32 masters, 1.3 GiB as
e4m3 with bf16+8, 0.65 GiB as e4m3 with bf16. The workspace is bounded by 0.5 GiB, a quarter of what an FP8 momentum saves there
(1.9 GiB). A chunk takes, for each matrix of d24, square and 1:4: by "full" and "half" products 18 and 45 MiB, by "gram" 27 and 54
MiB. So there is room for 28 and 9 matrices a chunk; 27 and 9 are taken (`polar_express.together`).
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nvfp8.ops import ops
from nvfp8.optim.stored import StoredOptimizer
from nvfp8.polar_express import fastest_products, polar_express, together, worked_in
from nvfp8.reference_optim import Copies
from nvfp8.state import Master, Stored

_WEIGHT, _MOMENTUM = 0, 4  # what a key is for: each is rounded in a kernel of its own, by another one


@dataclass(frozen=True)
class _Stack:
    """The matrices of one shape and dtype in one group, with their state in one buffer each, one slice a matrix."""

    group: dict[str, Any]
    params: list[Tensor]  # n of (r, c)
    views: list[dict[str, Tensor]]  # of the buffers, a matrix each: what `optimizer.state` holds
    momentum: Stored  # (n, r, c), each matrix with its own blocks
    second_moment: Tensor  # (n, r, 1), or (n, 1, c) where r < c; fp32
    kept: Tensor | None  # (n, r, c) beside matrices stored lower than fp32


class _Chunk(NamedTuple):
    """Matrices of a stack that go through Polar Express together."""

    stack: _Stack
    part: slice
    gradients: Sequence[Tensor]
    weights: Sequence[Tensor]
    copies: list[Copies | None]
    numbers: Tensor  # (matrices, NUMBERS) fp32, as `Muon._rates` has them behind two keys


def _alike(params: list[Tensor]) -> Collection[list[Tensor]]:
    """Matrices sorted by shape, dtype and device."""
    sorted_: dict[tuple[torch.Size, torch.dtype, torch.device], list[Tensor]] = {}
    for p in params:
        sorted_.setdefault((p.shape, p.dtype, p.device), []).append(p)
    return sorted_.values()


class Muon(StoredOptimizer):
    """Muon for fp32 and bf16 matrices. Each is needed whole: a sharded one is refused.

    `state` holds views of buffers, one a shape. What is put there instead (moved to another device and back, say) is copied into
    them at the next update; memory is not saved by moving it away.
    """

    coded = ("momentum",)
    purposes = (_WEIGHT, _MOMENTUM)

    def __init__(
        self, params: Any, lr: float = 0.02, momentum: float = 0.95, beta2: float = 0.9, weight_decay: float = 0.0,
        *, momentum_dtype: str = "fp32", master_weights: str = "fp32", compute_dtype: torch.dtype = torch.bfloat16,
        workspace: int = 2**29, seed: int = 0,
    ) -> None:  # fmt: skip
        """Allocate the state of every matrix, as zeros, and what is kept beside bf16 ones.

        Args:
            params: as for any torch optimizer; matrices.
            lr: learning rate, of which a matrix of r > c rows takes √(r/c).
            momentum: μ.
            beta2: of NorMuon's mean squares.
            weight_decay: wd.
            momentum_dtype: how the momentum is stored, a key of `nvfp8.state.STATE_DTYPES`.
            master_weights: what is kept beside bf16 matrices, a key of `nvfp8.state.MASTERS`; fp32 ones are whole.
            compute_dtype: of Polar Express: bf16, or fp32.
            workspace: bytes that a chunk of matrices may take on top of the state; one matrix is always taken.
            seed: of stochastic rounding; with the step and a matrix's name it says how an element is rounded.

        Raises:
            ValueError: no format is called so, a parameter is no whole contiguous matrix in fp32 or bf16, or a rate cannot be.
        """
        self.compute_dtype, self.workspace = compute_dtype, workspace
        self._stacks: list[_Stack] = []
        defaults = {
            "lr": lr, "momentum": momentum, "beta2": beta2, "weight_decay": weight_decay, "momentum_dtype": momentum_dtype,
            "master_weights": master_weights, "seed": seed,
        }  # fmt: skip
        super().__init__(params, defaults)

    def _allocate(self, group: dict[str, Any], kept: Master) -> None:
        """Sort a group's matrices by shape and allocate their state."""
        for p in group["params"]:
            if p.ndim != 2 or not p.numel():
                raise ValueError(f"Muon takes matrices, {self._names[p]} has shape {tuple(p.shape)}")
            if hasattr(p, "placements"):
                raise ValueError(
                    f"Muon takes whole matrices, {self._names[p]} is a DTensor: keep it out of fully_shard, or give it to AdamW"
                )
        stacks = []
        for params in _alike(group["params"]):
            n, (r, c), device = len(params), params[0].shape, params[0].device
            momentum = self._codec(group, "momentum").allocate((n, r, c), device, stacked=True)
            second_moment = torch.zeros((n, r, 1) if r >= c else (n, 1, c), dtype=torch.float32, device=device)
            beside = [rest for rest in (kept.allocate(p.detach()) for p in params) if rest is not None]
            stacks.append(self._stack(group, params, momentum, second_moment, torch.stack(beside) if beside else None))
        self._stacks += stacks

    def _stack(
        self, group: dict[str, Any], params: list[Tensor], momentum: Stored, second_moment: Tensor, kept: Tensor | None
    ) -> _Stack:
        views = []
        for i, p in enumerate(params):
            scale, step = None if momentum.scale is None else momentum.scale[i], self.state.get(p, {}).get("step")
            self._keep(p, {"momentum": Stored(momentum.data[i], scale)}, None if kept is None else kept[i])
            self.state[p]["second_moment"] = second_moment[i]
            views.append({what: value for what, value in self.state[p].items() if what != "step"})
            if step is not None:
                self.state[p]["step"] = step
        return _Stack(group, params, views, momentum, second_moment, kept)

    def __getstate__(self) -> dict[str, Any]:
        """What is copied or pickled; stacks are made anew of the state in it."""
        return {**super().__getstate__(), "compute_dtype": self.compute_dtype, "workspace": self.workspace}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become what was copied or pickled."""
        super().__setstate__(state)
        self._stacks = []
        for group in self.param_groups:
            for params in _alike(group["params"]):
                every = [self.state[p] for p in params]
                buffers = {what: torch.stack([entries[what] for entries in every]) for what in every[0] if what != "step"}
                momentum = Stored(buffers["momentum"], buffers.get("momentum.scale"))
                kept = buffers.get("master", buffers.get("remainder"))
                self._stacks.append(self._stack(group, params, momentum, buffers["second_moment"], kept))

    def _adopt(self, stack: _Stack, part: slice) -> None:
        """Copy into a stack what a user has put into `state` in the place of its views."""
        for p, views in zip(stack.params[part], stack.views[part], strict=True):
            entries = self.state[p]
            for what, view in views.items():
                value = entries.get(what)
                if value is view:
                    continue
                if value is None or value.shape != view.shape or value.dtype != view.dtype:
                    made = f"{view.dtype} {tuple(view.shape)}"
                    raise ValueError(f"{what} in the state of {self._names[p]} is not the {made} that was made")
                view.copy_(value)
                entries[what] = view

    def parts(self) -> list[list[Tensor]]:
        """The chunks of stacks that go through Polar Express together."""
        return [
            stack.params[i : i + size]
            for stack in self._stacks
            for size in (self._chunk(stack),)
            for i in range(0, len(stack.params), size)
        ]

    def _chunk(self, stack: _Stack) -> int:
        """Return how many matrices of a stack go through Polar Express at once."""
        n, r, c = stack.momentum.data.shape
        return together(n, self.workspace, r, c, self.compute_dtype, self._products(stack))

    def _products(self, stack: _Stack) -> str:
        """How Polar Express is computed for a stack."""
        _, r, c = stack.momentum.data.shape
        device = stack.momentum.data.device
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        return fastest_products(r, c, self.compute_dtype, capability)

    def fixed(self) -> object:
        """See `StoredOptimizer`; the workspace decides on chunks."""
        return super().fixed(), self.workspace, self.compute_dtype

    def _ordered(self, given: Sequence[tuple[Tensor, Tensor]]) -> Sequence[tuple[Tensor, Tensor]]:
        gradients = dict(given)
        return [(p, gradients[p]) for stack in self._stacks for p in stack.params if p in gradients]

    def _kind(self, parameter: Tensor) -> object:
        return parameter.shape

    def _rates(self, parameter: Tensor, group: dict[str, Any], steps: int) -> tuple[float, ...]:
        mu, (r, c) = float(group["momentum"]), parameter.shape
        lr = float(group["lr"]) * math.sqrt(max(1, r / c))
        return 1 - mu, mu, 1 - float(group["beta2"]), lr, lr * float(group["weight_decay"])

    def _prepared(
        self, given: Sequence[tuple[Tensor, Tensor]], written: Mapping[Tensor, Copies], numbers: Mapping[torch.device, Tensor]
    ) -> Callable[[], None]:
        gradients, chunks, row = dict(given), list[_Chunk](), 0
        for stack, part in self._neighbours(gradients):
            self._adopt(stack, part)
            params = stack.params[part]
            copies, passes, end = [written.get(p) for p in params], ops(params[0]), row + len(params)
            found = passes.addressed([gradients[p] for p in params])
            weights = passes.addressed([p.detach() for p in params], copies)
            chunks.append(_Chunk(stack, part, found, weights, copies, numbers[params[0].device][row:end]))
            row = end

        def launch() -> None:
            for chunk in chunks:
                self._descend(chunk)

        return launch

    def _neighbours(self, gradients: Collection[Tensor]) -> Iterator[tuple[_Stack, slice]]:
        """What goes through Polar Express together: matrices side by side that have gradients, within a chunk."""
        for stack in self._stacks:
            n, size = len(stack.params), self._chunk(stack)
            start = 0
            while start < n:
                end = start
                while end < min(n, start - start % size + size) and stack.params[end] in gradients:
                    end += 1
                if end > start:
                    yield stack, slice(start, end)
                start = max(end, start + 1)

    def _descend(self, chunk: _Chunk) -> None:
        """One step of a chunk's matrices."""
        stack, part = chunk.stack, chunk.part
        momentum, scales = (None if buffer is None else buffer[part] for buffer in stack.momentum)
        assert momentum is not None
        products = self._products(stack)
        dtype, factor = worked_in(products, self.compute_dtype)
        x = torch.empty(momentum.shape, dtype=dtype, device=momentum.device)
        passes, keys = ops(x), chunk.numbers.view(torch.int32)
        take, mu, take2, lr, lr_wd = chunk.numbers[0, 2:7].unbind()  # a stack is of one group and one shape
        rows = passes.equilibrating_scale(chunk.gradients, momentum, scales, take, mu)
        passes.muon_nesterov_(chunk.gradients, momentum, scales, x, take, mu, keys[:, 1], rows, factor)
        x = polar_express(x, products, lifted=True)
        scale = passes.normuon_scale(x, stack.second_moment[part], take2)
        kept = None if stack.kept is None else stack.kept[part]
        passes.muon_descend_(chunk.weights, kept, x, scale, lr, lr_wd, keys[:, 0], chunk.copies)
