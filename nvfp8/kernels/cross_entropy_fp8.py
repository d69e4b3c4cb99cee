"""Softcap, cross-entropy and a gradient in FP8, as it lies and transposed, of logits that are read from memory once.

A softmax is eᶻ over the sum of its row, and a transpose is written from tiles of many rows, which no L2 holds until their sums are
known: that would be two passes over the logits, each of 2 bytes and two exponentials. But FP8 numbers float: a power of 2 more or
less costs a code nothing. So codes are made of eᶻ over what is *known* of the sum early, its first entries (`known_entries`) and
the target, and what is missing multiplies where few numbers are: a row of dx after its GEMM, a row of x before the codes'
transpose meets it.

    _known               a program a row, 1/32 of the logits   log₂ of that part
    _gradient_quantize   tiles of 128 × 128                    codes both ways, sums of a tile's rows
    _finish_quantize     16 rows a program                     their sums, losses, factors, and the one code that a target changes
    _again_quantize      16 rows of 2,048 entries              nothing, nearly always

Where the known part is so small that a code could saturate (nearly all probability on one entry, which is neither the target nor
among the first), the last kernel makes the row's codes once more, over the whole sum.

Of a row of softmax − onehot the target's element is the largest: all others together are as much (softcaps aside). E5M2 rounds it
by up to an eighth, and there is a factor to put that right: what the target's element is, over what its code says. All others take
that ratio, 0.9 … 1.125, as an error of their own, where a rounding of theirs is as large.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp8.kernels.cross_entropy import exponents, of_shares, power_of_2, softcap_share
from nvfp8.kernels.fp8 import DTYPES, to_fp8
from nvfp8.kernels.quantize_fp8 import interleaved
from nvfp8.reference_fp8 import known_entries
from nvfp8.rounding import FORMATS

TOKENS, ENTRIES = 128, 128  # a tile: rows of it and of its transpose are 128 bytes
ROWS = 16  # of a program of the last two
BLOCK = 2048  # entries of a row that a program makes again: a transpose written byte by byte takes a multiprocessor a microsecond


@triton.jit
def _over(logits, known, CAP: tl.constexpr):
    """eᶻ / 2^known, and r."""
    LOG2E: tl.constexpr = 1.4426950408889634
    r = softcap_share(logits.to(tl.float32), CAP)
    return power_of_2((-2.0 * LOG2E * CAP) * r + (LOG2E * CAP - known)), r


@triton.jit
def _known(
    LOGITS, TARGETS, KNOWN, VOCAB: tl.constexpr, PADDED: tl.constexpr, CAP: tl.constexpr, EXPONENTS: tl.constexpr,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    LOG2E: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(TARGETS + row)
    column = tl.arange(0, ENTRIES)
    x = tl.load(LOGITS + row * PADDED + column, column < VOCAB, 0.0).to(tl.float32)
    exponential = power_of_2(of_shares(x, CAP, LOG2E * CAP, -2.0 * LOG2E * CAP, EXPONENTS))
    total = tl.sum(tl.where(column < VOCAB, exponential, 0.0), 0)
    elsewhere = target >= ENTRIES
    of_target, _ = _over(tl.load(LOGITS + row * PADDED + target, elsewhere, 0.0), 0.0, CAP)
    # No code of an ignored token is above 0.
    tl.store(KNOWN + row, tl.where(target >= 0, tl.log2(total + tl.where(elsewhere, of_target, 0.0)), float("inf")))


@triton.jit
def _written(which: tl.constexpr, Q, first_token, entry, M, PADDED: tl.constexpr, TOKENS: tl.constexpr):
    """Every fourth row of the tile, from row `which` on."""
    token = first_token + tl.arange(0, TOKENS // 4) * 4 + which
    return tl.load(Q + token[:, None] * PADDED + entry[None, :], (token < M)[:, None] & (entry < PADDED)[None, :])


@triton.jit
def _loaded(
    which: tl.constexpr, LOGITS, KNOWN, first_token, entry, M, VOCAB: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr
):
    """A quarter of a tile's logits, and what is known of its rows' sums."""
    token = first_token + TOKENS // 4 * which + tl.arange(0, TOKENS // 4)
    known = tl.load(KNOWN + token, token < M, float("inf"))
    # Logits of an ignored token or of padding are read as 0, whatever they are.
    mask = (known != float("inf"))[:, None] & (entry < VOCAB)[None, :]
    return tl.load(LOGITS + token[:, None] * PADDED + entry[None, :], mask, 0.0), known


@triton.jit
def _stored(
    which: tl.constexpr, logits, known, scale, SUMS, Q, first_token, entry, M, VOCAB: tl.constexpr, PADDED: tl.constexpr,
    CAP: tl.constexpr, DTYPE: tl.constexpr, TOKENS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Store that quarter's codes and the sums of its rows."""
    token = first_token + TOKENS // 4 * which + tl.arange(0, TOKENS // 4)
    exponential, r = _over(logits, known[:, None], CAP)
    if VOCAB < PADDED or PADDED % ENTRIES:
        exponential = tl.where((entry < VOCAB)[None, :], exponential, 0.0)
    tl.store(SUMS + token, tl.sum(exponential, 1), token < M)
    codes = to_fp8(exponential * (r - r * r) * scale, DTYPE)
    tl.store(Q + token[:, None] * PADDED + entry[None, :], codes, (token < M)[:, None] & (entry < PADDED)[None, :])


@triton.jit
def _gradient_quantize(
    LOGITS, KNOWN, SCALE, SUMS, Q, Q_T, M, STRIDE_T, VOCAB: tl.constexpr, PADDED: tl.constexpr, CAP: tl.constexpr,
    DTYPE: tl.constexpr, TOKENS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    first_token = tl.program_id(1).to(tl.int64) * TOKENS
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    SUMS += tl.program_id(0).to(tl.int64) * M
    scale = 4.0 * tl.load(SCALE)  # 1 − tanh² is 4r(1 − r)
    # In quarters, for what is live between a row's exponentials and its sum; all are asked for before one is stored.
    x0, known0 = _loaded(0, LOGITS, KNOWN, first_token, entry, M, VOCAB, PADDED, TOKENS)
    x1, known1 = _loaded(1, LOGITS, KNOWN, first_token, entry, M, VOCAB, PADDED, TOKENS)
    x2, known2 = _loaded(2, LOGITS, KNOWN, first_token, entry, M, VOCAB, PADDED, TOKENS)
    x3, known3 = _loaded(3, LOGITS, KNOWN, first_token, entry, M, VOCAB, PADDED, TOKENS)
    _stored(0, x0, known0, scale, SUMS, Q, first_token, entry, M, VOCAB, PADDED, CAP, DTYPE, TOKENS, ENTRIES)
    _stored(1, x1, known1, scale, SUMS, Q, first_token, entry, M, VOCAB, PADDED, CAP, DTYPE, TOKENS, ENTRIES)
    _stored(2, x2, known2, scale, SUMS, Q, first_token, entry, M, VOCAB, PADDED, CAP, DTYPE, TOKENS, ENTRIES)
    _stored(3, x3, known3, scale, SUMS, Q, first_token, entry, M, VOCAB, PADDED, CAP, DTYPE, TOKENS, ENTRIES)
    # Read again, from L2: of codes in registers Triton 3.6 makes the transposed ones by computing everything a second time,
    # 256 exponentials a thread for 64 elements, at 255 registers and with spills (sm_90). In quarters, see `quantize_fp8.py`.
    tl.debug_barrier()  # every thread has written its codes
    c0 = _written(0, Q, first_token, entry, M, PADDED, TOKENS)
    c1 = _written(1, Q, first_token, entry, M, PADDED, TOKENS)
    c2 = _written(2, Q, first_token, entry, M, PADDED, TOKENS)
    c3 = _written(3, Q, first_token, entry, M, PADDED, TOKENS)
    token = first_token + tl.arange(0, TOKENS)
    across = entry.to(tl.int64)[None, :] * STRIDE_T + token[:, None]
    tl.store(Q_T + across, interleaved(c0, c1, c2, c3, TOKENS, ENTRIES), (token < M)[:, None] & (entry < PADDED)[None, :])


@triton.jit
def _finish_quantize(
    LOGITS, TARGETS, KNOWN, SUMS, SCALE, LOSSES, FACTORS, Q, Q_T, M, STRIDE_T, PADDED: tl.constexpr, CAP: tl.constexpr,
    DTYPE: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr, TILES: tl.constexpr, POWER: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    LN2: tl.constexpr = 0.6931471805599453
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    target = tl.load(TARGETS + row, row < M, -1)
    valid = target >= 0
    tile = tl.arange(0, POWER)
    total = tl.sum(tl.load(SUMS + tile[:, None] * M + row[None, :], (tile < TILES)[:, None] & (row < M)[None, :], 0.0), 0)
    known = tl.load(KNOWN + row, valid, 0.0)
    of_target, r = _over(tl.load(LOGITS + row * PADDED + target, valid, 0.0), known, CAP)
    log_sum = tl.log2(total) + known
    tl.store(LOSSES + row, tl.where(valid, LN2 * log_sum - (CAP - 2.0 * CAP * r), 0.0), row < M)
    scale = 4.0 * tl.load(SCALE)
    again = valid & (total * scale > 4.0 * LARGEST)
    tl.store(KNOWN + row, tl.where(again, log_sum, float("inf")), row < M)  # for the next kernel
    norm = tl.where(again, total, 1.0)
    exact = (of_target - total) / norm * (r - r * r) * scale
    code = to_fp8(exact, DTYPE)
    # Not of codes below the normal numbers, which may have lost most of their bits.
    rounded = code.to(tl.float32)
    correction = tl.where(tl.abs(rounded) >= SMALLEST, exact / rounded, 1.0)
    tl.store(FACTORS + row, tl.where(valid, norm / total * correction, 0.0), row < M)
    tl.store(Q + row * PADDED + target, code, valid)
    tl.store(Q_T + target * STRIDE_T + row, code, valid)


@triton.jit
def _again_quantize(
    LOGITS, TARGETS, LOG_SUMS, SCALE, Q, Q_T, M, STRIDE_T, VOCAB: tl.constexpr, PADDED: tl.constexpr, CAP: tl.constexpr,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(1).to(tl.int64) * ROWS
    row = first + tl.arange(0, ROWS)
    if tl.min(tl.load(LOG_SUMS + row, row < M, float("inf")), 0) < float("inf"):
        entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        scale = 4.0 * tl.load(SCALE)
        for token in range(first, tl.minimum(first + ROWS, M)):
            log_sum = tl.load(LOG_SUMS + token)
            if log_sum < float("inf"):
                others = (entry < VOCAB) & (entry != tl.load(TARGETS + token))
                probability, r = _over(tl.load(LOGITS + token * PADDED + entry, others, 0.0), log_sum, CAP)
                codes = to_fp8(probability * (r - r * r) * scale, DTYPE)
                tl.store(Q + token * PADDED + entry, codes, others)
                tl.store(Q_T + entry.to(tl.int64) * STRIDE_T + token, codes, others)


@triton.jit
def _scale_rows(X, FACTORS, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x = tl.load(X + row * N + column, column < N, 0.0)
    tl.store(X + row * N + column, (x.to(tl.float32) * tl.load(FACTORS + row)).to(X.dtype.element_ty), column < N)


def scale_rows_(x: Tensor, factors: Tensor) -> Tensor:
    """See `nvfp8.reference_fp8.scale_rows_`."""
    assert x.is_contiguous()
    _scale_rows[(x.shape[0],)](x, factors, x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]))
    return x


def softcap_cross_entropy_quantize(
    logits: Tensor, targets: Tensor, losses: Tensor, factors: Tensor, vocab: int, softcap: float, scale: Tensor, q: Tensor,
    q_t: Tensor,
) -> None:  # fmt: skip
    """See `nvfp8.reference_fp8.softcap_cross_entropy_quantize`."""
    (m, padded), device = logits.shape, logits.device
    assert logits.is_contiguous() and q.is_contiguous() and q_t.stride(1) == 1
    tiles, (smallest, _, largest) = triton.cdiv(padded, ENTRIES), FORMATS[q.dtype]
    known, sums = (torch.empty(shape, dtype=torch.float32, device=device) for shape in ((m,), (tiles, m)))
    across, of_all = q_t.stride(0), {"PADDED": padded, "CAP": softcap}
    of_codes = of_all | {"DTYPE": DTYPES[q.dtype]}
    _known[(m,)](
        logits, targets, known, VOCAB=vocab, **of_all, EXPONENTS=exponents(softcap), ENTRIES=known_entries(vocab), num_warps=4
    )
    _gradient_quantize[(tiles, triton.cdiv(m, TOKENS))](
        logits, known, scale, sums, q, q_t, m, across, VOCAB=vocab, **of_codes, TOKENS=TOKENS, ENTRIES=ENTRIES, num_warps=8
    )
    _finish_quantize[(triton.cdiv(m, ROWS),)](
        logits, targets, known, sums, scale, losses, factors, q, q_t, m, across, **of_codes, SMALLEST=2.0**smallest,
        LARGEST=largest, TILES=tiles, POWER=triton.next_power_of_2(tiles), ROWS=ROWS, num_warps=4,
    )  # fmt: skip
    _again_quantize[(triton.cdiv(vocab, BLOCK), triton.cdiv(m, ROWS))](
        logits, targets, known, scale, q, q_t, m, across, VOCAB=vocab, **of_codes, ROWS=ROWS, BLOCK=BLOCK, num_warps=4
    )
