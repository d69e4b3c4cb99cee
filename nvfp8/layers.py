"""Linear layers fused with what stands between them, in the compute dtype of their input.

A transformer block's GEMMs are fast; what costs time is reading and writing the residual stream between them, and what
costs memory is keeping those tensors for backward. Each layer here is one autograd Function that keeps only what cannot
be computed again cheaply:

* `NormLinear`    residual mix, RMSNorm and several projections in one GEMM; keeps its input stream, not x̂.
* `ReluSquaredMLP` norm, two GEMMs; keeps its input and relu(h)², from which both gradients follow.

Branches are added to the stream by the next kernel that reads both, the mix or the MLP's norm, in fp32: no pass for the addition,
and the mix multiplies before it rounds, so an MLP's branch too small for a bf16 stream is not lost.

For a block of width D that is 20 bytes per token and channel in bf16; a compiled block keeps about 37.
Weights stored in fp32 are cast to the stream's dtype where they are used.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nvfp8.matmul import matmul, weight_gradient
from nvfp8.ops import ops


class Pending(NamedTuple):
    """A residual stream whose last branch is not added yet: a kernel that reads both anyway does it."""

    stream: Tensor
    branch: Tensor


def settled(x: Tensor | Pending) -> Tensor:
    """The stream as one tensor (..., D)."""
    return x.stream + x.branch if isinstance(x, Pending) else x


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, pending: Tensor | None, x0: Tensor, lambdas: Tensor, width: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        stream, head, rstd = ops(x).mix_forward(x, pending, x0, lambdas, width)
        ctx.save_for_backward(stream, x0, lambdas, rstd)
        ctx.pending = pending is not None
        ctx.set_materialize_grads(False)
        # The stream leaves twice, once for the residual path and once for the branch: backward then gets two gradients and
        # adds them in its own pass.
        return stream, stream.view_as(stream), x0, head

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_stream: Tensor | None, d_branch: Tensor | None, d_x0: Tensor | None, d_head: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        stream, x0, lambdas, rstd = ctx.saved_tensors
        d_stream = torch.zeros_like(stream) if d_stream is None else d_stream.contiguous()
        d_branch, d_head = (None if d is None else d.contiguous() for d in (d_branch, d_head))
        dx, d_x0, d_lambdas = ops(stream).mix_backward(d_stream, d_branch, d_head, stream, x0, lambdas, rstd, d_x0)
        return dx, dx if ctx.pending else None, d_x0, d_lambdas, None


def mix(x: Tensor | Pending, x0: Tensor, lambdas: Tensor, width: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The residual mix λ₀·x + λ₁·x0, in fp32, rounded to x's dtype once; for layers that do the norm themselves.

    Args:
        x: (..., D) residual stream, or the two parts of it.
        x0: (..., D).
        lambdas: (2,) fp32, λ₀ not 0.
        width: how many channels of the mix's norm the caller wants to see.

    Returns:
        The mixed stream (..., D), for the residual path and once more for the branch; x0, for the next mix; x̂[..., :width].
    """
    stream, pending = x if isinstance(x, Pending) else (x, None)
    return _Mix.apply(stream, pending, x0, lambdas, width)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        normed, rstd = ops(x).norm_forward(x)
        ctx.save_for_backward(x, rstd)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_normed: Tensor) -> Tensor:
        x, rstd = ctx.saved_tensors
        return ops(x).norm_backward(d_normed.contiguous(), x, rstd, None, again=False)[0]


class RMSNorm(nn.Module):
    """x / √(mean(x²) + 2⁻²³) over the last axis, no learnable scale (arXiv 1910.07467)."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D), same dtype; statistics in fp32."""
        return _Norm.apply(x)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return matmul(x, weight.to(x.dtype).t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        d_out = d_out.contiguous()
        dx = matmul(d_out, weight.to(x.dtype)) if ctx.needs_input_grad[0] else None
        return dx, weight_gradient(d_out, x, weight.dtype)


class Linear(nn.Module):
    """x·Wᵀ without bias, in x's dtype whatever the weight's."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype = torch.float32):
        """Allocate the weight (out_features, in_features); `GPT.init_weights` gives it values."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features); keeps x for backward, and no cast copy of the weight."""
        return _Linear.apply(x, self.weight)


def stacked(weights: tuple[Tensor, ...] | list[Tensor], dtype: torch.dtype) -> Tensor:
    """Weights (O, I) of one input as one (ΣO, I), cast for a GEMM."""
    return torch.cat([weight.to(dtype) for weight in weights])


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, pending: Tensor | None, x0: Tensor, lambdas: Tensor, width: int, *weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        stream, normed, rstd = ops(x).mix_forward(x, pending, x0, lambdas, x.shape[-1])
        out = matmul(normed, stacked(weights, x.dtype).t())
        ctx.save_for_backward(x, pending, x0, lambdas, rstd, *weights)
        ctx.set_materialize_grads(False)
        return stream, x0, normed[..., :width].contiguous(), out

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_stream: Tensor | None, d_x0: Tensor | None, d_head: Tensor | None, d_out: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, pending, x0, lambdas, rstd, *weights = ctx.saved_tensors
        d_stream = torch.zeros_like(x) if d_stream is None else d_stream.contiguous()
        if d_out is None:
            d_out = x.new_zeros(*x.shape[:-1], sum(weight.shape[0] for weight in weights))
        d_normed = matmul(d_out, stacked(weights, x.dtype))
        if d_head is not None:
            d_normed[..., : d_head.shape[-1]] += d_head
        dx, d_x0, d_lambdas, normed = ops(x).mix_norm_backward(d_stream, d_normed, x, pending, x0, lambdas, rstd, d_x0)
        d_weight = weight_gradient(d_out, normed, weights[0].dtype)
        return dx, None if pending is None else dx, d_x0, d_lambdas, None, *d_weight.split([weight.shape[0] for weight in weights])


class NormLinear(nn.Module):
    """Residual mix, RMSNorm, then several projections of the normalized stream in one GEMM.

    The projections stay separate `Linear` modules of the owner (c_q, c_k, c_v keep their names and parameters); this
    module only refers to them.
    """

    def __init__(self, *projections: Linear):
        """Join `projections`, all with the same in_features."""
        super().__init__()
        self._projections = projections  # a tuple: not registered a second time

    def forward(self, x: Tensor | Pending, x0: Tensor, lambdas: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Project norm(λ₀·x + λ₁·x0).

        Args:
            x: (..., D) residual stream, or the two parts of it.
            x0: (..., D) stream after the embedding.
            lambdas: (2,) fp32.
            width: how many leading channels of x̂ the caller wants to see.

        Returns:
            The mixed stream (..., D); x0, to be handed to the next block (so its gradient
            is summed block by block inside the kernels rather than by autograd in passes of its own); x̂[..., :width];
            the projections, concatenated (..., Σ out_features).
        """
        weights = [projection.weight for projection in self._projections]
        stream, pending = x if isinstance(x, Pending) else (x, None)
        return _NormLinear.apply(stream, pending, x0, lambdas, width, *weights)


class _ReluSquaredMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pending: Tensor | None, w_fc: Tensor, w_proj: Tensor) -> tuple[Tensor, Tensor]:
        if pending is None:
            x, (normed, rstd) = x.view_as(x), ops(x).norm_forward(x)
        else:
            x, normed, rstd = ops(x).add_norm_forward(x, pending)
        activated = ops(x).relu_squared_(matmul(normed, w_fc.to(x.dtype).t()))
        del normed
        ctx.save_for_backward(x, rstd, activated, w_fc, w_proj)
        ctx.pending = pending is not None
        # x leaves beside the branch: so the gradient that passes the branch by is added inside the norm's backward.
        return x, matmul(activated, w_proj.to(x.dtype).t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_stream: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, rstd, activated, w_fc, w_proj = ctx.saved_tensors
        dy = dy.contiguous()
        d_w_proj = weight_gradient(dy, activated, w_proj.dtype)
        d_hidden = ops(x).relu_squared_backward_(matmul(dy, w_proj.to(x.dtype)), activated)
        d_normed = matmul(d_hidden, w_fc.to(x.dtype))
        dx, normed = ops(x).norm_backward(d_normed, x, rstd, d_stream.contiguous())
        return dx, dx if ctx.pending else None, weight_gradient(d_hidden, normed, w_fc.dtype), d_w_proj


class ReluSquaredMLP(nn.Module):
    """x + c_proj(relu(c_fc(norm(x)))²): a whole MLP branch with its norm and its residual addition."""

    def __init__(self, width: int, hidden: int, dtype: torch.dtype = torch.float32):
        """Allocate c_fc (hidden, width) and c_proj (width, hidden)."""
        super().__init__()
        self.c_fc = Linear(width, hidden, dtype)
        self.c_proj = Linear(hidden, width, dtype)

    def forward(self, x: Tensor | Pending, settle: bool = True) -> Tensor | Pending:
        """(..., D), or the two parts of it -> (..., D): the stream with the MLP's branch added, or, to be settled later, both."""
        stream, before = x if isinstance(x, Pending) else (x, None)
        pending = Pending(*_ReluSquaredMLP.apply(stream, before, self.c_fc.weight, self.c_proj.weight))
        return settled(pending) if settle else pending
