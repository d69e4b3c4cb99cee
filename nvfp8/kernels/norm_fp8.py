"""RMSNorm between a bf16 stream and FP8 GEMMs: residual sums and mixes go in, FP8 comes out, both ways.

Forward takes a row a program, as in `norm.py`: everything between load and store in registers. Bytes an element:
`mix_norm_quantize` 2·3 read (x, pending, x0), 2 + 1 written; `add_norm_quantize` 2·2 read, 2 + 1 written.

Backward needs a sum over each row, Σ dx̂·x̂, before it can write anything, and transposes, which want many rows: 64 rows of two bf16
tensors are more than registers and shared memory hold, so rows would be read twice. But dx̂ = dy·W and y = x̂·Wᵀ, hence

    Σ_d dx̂·x̂ = Σ_n dy·y        over the N outputs of the linear layer behind the norm

and who wrote dy had both in registers (`Quantized.along`): relu²'s gradient, 2√a·da times √a, and the heads'. So a program takes a
tile of 32 tokens × 128 channels and reads it once. Of what FP8 rounds of y, dy and x̂ the part along x̂ stays in dx. Where nobody
knows y, as after a GEMM that was measured first, `_row_products` reads the rows a first time.
Bytes an element: `norm_backward_quantize` 2·3 read (d_normed, x, d_stream), 2 + 1 + 1 + 1 written; `mix_norm_backward_quantize`
2·5 read, 2 + 2 + 1 + 1 + 1 written. The tile is taken in quarters, as in `quantize_fp8.py` and for its reasons, and all that a
program reads is asked for at once: small programs, 3 or 5 of 128 threads on a multiprocessor, keep memory busier than large ones.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp8.kernels.fp8 import DTYPES, INTERPRETED, as_bits, largest_bits, raise_amax, to_fp8
from nvfp8.kernels.quantize_fp8 import every_fourth, store_across
from nvfp8.reference import NORM_EPS

TOKENS, CHANNELS = 64 if INTERPRETED.value else 32, 128  # backward's tile; the interpreter's time is programs


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
def _row_products(D_NORMED, X, RSTD, ALONG, D, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < D
    gradient = tl.load(D_NORMED + row * D + column, mask, 0.0).to(tl.float32)
    x = tl.load(X + row * D + column, mask, 0.0).to(tl.float32)
    tl.store(ALONG + row, tl.sum(gradient * x, 0) * tl.load(RSTD + row))


@triton.jit
def _eighth(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    # Eight neighbours, which one thread holds: what is summed over all quarters takes an eighth of the registers.
    return tl.reshape(tile, (ROWS, COLUMNS // 8, 8))


@triton.jit
def _read_quarter(
    which: tl.constexpr, D_NORMED, X, D_STREAM, X0, D_X0_IN, first_token, first_channel, M, D,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """What a quarter reads, as it is stored; what there is none of stands for nothing."""
    at, mask = every_fourth(which, first_token, first_channel, M, D, TOKENS, CHANNELS)
    gradient = tl.load(D_NORMED + at, mask, 0.0)
    x = tl.load(X + at, mask, 0.0)
    d_stream = tl.load(D_STREAM + at, mask, 0.0)
    x0 = x
    d_x0 = x
    if X0 is not None:
        x0 = tl.load(X0 + at, mask, 0.0)
        if D_X0_IN is not None:
            d_x0 = tl.load(D_X0_IN + at, mask, 0.0)
    return gradient, x, d_stream, x0, d_x0


@triton.jit
def _gradient_quarter(
    which: tl.constexpr, read, rstd, mean, factors, D_HEAD, first_token, first_channel, M, WIDTH, MIX: tl.constexpr,
    ADD: tl.constexpr, NORMED_DTYPE: tl.constexpr, DTYPE: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """From what `_read_quarter` read: dx and d_x0 to store, codes of dx and of x̂, and what is summed over the tile."""
    gradient, x, d_stream, x0, d_x0 = read
    lambda0, lambda1, normed_scale, scale = factors
    stored: tl.constexpr = x.dtype
    gradient = gradient.to(tl.float32)
    if D_HEAD is not None:
        token = first_token + tl.arange(0, TOKENS // 4)[:, None] * 4 + which
        channel = first_channel + tl.arange(0, CHANNELS)[None, :]
        gradient += tl.load(D_HEAD + token * WIDTH + channel, (token < M) & (channel < WIDTH), 0.0).to(tl.float32)
    x = x.to(tl.float32)
    normed = x * rstd
    ds = d_stream.to(tl.float32) + rstd * (gradient - normed * mean)
    dx = ds
    dx0 = ds
    along_stream = 0.0
    along_x0 = 0.0
    if MIX:
        along_stream = tl.sum(_eighth(ds * x, TOKENS // 4, CHANNELS), 2)
        along_x0 = tl.sum(_eighth(ds * x0.to(tl.float32), TOKENS // 4, CHANNELS), 2)
        dx0 = ds * lambda1
        if ADD:
            dx0 += d_x0.to(tl.float32)
        dx = ds * lambda0
    largest = tl.max(_eighth(dx.to(tl.int32, bitcast=True) & 0x7FFFFFFF, TOKENS // 4, CHANNELS), 2)
    codes, normed_codes = to_fp8(dx * scale, DTYPE), to_fp8(normed * normed_scale, NORMED_DTYPE)
    return dx.to(stored), dx0.to(stored), codes, normed_codes, largest, along_stream, along_x0


@triton.jit
def _write_quarter(
    which: tl.constexpr, dx, dx0, codes, DX, D_X0, DX_Q, first_token, first_channel, M, D,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    at, mask = every_fourth(which, first_token, first_channel, M, D, TOKENS, CHANNELS)
    tl.store(DX + at, dx, mask)
    if D_X0 is not None:
        tl.store(D_X0 + at, dx0, mask)
    tl.store(DX_Q + at, codes, mask)


@triton.jit
def _norm_backward_quantize(
    D_NORMED, ALONG, X, RSTD, D_STREAM, D_HEAD, X0, LAMBDAS, D_X0_IN, NORMED_SCALE, SCALE,
    DX, D_X0, D_LAMBDAS, NORMED_T, DX_Q, DX_T, AMAX, M, D, WIDTH, PARTS, NORMED_DTYPE: tl.constexpr, DTYPE: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    MIX: tl.constexpr = X0 is not None
    ADD: tl.constexpr = D_X0_IN is not None
    first_channel = tl.program_id(0).to(tl.int64) * CHANNELS
    first_token = tl.program_id(1).to(tl.int64) * TOKENS
    # All is read before anything is written: the compiler must take a store for one to any address, and moves no load across.
    read0 = _read_quarter(0, D_NORMED, X, D_STREAM, X0, D_X0_IN, first_token, first_channel, M, D, TOKENS, CHANNELS)
    read1 = _read_quarter(1, D_NORMED, X, D_STREAM, X0, D_X0_IN, first_token, first_channel, M, D, TOKENS, CHANNELS)
    read2 = _read_quarter(2, D_NORMED, X, D_STREAM, X0, D_X0_IN, first_token, first_channel, M, D, TOKENS, CHANNELS)
    read3 = _read_quarter(3, D_NORMED, X, D_STREAM, X0, D_X0_IN, first_token, first_channel, M, D, TOKENS, CHANNELS)
    token = first_token + tl.arange(0, TOKENS)
    part = tl.arange(0, BLOCK_PARTS)[:, None]
    rstd = tl.load(RSTD + token, token < M, 0.0)
    along = tl.sum(tl.load(ALONG + part * M + token[None, :], (part < PARTS) & (token < M)[None, :], 0.0), 0)
    if D_HEAD is not None:
        column = tl.arange(0, BLOCK_WIDTH)[None, :]
        mask = (token < M)[:, None] & (column < WIDTH)
        d_head = tl.load(D_HEAD + token[:, None] * WIDTH + column, mask, 0.0).to(tl.float32)
        along += tl.sum(d_head * tl.load(X + token[:, None] * D + column, mask, 0.0).to(tl.float32), 1) * rstd
    lambda0 = 1.0
    lambda1 = 0.0
    if MIX:
        lambda0 = tl.load(LAMBDAS)
        lambda1 = tl.load(LAMBDAS + 1)
    factors = lambda0, lambda1, tl.load(NORMED_SCALE), tl.load(SCALE)
    r0, r1, r2, r3 = _fourths(rstd, TOKENS)
    m0, m1, m2, m3 = _fourths(along / D, TOKENS)
    dx_0, dx0_0, c0, n0, b0, s0, z0 = _gradient_quarter(
        0, read0, r0, m0, factors, D_HEAD, first_token, first_channel, M, WIDTH, MIX, ADD, NORMED_DTYPE, DTYPE, TOKENS, CHANNELS
    )
    dx_1, dx0_1, c1, n1, b1, s1, z1 = _gradient_quarter(
        1, read1, r1, m1, factors, D_HEAD, first_token, first_channel, M, WIDTH, MIX, ADD, NORMED_DTYPE, DTYPE, TOKENS, CHANNELS
    )
    dx_2, dx0_2, c2, n2, b2, s2, z2 = _gradient_quarter(
        2, read2, r2, m2, factors, D_HEAD, first_token, first_channel, M, WIDTH, MIX, ADD, NORMED_DTYPE, DTYPE, TOKENS, CHANNELS
    )
    dx_3, dx0_3, c3, n3, b3, s3, z3 = _gradient_quarter(
        3, read3, r3, m3, factors, D_HEAD, first_token, first_channel, M, WIDTH, MIX, ADD, NORMED_DTYPE, DTYPE, TOKENS, CHANNELS
    )
    _write_quarter(0, dx_0, dx0_0, c0, DX, D_X0, DX_Q, first_token, first_channel, M, D, TOKENS, CHANNELS)
    _write_quarter(1, dx_1, dx0_1, c1, DX, D_X0, DX_Q, first_token, first_channel, M, D, TOKENS, CHANNELS)
    _write_quarter(2, dx_2, dx0_2, c2, DX, D_X0, DX_Q, first_token, first_channel, M, D, TOKENS, CHANNELS)
    _write_quarter(3, dx_3, dx0_3, c3, DX, D_X0, DX_Q, first_token, first_channel, M, D, TOKENS, CHANNELS)
    store_across(DX_T, c0, c1, c2, c3, first_token, first_channel, M, D, TOKENS, CHANNELS)
    store_across(NORMED_T, n0, n1, n2, n3, first_token, first_channel, M, D, TOKENS, CHANNELS)
    if AMAX is not None:
        raise_amax(AMAX, tl.max(tl.ravel(tl.maximum(tl.maximum(b0, b1), tl.maximum(b2, b3))), 0))
    if MIX:
        program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        along_stream = tl.sum(tl.ravel((s0 + s1) + (s2 + s3)), 0)
        along_x0 = tl.sum(tl.ravel((z0 + z1) + (z2 + z3)), 0)
        tl.store(D_LAMBDAS + program, (along_stream - lambda1 * along_x0) / lambda0)
        tl.store(D_LAMBDAS + tl.num_programs(0) * tl.num_programs(1) + program, along_x0)


@triton.jit
def _fourths(of_tokens, TOKENS: tl.constexpr):
    """A number of each token as columns for the quarters of a tile, (TOKENS / 4, 1) each."""
    pairs = tl.reshape(of_tokens, (TOKENS // 4, 2, 2))
    even, odd = tl.split(pairs)
    f0, f2 = tl.split(even)
    f1, f3 = tl.split(odd)
    return f0[:, None], f1[:, None], f2[:, None], f3[:, None]


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
    along: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor]:  # fmt: skip
    d_normed, x, d_stream = d_normed.contiguous(), x.contiguous(), d_stream.contiguous()
    d_head, x0, lambdas, d_x0 = (None if t is None else t.contiguous() for t in (d_head, x0, lambdas, d_x0))
    d = x.shape[-1]
    m = x.numel() // d
    dx, new_d_x0 = torch.empty_like(x), None if x0 is None else torch.empty_like(x)
    normed_t = torch.empty(d, m, dtype=normed_dtype, device=x.device)
    dx_q, dx_t = (torch.empty(shape, dtype=dtype, device=x.device) for shape in ((m, d), (d, m)))
    width = 0 if d_head is None else d_head.shape[-1]
    grid = triton.cdiv(d, CHANNELS), triton.cdiv(m, TOKENS)
    partial = None if x0 is None else torch.empty(2, grid[0] * grid[1], dtype=torch.float32, device=x.device)
    if along is None and m:
        along, block = torch.empty(1, m, dtype=torch.float32, device=x.device), triton.next_power_of_2(d)
        _row_products[(m,)](d_normed, x, rstd, along, d, BLOCK=block, num_warps=min(16, max(1, block // 512)))
    if m:
        assert along is not None and along.is_contiguous()
        _norm_backward_quantize[grid](
            d_normed, along, x, rstd, d_stream, d_head, x0, lambdas, d_x0, normed_scale, scale,
            dx, new_d_x0, partial, normed_t, dx_q, dx_t, as_bits(amax), m, d, width, len(along),
            NORMED_DTYPE=DTYPES[normed_dtype], DTYPE=DTYPES[dtype], TOKENS=TOKENS, CHANNELS=CHANNELS,
            BLOCK_PARTS=triton.next_power_of_2(len(along)), BLOCK_WIDTH=triton.next_power_of_2(max(1, width)),
            num_warps=4,
        )  # fmt: skip
    return dx, new_d_x0, None if partial is None else partial.sum(1), normed_t, dx_q, dx_t


def norm_backward_quantize(
    d_normed: Tensor, x: Tensor, rstd: Tensor, d_stream: Tensor, normed_scale: Tensor, normed_dtype: torch.dtype,
    scale: Tensor, dtype: torch.dtype, amax: Tensor | None, *, along: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `nvfp8.reference_fp8.norm_backward_quantize`."""
    dx, _, _, normed_t, dx_q, dx_t = _backward(
        d_normed, x, rstd, d_stream, None, None, None, None, normed_scale, normed_dtype, scale, dtype, amax, along
    )
    return dx, normed_t, dx_q, dx_t


def mix_norm_backward_quantize(
    d_stream: Tensor, d_normed: Tensor, d_head: Tensor | None, stream: Tensor, x0: Tensor, lambdas: Tensor, rstd: Tensor,
    d_x0: Tensor | None, normed_scale: Tensor, normed_dtype: torch.dtype, scale: Tensor, dtype: torch.dtype, amax: Tensor | None,
    *, along: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `nvfp8.reference_fp8.mix_norm_backward_quantize`."""
    dx, new_d_x0, d_lambdas, normed_t, dx_q, dx_t = _backward(
        d_normed, stream, rstd, d_stream, d_head, x0, lambdas, d_x0, normed_scale, normed_dtype, scale, dtype, amax, along
    )
    assert new_d_x0 is not None and d_lambdas is not None
    return dx, new_d_x0, d_lambdas, normed_t, dx_q, dx_t
