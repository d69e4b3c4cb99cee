"""The output head and its loss in chunks: logits, softcap, cross-entropy and their gradient without ever holding the logits.

At 65,536 tokens and 32,768 entries the logits of one micro-batch are 4.3 GB in bf16, 8.6 GB in fp32, and a compiled
loss reads and writes them several times. Here a chunk of rows goes through: logits GEMM, one kernel that computes the losses
and overwrites the logits with their gradient, and the two gradient GEMMs, at once, in forward. What backward needs is
then only dx and dW, so a chunk of logits (256 MiB) is all that ever exists.

The gradient is taken while the loss is: so what the loss will be divided by must be known beforehand. `loss` takes it as
`scale` (1 / accumulation steps / ranks) and counts the valid targets itself; the gradient that reaches `loss` from later
operations multiplies dx and dW, whatever it is.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nvfp8.matmul import add_matmul_, matmul
from nvfp8.ops import ops

# Rows of a chunk are chosen so that its logits take at most this much: long enough for full GEMM speed.
CHUNK_BYTES = 256 * 2**20


def chunk_rows(padded_vocab: int, dtype: torch.dtype) -> int:
    """How many rows of logits a chunk has, a multiple of 128."""
    return max(128, CHUNK_BYTES // (padded_vocab * dtype.itemsize) // 128 * 128)


def counted(targets: Tensor, scale: float) -> Tensor:
    """Gradient of every valid token's loss, 0-D fp32: `scale` over their number."""
    return scale / (targets >= 0).sum().clamp_min(1).float()


def scaled_gradients(ctx: Any, d_loss: Tensor) -> tuple[Tensor, Tensor]:
    """The dx and dW that forward has saved in `ctx`, times what reaches the loss, in place.

    Raises:
        RuntimeError: it was done before.
    """
    if ctx.used:
        raise RuntimeError("the loss's backward may run once: it scales the gradients it holds in place")
    ctx.used = True
    dx, dw = ctx.saved_tensors
    return ops(dx).scale_(dx, d_loss), ops(dw).scale_(dw, d_loss).to(ctx.weight_dtype)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, vocab: int, softcap: float, scale: float, with_gradient: bool
    ) -> Tensor:
        factor = counted(targets, scale)
        cast = weight.to(x.dtype)
        needs_gradient = with_gradient and any(ctx.needs_input_grad)
        dx = torch.empty_like(x) if needs_gradient else None
        dw = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) if needs_gradient else None
        losses = []
        rows = chunk_rows(weight.shape[0], x.dtype)
        for start in range(0, x.shape[0], rows):
            part = slice(start, start + rows)
            logits = matmul(x[part], cast.t())
            losses.append(ops(x).softcap_cross_entropy_(logits, targets[part], vocab, softcap, factor if needs_gradient else None))
            if dx is not None and dw is not None:
                matmul(logits, cast, dx[part])
                add_matmul_(dw, logits.t(), x[part])
            del logits  # before the next chunk's are made
        ctx.save_for_backward(dx, dw)
        ctx.used, ctx.weight_dtype = False, weight.dtype
        return torch.cat(losses).sum() * factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        return *scaled_gradients(ctx, d_loss), None, None, None, None, None


class LinearCrossEntropy(nn.Module):
    """lm_head with softcap and loss: z = c·tanh(x·Wᵀ/c), cross-entropy with ignored target −1."""

    def __init__(self, width: int, vocab: int, padded_vocab: int, softcap: float, dtype: torch.dtype = torch.float32):
        """Allocate the weight (padded_vocab, width); rows from `vocab` on are never seen."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(padded_vocab, width, dtype=dtype))
        self.vocab = vocab
        self.softcap = softcap

    def loss(self, x: Tensor, targets: Tensor, scale: float) -> Tensor:
        """Mean loss over the valid targets, times `scale`, in nats.

        Args:
            x: (N, D) normalized stream.
            targets: (N,) int64, −1 ignored; with no valid target the loss is 0.
            scale: factor known beforehand, such as 1 / accumulation steps.

        Returns:
            0-d fp32. dx and dW are computed now and kept until its backward, which may run once.
        """
        return _Loss.apply(x, self.weight, targets, self.vocab, self.softcap, scale, torch.is_grad_enabled())

    @torch.no_grad()
    def token_losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """Loss of each token, for evaluation; no gradient.

        Args:
            x: (N, D).
            targets: (N,) int64, −1 ignored (loss 0).

        Returns:
            (N,) fp32, in nats.
        """
        cast = self.weight.to(x.dtype)
        rows = chunk_rows(self.weight.shape[0], x.dtype)
        pairs = zip(x.split(rows), targets.split(rows), strict=True)
        return torch.cat([ops(x).softcap_cross_entropy_(matmul(c, cast.t()), t, self.vocab, self.softcap, None) for c, t in pairs])

    def logits(self, x: Tensor) -> Tensor:
        """Softcapped logits (..., vocab) in fp32, for generation: call it on few positions."""
        logits = matmul(x, self.weight.to(x.dtype).t())[..., : self.vocab].float()
        return self.softcap * torch.tanh(logits / self.softcap)
