"""Muon: momentum whose update is made nearly orthogonal, for every matrix of the blocks.

Per matrix (r x c), the steps and where they come from:
    momentum   m ← m + (1 - μ)(g - m),  x = g + μ(m - g)                      (Nesterov)
    rows       each row of x scaled to the RMS row norm ‖x‖_F / √r            (arXiv 2603.28254)
    polar      x / (1.01 ‖x‖_F + 1e-6), then five Polar Express steps         (arXiv 2505.16932)
    norm       ‖x‖_F set to √min(r, c)                                        (arXiv 2602.21545)
    NorMuon    each row (column if r < c) over the root of an EMA of its mean square, norm kept   (arXiv 2510.05491)
    descend    w ← w - lr·(u + wd·w where u·w ≥ 0),  lr times √max(1, r/c)    (cautious, decoupled decay)

All matrices of one shape go through Polar Express as one batch, in chunks that keep the workspace bounded, with
`torch.baddbmm` so that bA + cA² and aX + BX are one GEMM each, summed in fp32: against aX + (BX rounded to bf16) the
error falls 2.5 to 5 times.

Passes over memory, in bytes a parameter, with fp32 gradients and a bf16 workspace:
    momentum + Nesterov + cast, one kernel            g 4, m 4 + 4, x 2         14
    row norms; rows scaled                            2; 2 + 2                   6
    Polar Express                                     5 (X copied into the GEMM's output) x 4, the rest is GEMM   20
    sums of squares for NorMuon                       2                          2
    descend, one kernel                               x 2, w 4 + 4              10
52 in all, and as many with bf16 gradients and weights beside fp32 masters. At d24 (680 M) that is 35 GB, 8.4 ms at 4.2 TB/s,
beside 39 ms of GEMMs (26.1 TFLOP). The two kernels take a whole chunk in one launch, gradients and weights where they are,
through a table of addresses (`nvfp8/kernels/muon.py`): stacking them would move 24 bytes more, and a call for each matrix
made the host the slowest part of a d12 step (docs/log.md).
Everything between the two passes that is not a GEMM works on row sums.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanochat.optimizer import NamedOptimizer, gradient
from nvfp8.ops import ops
from nvfp8.state import Codec
from nvfp8.state import codec as codec_named

# (a, b, c) of X ← aX + (bA + cA²)X, A = XXᵀ, for 5 steps with safety factor 2e-2 and cushion 2 (arXiv 2505.16932)
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(x: Tensor) -> Tensor:
    """Return x (n, r, c), each of Frobenius norm at most 1, with all singular values brought near 1; overwrites x.

    fp32 or bf16, as x is. The Gram matrix is on the short side. Takes room for one more x and two Gram matrices each.
    """
    tall = x.size(-2) > x.size(-1)
    short, other = min(x.shape[-2:]), torch.empty_like(x)
    gram, poly = x.new_empty(x.size(0), short, short), x.new_empty(x.size(0), short, short)
    for a, b, c in POLAR_EXPRESS:
        torch.bmm(*((x.mT, x) if tall else (x, x.mT)), out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=poly)
        torch.baddbmm(x, *((x, poly) if tall else (poly, x)), beta=a, out=other)
        x, other = other, x
    return x


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
    momentum: Tensor  # (n, r, c), stored by the codec
    second_moment: Tensor  # (n, r, 1), or (n, 1, c) where r < c; fp32
    master: Tensor | None  # (n, r, c) fp32 where the matrices are stored lower


def _stacks(group: dict[str, Any], codec: Codec) -> list[_Stack]:
    """Sort a group's matrices by shape and allocate their state."""
    by_shape: dict[tuple[torch.Size, torch.dtype], list[tuple[str, Tensor]]] = {}
    for name, p in zip(group["names"], group["params"], strict=True):
        if p.ndim != 2:
            raise ValueError(f"Muon takes matrices, {name} has shape {tuple(p.shape)}")
        by_shape.setdefault((p.shape, p.dtype), []).append((name, p))
    stacks = []
    for ((r, c), dtype), members in by_shape.items():
        n, device = len(members), members[0][1].device
        second_moment = torch.zeros((n, r, 1) if r >= c else (n, 1, c), dtype=torch.float32, device=device)
        momentum = codec.allocate((n, r, c), device)
        params = [parameter for _, parameter in members]
        master = None if dtype == torch.float32 else torch.stack([p.detach().float() for p in params])
        stacks.append(_Stack([name for name, _ in members], params, momentum, second_moment, master))
    return stacks


class Muon(NamedOptimizer):
    """Muon over groups that each hold lr, momentum, beta2 and weight_decay."""

    kind = "muon"

    def __init__(
        self,
        groups: list[dict[str, Any]],
        compute_dtype: torch.dtype,
        workspace: int = 2**30,
        codec: Codec | None = None,
    ) -> None:
        """Allocate the state of every matrix, as zeros.

        Args:
            groups: `params` (contiguous matrices), parallel `names`, lr, momentum, beta2, weight_decay.
            compute_dtype: of Polar Express: bf16 where the run's precision computes in bf16 or lower, else fp32.
            workspace: bytes that a chunk of matrices may take on top of the state; one matrix is always taken.
            codec: how the momentum is stored; None is fp32.

        Raises:
            ValueError: names do not match parameters, or a parameter is not a matrix.
        """
        super().__init__(groups)
        self.compute_dtype = compute_dtype
        self.workspace = workspace
        self._stacks = [_stacks(group, codec or codec_named("fp32")) for group in self.param_groups]

    def named_state(self) -> dict[str, Tensor]:
        """Return `<name>.momentum` (r, c), `.second_moment` (r, 1) or (1, c) and `.master` (r, c) of every matrix, as stored."""
        return {
            f"{name}.{what}": buffer[i]
            for stacks in self._stacks
            for stack in stacks
            for i, name in enumerate(stack.names)
            for what, buffer in (("momentum", stack.momentum), ("second_moment", stack.second_moment), ("master", stack.master))
            if buffer is not None
        }

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
        n, r, c = stack.momentum.shape
        matrix = self.compute_dtype.itemsize * 2 * (r * c + min(r, c) ** 2)  # as polar_express takes it
        chunks = math.ceil(n / max(1, self.workspace // matrix))
        return math.ceil(n / chunks)

    def _update(self, stack: _Stack, part: slice, group: dict[str, Any]) -> None:
        """One step of the matrices `part` of a stack."""
        params, momentum = stack.params[part], stack.momentum[part]
        x = torch.empty(momentum.shape, dtype=self.compute_dtype, device=momentum.device)
        passes, mu = ops(x), group["momentum"]
        passes.muon_nesterov_([gradient(p) for p in params], momentum, x, 1 - mu, mu)
        _equilibrate_(x)
        x = polar_express(x)
        scale = _normuon_scale(x, stack.second_moment[part], group["beta2"])
        r, c = momentum.shape[1:]
        lr = group["lr"] * math.sqrt(max(1, r / c))
        master = None if stack.master is None else stack.master[part]
        passes.muon_descend_([p.detach() for p in params], master, x, scale, lr, lr * group["weight_decay"])
