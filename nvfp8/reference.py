"""The plain PyTorch twin of every kernel: what the kernel computes, readable, in fp32 inside.

Tests compare each Triton kernel with its twin and both with fp64; a CPU runs the twins themselves. Twins and kernels have
the same names and arguments, so `nvfp8.ops` can choose by device. Statistics and all arithmetic are fp32 (fp64 for fp64
input); each result is rounded once to the dtype of the tensor it replaces. Twins of optimizers are in `nvfp8/reference_optim.py`,
of kernels that write FP8 in `nvfp8/reference_fp8.py`, formulas that both share in `nvfp8/reference_math.py`.

Letters: N tokens (B·T), D model width, H query heads, K key/value heads, E head dimension, V vocabulary.
"""

import torch
from torch import Tensor

from nvfp8.reference_fp8 import add_norm_quantize as add_norm_quantize
from nvfp8.reference_fp8 import amax_ as amax_
from nvfp8.reference_fp8 import gemm_heads as gemm_heads
from nvfp8.reference_fp8 import gemm_relu_squared as gemm_relu_squared
from nvfp8.reference_fp8 import gemm_relu_squared_backward as gemm_relu_squared_backward
from nvfp8.reference_fp8 import heads_backward_quantize as heads_backward_quantize
from nvfp8.reference_fp8 import mix_norm_backward_quantize as mix_norm_backward_quantize
from nvfp8.reference_fp8 import mix_norm_quantize as mix_norm_quantize
from nvfp8.reference_fp8 import norm_backward_quantize as norm_backward_quantize
from nvfp8.reference_fp8 import norm_quantize as norm_quantize
from nvfp8.reference_fp8 import quantize as quantize
from nvfp8.reference_fp8 import quantize_rows as quantize_rows
from nvfp8.reference_fp8 import relu_squared_backward_quantize as relu_squared_backward_quantize
from nvfp8.reference_fp8 import relu_squared_quantize as relu_squared_quantize
from nvfp8.reference_fp8 import scale_rows_ as scale_rows_
from nvfp8.reference_fp8 import softcap_cross_entropy_quantize as softcap_cross_entropy_quantize
from nvfp8.reference_math import NORM_EPS as NORM_EPS
from nvfp8.reference_math import QK_SCALE as QK_SCALE
from nvfp8.reference_math import heads_gradient, heads_values, lambda_gradient, mixed, norm, norm_gradient, softcap_loss, wide
from nvfp8.reference_optim import AdamWTensor as AdamWTensor
from nvfp8.reference_optim import Copies as Copies
from nvfp8.reference_optim import adamw_ as adamw_
from nvfp8.reference_optim import adamw_prepared as adamw_prepared
from nvfp8.reference_optim import addressed as addressed
from nvfp8.reference_optim import equilibrating_scale as equilibrating_scale
from nvfp8.reference_optim import muon_descend_ as muon_descend_
from nvfp8.reference_optim import muon_nesterov_ as muon_nesterov_
from nvfp8.reference_optim import normuon_scale as normuon_scale
from nvfp8.reference_optim import polar_express_ as polar_express_
from nvfp8.reference_optim import symmetric_product_ as symmetric_product_


def norm_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """RMSNorm without learnable scale (arXiv 1910.07467).

    Args:
        x: (..., D).

    Returns:
        x̂ (..., D) in x's dtype, and 1/rms (...) in fp32.
    """
    normed, rstd = norm(wide(x))
    return normed.to(x.dtype), rstd


def add_norm_forward(stream: Tensor, branch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A branch added to the residual stream, and the norm of the sum as it was rounded.

    Args:
        stream: (..., D).
        branch: (..., D), same dtype.

    Returns:
        x (..., D) and x̂ (..., D) in the stream's dtype, 1/rms (...) in fp32.
    """
    x = stream + branch
    return x, *norm_forward(x)


def norm_backward(
    d_normed: Tensor, x: Tensor, rstd: Tensor, d_stream: Tensor | None, again: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Gradient of `norm_forward`, plus the gradient that reaches x past the norm.

    Args:
        d_normed: (..., D) gradient of x̂.
        x: (..., D) the norm's input.
        rstd: (...) from the forward.
        d_stream: (..., D) gradient of x from elsewhere (the residual stream), or None.
        again: whether x̂ is wanted.

    Returns:
        dx (..., D), and x̂ (..., D) once more, or None: a weight gradient needs it, so nobody has to keep it.
    """
    dx, normed = norm_gradient(wide(d_normed), wide(x), rstd)
    if d_stream is not None:
        dx = dx + wide(d_stream)
    return dx.to(x.dtype), normed.to(x.dtype) if again else None


def mix_norm_backward(
    d_stream: Tensor, d_normed: Tensor, x: Tensor, pending: Tensor | None, x0: Tensor, lambdas: Tensor, rstd: Tensor,
    d_x0: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradient of `mix_forward` where all of x̂ is wanted; s is computed again from x, pending and x0 rather than kept.

    Args:
        d_stream: (..., D) gradient of s.
        d_normed: (..., D) gradient of x̂.
        x: (..., D).
        pending: (..., D), or None.
        x0: (..., D).
        lambdas: (2,).
        rstd: (...).
        d_x0: (..., D) gradient of x0 from the later blocks, to which this one's is added, or None.

    Returns:
        dx (..., D), which is the gradient of `pending` too, the new d_x0 (..., D), dλ (2,) fp32, x̂ (..., D).
    """
    before, stream = mixed(x, pending, x0, lambdas)
    ds, normed = norm_gradient(wide(d_normed), wide(stream), rstd)
    ds = ds + wide(d_stream)
    dx0 = ds * lambdas[1]
    if d_x0 is not None:
        dx0 = dx0 + wide(d_x0)
    d_lambdas = torch.stack(((ds * before).sum(), (ds * wide(x0)).sum()))
    return (ds * lambdas[0]).to(x.dtype), dx0.to(x.dtype), d_lambdas, normed.to(x.dtype)


def mix_forward(x: Tensor, pending: Tensor | None, x0: Tensor, lambdas: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The residual mix s = λ₀·(x + pending) + λ₁·x0, rounded once, and the first channels of norm(s).

    Args:
        x: (..., D) residual stream.
        pending: (..., D) branch that has yet to be added to it, or None.
        x0: (..., D) the stream as it was after the embedding.
        lambdas: (2,) fp32.
        width: how many channels of x̂ are wanted.

    Returns:
        s (..., D), x̂[..., :width], 1/rms of s (...).
    """
    _, stream = mixed(x, pending, x0, lambdas)
    normed, rstd = norm_forward(stream)
    return stream, normed[..., :width].contiguous(), rstd


def mix_backward(
    d_stream: Tensor, d_branch: Tensor | None, d_head: Tensor | None, stream: Tensor, x0: Tensor, lambdas: Tensor, rstd: Tensor,
    d_x0: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradient of `mix_forward` from its own output: Σg·x = (Σg·s − λ₁·Σg·x0) / λ₀, so x need not be kept.

    x stands for x + pending: both have the same gradient. λ₀ = 0 makes dλ₀ not finite.

    Args:
        d_stream: (..., D) gradient of s on the residual path.
        d_branch: (..., D) gradient of s from the layer that normalizes it, or None.
        d_head: (..., width) gradient of x̂[..., :width], or None.
        stream: (..., D) s.
        x0: (..., D).
        lambdas: (2,).
        rstd: (...).
        d_x0: (..., D) gradient of x0 from the later blocks, to which this one's is added, or None.

    Returns:
        dx (..., D), the new d_x0 (..., D), dλ (2,) fp32.
    """
    ds = wide(d_stream) if d_branch is None else wide(d_stream) + wide(d_branch)
    if d_head is not None:
        d_normed = torch.nn.functional.pad(wide(d_head), (0, stream.shape[-1] - d_head.shape[-1]))
        ds = ds + norm_gradient(d_normed, wide(stream), rstd)[0]
    dx0 = ds * lambdas[1]
    if d_x0 is not None:
        dx0 = dx0 + wide(d_x0)
    d_lambdas = lambda_gradient(ds, wide(stream), wide(x0), lambdas)
    return (ds * lambdas[0]).to(stream.dtype), dx0.to(stream.dtype), d_lambdas


def smear_forward(x: Tensor, previous: Tensor | None, weight: Tensor, smear: Tensor) -> Tensor:
    """Each position with the one before it: x[t] + λ·σ(weight·x[t, :C])·x[t−1].

    Args:
        x: (B, T, D).
        previous: (B, 1, D) that came before x[0]; None for zeros.
        weight: (1, C).
        smear: (1,), λ.

    Returns:
        (B, T, D), x's dtype.
    """
    first = torch.zeros_like(x[:, :1]) if previous is None else previous
    gate = smear * torch.sigmoid(wide(x[..., : weight.shape[1]]) @ wide(weight).t())
    return (wide(x) + gate * wide(torch.cat((first, x[:, :-1]), 1))).to(x.dtype)


def smear_backward(d_out: Tensor, d_x0: Tensor | None, x: Tensor, weight: Tensor, smear: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of `smear_forward` without a `previous`.

    Args:
        d_out: (B, T, D).
        d_x0: (B, T, D), a second gradient of the same result, or None.
        x: (B, T, D).
        weight: (1, C).
        smear: (1,).

    Returns:
        dx (B, T, D), d_weight (1, C) fp32, dλ (1,) fp32.
    """
    gradient = wide(d_out) if d_x0 is None else wide(d_out) + wide(d_x0)
    channels, before = weight.shape[1], torch.nn.functional.pad(wide(x), (0, 0, 1, 0))[:, :-1]
    read, sigmoid = wide(x[..., :channels]), torch.sigmoid(wide(x[..., :channels]) @ wide(weight).t())
    d_gate = (gradient * before).sum(-1, keepdim=True)
    d_logit = d_gate * smear * sigmoid * (1 - sigmoid)
    dx = gradient + torch.nn.functional.pad((smear * sigmoid * gradient)[:, 1:], (0, 0, 0, 1))
    dx[..., :channels] += d_logit * wide(weight)
    return dx.to(x.dtype), (d_logit * read).sum((0, 1))[None], (d_gate * sigmoid).sum()[None]


def value_gate_forward(x: Tensor, weight: Tensor) -> Tensor:
    """Factors of a value embedding's heads, 3·σ(x·weightᵀ): x (..., C), weight (K, C) -> (..., K) in x's dtype."""
    return (3 * torch.sigmoid(wide(x) @ wide(weight).t())).to(x.dtype)


def value_gate_backward(d_gate: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of `value_gate_forward`.

    Args:
        d_gate: (..., K).
        x: (..., C).
        weight: (K, C).

    Returns:
        dx (..., C) in x's dtype, d_weight (K, C) fp32.
    """
    sigmoid = torch.sigmoid(wide(x) @ wide(weight).t())
    d_logit = wide(d_gate) * 3 * sigmoid * (1 - sigmoid)
    return (d_logit @ wide(weight)).to(x.dtype), d_logit.flatten(0, -2).t() @ wide(x).flatten(0, -2)


def heads_forward(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int], gate: Tensor | None, table: Tensor | None, ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the projections to what attention reads: rotary (arXiv 2104.09864), QK norm, value embedding.

    q and k: halves rotated, (a, b) -> (a·cos + b·sin, b·cos − a·sin), then RMSNorm over E, then × 1.2.
    v: v + gate · table[ids].

    Args:
        qkv: (B, T, (H + 2K)·E), q then k then v.
        cos: (T, E/2).
        sin: (T, E/2).
        heads: (H, K).
        gate: (B, T, K), or None where the layer has no value embedding.
        table: (V, K·E) value embedding, or None.
        ids: (B, T) int64 rows of the table, or None.

    Returns:
        q (B, T, H, E), k (B, T, K, E), v (B, T, K, E), contiguous, and 1/rms of the rotated q and k (B, T, H + K) fp32.
    """
    q, k, v, rstd = heads_values(wide(qkv), cos, sin, heads, gate, table, ids)
    return q.to(qkv.dtype).contiguous(), k.to(qkv.dtype).contiguous(), v.to(qkv.dtype).contiguous(), rstd


def heads_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, q: Tensor, k: Tensor, rstd: Tensor, cos: Tensor, sin: Tensor,
    gate: Tensor | None, table: Tensor | None, ids: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Gradient of `heads_forward` from its own outputs: q/1.2 is x̂, so the raw projections need not be kept.

    Args:
        dq: (B, T, H, E).
        dk: (B, T, K, E).
        dv: (B, T, K, E).
        q: (B, T, H, E) as returned by the forward.
        k: (B, T, K, E) as returned by the forward.
        rstd: (B, T, H + K).
        cos: (T, E/2).
        sin: (T, E/2).
        gate: as in the forward.
        table: as in the forward.
        ids: as in the forward.

    Returns:
        d_qkv (B, T, (H + 2K)·E), and d_gate (B, T, K) or None. The gradient of table[ids] is gate · dv: `add_rows_` forms it.
    """
    d_qkv, d_gate = heads_gradient(dq, dk, dv, q, k, rstd, cos, sin, None if gate is None else table, ids)
    return d_qkv.to(dq.dtype), None if gate is None or d_gate is None else d_gate.to(gate.dtype)


def add_rows_(grad: Tensor, rows: Tensor, gate: Tensor | None, positions: Tensor, ids: Tensor) -> None:
    """Add to a lookup table's gradient, in place: grad[id] += Σ gate·rows over the positions where the id stands.

    Args:
        grad: (V, W), any float; sums are fp32, each row that occurs is rounded once.
        rows: (..., W) with N rows.
        gate: (..., K), factor of W/K channels each, or None.
        positions: (N,) int64, positions sorted by id.
        ids: (N,) int64, the ids in that order.
    """
    width = grad.shape[1]
    values = wide(rows)
    if gate is not None:
        values = values.view(*gate.shape, -1) * wide(gate)[..., None]
    values = values.reshape(-1, width)[positions]
    grad.copy_(wide(grad) + torch.zeros(grad.shape, dtype=values.dtype, device=grad.device).index_add_(0, ids, values))


def relu_squared_(hidden: Tensor) -> Tensor:
    """relu(h)² (arXiv 2109.08668), written over h.

    Args:
        hidden: (..., F); overwritten.

    Returns:
        `hidden`, now relu(h)².
    """
    return hidden.copy_(wide(hidden).relu().square())


def relu_squared_backward_(d_activated: Tensor, activated: Tensor) -> Tensor:
    """Gradient of relu² from its output alone: for a = relu(h)², da/dh = 2·√a. Written over d_activated.

    Args:
        d_activated: (..., F); overwritten.
        activated: (..., F) the forward's output.

    Returns:
        `d_activated`, now the gradient of h.
    """
    return d_activated.copy_(wide(d_activated) * 2 * wide(activated).sqrt())


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """X · factor, written over x.

    Args:
        x: contiguous, any shape and float; overwritten.
        factor: 0-d fp32.

    Returns:
        `x`.
    """
    return x.copy_(wide(x) * factor)


def softcap_cross_entropy_(logits: Tensor, targets: Tensor, vocab: int, softcap: float, scale: Tensor | None) -> Tensor:
    """Cross-entropy of softcapped logits, and its gradient written over them.

    z = c·tanh(logit/c); loss = log Σ exp(z) − z[target]; d logit = scale·(softmax(z) − onehot)·(1 − (z/c)²).
    |z| ≤ c = 15 keeps Σ exp(z) inside fp32 without subtracting a maximum, which saves a pass.

    Args:
        logits: (N, V') with V' ≥ vocab; overwritten with the gradient where `scale` is given.
        targets: (N,) int64; −1 is ignored: loss 0, gradient 0.
        vocab: V; columns from V on are padding: not in the sum, gradient 0.
        softcap: c.
        scale: 0-d fp32, the factor of every token's gradient; None computes losses only.

    Returns:
        losses (N,) fp32, in nats.
    """
    losses, gradient = softcap_loss(wide(logits[:, :vocab]), targets, softcap, scale is not None)
    if gradient is not None and scale is not None:
        logits[:, :vocab] = gradient * scale
        logits[:, vocab:] = 0
    return losses
