"""RMSNorm between a bf16 stream and FP8 GEMMs: residual sums and mixes go in, FP8 comes out, both ways.

Forward takes a row a program, as in `norm.py`: everything between load and store in registers. Bytes an element:
`mix_norm_quantize` 2·3 read (x, pending, x0), 2 + 1 written; `add_norm_quantize` 2·2 read, 2 + 1 written.

Backward also writes transposes, so a program needs many rows, and the sum over each row before it can write anything. 32 whole rows
of two bf16 tensors at D = 1,536 are 192 KiB: neither registers nor, beside anything else, shared memory hold them. A program
therefore walks its rows' columns twice, 512 channels at a time, first for the sums, then back: what it read last it finds in L1,
the rest in L2, which is asked to keep it. What is written asks to be evicted first. 32,768 × 1,536, H100: 0.236 and 0.358 ms; with
256 channels at a time 0.248 and 0.418, with asynchronous copies besides, which cost the second program on an SM, 0.300 and 0.420.
Bytes an element: `norm_backward_quantize` 2·3 read (d_normed, x, d_stream), 2 + 1 + 1 + 1
written; `mix_norm_backward_quantize` 2·5 read, 2 + 2 + 1 + 1 + 1 written; either up to 4 more where L2 did not keep the rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp8.kernels.fp8 import DTYPES, as_bits, largest_bits, raise_amax, to_fp8
from nvfp8.reference import NORM_EPS

TOKENS, TILE = 32, 512  # backward's tile: 32 tokens are whole 32-byte sectors of the transposes


@triton.jit
def _norm_quantize(
    X, PENDING, X0, LAMBDAS, STREAM, Q, HEAD, RSTD, SCALE, AMAX, D, WIDTH: tl.constexpr,
    EPS: tl.constexpr, MIX: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < D
    at = row * D
    x = tl.load(X + at + column, mask, 0.0).to(tl.float32)
    if PENDING is not None:
        x += tl.load(PENDING + at + column, mask, 0.0).to(tl.float32)
    if MIX:
        x = tl.load(LAMBDAS) * x + tl.load(LAMBDAS + 1) * tl.load(X0 + at + column, mask, 0.0).to(tl.float32)
    if STREAM is not None:
        stored = x.to(STREAM.dtype.element_ty)
        tl.store(STREAM + at + column, stored, mask)
        x = stored.to(tl.float32)  # the norm sees the stream as it is stored, here and in backward
    rstd = tl.rsqrt(tl.sum(x * x, 0) / D + EPS)
    if RSTD is not None:
        tl.store(RSTD + row, rstd)
    normed = x * rstd
    if AMAX is not None:
        raise_amax(AMAX, largest_bits(normed))
    if HEAD is not None:
        tl.store(HEAD + row * WIDTH + column, normed.to(HEAD.dtype.element_ty), column < WIDTH)
    tl.store(Q + at + column, to_fp8(normed * tl.load(SCALE), DTYPE), mask)


@triton.jit
def _gradient(D_NORMED, D_HEAD, token, channel, at, mask, M, WIDTH: tl.constexpr, KEEP: tl.constexpr):
    gradient = tl.load(D_NORMED + at, mask, 0.0, eviction_policy=KEEP).to(tl.float32)
    if D_HEAD is not None:
        gradient += tl.load(D_HEAD + token * WIDTH + channel, (token < M) & (channel < WIDTH), 0.0).to(tl.float32)
    return gradient


@triton.jit
def _added(tile, TOKENS: tl.constexpr, TILE: tl.constexpr):
    # Sums of 8 neighbours, which one thread holds: what runs along with a loop takes an eighth of the registers.
    return tl.sum(tl.reshape(tile, (TOKENS, TILE // 8, 8)), 2)


@triton.jit
def _norm_backward_quantize(
    D_NORMED, X, RSTD, D_STREAM, D_HEAD, X0, LAMBDAS, D_X0_IN, NORMED_SCALE, SCALE,
    DX, D_X0, D_LAMBDAS, NORMED_T, DX_Q, DX_T, AMAX, M, D, WIDTH: tl.constexpr,
    NORMED_DTYPE: tl.constexpr, DTYPE: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    MIX: tl.constexpr = X0 is not None
    first_token = tl.program_id(0).to(tl.int64) * TOKENS
    token = tl.arange(0, TOKENS)[:, None]
    channel = tl.arange(0, TILE)[None, :]
    left = (M - first_token).to(tl.int32)  # what follows counts from the first token, in 32 bits
    D_NORMED += first_token * D
    X += first_token * D
    D_STREAM += first_token * D
    if D_HEAD is not None:
        D_HEAD += first_token * WIDTH
    rows = tl.arange(0, TOKENS)
    rstd = tl.load(RSTD + first_token + rows, rows < left, 0.0)[:, None]
    products = tl.zeros((TOKENS, TILE // 8), tl.float32)
    for start in range(0, D, TILE):
        at = token * D + (start + channel)
        mask = (token < left) & (start + channel < D)
        gradient = _gradient(D_NORMED, D_HEAD, token, start + channel, at, mask, left, WIDTH, "evict_last")
        x = tl.load(X + at, mask, 0.0, eviction_policy="evict_last").to(tl.float32)
        products += _added(gradient * x, TOKENS, TILE)
    mean = (tl.sum(products, 1) / D)[:, None] * rstd
    normed_scale = tl.load(NORMED_SCALE)
    scale = tl.load(SCALE)
    if MIX:
        resid_lambda = tl.load(LAMBDAS)
        x0_lambda = tl.load(LAMBDAS + 1)
        along_stream = tl.zeros((TOKENS, TILE // 8), tl.float32)
        along_x0 = tl.zeros((TOKENS, TILE // 8), tl.float32)
    if AMAX is not None:
        largest = tl.zeros((TOKENS, TILE // 8), tl.int32)
    last = (tl.cdiv(D, TILE) - 1) * TILE
    for back in range(0, D, TILE):
        start = last - back
        at = token * D + (start + channel)
        mask = (token < left) & (start + channel < D)
        gradient = _gradient(D_NORMED, D_HEAD, token, start + channel, at, mask, left, WIDTH, "evict_first")
        x = tl.load(X + at, mask, 0.0, eviction_policy="evict_first").to(tl.float32)
        ds = tl.load(D_STREAM + at, mask, 0.0, eviction_policy="evict_first").to(tl.float32)
        normed = x * rstd
        ds += rstd * (gradient - normed * mean)
        dx = ds
        if MIX:
            x0 = tl.load(X0 + first_token * D + at, mask, 0.0, eviction_policy="evict_first").to(tl.float32)
            along_stream += _added(ds * x, TOKENS, TILE)
            along_x0 += _added(ds * x0, TOKENS, TILE)
            dx0 = ds * x0_lambda
            if D_X0_IN is not None:
                dx0 += tl.load(D_X0_IN + first_token * D + at, mask, 0.0, eviction_policy="evict_first").to(tl.float32)
            tl.store(D_X0 + first_token * D + at, dx0.to(D_X0.dtype.element_ty), mask, eviction_policy="evict_first")
            dx = ds * resid_lambda
        if AMAX is not None:
            magnitude = tl.reshape(dx.to(tl.int32, bitcast=True) & 0x7FFFFFFF, (TOKENS, TILE // 8, 8))
            largest = tl.maximum(largest, tl.max(magnitude, 2))
        tl.store(DX + first_token * D + at, dx.to(DX.dtype.element_ty), mask, eviction_policy="evict_first")
        codes = to_fp8(dx * scale, DTYPE)
        tl.store(DX_Q + first_token * D + at, codes, mask, eviction_policy="evict_first")
        corner = start * (first_token + left) + first_token  # start · M, in 64 bits
        tl.store(DX_T + corner + (channel * M + token), codes, mask)
        tl.store(NORMED_T + corner + (channel * M + token), to_fp8(normed * normed_scale, NORMED_DTYPE), mask)
    if AMAX is not None:
        raise_amax(AMAX, tl.max(tl.ravel(largest), 0))
    if MIX:
        program = tl.program_id(0)
        x0_sum = tl.sum(tl.ravel(along_x0), 0)
        tl.store(D_LAMBDAS + 2 * program, (tl.sum(tl.ravel(along_stream), 0) - x0_lambda * x0_sum) / resid_lambda)
        tl.store(D_LAMBDAS + 2 * program + 1, x0_sum)


def _forward(
    x: Tensor, pending: Tensor | None, x0: Tensor | None, lambdas: Tensor | None, width: int, scale: Tensor, dtype: torch.dtype,
    amax: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x = x.contiguous()
    d = x.shape[-1]
    m = x.numel() // d
    stream, head = torch.empty_like(x), torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    q = torch.empty(m, d, dtype=dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(d)
    if m:
        _norm_quantize[(m,)](
            x, None if pending is None else pending.contiguous(), None if x0 is None else x0.contiguous(), lambdas, stream, q,
            head if width else None, rstd, scale, as_bits(amax), d, width,
            EPS=NORM_EPS, MIX=x0 is not None, DTYPE=DTYPES[dtype], BLOCK=block, num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip
    return stream, q, head, rstd


def mix_norm_quantize(
    x: Tensor, pending: Tensor | None, x0: Tensor, lambdas: Tensor, width: int, scale: Tensor, dtype: torch.dtype,
    amax: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `nvfp8.reference_fp8.mix_norm_quantize`."""
    return _forward(x, pending, x0, lambdas.contiguous(), width, scale, dtype, amax)


def add_norm_quantize(
    stream: Tensor, branch: Tensor, scale: Tensor, dtype: torch.dtype, amax: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `nvfp8.reference_fp8.add_norm_quantize`."""
    x, q, _, rstd = _forward(stream, branch, None, None, 0, scale, dtype, amax)
    return x, q, rstd


def norm_quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """See `nvfp8.reference_fp8.norm_quantize`."""
    x = x.contiguous()
    d = x.shape[-1]
    q, block = torch.empty(x.numel() // d, d, dtype=dtype, device=x.device), triton.next_power_of_2(d)
    if len(q):
        _norm_quantize[(len(q),)](
            x, None, None, None, None, q, None, None, scale, None, d, 0,
            EPS=NORM_EPS, MIX=False, DTYPE=DTYPES[dtype], BLOCK=block, num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip
    return q


def _backward(
    d_normed: Tensor, x: Tensor, rstd: Tensor, d_stream: Tensor, d_head: Tensor | None, x0: Tensor | None, lambdas: Tensor | None,
    d_x0: Tensor | None, normed_scale: Tensor, normed_dtype: torch.dtype, scale: Tensor, dtype: torch.dtype, amax: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor]:  # fmt: skip
    d_normed, x, d_stream = d_normed.contiguous(), x.contiguous(), d_stream.contiguous()
    d_head, x0, lambdas, d_x0 = (None if t is None else t.contiguous() for t in (d_head, x0, lambdas, d_x0))
    d = x.shape[-1]
    m = x.numel() // d
    dx, new_d_x0 = torch.empty_like(x), None if x0 is None else torch.empty_like(x)
    normed_t = torch.empty(d, m, dtype=normed_dtype, device=x.device)
    dx_q, dx_t = (torch.empty(shape, dtype=dtype, device=x.device) for shape in ((m, d), (d, m)))
    width = 0 if d_head is None else d_head.shape[-1]
    programs = triton.cdiv(m, TOKENS)
    partial = None if x0 is None else torch.empty(programs, 2, dtype=torch.float32, device=x.device)
    _norm_backward_quantize[(programs,)](
        d_normed, x, rstd, d_stream, d_head, x0, lambdas, d_x0, normed_scale, scale,
        dx, new_d_x0, partial, normed_t, dx_q, dx_t, as_bits(amax), m, d, width,
        NORMED_DTYPE=DTYPES[normed_dtype], DTYPE=DTYPES[dtype], TOKENS=TOKENS, TILE=TILE, num_warps=16, num_stages=1,
    )  # fmt: skip
    return dx, new_d_x0, None if partial is None else partial.sum(0), normed_t, dx_q, dx_t


def norm_backward_quantize(
    d_normed: Tensor, x: Tensor, rstd: Tensor, d_stream: Tensor, normed_scale: Tensor, normed_dtype: torch.dtype,
    scale: Tensor, dtype: torch.dtype, amax: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `nvfp8.reference_fp8.norm_backward_quantize`."""
    dx, _, _, *rest = _backward(d_normed, x, rstd, d_stream, None, None, None, None, normed_scale, normed_dtype, scale, dtype, amax)
    normed_t, dx_q, dx_t = rest
    return dx, normed_t, dx_q, dx_t


def mix_norm_backward_quantize(
    d_stream: Tensor, d_normed: Tensor, d_head: Tensor | None, stream: Tensor, x0: Tensor, lambdas: Tensor, rstd: Tensor,
    d_x0: Tensor | None, normed_scale: Tensor, normed_dtype: torch.dtype, scale: Tensor, dtype: torch.dtype, amax: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `nvfp8.reference_fp8.mix_norm_backward_quantize`."""
    dx, new_d_x0, d_lambdas, normed_t, dx_q, dx_t = _backward(
        d_normed, stream, rstd, d_stream, d_head, x0, lambdas, d_x0, normed_scale, normed_dtype, scale, dtype, amax
    )
    assert new_d_x0 is not None and d_lambdas is not None
    return dx, new_d_x0, d_lambdas, normed_t, dx_q, dx_t
