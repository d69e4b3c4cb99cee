"""Softcap, cross-entropy and a gradient in FP8, as it lies and transposed, of logits that are read from memory once.

A softmax is eᶻ over the sum of its row, and a transpose is written from tiles of many rows, which no L2 holds until their sums are
known: that would be two passes over the logits, each of 2 bytes and two exponentials. But FP8 numbers float: a power of 2 more or
less costs a code nothing. So codes are made of eᶻ over a *reference* that is known early, the sum of a row's first SAMPLE entries
and its target's, and what is missing multiplies where few numbers are: a row of dx after its GEMM, a row of x before the codes'
transpose meets it.

    _reference  a program a row, 1/32 of the logits   log₂ of the reference
    _gradient   tiles of 128 × 128                    codes both ways, sums of a tile's rows
    _finished   16 rows a program                     their sums, losses, factors, and the one code that a target changes

A reference is part of the sum, so reference / sum ≤ 1. Where it is so small a part that a code could saturate (nearly all
probability on one entry, which is neither the target nor in the sample), `_finished` makes the row's codes again over the sum.

Of a row of softmax − onehot the target's element is the largest: all others together are as much. E5M2 rounds it by up to an
eighth, and there is a factor to put that right: what the target's element is, over what its code says.

A thread of `_gradient` has 64 logits, 2 exponentials and a reciprocal each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp8.kernels.cross_entropy import exponents, of_shares, power_of_2, softcap_share
from nvfp8.kernels.fp8 import DTYPES, to_fp8
from nvfp8.kernels.quantize_fp8 import interleaved
from nvfp8.reference_fp8 import SAMPLE
from nvfp8.rounding import FORMATS

TOKENS, ENTRIES = 128, 128  # a tile: rows of it and of its transpose are 128 bytes
ROWS = 16  # of a program of `_finished`
BLOCK = 2048  # entries of a row that it makes again, at a time


@triton.jit
def _over(logits, reference, CAP: tl.constexpr):
    """eᶻ / 2^reference, and r."""
    LOG2E: tl.constexpr = 1.4426950408889634
    r = softcap_share(logits.to(tl.float32), CAP)
    return power_of_2((-2.0 * LOG2E * CAP) * r + (LOG2E * CAP - reference)), r


@triton.jit
def _reference(
    LOGITS, TARGETS, REFERENCES, VOCAB: tl.constexpr, PADDED: tl.constexpr, CAP: tl.constexpr, EXPONENTS: tl.constexpr,
    SAMPLE: tl.constexpr,
):  # fmt: skip
    LOG2E: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(TARGETS + row)
    column = tl.arange(0, SAMPLE)
    x = tl.load(LOGITS + row * PADDED + column, column < VOCAB, 0.0).to(tl.float32)
    exponential = power_of_2(of_shares(x, CAP, LOG2E * CAP, -2.0 * LOG2E * CAP, EXPONENTS))
    total = tl.sum(tl.where(column < VOCAB, exponential, 0.0), 0)
    elsewhere = target >= SAMPLE
    of_target, _ = _over(tl.load(LOGITS + row * PADDED + target, elsewhere, 0.0), 0.0, CAP)
    # No code of an ignored token is above 0.
    tl.store(REFERENCES + row, tl.where(target >= 0, tl.log2(total + tl.where(elsewhere, of_target, 0.0)), float("inf")))


@triton.jit
def _written(which: tl.constexpr, Q, first_token, entry, M, PADDED: tl.constexpr, TOKENS: tl.constexpr):
    """Every fourth row of the tile, from row `which` on."""
    token = first_token + tl.arange(0, TOKENS // 4) * 4 + which
    return tl.load(Q + token[:, None] * PADDED + entry[None, :], (token < M)[:, None] & (entry < PADDED)[None, :])


@triton.jit
def _loaded(which: tl.constexpr, LOGITS, REFERENCES, first_token, entry, M, PADDED: tl.constexpr, TOKENS: tl.constexpr):
    """A quarter of a tile's logits, and the references of its rows."""
    token = first_token + TOKENS // 4 * which + tl.arange(0, TOKENS // 4)
    reference = tl.load(REFERENCES + token, token < M, float("inf"))
    # An ignored token's logits are read as 0, whatever they are.
    mask = (reference != float("inf"))[:, None] & (entry < PADDED)[None, :]
    return tl.load(LOGITS + token[:, None] * PADDED + entry[None, :], mask, 0.0), reference


@triton.jit
def _stored(
    which: tl.constexpr, logits, reference, scale, SUMS, Q, first_token, entry, M, VOCAB: tl.constexpr, PADDED: tl.constexpr,
    CAP: tl.constexpr, DTYPE: tl.constexpr, TOKENS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Store that quarter's codes and the sums of its rows."""
    token = first_token + TOKENS // 4 * which + tl.arange(0, TOKENS // 4)
    exponential, r = _over(logits, reference[:, None], CAP)
    if VOCAB < PADDED or PADDED % ENTRIES:
        exponential = tl.where((entry < VOCAB)[None, :], exponential, 0.0)
    tl.store(SUMS + token, tl.sum(exponential, 1), token < M)
    codes = to_fp8(exponential * (r - r * r) * scale, DTYPE)
    tl.store(Q + token[:, None] * PADDED + entry[None, :], codes, (token < M)[:, None] & (entry < PADDED)[None, :])


@triton.jit
def _gradient(
    LOGITS, REFERENCES, SCALE, SUMS, Q, Q_T, M, STRIDE_T, VOCAB: tl.constexpr, PADDED: tl.constexpr, CAP: tl.constexpr,
    DTYPE: tl.constexpr, TOKENS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    first_token = tl.program_id(1).to(tl.int64) * TOKENS
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    SUMS += tl.program_id(0).to(tl.int64) * M
    scale = 4.0 * tl.load(SCALE)  # 1 − tanh² is 4r(1 − r)
    # In quarters, for what is live between a row's exponentials and its sum; all are asked for before one is stored.
    x0, reference0 = _loaded(0, LOGITS, REFERENCES, first_token, entry, M, PADDED, TOKENS)
    x1, reference1 = _loaded(1, LOGITS, REFERENCES, first_token, entry, M, PADDED, TOKENS)
    x2, reference2 = _loaded(2, LOGITS, REFERENCES, first_token, entry, M, PADDED, TOKENS)
    x3, reference3 = _loaded(3, LOGITS, REFERENCES, first_token, entry, M, PADDED, TOKENS)
    _stored(0, x0, reference0, scale, SUMS, Q, first_token, entry, M, VOCAB, PADDED, CAP, DTYPE, TOKENS, ENTRIES)
    _stored(1, x1, reference1, scale, SUMS, Q, first_token, entry, M, VOCAB, PADDED, CAP, DTYPE, TOKENS, ENTRIES)
    _stored(2, x2, reference2, scale, SUMS, Q, first_token, entry, M, VOCAB, PADDED, CAP, DTYPE, TOKENS, ENTRIES)
    _stored(3, x3, reference3, scale, SUMS, Q, first_token, entry, M, VOCAB, PADDED, CAP, DTYPE, TOKENS, ENTRIES)
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
def _finished(
    LOGITS, TARGETS, REFERENCES, SUMS, SCALE, LOSSES, FACTORS, Q, Q_T, M, STRIDE_T, VOCAB: tl.constexpr, PADDED: tl.constexpr,
    CAP: tl.constexpr, DTYPE: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr, TILES: tl.constexpr,
    POWER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    LN2: tl.constexpr = 0.6931471805599453
    lane = tl.arange(0, ROWS)
    row = tl.program_id(0).to(tl.int64) * ROWS + lane
    target = tl.load(TARGETS + row, row < M, -1)
    valid = target >= 0
    tile = tl.arange(0, POWER)
    total = tl.sum(tl.load(SUMS + tile[:, None] * M + row[None, :], (tile < TILES)[:, None] & (row < M)[None, :], 0.0), 0)
    reference = tl.load(REFERENCES + row, valid, 0.0)
    of_target, r = _over(tl.load(LOGITS + row * PADDED + target, valid, 0.0), reference, CAP)
    z = CAP - 2.0 * CAP * r
    tl.store(LOSSES + row, tl.where(valid, LN2 * (tl.log2(total) + reference) - z, 0.0), row < M)
    scale = 4.0 * tl.load(SCALE)
    again = valid & (total * scale > 4.0 * LARGEST)
    norm = tl.where(again, total, 1.0)
    exact = (of_target - total) / norm * (r - r * r) * scale
    code = to_fp8(exact, DTYPE)
    # A target's code is the row's largest. Its rounding goes into the factor, unless it lost more than a bit or two below the least
    # normal number.
    rounded = code.to(tl.float32)
    correction = tl.where(tl.abs(rounded) >= SMALLEST, exact / rounded, 1.0)
    tl.store(FACTORS + row, tl.where(valid, norm / total * correction, 0.0), row < M)
    tl.store(Q + row * PADDED + target, code, valid)
    tl.store(Q_T + target * STRIDE_T + row, code, valid)
    if tl.max(again.to(tl.int32), 0) > 0:
        log_sum = tl.log2(total) + reference
        for i in range(ROWS):
            here = lane == i
            if tl.max((here & again).to(tl.int32), 0) > 0:
                token = tl.program_id(0).to(tl.int64) * ROWS + i
                its_sum, its_target = tl.sum(tl.where(here, log_sum, 0.0), 0), tl.sum(tl.where(here, target, 0), 0)
                for start in range(0, VOCAB, BLOCK):
                    entry = start + tl.arange(0, BLOCK)
                    others = (entry < VOCAB) & (entry != its_target)
                    probability, r_ = _over(tl.load(LOGITS + token * PADDED + entry, others, 0.0), its_sum, CAP)
                    codes = to_fp8(probability * (r_ - r_ * r_) * scale, DTYPE)
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
    references, sums = (torch.empty(shape, dtype=torch.float32, device=device) for shape in ((m,), (tiles, m)))
    of_logits = {"VOCAB": vocab, "PADDED": padded, "CAP": softcap}
    _reference[(m,)](logits, targets, references, **of_logits, EXPONENTS=exponents(softcap), SAMPLE=SAMPLE, num_warps=4)
    _gradient[(tiles, triton.cdiv(m, TOKENS))](
        logits, references, scale, sums, q, q_t, m, q_t.stride(0), **of_logits, DTYPE=DTYPES[q.dtype], TOKENS=TOKENS,
        ENTRIES=ENTRIES, num_warps=8,
    )  # fmt: skip
    _finished[(triton.cdiv(m, ROWS),)](
        logits, targets, references, sums, scale, losses, factors, q, q_t, m, q_t.stride(0), **of_logits, DTYPE=DTYPES[q.dtype],
        SMALLEST=2.0**smallest, LARGEST=largest, TILES=tiles, POWER=triton.next_power_of_2(tiles), ROWS=ROWS, BLOCK=BLOCK,
        num_warps=4,
    )  # fmt: skip
