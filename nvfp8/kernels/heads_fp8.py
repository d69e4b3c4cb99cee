"""The backward pass of `heads.py` into FP8: q, k, v's gradients become both operands of the projections' two backward GEMMs.

A program takes 32 tokens of one head. Its two halves are tiles of 32 × E/2, which leave as 64 bytes a row and, transposed, as 32
(E = 128). Bytes an element of d_qkv, without angles and 1/rms: 2 + 2 read (gradient and output; of v 2 more where a value
embedding is gathered), 1 + 1 written. v is read for one number a head and token, Σ d_qkv·qkv, which saves the norm before the
projections reading its rows twice. 32,768 tokens × 36 heads are 36,864 programs of 4 warps, 16 elements of each half a thread.
The compiler would take 96 registers a thread; with 80, and 8 bytes spilled, 768 threads share a multiprocessor.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp8.kernels.fp8 import DTYPES, INTERPRETED, as_bits, largest_bits, raise_amax, to_fp8
from nvfp8.kernels.heads import heads_gradient
from nvfp8.reference import NORM_EPS, QK_SCALE

TOKENS = 64 if INTERPRETED.value else 32  # tokens a program; the interpreter's time is programs


@triton.jit
def _heads_backward_quantize(
    DQ, DK, DV, Q, K, V, RSTD, COS, SIN, GATE, TABLE, IDS, D_GATE, OUT_SCALE, OUT, OUT_T, ALONG, AMAX, N, T,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, VALUES: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr,
    DTYPE: tl.constexpr, TOKENS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    first_token = tl.program_id(1).to(tl.int64) * TOKENS
    a, b = heads_gradient(
        DQ, DK, DV, Q, K, V, RSTD, COS, SIN, GATE, TABLE, IDS, D_GATE, ALONG, head, first_token, N, T,
        H, G, E, VALUES, SCALE, EPS, TOKENS, HALF,
    )  # fmt: skip
    if AMAX is not None:
        raise_amax(AMAX, tl.maximum(largest_bits(a), largest_bits(b)))
    scale = tl.load(OUT_SCALE)
    # Where the tile is wider than half a head, its end would be the next half's beginning: each store is bounded by its own end.
    first = head.to(tl.int64) * E
    _store_half(OUT, OUT_T, to_fp8(a * scale, DTYPE), first_token, first, N, (H + 2 * G) * E, E // 2, TOKENS, HALF)
    _store_half(OUT, OUT_T, to_fp8(b * scale, DTYPE), first_token, first + E // 2, N, (H + 2 * G) * E, E // 2, TOKENS, HALF)


@triton.jit
def _store_half(
    OUT, OUT_T, codes, first_token, first_channel, M, WIDTH: tl.constexpr, SIZE: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    token = tl.arange(0, TOKENS)[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    mask = (first_token + token < M) & (channel < SIZE)
    tl.store(OUT + first_token * WIDTH + first_channel + (token * WIDTH + channel), codes, mask)
    tl.store(OUT_T + first_channel * M + first_token + (channel * M + token), codes, mask)


def heads_backward_quantize(
    dq: Tensor, dk: Tensor, dv: Tensor, q: Tensor, k: Tensor, v: Tensor, rstd: Tensor, cos: Tensor, sin: Tensor,
    gate: Tensor | None, table: Tensor | None, ids: Tensor | None, scale: Tensor, dtype: torch.dtype, amax: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """See `nvfp8.reference_fp8.heads_backward_quantize`."""
    batch, length, n_head, size = q.shape
    n_kv = k.shape[2]
    tokens, width = batch * length, (n_head + 2 * n_kv) * size
    out = torch.empty(tokens, width, dtype=dtype, device=q.device)
    out_t = torch.empty(width, tokens, dtype=dtype, device=q.device)
    d_gate = None if gate is None else torch.empty_like(gate)
    along = torch.empty(n_head + 2 * n_kv, tokens, dtype=torch.float32, device=q.device)
    _heads_backward_quantize[n_head + 2 * n_kv, triton.cdiv(tokens, TOKENS)](
        dq, dk, dv, q, k, v, rstd, cos, sin, gate, table, ids, d_gate, scale, out, out_t, along, as_bits(amax), tokens, length,
        H=n_head, G=n_kv, E=size, VALUES=gate is not None, SCALE=QK_SCALE, EPS=NORM_EPS, DTYPE=DTYPES[dtype],
        TOKENS=TOKENS, HALF=triton.next_power_of_2(size // 2), num_warps=4, maxnreg=80,
    )  # fmt: skip
    return out, out_t, d_gate, along
