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
matrix made the host the slowest part of a d12 step (docs/log.md). What lies between and is not a GEMM works on row sums.

Bytes a parameter moved by one step, with fp32 gradients and a 16-bit workspace ("full" products):
    momentum + Nesterov + cast, one kernel            g 4, x 2, and the momentum twice
    row norms; rows scaled                            2; 2 + 2                   6
    Polar Express                                     5 (X copied into the GEMM's output) x 4, the rest is GEMM   20
    sums of squares for NorMuon                       2                          2
    descend, one kernel                               x 2, and the weight twice
    momentum                 fp32 4    bf16 2    e4m3, e5m2 1.03 (fp32 scales of 128 elements are 3 %)
    weight                   fp32 4    bf16 beside an fp32 master 6 (written; read as 4)    bf16 2    bf16+8 3    bf16+16 4
52 in all where all is fp32, 44 with an e4m3 momentum and bf16+8 weights. At d24 (680 M) that is 35 and 30 GB, 8.4 and 7.1 ms at
4.2 TB/s, beside 39 ms of GEMMs (26.1 TFLOP). With bf16 gradients 2 bytes less.

What lasts between two steps at d24, momentum and what is kept beside bf16 weights: 5.1 GiB as fp32 with fp32 masters, 1.3 GiB as
e4m3 with bf16+8, 0.65 GiB as e4m3 with bf16. The workspace is bounded by 0.5 GiB, a quarter of what an FP8 momentum saves there
(1.9 GiB). A chunk takes, for each matrix of d24, square and 1:4: by "full" and "half" products 18 and 45 MiB (28 and 11 matrices
a chunk), by "gram" 27 and 54 MiB (18 and 9).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from nanochat.errors import BadInput
from nanochat.optimizer import NamedOptimizer, gradient
from nvfp8.ops import ops
from nvfp8.polar_express import fastest_products, polar_express, room
from nvfp8.rounding import BLOCK, key
from nvfp8.state import Codec, Master, Stored, codec, codec_of, read_weight, write_weight
from nvfp8.state import master as master_named

# What is rounded stochastically, as part of a key.
_MOMENTUM, _WEIGHT = 0, 1


def _equilibrate_(x: Tensor) -> None:
    """Scale the rows of each matrix of x (n, r, c) to equal norm and the whole to norm 1/1.01, in place."""
    row_norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # (n, r, 1)
    unit = 1 / row_norm.clamp_min(1e-6)
    rms = torch.linalg.vector_norm(row_norm, dim=-2, keepdim=True) / math.sqrt(x.size(-2))  # (n, 1, 1)
    norm = rms * torch.linalg.vector_norm(row_norm * unit, dim=-2, keepdim=True)  # of the scaled matrix
    x.mul_(rms * unit / (1.01 * norm + 1e-6))


def _normuon_scale(x: Tensor, second_moment: Tensor, beta2: float) -> Tensor:
    """Update `second_moment` in place; return what x (n, r, c) is to be multiplied by, of second_moment's shape.

    It holds the factor to norm √min(r, c) too. Both need no more of x than sums of squares over one axis.
    """
    axis = -1 if second_moment.size(-1) == 1 else -2
    square = torch.linalg.vector_norm(x, dim=axis, keepdim=True, dtype=torch.float32).square()
    to_norm = math.sqrt(min(x.shape[-2:])) / square.sum(dim=(-2, -1), keepdim=True).sqrt().clamp_min(1e-6)
    square = square * to_norm.square()
    second_moment.lerp_(square / x.size(axis), 1 - beta2)
    root = second_moment.clamp_min(1e-10).rsqrt()
    before = square.sum(dim=(-2, -1), keepdim=True).sqrt()
    after = (square * root.square()).sum(dim=(-2, -1), keepdim=True).sqrt().clamp_min(1e-10)
    scale: Tensor = to_norm * root * (before / after)
    return scale


@dataclass(frozen=True)
class _Stack:
    """The matrices of one shape and dtype in one group, with their state in one buffer each, one slice a matrix."""

    names: list[str]
    params: list[Tensor]  # n of (r, c)
    momentum: Stored  # (n, r, c), each matrix with its own blocks
    second_moment: Tensor  # (n, r, 1), or (n, 1, c) where r < c; fp32
    kept: Tensor | None  # (n, r, c) beside matrices stored lower than fp32


def _stacks(group: dict[str, Any], momentum: Codec, kept: Master) -> list[_Stack]:
    """Sort a group's matrices by shape and allocate their state."""
    by_shape: dict[tuple[torch.Size, torch.dtype], list[tuple[str, Tensor]]] = {}
    for name, p in zip(group["names"], group["params"], strict=True):
        if p.ndim != 2:
            raise ValueError(f"Muon takes matrices, {name} has shape {tuple(p.shape)}")
        by_shape.setdefault((p.shape, p.dtype), []).append((name, p))
    stacks = []
    for ((r, c), _), members in by_shape.items():
        n, device, params = len(members), members[0][1].device, [p for _, p in members]
        second_moment = torch.zeros((n, r, 1) if r >= c else (n, 1, c), dtype=torch.float32, device=device)
        beside = [rest for rest in (kept.allocate(p) for p in params) if rest is not None]
        stacks.append(
            _Stack(
                [name for name, _ in members], params, momentum.allocate((n, r, c), device, stacked=True), second_moment,
                torch.stack(beside) if beside else None,
            )
        )  # fmt: skip
    return stacks


class Muon(NamedOptimizer):
    """Muon over groups that each hold lr, momentum, beta2 and weight_decay."""

    kind = "muon"

    def __init__(
        self,
        groups: list[dict[str, Any]],
        compute_dtype: torch.dtype,
        workspace: int = 2**29,
        state: str = "fp32",
        master: str = "fp32",
        seed: int = 0,
    ) -> None:
        """Allocate the state of every matrix, as zeros.

        Args:
            groups: `params` (contiguous matrices), parallel `names`, lr, momentum, beta2, weight_decay.
            compute_dtype: of Polar Express: bf16 where the run's precision computes in bf16 or lower, else fp32.
            workspace: bytes that a chunk of matrices may take on top of the state; one matrix is always taken.
            state: how the momentum is stored, a key of `nvfp8.state.STATE_DTYPES`.
            master: what is kept beside matrices stored as bf16, a key of `nvfp8.state.MASTERS`; fp32 ones are their own.
            seed: of stochastic rounding; with the step and a matrix's name it says how an element is rounded, on any rank.

        Raises:
            ValueError: names do not match parameters, a parameter is not a matrix, or no format is called so.
        """
        super().__init__(groups)
        self.compute_dtype = compute_dtype
        self.workspace = workspace
        self.seed = seed
        self._stacks = [_stacks(group, codec(state), master_named(master)) for group in self.param_groups]

    def named_state(self) -> dict[str, Tensor]:
        """Return what is stored of every matrix, as it is.

        `<name>.momentum` (r, c) and in FP8 its `.momentum.scale` (blocks,), `.second_moment` (r, 1) or (1, c), and what is kept
        beside the weight, (r, c): `.master` in fp32, `.remainder` in int8 or int16.
        """
        result: dict[str, Tensor] = {}
        for stack in (stack for stacks in self._stacks for stack in stacks):
            buffers = {"momentum": stack.momentum.data, "momentum.scale": stack.momentum.scale}
            beside = "master" if stack.kept is not None and stack.kept.dtype == torch.float32 else "remainder"
            for what, buffer in {**buffers, "second_moment": stack.second_moment, beside: stack.kept}.items():
                if buffer is not None:
                    result.update({f"{name}.{what}": buffer[i] for i, name in enumerate(stack.names)})
        return result

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no line search here
        """Update every matrix from its gradient."""
        self.steps += 1
        for group, stacks in zip(self.param_groups, self._stacks, strict=True):
            for stack in stacks:
                n, size = len(stack.params), self._chunk(stack)
                for start in range(0, n, size):
                    self._update(stack, slice(start, min(start + size, n)), group)
        self.mark_changed()

    def _chunk(self, stack: _Stack) -> int:
        """Return how many matrices of a stack go through Polar Express at once; chunks come out nearly equal."""
        n, r, c = stack.momentum.data.shape
        products = fastest_products(r, c, self.compute_dtype)
        chunks = math.ceil(n / max(1, self.workspace // room(r, c, self.compute_dtype, products)))
        return math.ceil(n / chunks)

    def _update(self, stack: _Stack, part: slice, group: dict[str, Any]) -> None:
        """One step of the matrices `part` of a stack."""
        names, params = stack.names[part], stack.params[part]
        momentum, scales = (None if buffer is None else buffer[part] for buffer in stack.momentum)
        assert momentum is not None
        x = torch.empty(momentum.shape, dtype=self.compute_dtype, device=momentum.device)
        passes, mu, (r, c) = ops(x), group["momentum"], momentum.shape[1:]
        keys = None if scales is None else self._keys(names, _MOMENTUM)
        passes.muon_nesterov_([gradient(p) for p in params], momentum, scales, x, 1 - mu, mu, keys)
        _equilibrate_(x)
        x = polar_express(x, fastest_products(r, c, self.compute_dtype))
        scale = _normuon_scale(x, stack.second_moment[part], group["beta2"])
        lr = group["lr"] * math.sqrt(max(1, r / c))
        kept = None if stack.kept is None else stack.kept[part]
        keys = self._keys(names, _WEIGHT) if params[0].dtype == torch.bfloat16 else None
        passes.muon_descend_([p.detach() for p in params], kept, x, scale, lr, lr * group["weight_decay"], keys)

    def _keys(self, names: list[str], purpose: int) -> list[int]:
        """Keys of this step's rounding: a matrix is known by its name, whichever process owns it and wherever it is stacked."""
        return [key(self.seed, self.steps, crc32(name.encode()), purpose) for name in names]

    def load_state_tensors(self, saved: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Take `saved` into this run's formats, whatever it was saved in; bit for bit where they are the same.

        See `NamedOptimizer.load_state_tensors`, which gives the arguments and raises `BadInput`.
        """
        steps = int(_saved(saved, f"{self.kind}.steps", ()))
        self.steps = steps
        for stack in (stack for stacks in self._stacks for stack in stacks):
            for i, (name, p) in enumerate(zip(stack.names, stack.params, strict=True)):
                scale = None if stack.momentum.scale is None else stack.momentum.scale[i]
                place = Stored(stack.momentum.data[i], scale)
                load_state(place, saved, f"{name}.momentum", self._keys([name], _MOMENTUM)[0])
                stack.second_moment[i].copy_(_saved(saved, f"{name}.second_moment", stack.second_moment[i].shape))
                kept = None if stack.kept is None else stack.kept[i]
                load_weight(p.detach(), kept, saved, weights, name, self._keys([name], _WEIGHT)[0])


# Between formats. These know nothing of Muon.


def _saved(saved: Mapping[str, Tensor], key: str, shape: Sequence[int]) -> Tensor:
    """Return `saved[key]`, of `shape`."""
    if key not in saved:
        raise BadInput(f"the checkpoint lacks the optimizer state {key}; resume with its own settings")
    value = saved[key]
    if value.shape != torch.Size(shape):
        raise BadInput(
            f"the checkpoint's optimizer state {key} is {tuple(value.shape)}, this run needs {tuple(shape)}; "
            "resume with the settings it was saved with"
        )
    return value


def load_state(place: Stored, saved: Mapping[str, Tensor], name: str, seed: int) -> None:
    """Write what was saved as `name` (and `<name>.scale`) into `place`, in its format."""
    data = _saved(saved, name, place.data.shape)
    theirs = codec_of(data.dtype)
    blocks = math.ceil(data.numel() / BLOCK)
    value = Stored(data, _saved(saved, f"{name}.scale", (blocks,)) if theirs.blocked else None)
    if data.dtype == place.data.dtype:
        place.data.copy_(data)
        if place.scale is not None and value.scale is not None:
            place.scale.copy_(value.scale)
        return
    codec_of(place.data.dtype).encode_(place, theirs.decode(value).to(place.data.device), seed)


def load_weight(
    parameter: Tensor, kept: Tensor | None, saved: Mapping[str, Tensor], weights: Mapping[str, Tensor], name: str, seed: int
) -> None:
    """Write the weight `name`, as a whole in fp32, into `parameter` and what this run keeps beside it."""
    beside = next((f"{name}.{what}" for what in ("master", "remainder") if f"{name}.{what}" in saved), None)
    if beside is None and kept is None:
        return  # the model's weights are all there is, and the model has loaded them
    rest = None if beside is None else _saved(saved, beside, parameter.shape)
    weight = weights[name]
    if rest is not None and kept is not None and rest.dtype == kept.dtype and weight.dtype == parameter.dtype:
        parameter.copy_(weight)
        kept.copy_(rest)
        return
    write_weight(parameter, kept, read_weight(weight, rest).to(parameter.device), seed)
