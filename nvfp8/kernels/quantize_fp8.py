"""Elementwise passes that end in FP8 in two layouts: a tile is read once, and written as it lies and transposed.

A program takes TOKENS × CHANNELS = 64 × 128 elements. A row of the tile is 256 bytes of bf16 in and 128 bytes of FP8 out, a row of
its transpose 64 bytes, so every access is whole sectors of memory; in between the codes (never the wide numbers) change places
through shared memory, 8 KiB a program. Bytes a bf16 element: `quantize` 2 + 1 + 1, `relu_squared_quantize` the same,
`relu_squared_backward_quantize` 2 + 1 + 1 + 1. 32,768 × 1,536 elements are 6,144 programs of 8 warps, a thread holds 32 elements.

The tile is taken in four quarters, rows 0, 4, 8 …, rows 1, 5, 9 … and so on. A thread reads 16 neighbours in one row of each, so
it holds 4 neighbours of each column: words for the transpose, where single bytes would take four times the stores to shared
memory. And as codes of several loads, they are converted as they are: of one load, Triton 3.6 would rather convert the bf16 numbers
and compute again, which doubles both arithmetic and registers. 11 to 18 instructions an element come of it (sm_90), where an H200
has time for 27 at 4.3 TB/s and 4 bytes an element, and 32 to 64 registers a thread.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp8.kernels.fp8 import DTYPES, INTERPRETED, as_bits, largest_bits, raise_amax, to_fp8

TOKENS, CHANNELS = 128 if INTERPRETED.value else 64, 128  # a program's tile; the interpreter's time is programs
BLOCK = 8192  # elements a program of `amax_`


@triton.jit
def every_fourth(which: tl.constexpr, first_row, first_column, ROW_END, COLUMN_END, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where every fourth row of a tile, from row `which` on, lies in a matrix (ROW_END, COLUMN_END), and what of it exists."""
    row = tl.arange(0, ROWS // 4)[:, None] * 4 + which
    column = tl.arange(0, COLUMNS)[None, :]
    at = first_row * COLUMN_END + first_column + (row * COLUMN_END + column)
    return at, (first_row + row < ROW_END) & (first_column + column < COLUMN_END)


@triton.jit
def interleaved(c0, c1, c2, c3, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Four times every fourth row, as one tile in order: other names for the same registers."""
    pairs = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    return tl.reshape(tl.permute(pairs, (0, 2, 3, 1)), (ROWS, COLUMNS))


@triton.jit
def _quarters(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The reverse of `interleaved`."""
    pairs = tl.permute(tl.reshape(tile, (ROWS // 4, 2, 2, COLUMNS)), (0, 3, 1, 2))
    even, odd = tl.split(pairs)
    c0, c2 = tl.split(even)
    c1, c3 = tl.split(odd)
    return c0, c1, c2, c3


@triton.jit
def store_across(Q_T, c0, c1, c2, c3, first_token, first_channel, M, N, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """Store a tile's codes, in quarters (TOKENS / 4, CHANNELS), transposed: Q_T is (N, M)."""
    token = tl.arange(0, TOKENS)[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    mask = (first_token + token < M) & (first_channel + channel < N)
    across = first_channel * M + first_token + (channel * M + token)
    tl.store(Q_T + across, interleaved(c0, c1, c2, c3, TOKENS, CHANNELS), mask)


@triton.jit
def _quarter(
    which: tl.constexpr, X, scale, FACTORS, first_token, first_channel, M, N,
    DTYPE: tl.constexpr, RELU_SQUARED: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    at, mask = every_fourth(which, first_token, first_channel, M, N, TOKENS, CHANNELS)
    x = tl.load(X + at, mask, 0.0).to(tl.float32)
    if FACTORS is not None:
        token = first_token + tl.arange(0, TOKENS // 4) * 4 + which
        scale = scale * tl.load(FACTORS + token, token < M, 0.0)[:, None]
    if RELU_SQUARED:
        x = tl.where(x < 0, 0.0, x)  # a maximum would hide NaN
        x = x * x
    return to_fp8(x * scale, DTYPE), x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _store_along(Q, c0, c1, c2, c3, first_token, first_channel, M, N, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """Store a tile's codes, in quarters, as they lie, and that after all is read: the compiler moves no load across a store."""
    at, mask = every_fourth(0, first_token, first_channel, M, N, TOKENS, CHANNELS)
    tl.store(Q + at, c0, mask)
    at, mask = every_fourth(1, first_token, first_channel, M, N, TOKENS, CHANNELS)
    tl.store(Q + at, c1, mask)
    at, mask = every_fourth(2, first_token, first_channel, M, N, TOKENS, CHANNELS)
    tl.store(Q + at, c2, mask)
    at, mask = every_fourth(3, first_token, first_channel, M, N, TOKENS, CHANNELS)
    tl.store(Q + at, c3, mask)


@triton.jit
def _quantize(
    X, SCALE, FACTORS, Q, Q_T, AMAX, M, N, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    RELU_SQUARED: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1).to(tl.int64) * TOKENS
    channel = tl.program_id(0).to(tl.int64) * CHANNELS
    scale = tl.load(SCALE)
    c0, b0 = _quarter(0, X, scale, FACTORS, token, channel, M, N, DTYPE, RELU_SQUARED, TOKENS, CHANNELS)
    c1, b1 = _quarter(1, X, scale, FACTORS, token, channel, M, N, DTYPE, RELU_SQUARED, TOKENS, CHANNELS)
    c2, b2 = _quarter(2, X, scale, FACTORS, token, channel, M, N, DTYPE, RELU_SQUARED, TOKENS, CHANNELS)
    c3, b3 = _quarter(3, X, scale, FACTORS, token, channel, M, N, DTYPE, RELU_SQUARED, TOKENS, CHANNELS)
    if AMAX is not None:
        raise_amax(AMAX, tl.max(tl.ravel(tl.maximum(tl.maximum(b0, b1), tl.maximum(b2, b3))), 0))
    if ROWS:
        _store_along(Q, c0, c1, c2, c3, token, channel, M, N, TOKENS, CHANNELS)
    if COLUMNS:
        store_across(Q_T, c0, c1, c2, c3, token, channel, M, N, TOKENS, CHANNELS)


@triton.jit
def _gradient_quarter(
    which: tl.constexpr, D_A, a, factor, scale, first_token, first_channel, M, N,
    DTYPE: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    at, mask = every_fourth(which, first_token, first_channel, M, N, TOKENS, CHANNELS)
    root = tl.sqrt(a.to(tl.float32))
    dh = tl.load(D_A + at, mask, 0.0).to(tl.float32) * (root * factor)
    return to_fp8(dh * scale, DTYPE), dh.to(tl.int32, bitcast=True) & 0x7FFFFFFF, tl.sum(dh * root, 1)


@triton.jit
def _relu_squared_backward_quantize(
    D_A, A_T, A_SCALE, SCALE, DH, DH_T, ALONG, AMAX, M, N, DTYPE: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr
):
    token = tl.program_id(1).to(tl.int64) * TOKENS
    channel = tl.program_id(0).to(tl.int64) * CHANNELS
    scale = tl.load(SCALE)
    per_root = tl.rsqrt(tl.load(A_SCALE))
    factor = 2.0 * per_root  # 2·√(a / scale) = √a · (2 / √scale): one factor for all instead of divisions
    # aᵀ is read as it lies, in quarters too, and turned round as FP8.
    at, mask = every_fourth(0, channel, token, N, M, CHANNELS, TOKENS)
    r0 = tl.load(A_T + at, mask, 0.0)
    at, mask = every_fourth(1, channel, token, N, M, CHANNELS, TOKENS)
    r1 = tl.load(A_T + at, mask, 0.0)
    at, mask = every_fourth(2, channel, token, N, M, CHANNELS, TOKENS)
    r2 = tl.load(A_T + at, mask, 0.0)
    at, mask = every_fourth(3, channel, token, N, M, CHANNELS, TOKENS)
    r3 = tl.load(A_T + at, mask, 0.0)
    a0, a1, a2, a3 = _quarters(tl.trans(interleaved(r0, r1, r2, r3, CHANNELS, TOKENS)), TOKENS, CHANNELS)
    c0, b0, s0 = _gradient_quarter(0, D_A, a0, factor, scale, token, channel, M, N, DTYPE, TOKENS, CHANNELS)
    c1, b1, s1 = _gradient_quarter(1, D_A, a1, factor, scale, token, channel, M, N, DTYPE, TOKENS, CHANNELS)
    c2, b2, s2 = _gradient_quarter(2, D_A, a2, factor, scale, token, channel, M, N, DTYPE, TOKENS, CHANNELS)
    c3, b3, s3 = _gradient_quarter(3, D_A, a3, factor, scale, token, channel, M, N, DTYPE, TOKENS, CHANNELS)
    if AMAX is not None:
        raise_amax(AMAX, tl.max(tl.ravel(tl.maximum(tl.maximum(b0, b1), tl.maximum(b2, b3))), 0))
    _store_along(DH, c0, c1, c2, c3, token, channel, M, N, TOKENS, CHANNELS)
    store_across(DH_T, c0, c1, c2, c3, token, channel, M, N, TOKENS, CHANNELS)
    row = token + tl.arange(0, TOKENS)
    along = tl.reshape(tl.join(tl.join(s0, s2), tl.join(s1, s3)), (TOKENS,))
    tl.store(ALONG + tl.program_id(0).to(tl.int64) * M + row, along * per_root, row < M)


@triton.jit
def _amax(X, AMAX, SIZE, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    raise_amax(AMAX, largest_bits(tl.load(X + first + at, first + at < SIZE, 0.0).to(tl.float32)))


def amax_(x: Tensor, amax: Tensor) -> None:
    """See `nvfp8.reference_fp8.amax_`."""
    x = x.contiguous()
    if x.numel():
        _amax[(triton.cdiv(x.numel(), BLOCK),)](x, as_bits(amax), x.numel(), BLOCK=BLOCK, num_warps=8)


def _grid(m: int, n: int) -> tuple[int, int]:
    return triton.cdiv(n, CHANNELS), triton.cdiv(m, TOKENS)


def _tile_pass(
    x: Tensor, scale: Tensor, dtype: torch.dtype, amax: Tensor | None, rows: bool, columns: bool, relu_squared: bool,
    factors: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    x = x.contiguous()
    m, n = x.shape
    q = torch.empty(m, n, dtype=dtype, device=x.device) if rows else None
    q_t = torch.empty(n, m, dtype=dtype, device=x.device) if columns else None
    if x.numel():
        _quantize[_grid(m, n)](
            x, scale, factors, q, q_t, as_bits(amax), m, n, DTYPE=DTYPES[dtype], ROWS=rows, COLUMNS=columns,
            RELU_SQUARED=relu_squared, TOKENS=TOKENS, CHANNELS=CHANNELS, num_warps=8,
        )  # fmt: skip
    return q, q_t


def quantize(
    x: Tensor, scale: Tensor, dtype: torch.dtype, amax: Tensor | None, *, rows: bool, columns: bool, factors: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """See `nvfp8.reference_fp8.quantize`."""
    return _tile_pass(x, scale, dtype, amax, rows, columns, relu_squared=False, factors=factors)


def relu_squared_quantize(h: Tensor, scale: Tensor, dtype: torch.dtype, amax: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `nvfp8.reference_fp8.relu_squared_quantize`."""
    a, a_t = _tile_pass(h, scale, dtype, amax, rows=True, columns=True, relu_squared=True)
    assert a is not None and a_t is not None
    return a, a_t


def relu_squared_backward_quantize(
    d_a: Tensor, a_t: Tensor, a_scale: Tensor, scale: Tensor, dtype: torch.dtype, amax: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `nvfp8.reference_fp8.relu_squared_backward_quantize`."""
    d_a, a_t = d_a.contiguous(), a_t.contiguous()
    m, n = d_a.shape
    dh, dh_t = (torch.empty(shape, dtype=dtype, device=d_a.device) for shape in ((m, n), (n, m)))
    grid = _grid(m, n)
    along = torch.empty(grid[0], m, dtype=torch.float32, device=d_a.device)
    if d_a.numel():
        _relu_squared_backward_quantize[grid](
            d_a, a_t, a_scale, scale, dh, dh_t, along, as_bits(amax), m, n, DTYPE=DTYPES[dtype], TOKENS=TOKENS, CHANNELS=CHANNELS,
            num_warps=8,
        )  # fmt: skip
    return dh, dh_t, along
