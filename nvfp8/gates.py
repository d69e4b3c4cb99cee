"""Gates of a few channels as autograd Functions: smear, which mixes each position with the one before it, and value embeddings'.

Written with PyTorch's operators smear reads or writes the stream 7 times forward and 18 times backward, with copies of it that are
shifted by a position or padded with zeros; here it is one kernel each way, fp32 inside, and nothing is kept but its input.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nvfp8.ops import ops


class _Smear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, previous: Tensor | None, weight: Tensor, smear: Tensor) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        out = ops(x).smear_forward(x, previous, weight, smear)
        ctx.save_for_backward(x, weight, smear)
        ctx.set_materialize_grads(False)
        # It leaves twice, as the stream and as x0: so both gradients are added in the kernel that reads them.
        return out, out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_x0: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, smear = ctx.saved_tensors
        first, *rest = (d.contiguous() for d in (d_out, d_x0) if d is not None)
        dx, d_weight, d_smear = ops(x).smear_backward(first, rest[0] if rest else None, x, weight, smear)
        return dx, None, d_weight.to(weight.dtype), d_smear.to(smear.dtype)


class _ValueGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return ops(x).value_gate_forward(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_gate: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        dx, d_weight = ops(x).value_gate_backward(d_gate, x, weight)
        return dx, d_weight.to(weight.dtype)


def value_gate(x: Tensor, weight: Tensor) -> Tensor:
    """3·σ(x·weightᵀ), factors of a value embedding's heads: x (..., C), weight (K, C) -> (..., K), x's dtype."""
    return _ValueGate.apply(x, weight)


def smeared(x: Tensor, previous: Tensor | None, weight: Tensor, smear: Tensor) -> tuple[Tensor, Tensor]:
    """x[t] + λ·σ(weight·x[t, :C])·x[t−1].

    Args:
        x: (B, T, D).
        previous: (B, 1, D) that came before x[0], without a gradient; None at the start of a text.
        weight: (1, C).
        smear: (1,), λ.

    Returns:
        The same (B, T, D) twice, for two readers whose gradients meet in one kernel.
    """
    return _Smear.apply(x, previous, weight, smear)
