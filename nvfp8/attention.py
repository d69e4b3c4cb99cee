"""What happens between the q/k/v projections and the output projection: rotary, QK norm, value embedding, attention.

`project_heads` is one kernel each way (rotary, norm and gate between one read and one write; forward, in FP8, the projections'
GEMM too). `causal_attention` is exact
on every backend; a window of w lets position t see t−w … t. Backends, best first:

* `fa3`    FlashAttention 3 where `flash_attn_interface` is installed (Hopper, bf16): windows native.
* `cudnn`  cuDNN's fused attention through its Python front end (bf16): windows native, and faster on Hopper than
           PyTorch's own flash backend.
* `sdpa`   PyTorch's own; a window runs in blocks of queries against the band of keys they see, so the mask is T×(w + block).
* `plain`  the definition, with its T×T scores: the twin for tests, refused on a GPU.

All of them group heads: K need only divide H. What else a shape must have differs, so the choice is made for a device, a dtype,
E and T, and can say why a better backend was passed over.

Letters: B batch, T sequence, H query heads, K key/value heads (K divides H), E head dimension.
"""

import importlib.util
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nvfp8 import cudnn_attention
from nvfp8.embedding import TokenOrder, add_rows_to_gradient, token_order
from nvfp8.hardware import missing
from nvfp8.ops import ops
from nvfp8.quantize import Deferred, asked, deferred, hand_only
from nvfp8.scaling import Site

BACKENDS = ("fa3", "cudnn", "sdpa", "plain")


class _ProjectHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int],
        gate: Tensor | None, table: Tensor | None, ids: Tensor | None, order: TokenOrder | None, site: Site | None,
        product: Deferred | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        if product is None:
            q, k, v, rstd = ops(qkv).heads_forward(qkv, cos, sin, heads, gate, table, ids)
        else:
            q, k, v, rstd = product.site.kernels(qkv).gemm_heads(
                product.x, product.w, product.x_inverse, product.w_inverse, cos, sin, heads, gate, table, ids,
                qkv.shape[:2], qkv.dtype, product.fast,
            )  # fmt: skip
        # What attention keeps anyway, but where it pads or cuts k and v for a window. The table too: autograd sees if it changes.
        ctx.save_for_backward(q, k, v if site is not None else None, rstd, cos, sin, gate, table, ids)
        ctx.table, ctx.order, ctx.site, ctx.shape = table, order, site, qkv.shape
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, rstd, cos, sin, gate, table, ids = ctx.saved_tensors
        dq, dk, dv = dq.contiguous(), dk.contiguous(), dv.contiguous()
        site: Site | None = ctx.site
        if site is None:
            d_qkv, d_gate = ops(q).heads_backward(dq, dk, dv, q, k, rstd, cos, sin, gate, table, ids)
        else:  # the projections' backward reads FP8, so nothing is written in bf16
            codes, codes_t, d_gate, along = site.kernels(q).heads_backward_quantize(
                dq, dk, dv, q, k, v, rstd, cos, sin, gate, table, ids, site.scale, site.dtype, site.amax
            )
            d_qkv = hand_only(ctx.shape, q.dtype, site, codes, codes_t, along)
        if ctx.table is not None and ctx.table.requires_grad:
            add_rows_to_gradient(ctx.table, dv.flatten(2), gate, ctx.order or token_order(ids))
        return d_qkv, None, None, None, d_gate, None, None, None, None, None


def project_heads(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int], gate: Tensor | None, table: Tensor | None, ids: Tensor | None,
    order: TokenOrder | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Rotary, QK norm (× 1.2) and value embedding; keeps q, k, in FP8 also v, and 1/rms for backward.

    Args:
        qkv: (B, T, (H + 2K)·E) projections; where their layer has left the GEMM to us, it is done here, once, in one kernel
            with all else; where their layer asks for the gradient in FP8, it is written in FP8 only.
        cos: (T, E/2).
        sin: (T, E/2).
        heads: (H, K).
        gate: (B, T, K) factor of the value embedding, or None.
        table: (V, K·E) value embedding, a Parameter, or None; its gradient goes straight into `.grad` (`nvfp8.embedding`).
        ids: (B, T) int64, or None.
        order: of ids, where several tables share it; None sorts them in backward.

    Returns:
        q (B, T, H, E), k and v (B, T, K, E), contiguous, qkv's dtype.

    Raises:
        RuntimeError: qkv stands in for a GEMM that was done before, or is a view of what does.
    """
    # Kernels address these by token alone; `tokens[:, :-1]` and the like have other strides.
    gate, ids = (None if t is None else t.contiguous() for t in (gate, ids))
    angles = cos.contiguous(), sin.contiguous()
    return _ProjectHeads.apply(qkv, *angles, heads, gate, table, ids, order, asked(qkv), deferred(qkv))


@cache
def why_not(backend: str, device_type: str, dtype: torch.dtype, head_dim: int, length: int) -> str | None:
    """Why attention `backend` cannot run, forward and backward, or None where it can.

    Args:
        backend: one of BACKENDS.
        device_type: "cuda" or "cpu".
        dtype: dtype of q, k, v.
        head_dim: E.
        length: T.
    """
    if backend == "sdpa":
        return None
    if backend == "plain":
        return "its score matrix is quadratic in T" if device_type == "cuda" else None
    if device_type != "cuda":
        return "it needs a CUDA device"
    if dtype != torch.bfloat16:
        return f"it runs in bfloat16, not {str(dtype).removeprefix('torch.')}"
    capability = torch.cuda.get_device_capability()
    chip = missing("wgmma" if backend == "fa3" else "bf16", capability)
    if chip is not None:
        return chip
    if backend == "cudnn":
        if not cudnn_attention.available():
            return "nvidia-cudnn-frontend is not installed (pip install -e '.[cuda]')"
        return cudnn_attention.unsupported(head_dim, length, capability)
    if importlib.util.find_spec("flash_attn_interface") is None:
        return "flash_attn_interface is not installed"
    fits = head_dim % 8 == 0 and head_dim <= 256
    return None if fits else f"its head dimension must be a multiple of 8 up to 256, not {head_dim}"


def passed_over(device_type: str, dtype: torch.dtype, head_dim: int, length: int) -> dict[str, str]:
    """The backends better than the one "auto" takes, best first, and why each cannot run; arguments as for `why_not`."""
    reasons: dict[str, str] = {}
    for backend in BACKENDS:
        reason = why_not(backend, device_type, dtype, head_dim, length)
        if reason is None:
            break
        reasons[backend] = reason
    return reasons


def choose_backend(device_type: str, dtype: torch.dtype, head_dim: int, length: int, wanted: str = "auto") -> str:
    """The attention backend that will run: `wanted`, or with "auto" the best one there is.

    Args:
        device_type: "cuda" or "cpu".
        dtype: dtype of q, k, v.
        head_dim: E.
        length: T.
        wanted: "auto" or one of BACKENDS.

    Raises:
        ValueError: `wanted` is unknown or cannot run here; the message says why.
    """
    if wanted == "auto":
        return next(name for name in BACKENDS if why_not(name, device_type, dtype, head_dim, length) is None)
    if wanted not in BACKENDS:
        raise ValueError(f"unknown attention backend {wanted!r}: choose auto or one of {', '.join(BACKENDS)}")
    reason = why_not(wanted, device_type, dtype, head_dim, length)
    if reason is not None:
        raise ValueError(f"attention backend {wanted!r} cannot run here: {reason}; use auto, which takes the best that can")
    return wanted


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int, backend: str) -> Tensor:
    """softmax(q·kᵀ/√E)·v over the keys t−window … t.

    Args:
        q: (B, T, H, E).
        k: (B, T, K, E).
        v: (B, T, K, E).
        window: how many earlier positions are seen besides the own one; T − 1 or more means all.
        backend: a name `choose_backend` returned.

    Returns:
        (B, T, H, E), q's dtype.
    """
    if backend == "cudnn":
        return cudnn_attention.attention(q, k, v, window)
    if backend == "fa3":
        from flash_attn_interface import flash_attn_func

        deterministic = torch.are_deterministic_algorithms_enabled()
        out = flash_attn_func(q, k, v, causal=True, window_size=(window, 0), deterministic=deterministic)
        return out[0] if isinstance(out, tuple) else out  # some releases return the log-sum-exp beside it
    if backend == "plain":
        positions = torch.arange(q.shape[1], device=q.device)
        return masked_attention(q, k, v, band_mask(positions, positions, window))
    return _sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), window).transpose(1, 2)


def band_mask(queries: Tensor, keys: Tensor, window: int) -> Tensor:
    """Which key positions (S,) each query position (T,) sees: bool (T, S), true for query−window ≤ key ≤ query."""
    distance = queries[:, None] - keys[None, :]
    return (distance >= 0) & (distance <= window)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention by its definition, scores in at least fp32; decoding with a cache uses it too.

    Args:
        q: (B, T, H, E).
        k: (B, S, K, E).
        v: (B, S, K, E).
        mask: (T, S) bool, true where seen.

    Returns:
        (B, T, H, E), q's dtype.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[2] // k.shape[2]
    k, v = (x.to(wide).repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("bthe,bshe->bhts", q.to(wide), k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshe->bthe", weights, v).to(q.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """(B, H, T, E), (B, K, T, E) -> (B, H, T, E); a window runs as blocks of queries against their band of keys."""
    length, grouped = q.shape[2], q.shape[1] != k.shape[1]
    if window >= length - 1:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    block = 128
    blocks = -(-length // block)
    tail = blocks * block - length
    # Block i of queries, [i·block, (i+1)·block), sees keys [i·block − window, (i+1)·block).
    q_blocks = F.pad(q, (0, 0, 0, tail)).unflatten(2, (blocks, block))  # (B, H, n, block, E)
    k_bands, v_bands = (
        F.pad(x, (0, 0, window, tail)).unfold(2, window + block, block).transpose(-1, -2)  # (B, K, n, window+block, E)
        for x in (k, v)
    )
    queries = torch.arange(blocks * block, device=q.device).view(blocks, block)
    keys = torch.arange(window + block, device=q.device) + torch.arange(blocks, device=q.device)[:, None] * block - window
    distance = queries[:, :, None] - keys[:, None, :]
    mask = (distance >= 0) & (distance <= window) & (keys >= 0)[:, None, :]  # (n, block, window+block)
    # Blocks become the batch, rows and heads one axis, so that one mask a block serves them all.
    q_blocks, k_bands, v_bands = (x.flatten(0, 1).transpose(0, 1) for x in (q_blocks, k_bands, v_bands))
    out = F.scaled_dot_product_attention(q_blocks, k_bands, v_bands, attn_mask=mask[:, None], enable_gqa=grouped)
    return out.transpose(0, 1).unflatten(0, (q.shape[0], -1)).flatten(2, 3)[:, :, :length]
