"""Twins of the kernels that write or multiply FP8: what stands between two GEMMs of a block, in the layouts those GEMMs need.

Hopper multiplies FP8 only "TN": both operands must lie with the summed axis contiguous. A forward GEMM sums over channels, a
weight gradient over tokens, so a tensor that takes part in both is written twice, as (M, N) and as its transpose (N, M): the
two copies together are as many bytes as one in bf16.

One convention throughout: q = cast(clamp(x · scale, ±largest)), rounded to nearest, ties to even, and x ≈ q / scale. `scale` is a
0-D fp32 tensor, so nothing waits for the host. `amax`, 0-D fp32 or None, is raised in place to the largest |x| before
quantization, compared as integers: bits of NaN > inf > finite, so what is not finite stays visible where the clamp hides it.

Letters: M tokens (leading dimensions flattened), D model width, N and K widths of a GEMM, H, G heads and key/value heads, E head
dimension.
"""

import torch
from torch import Tensor

from nvfp8.reference_math import (
    heads_along,
    heads_gradient,
    heads_values,
    lambda_gradient,
    mixed,
    norm,
    norm_gradient,
    softcap_loss,
    wide,
)
from nvfp8.rounding import FORMATS


def amax_(x: Tensor, amax: Tensor) -> None:
    """Raise `amax` to the largest magnitude of x, in place: the pass over memory that current scaling pays.

    Args:
        x: any shape and float.
        amax: 0-D fp32.
    """
    if x.numel():
        bits = (x.float().contiguous().view(torch.int32) & 0x7FFFFFFF).amax()
        amax.view(torch.int32).copy_(torch.maximum(bits, amax.view(torch.int32)))


def quantize(
    x: Tensor, scale: Tensor, dtype: torch.dtype, amax: Tensor | None, *, rows: bool, columns: bool, factors: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """A tensor to FP8, as it lies, transposed, or both.

    Args:
        x: (M, N) bf16 or fp32.
        scale: 0-D fp32.
        dtype: torch.float8_e4m3fn or torch.float8_e5m2.
        amax: 0-D fp32, raised in place, or None.
        rows: whether (M, N) is wanted.
        columns: whether (N, M) is wanted.
        factors: (M,) fp32 that multiply the rows of x, unseen by `amax`; or None.

    Returns:
        q (M, N) or None, qᵀ (N, M) or None.
    """
    if amax is not None:
        amax_(x, amax)
    codes = _codes(wide(x), scale if factors is None else scale * factors[:, None], dtype)
    return codes if rows else None, codes.t().contiguous() if columns else None


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A matrix to FP8 with a scale for every row, measured: what brings its largest magnitude to the format's.

    Args:
        x: (R, K) bf16 or fp32, neither 0.
        dtype: torch.float8_e4m3fn or torch.float8_e5m2.

    Returns:
        q (R, K), and 1 / scale (R,) fp32: 1 for a row of zeros; NaN, in q too, for one that is not finite.
    """
    wide = x.float()
    amax = wide.abs().amax(1, keepdim=True)
    # A number over a tensor PyTorch computes as its multiple of a reciprocal, rounded twice. At most 2^126, whose reciprocal is no
    # denormal number.
    scale = torch.where(amax > 0, (torch.full_like(amax, FORMATS[dtype][2]) / amax).clamp(max=2.0**126), 1.0)
    scale = torch.where(amax.isfinite(), scale, torch.nan)
    return _codes(wide, scale, dtype).contiguous(), scale.reciprocal()[:, 0]


def _codes(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    largest = FORMATS[dtype][2]
    return (x * scale).clamp(-largest, largest).to(dtype)


def _both(x: Tensor, scale: Tensor, dtype: torch.dtype, amax: Tensor | None) -> tuple[Tensor, Tensor]:
    q, q_t = quantize(x.flatten(0, -2), scale, dtype, amax, rows=True, columns=True)
    assert q is not None and q_t is not None
    return q, q_t


def _rows(x: Tensor, scale: Tensor, dtype: torch.dtype, amax: Tensor | None) -> Tensor:
    q, _ = quantize(x.flatten(0, -2), scale, dtype, amax, rows=True, columns=False)
    assert q is not None
    return q


def mix_norm_quantize(
    x: Tensor, pending: Tensor | None, x0: Tensor, lambdas: Tensor, width: int, scale: Tensor, dtype: torch.dtype,
    amax: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The residual mix s = λ₀·(x + pending) + λ₁·x0, rounded once, and its RMSNorm in FP8.

    Args:
        x: (..., D) bf16 residual stream.
        pending: (..., D) branch that has yet to be added to it, or None.
        x0: (..., D) the stream as it was after the embedding.
        lambdas: (2,) fp32.
        width: how many channels of x̂ are wanted in x's dtype.
        scale: 0-D fp32, of x̂.
        dtype: FP8 format of x̂.
        amax: 0-D fp32 of x̂, raised in place, or None.

    Returns:
        s (..., D) in x's dtype, x̂ (M, D) in FP8, x̂[..., :width] in x's dtype, 1/rms of s (...) fp32.
    """
    _, stream = mixed(x, pending, x0, lambdas)
    normed, rstd = norm(wide(stream))
    return stream, _rows(normed, scale, dtype, amax), normed[..., :width].to(x.dtype).contiguous(), rstd


def add_norm_quantize(
    stream: Tensor, branch: Tensor, scale: Tensor, dtype: torch.dtype, amax: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """A branch added to the residual stream, and the RMSNorm of the sum as it was rounded, in FP8.

    Args:
        stream: (..., D) bf16.
        branch: (..., D) same dtype.
        scale: 0-D fp32, of x̂.
        dtype: FP8 format of x̂.
        amax: 0-D fp32 of x̂, raised in place, or None.

    Returns:
        x = stream + branch (..., D) in stream's dtype, norm(x) (M, D) in FP8, 1/rms of x (...) fp32.
    """
    x = stream + branch
    normed, rstd = norm(wide(x))
    return x, _rows(normed, scale, dtype, amax), rstd


def norm_quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """RMSNorm of x (..., D) in FP8 alone, (M, D): what `add_norm_quantize` made of x when it was whole, again."""
    return _rows(norm(wide(x))[0], scale, dtype, None)


def relu_squared_quantize(h: Tensor, scale: Tensor, dtype: torch.dtype, amax: Tensor | None) -> tuple[Tensor, Tensor]:
    """The square of relu, a = relu(h)² (arXiv 2109.08668), in FP8.

    Args:
        h: (M, N) bf16.
        scale: 0-D fp32, of a.
        dtype: FP8 format of a.
        amax: 0-D fp32 of a, raised in place, or None.

    Returns:
        a (M, N), aᵀ (N, M).
    """
    return _both(wide(h).relu().square(), scale, dtype, amax)


def relu_squared_backward_quantize(
    d_a: Tensor, a_t: Tensor, a_scale: Tensor, scale: Tensor, dtype: torch.dtype, amax: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of relu² from its FP8 output alone: dh = d_a · 2·√a.

    Args:
        d_a: (M, N) bf16.
        a_t: (N, M) FP8, the transpose that the forward wrote.
        a_scale: 0-D fp32 it was written with.
        scale: 0-D fp32, of dh.
        dtype: FP8 format of dh.
        amax: 0-D fp32 of dh, raised in place, or None.

    Returns:
        dh (M, N), dhᵀ (N, M), and what a norm before the layer wants to know (`norm_backward_quantize`), P parts of Σ dh·h for
        every token: (P, M) fp32.
    """
    return _relu_squared_gradient(wide(d_a), a_t, a_scale, scale, dtype, amax)


def _relu_squared_gradient(
    d_a: Tensor, a_t: Tensor, a_scale: Tensor, scale: Tensor, dtype: torch.dtype, amax: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    h = (a_t.to(d_a.dtype).t() / a_scale).sqrt()
    dh = d_a * 2 * h
    return *_both(dh, scale, dtype, amax), (dh * h).sum(1)[None]


def norm_backward_quantize(
    d_normed: Tensor, x: Tensor, rstd: Tensor, d_stream: Tensor, normed_scale: Tensor, normed_dtype: torch.dtype,
    scale: Tensor, dtype: torch.dtype, amax: Tensor | None, *, along: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradient of RMSNorm plus the gradient that passes it by; x̂ᵀ for the weight gradient is made again rather than kept.

    Args:
        d_normed: (..., D) bf16 gradient of x̂.
        x: (..., D) bf16, the norm's input.
        rstd: (...) fp32.
        d_stream: (..., D) gradient of x on the residual path.
        normed_scale: 0-D fp32, that x̂ was quantized with in the forward.
        normed_dtype: FP8 format of x̂.
        scale: 0-D fp32, of dx.
        dtype: FP8 format of dx.
        amax: 0-D fp32 of dx, raised in place, or None.
        along: (P, M) fp32, P parts of Σ d_normed·x̂ for every token, or None where it is not known.

    Returns:
        dx (..., D) in x's dtype, x̂ᵀ (D, M) FP8, dx (M, D) FP8, dxᵀ (D, M) FP8.
    """
    dx, normed = norm_gradient(wide(d_normed), wide(x), rstd, None if along is None else along.sum(0).view(rstd.shape))
    dx = dx + wide(d_stream)
    normed_t = _codes(normed, normed_scale, normed_dtype).flatten(0, -2).t().contiguous()
    return dx.to(x.dtype), normed_t, *_both(dx, scale, dtype, amax)


def mix_norm_backward_quantize(
    d_stream: Tensor, d_normed: Tensor, d_head: Tensor | None, stream: Tensor, x0: Tensor, lambdas: Tensor, rstd: Tensor,
    d_x0: Tensor | None, normed_scale: Tensor, normed_dtype: torch.dtype, scale: Tensor, dtype: torch.dtype, amax: Tensor | None,
    *, along: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradient of `mix_norm_quantize` from its own output s, so x need not be kept; λ₀ = 0 makes dλ₀ not finite.

    Args:
        d_stream: (..., D) bf16 gradient of s on the residual path.
        d_normed: (..., D) gradient of x̂.
        d_head: (..., width) gradient of x̂[..., :width], which is added to d_normed, or None.
        stream: (..., D) s.
        x0: (..., D).
        lambdas: (2,) fp32.
        rstd: (...) fp32.
        d_x0: (..., D) gradient of x0 from the later blocks, to which this one's is added, or None.
        normed_scale: 0-D fp32, that x̂ was quantized with in the forward.
        normed_dtype: FP8 format of x̂.
        scale: 0-D fp32, of dx.
        dtype: FP8 format of dx.
        amax: 0-D fp32 of dx, raised in place, or None.
        along: (P, M) fp32, P parts of Σ d_normed·x̂ for every token, without d_head's; or None where it is not known.

    Returns:
        dx (..., D), which is the gradient of `pending` too; the new d_x0 (..., D); dλ (2,) fp32; x̂ᵀ (D, M) FP8; dx (M, D) FP8 and
        dxᵀ (D, M) FP8, which the MLP of the block before takes as its dy.
    """
    gradient, known = wide(d_normed), None if along is None else along.sum(0).view(rstd.shape)
    if d_head is not None:
        width = d_head.shape[-1]
        gradient = gradient + torch.nn.functional.pad(wide(d_head), (0, stream.shape[-1] - width))
        if known is not None:
            known = known + (wide(d_head) * wide(stream)[..., :width]).sum(-1) * rstd
    ds, normed = norm_gradient(gradient, wide(stream), rstd, known)
    ds = ds + wide(d_stream)
    dx, dx0 = ds * lambdas[0], ds * lambdas[1]
    if d_x0 is not None:
        dx0 = dx0 + wide(d_x0)
    d_lambdas = lambda_gradient(ds, wide(stream), wide(x0), lambdas)
    normed_t = _codes(normed, normed_scale, normed_dtype).flatten(0, -2).t().contiguous()
    return dx.to(stream.dtype), dx0.to(stream.dtype), d_lambdas, normed_t, *_both(dx, scale, dtype, amax)


def heads_backward_quantize(
    dq: Tensor, dk: Tensor, dv: Tensor, q: Tensor, k: Tensor, v: Tensor, rstd: Tensor, cos: Tensor, sin: Tensor,
    gate: Tensor | None, table: Tensor | None, ids: Tensor | None, scale: Tensor, dtype: torch.dtype, amax: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Gradient of `heads_forward` in FP8: rotated back, through the norm, and both copies of d_qkv in one pass.

    Args:
        dq: (B, T, H, E) bf16.
        dk: (B, T, G, E).
        dv: (B, T, G, E).
        q: (B, T, H, E) as returned by the forward.
        k: (B, T, G, E) as returned by the forward.
        v: (B, T, G, E) as returned by the forward.
        rstd: (B, T, H + G) fp32.
        cos: (T, E/2).
        sin: (T, E/2).
        gate: (B, T, G), or None where the layer has no value embedding.
        table: (V, G·E), or None.
        ids: (B, T) int64, or None.
        scale: 0-D fp32, of d_qkv.
        dtype: FP8 format of d_qkv.
        amax: 0-D fp32 of d_qkv, raised in place, or None.

    Returns:
        d_qkv (M, (H + 2G)·E), its transpose ((H + 2G)·E, M), d_gate (B, T, G) or None, and what a norm before the projections wants
        to know (`norm_backward_quantize`): Σ d_qkv·qkv of every head and token, (H + 2G, M) fp32.
    """
    d_qkv, d_gate = heads_gradient(dq, dk, dv, q, k, rstd, cos, sin, None if gate is None else table, ids)
    along = heads_along(dq, dk, dv, q, k, v, rstd, gate, d_gate)
    return *_both(d_qkv, scale, dtype, amax), None if gate is None or d_gate is None else d_gate.to(gate.dtype), along


def gemm_heads(
    x_q: Tensor, w_q: Tensor, x_inverse: Tensor, w_inverse: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int],
    gate: Tensor | None, table: Tensor | None, ids: Tensor | None, shape: tuple[int, int], dtype: torch.dtype, fast: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What attention reads, straight from a GEMM in FP8: as `nvfp8.reference.heads_forward` of x·wᵀ, but that is never rounded.

    Args:
        x_q: (B·T, D) FP8.
        w_q: ((H + 2G)·E, D) FP8, the weights of q, k and v.
        x_inverse: 0-D fp32, 1 / scale of x.
        w_inverse: 0-D fp32, 1 / scale of w.
        cos: (T, E/2).
        sin: (T, E/2).
        heads: (H, G).
        gate: (B, T, G), or None where the layer has no value embedding.
        table: (V, G·E) value embedding, or None.
        ids: (B, T) int64 rows of the table, or None.
        shape: (B, T).
        dtype: of q, k and v.
        fast: as in `gemm_relu_squared`.

    Returns:
        q (B, T, H, E), k (B, T, G, E), v (B, T, G, E), contiguous, and 1/rms of the rotated q and k (B, T, H + G) fp32.
    """
    del fast
    qkv = _product(x_q, w_q, x_inverse * w_inverse).unflatten(0, shape)
    q, k, v, rstd = heads_values(qkv, cos, sin, heads, gate, table, ids)
    return q.to(dtype).contiguous(), k.to(dtype).contiguous(), v.to(dtype).contiguous(), rstd


def gemm_relu_squared(
    x_q: Tensor, w_q: Tensor, x_inverse: Tensor, w_inverse: Tensor, scale: Tensor, dtype: torch.dtype, fast: bool,
    amax: Tensor | None, *, rows: bool = True, columns: bool = True,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """relu(x·wᵀ)² in FP8, x·wᵀ never stored.

    Args:
        x_q: (M, K) FP8.
        w_q: (N, K) FP8.
        x_inverse: 0-D fp32, 1 / scale of x.
        w_inverse: 0-D fp32, 1 / scale of w.
        scale: 0-D fp32, of the result.
        dtype: FP8 format of the result.
        fast: sum in the tensor core's own 14 bits or so, rather than promote to fp32 every 128 terms; a twin never does.
        amax: 0-D fp32 of the result, raised in place, or None.
        rows: whether a is wanted.
        columns: whether aᵀ is.

    Returns:
        a (M, N), aᵀ (N, M), None for what is not wanted.
    """
    del fast
    return quantize(_product(x_q, w_q, x_inverse * w_inverse).relu().square(), scale, dtype, amax, rows=rows, columns=columns)


def gemm_relu_squared_backward(
    dy_q: Tensor, w_t: Tensor, dy_inverse: Tensor, w_inverse: Tensor, a_t: Tensor, a_scale: Tensor, scale: Tensor,
    dtype: torch.dtype, fast: bool, amax: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """A gradient GEMM through relu²: dh = (dy·w) · 2·√a in FP8; the gradient of a is never stored.

    Args:
        dy_q: (M, K) FP8.
        w_t: (N, K) FP8, the transpose of the weight (K, N).
        dy_inverse: 0-D fp32, 1 / scale of dy.
        w_inverse: 0-D fp32, 1 / scale of w.
        a_t: (N, M) FP8, as the forward wrote it.
        a_scale: 0-D fp32 it was written with.
        scale: 0-D fp32, of dh.
        dtype: FP8 format of dh.
        fast: as in `gemm_relu_squared`.
        amax: 0-D fp32 of dh, raised in place, or None.

    Returns:
        dh (M, N), dhᵀ (N, M), and P parts of Σ dh·h for every token, (P, M) fp32.
    """
    del fast
    return _relu_squared_gradient(_product(dy_q, w_t, dy_inverse * w_inverse), a_t, a_scale, scale, dtype, amax)


def _product(x_q: Tensor, w_q: Tensor, inverse: Tensor) -> Tensor:
    # An inverse in fp64 asks for the exact product.
    dtype = torch.promote_types(inverse.dtype, torch.float32)
    return x_q.to(dtype) @ w_q.to(dtype).t() * inverse


def known_entries(vocab: int) -> int:
    """How many entries' share of a row's Σ exp(z) is known before the rest is: a power of 2, at least 1,024 and 1/32 of all.

    They are the first ones: a tokenizer of byte pairs numbers entries as it finds them, so these are the most frequent.
    """
    return int(2 ** max(10, (vocab - 1).bit_length() - 5))


def softcap_cross_entropy_quantize(
    logits: Tensor, targets: Tensor, losses: Tensor, factors: Tensor, vocab: int, softcap: float, scale: Tensor, q: Tensor,
    q_t: Tensor,
) -> None:  # fmt: skip
    """Cross-entropy of softcapped logits, and its gradient in FP8, as it lies and transposed, every row to a factor of its own.

    As `softcap_cross_entropy_`, but what every token's gradient is multiplied by (1 / valid tokens) is left to the GEMMs: without
    it no element is above 1, so one scale serves every batch and nothing is measured. A row's gradient is q · factor / scale.

    Codes are made over the part of Σ exp(z) that is known before all logits are read: of the first `known_entries`, and of the
    target if it is another; over all of it where one could be above the format's largest. The factor is that part's share of the
    sum, times what makes the target's code, the row's largest, exact if it is a normal number: 0.9 … 1.125 in E5M2.

    Args:
        logits: (M, V') with V' ≥ vocab, contiguous.
        targets: (M,) int64; −1 is ignored: loss 0, gradient 0, factor 0.
        losses: (M,) fp32 to write, in nats.
        factors: (M,) fp32 to write, in 0 … 1.125.
        vocab: V; columns from V on are padding: not in the sum, gradient 0.
        softcap: c.
        scale: 0-D fp32, of the gradient in FP8; no code over the whole sum is above it.
        q: (M, V') FP8 to write, contiguous.
        q_t: (V', M) to write, rows contiguous but maybe part of longer ones.
    """
    wide_logits = wide(logits[:, :vocab])
    of_tokens, gradient = softcap_loss(wide_logits, targets, softcap, True)
    assert gradient is not None
    losses.copy_(of_tokens)
    exponentials = (softcap * torch.tanh(wide_logits / softcap)).exp()
    of_target = exponentials.gather(1, targets.clamp_min(0)[:, None])[:, 0]
    first = known_entries(vocab)
    known = exponentials[:, :first].sum(1) + torch.where(targets < first, 0.0, of_target)
    over = exponentials.sum(1) / known
    smallest, _, largest = FORMATS[q.dtype]
    over = torch.where((over * scale > largest) | (targets < 0), 1.0, over)
    gradient = torch.nn.functional.pad(gradient * over[:, None], (0, logits.shape[1] - vocab))
    codes, at_target = _codes(gradient, scale, q.dtype), targets.clamp_min(0)[:, None]
    exact, rounded = (scale * gradient).gather(1, at_target)[:, 0], wide(codes).gather(1, at_target)[:, 0]
    correction = torch.where(rounded.abs() >= 2.0**smallest, exact / rounded, 1.0)
    factors.copy_(torch.where(targets < 0, 0.0, correction / over))
    q.copy_(codes)
    q_t.copy_(codes.t())


def scale_rows_(x: Tensor, factors: Tensor) -> Tensor:
    """Multiply every row of x by a factor of its own, in place.

    Args:
        x: (M, N) bf16 or fp32, contiguous.
        factors: (M,) fp32.
    """
    return x.copy_(wide(x) * factors[:, None])
