"""Elementwise passes that end in FP8 in two layouts: a tile is read once, and written as it lies and transposed.

A program takes TOKENS × CHANNELS = 128 × 128 elements. A row of the tile is 256 bytes of bf16 in and 128 bytes of FP8 out, a row
of its transpose 128 bytes too, so every access is whole 128-byte lines; in between the codes (never the wide numbers) change
places through shared memory, 16 KiB a program, four at a time (`_dealt`). Some 12 to 16 instructions an element, where an H200
has time for 27 at 4.3 TB/s and 4 bytes an element. Bytes a bf16 element: `quantize` 2 + 1 + 1, `relu_squared_quantize` the same,
`relu_squared_backward_quantize` 2 + 1 + 1 + 1. 32,768 × 1,536 elements are 3,072 programs of 8 warps, a thread holds 64 elements.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp8.kernels.fp8 import DTYPES, as_bits, largest_bits, raise_amax, to_fp8

TOKENS, CHANNELS = 128, 128  # a program's tile
BLOCK = 8192  # elements a program of `amax_`


@triton.jit
def _dealt(ROWS: tl.constexpr):
    """The row of a tensor's tile that each row of the registers' tile holds: 0, 4, 8 and so on, then 1, 5, 9.

    A thread reads 16 neighbours in each of 4 rows, 32 apart. Dealt out like this they are 4 neighbours of the tensor, so what it
    hands over for the transpose is words of 4 bytes rather than single ones.
    """
    row = tl.arange(0, ROWS)
    return row % (ROWS // 4) * 4 + row // (ROWS // 4)


@triton.jit
def _in_order(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows that were dealt out, back in the tensor's order: other names for the same registers."""
    return tl.reshape(tl.permute(tl.reshape(tile, (4, ROWS // 4, COLUMNS)), (1, 0, 2)), (ROWS, COLUMNS))


@triton.jit
def _dealt_out(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The reverse of `_in_order`."""
    return tl.reshape(tl.permute(tl.reshape(tile, (ROWS // 4, 4, COLUMNS)), (1, 0, 2)), (ROWS, COLUMNS))


@triton.jit
def _store(
    Q, Q_T, codes, first_token, first_channel, M, N,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write a tile (TOKENS, CHANNELS) of codes, tokens dealt out, into Q (M, N) and Q_T (N, M), whichever is wanted."""
    channel = tl.arange(0, CHANNELS)[None, :]
    if ROWS:
        token = _dealt(TOKENS)[:, None]
        mask = (first_token + token < M) & (first_channel + channel < N)
        tl.store(Q + first_token * N + first_channel + (token * N + channel), codes, mask)
    if COLUMNS:
        token = tl.arange(0, TOKENS)[:, None]
        mask = (first_token + token < M) & (first_channel + channel < N)
        across = first_channel * M + first_token + (channel * M + token)
        tl.store(Q_T + across, _in_order(codes, TOKENS, CHANNELS), mask)


@triton.jit
def _quantize(
    X, SCALE, Q, Q_T, AMAX, M, N, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RELU_SQUARED: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    first_token = tl.program_id(1).to(tl.int64) * TOKENS
    first_channel = tl.program_id(0).to(tl.int64) * CHANNELS
    token = _dealt(TOKENS)[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    mask = (first_token + token < M) & (first_channel + channel < N)
    x = tl.load(X + first_token * N + first_channel + (token * N + channel), mask, 0.0).to(tl.float32)
    if RELU_SQUARED:
        x = tl.where(x < 0, 0.0, x)  # a maximum would hide NaN
        x = x * x
    if AMAX is not None:
        raise_amax(AMAX, largest_bits(x))
    codes = to_fp8(x * tl.load(SCALE), DTYPE)
    _store(Q, Q_T, codes, first_token, first_channel, M, N, ROWS, COLUMNS, TOKENS, CHANNELS)


@triton.jit
def _relu_squared_backward_quantize(
    D_A, A_T, A_SCALE, SCALE, DH, DH_T, AMAX, M, N, DTYPE: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr
):
    first_token = tl.program_id(1).to(tl.int64) * TOKENS
    first_channel = tl.program_id(0).to(tl.int64) * CHANNELS
    token = _dealt(TOKENS)[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    mask = (first_token + token < M) & (first_channel + channel < N)
    gradient = tl.load(D_A + first_token * N + first_channel + (token * N + channel), mask, 0.0).to(tl.float32)
    # aᵀ is read as it lies, its rows dealt out too, and turned round as FP8.
    channel = _dealt(CHANNELS)[:, None]
    token = tl.arange(0, TOKENS)[None, :]
    mask = (first_token + token < M) & (first_channel + channel < N)
    a_t = _in_order(tl.load(A_T + first_channel * M + first_token + (channel * M + token), mask, 0.0), CHANNELS, TOKENS)
    a = _dealt_out(tl.trans(a_t), TOKENS, CHANNELS).to(tl.float32)
    # 2·√(a / scale) = √a · (2 / √scale): one factor for all instead of a division each
    dh = gradient * (tl.sqrt(a) * (2.0 * tl.rsqrt(tl.load(A_SCALE))))
    if AMAX is not None:
        raise_amax(AMAX, largest_bits(dh))
    codes = to_fp8(dh * tl.load(SCALE), DTYPE)
    _store(DH, DH_T, codes, first_token, first_channel, M, N, True, True, TOKENS, CHANNELS)


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
    x: Tensor, scale: Tensor, dtype: torch.dtype, amax: Tensor | None, rows: bool, columns: bool, relu_squared: bool
) -> tuple[Tensor | None, Tensor | None]:
    x = x.contiguous()
    m, n = x.shape
    q = torch.empty(m, n, dtype=dtype, device=x.device) if rows else None
    q_t = torch.empty(n, m, dtype=dtype, device=x.device) if columns else None
    if x.numel():
        _quantize[_grid(m, n)](
            x, scale, q, q_t, as_bits(amax), m, n, DTYPE=DTYPES[dtype], ROWS=rows, COLUMNS=columns, RELU_SQUARED=relu_squared,
            TOKENS=TOKENS, CHANNELS=CHANNELS, num_warps=8,
        )  # fmt: skip
    return q, q_t


def quantize(
    x: Tensor, scale: Tensor, dtype: torch.dtype, amax: Tensor | None, *, rows: bool, columns: bool
) -> tuple[Tensor | None, Tensor | None]:
    """See `nvfp8.reference_fp8.quantize`."""
    return _tile_pass(x, scale, dtype, amax, rows, columns, relu_squared=False)


def relu_squared_quantize(h: Tensor, scale: Tensor, dtype: torch.dtype, amax: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `nvfp8.reference_fp8.relu_squared_quantize`."""
    a, a_t = _tile_pass(h, scale, dtype, amax, rows=True, columns=True, relu_squared=True)
    assert a is not None and a_t is not None
    return a, a_t


def relu_squared_backward_quantize(
    d_a: Tensor, a_t: Tensor, a_scale: Tensor, scale: Tensor, dtype: torch.dtype, amax: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `nvfp8.reference_fp8.relu_squared_backward_quantize`."""
    d_a, a_t = d_a.contiguous(), a_t.contiguous()
    m, n = d_a.shape
    dh, dh_t = (torch.empty(shape, dtype=dtype, device=d_a.device) for shape in ((m, n), (n, m)))
    if d_a.numel():
        _relu_squared_backward_quantize[_grid(m, n)](
            d_a, a_t, a_scale, scale, dh, dh_t, as_bits(amax), m, n, DTYPE=DTYPES[dtype], TOKENS=TOKENS, CHANNELS=CHANNELS,
            num_warps=8,
        )  # fmt: skip
    return dh, dh_t
