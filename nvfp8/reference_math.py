"""Formulas that several twins share, in the precision they are given: fp32, or fp64 where a test wants the exact value.

`nvfp8/reference.py` rounds their results to the stream's dtype, `nvfp8/reference_fp8.py` quantizes them instead.
Letters as in `nvfp8/reference.py`.
"""

import torch
from torch import Tensor

# nanochat calls rms_norm without eps: PyTorch then takes fp32's machine epsilon, whatever the dtype.
NORM_EPS = 2.0**-23
# Queries and keys are sharpened after their norm: each carries the factor 1.2.
QK_SCALE = 1.2
# Channels of a head, of which a tile of a GEMM holds whole ones: so rotary and norm can be in its epilogue.
FUSED_HEADS = 64, 128


def wide(x: Tensor) -> Tensor:
    """What is computed with: fp32, or fp64 if x is fp64."""
    return x if x.dtype == torch.float64 else x.float()


def norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """RMSNorm over the last axis: (..., D) wide -> x̂ (..., D) and 1/rms (...)."""
    rstd = (x.square().mean(-1) + NORM_EPS).rsqrt()
    return x * rstd[..., None], rstd


def norm_gradient(d_normed: Tensor, x: Tensor, rstd: Tensor, along: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gradient of x (..., D) from that of x̂, and x̂ once more; Σ d_normed·x̂ is taken from `along` (...) where that is given."""
    normed = x * rstd[..., None]
    along = (d_normed * normed).sum(-1) if along is None else along
    return rstd[..., None] * (d_normed - normed * (along / x.shape[-1])[..., None]), normed


def mixed(x: Tensor, pending: Tensor | None, x0: Tensor, lambdas: Tensor) -> tuple[Tensor, Tensor]:
    """The sum x + pending (..., D), wide, and s = λ₀·(x + pending) + λ₁·x0 in x's dtype.

    s is rounded to the stream's dtype: backward must normalize the very tensor that forward wrote.
    """
    before = wide(x) if pending is None else wide(x) + wide(pending)
    return before, (before * lambdas[0] + wide(x0) * lambdas[1]).to(x.dtype)


def lambda_gradient(ds: Tensor, stream: Tensor, x0: Tensor, lambdas: Tensor) -> Tensor:
    """Gradient of λ (2,) from s itself: Σg·x = (Σg·s − λ₁·Σg·x0) / λ₀, all wide and (..., D)."""
    along_x0 = (ds * x0).sum()
    return torch.stack((((ds * stream).sum() - lambdas[1] * along_x0) / lambdas[0], along_x0))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Halves rotated, (a, b) -> (a·cos + b·sin, b·cos − a·sin): x (B, T, H, E), cos and sin (T, E/2)."""
    a, b = x.chunk(2, -1)
    cos, sin = wide(cos)[:, None], wide(sin)[:, None]  # (T, 1, E/2): one rotation for all heads
    return torch.cat((a * cos + b * sin, b * cos - a * sin), -1)


def heads_values(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int], gate: Tensor | None, table: Tensor | None, ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`heads_forward` of a wide qkv before its results are rounded: q (B, T, H, E), k, v (B, T, K, E) and 1/rms (B, T, H + K)."""
    n_head, n_kv = heads
    q_k, v = qkv.unflatten(-1, (n_head + 2 * n_kv, -1)).split((n_head + n_kv, n_kv), dim=2)
    normed, rstd = norm(rotate(q_k, cos, sin))
    q, k = (normed * QK_SCALE).split((n_head, n_kv), dim=2)
    if gate is not None and table is not None and ids is not None:
        v = v + wide(gate)[..., None] * wide(table[ids]).view_as(v)
    return q, k, v, rstd


def heads_gradient(
    dq: Tensor, dk: Tensor, dv: Tensor, q: Tensor, k: Tensor, rstd: Tensor, cos: Tensor, sin: Tensor,
    table: Tensor | None, ids: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`heads_backward` before its results are rounded: d_qkv (B, T, (H + 2K)·E) and d_gate (B, T, K) or None."""
    normed = torch.cat((wide(q), wide(k)), 2) / QK_SCALE
    d_normed = torch.cat((wide(dq), wide(dk)), 2) * QK_SCALE
    d_rotated = rstd[..., None] * (d_normed - normed * (d_normed * normed).mean(-1, keepdim=True))
    wide_dv = wide(dv)
    d_qkv = torch.cat((rotate(d_rotated, cos, -sin), wide_dv), 2).flatten(2)
    if table is None or ids is None:
        return d_qkv, None
    return d_qkv, (wide_dv * wide(table[ids]).view_as(wide_dv)).sum(-1)


def heads_along(
    dq: Tensor, dk: Tensor, dv: Tensor, q: Tensor, k: Tensor, v: Tensor, rstd: Tensor, gate: Tensor | None, d_gate: Tensor | None
) -> Tensor:
    """Σ d_qkv·qkv of every head and token, (H + 2K, B·T), of qkv as it was before `heads_values`.

    A norm's gradient is orthogonal to its input but for eps, so queries and keys add next to nothing; of v what the value embedding
    brought is taken off again, gate · d_gate.
    """
    d_normed, normed = (torch.cat((wide(a), wide(b)), 2) for a, b in ((dq, dk), (q, k)))
    of_norms = (d_normed * normed).sum(-1) * NORM_EPS * rstd.square()
    of_values = (wide(dv) * wide(v)).sum(-1)
    if gate is not None and d_gate is not None:
        of_values = of_values - wide(gate) * d_gate
    return torch.cat((of_norms, of_values), 2).flatten(0, 1).t().contiguous()


def softcap_loss(logits: Tensor, targets: Tensor, softcap: float, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of z = c·tanh(logit/c) and its gradient (softmax(z) − onehot)·(1 − (z/c)²), of which no element is above 1.

    Args:
        logits: (N, V) wide.
        targets: (N,) int64; −1 is ignored: loss 0, gradient 0.
        softcap: c; e^c must be far inside the dtype's range, for no maximum is subtracted.
        with_gradient: whether it is wanted.

    Returns:
        losses (N,) in nats, gradient (N, V) or None.
    """
    capped = softcap * torch.tanh(logits / softcap)
    valid, rows = targets >= 0, targets.clamp_min(0)[:, None]
    log_sum = capped.exp().sum(-1).log()
    losses = torch.where(valid, log_sum - capped.gather(1, rows)[:, 0], 0.0)
    if not with_gradient:
        return losses, None
    gradient = (capped - log_sum[:, None]).exp()
    gradient.scatter_add_(1, rows, torch.full_like(rows, -1, dtype=gradient.dtype))
    gradient *= 1 - (capped / softcap).square()
    return losses, torch.where(valid[:, None], gradient, 0.0)
