"""Softcap, cross-entropy and their gradient over one row of logits a program, the gradient written where the logits were.

The softcap bounds |z| by c = 15, so Σ exp(z) fits fp32 without a maximum: one pass sums, a second one (which finds the row
in L2) writes the gradient. tanh and the softmax share fast exponentials: tanh(u) = 1 − 2/(1 + e^2u).

An FP8 gradient is wanted transposed too, for the weight's gradient, and a transpose wants tiles of many rows, which no L2 holds
between two passes. So its second pass goes by tiles of 128 × 128 and reads the logits once more from memory: 2 bytes each, beside
2 + 2 for the GEMM's write and the first pass, 1 + 1 for the gradient in two layouts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp8.kernels.fp8 import DTYPES, to_fp8

BLOCK = 4096  # columns in registers at a time
TOKENS, ENTRIES = 128, 128  # a tile of the FP8 gradient: rows of it and of its transpose are 128 bytes


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


@triton.jit
def _softcap_cross_entropy(
    LOGITS, TARGETS, SCALE, LOSSES, LOG_SUMS, STRIDE, VOCAB: tl.constexpr, PADDED: tl.constexpr, CAP: tl.constexpr,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(TARGETS + row)
    logits = LOGITS + row * STRIDE
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, VOCAB, BLOCK):
        column = start + tl.arange(0, BLOCK)
        capped = CAP * _tanh(tl.load(logits + column, column < VOCAB, 0.0).to(tl.float32) / CAP)
        total += tl.where(column < VOCAB, tl.exp(capped), 0.0)
    log_sum = tl.log(tl.sum(total, 0))
    valid = target >= 0
    z_target = CAP * _tanh(tl.load(logits + tl.maximum(target, 0)).to(tl.float32) / CAP)
    tl.store(LOSSES + row, tl.where(valid, log_sum - z_target, 0.0))
    if LOG_SUMS is not None:
        tl.store(LOG_SUMS + row, log_sum)
    if GRADIENT:
        tl.debug_barrier()  # every thread has read the target's logit before any overwrites it
        scale = tl.where(valid, tl.load(SCALE), 0.0)
        for start in range(0, PADDED, BLOCK):
            column = start + tl.arange(0, BLOCK)
            tanh = _tanh(tl.load(logits + column, column < VOCAB, 0.0).to(tl.float32) / CAP)
            gradient = tl.exp(CAP * tanh - log_sum) - tl.where(column == target, 1.0, 0.0)
            gradient = tl.where(column < VOCAB, gradient * (1.0 - tanh * tanh) * scale, 0.0)
            tl.store(logits + column, gradient.to(LOGITS.dtype.element_ty), column < PADDED)


@triton.jit
def _gradient_quantize(
    LOGITS, TARGETS, LOG_SUMS, SCALE, FACTOR, Q, Q_T, M, STRIDE_T, VOCAB: tl.constexpr, PADDED: tl.constexpr, CAP: tl.constexpr,
    DTYPE: tl.constexpr, TOKENS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    LOG2E: tl.constexpr = 1.4426950408889634
    token = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    target = tl.load(TARGETS + token, token < M, -1).to(tl.int32)[:, None]
    log_sum = tl.load(LOG_SUMS + token, token < M, 0.0)[:, None]
    at = token[:, None] * PADDED + entry[None, :]
    inside = (token < M)[:, None] & (entry < PADDED)[None, :]
    r = 1.0 / (1.0 + tl.exp2((2.0 * LOG2E / CAP) * tl.load(LOGITS + at, inside, 0.0).to(tl.float32)))  # tanh is 1 − 2r
    p = tl.exp2((-2.0 * LOG2E * CAP) * r + LOG2E * (CAP - log_sum))
    gradient = (p - tl.where(entry[None, :] == target, 1.0, 0.0)) * (4.0 * r * (1.0 - r))  # 1 − tanh²
    gradient = tl.where((target >= 0) & (entry < VOCAB)[None, :], gradient, 0.0)
    if FACTOR is not None:
        tl.store(LOGITS + at, (gradient * tl.load(FACTOR)).to(LOGITS.dtype.element_ty), inside)
    tl.store(Q + at, to_fp8(gradient * tl.load(SCALE), DTYPE), inside)
    if Q_T is not None:
        # Read again, from L2: of codes in registers Triton 3.6 makes the transposed ones by computing everything a second time,
        # 256 exponentials a thread for 64 elements, at 255 registers and with spills (sm_90).
        tl.debug_barrier()  # every thread has written its codes
        across = entry.to(tl.int64)[:, None] * STRIDE_T + token[None, :]
        codes = tl.trans(tl.load(Q + at, inside))
        tl.store(Q_T + across, codes, (entry < PADDED)[:, None] & (token < M)[None, :])


@triton.jit
def _scale(X, FACTOR, N, BLOCK: tl.constexpr):
    factor = tl.load(FACTOR)
    if factor != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(X + at, at < N, 0.0)
        tl.store(X + at, (x.to(tl.float32) * factor).to(X.dtype.element_ty), at < N)


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """See `nvfp8.reference.scale_`; a factor of 1, which a loss's gradient nearly always is, costs no pass over x."""
    _scale[(triton.cdiv(x.numel(), BLOCK),)](x, factor, x.numel(), BLOCK=BLOCK)
    return x


def softcap_cross_entropy_(logits: Tensor, targets: Tensor, vocab: int, softcap: float, scale: Tensor | None) -> Tensor:
    """See `nvfp8.reference.softcap_cross_entropy_`; rows of `logits` must be contiguous."""
    return _row_pass(logits, targets, vocab, softcap, scale, None)


def _row_pass(logits: Tensor, targets: Tensor, vocab: int, softcap: float, scale: Tensor | None, log_sums: Tensor | None) -> Tensor:
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    _softcap_cross_entropy[(logits.shape[0],)](
        logits, targets, scale, losses, log_sums, logits.stride(0), VOCAB=vocab, PADDED=logits.shape[1],
        CAP=softcap, GRADIENT=scale is not None, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return losses


def softcap_cross_entropy_quantize(
    logits: Tensor, targets: Tensor, vocab: int, softcap: float, scale: Tensor, factor: Tensor | None, q: Tensor | None,
    q_t: Tensor | None,
) -> Tensor:  # fmt: skip
    """See `nvfp8.reference_fp8.softcap_cross_entropy_quantize`."""
    m, padded = logits.shape
    assert logits.is_contiguous() and (q is None or q.is_contiguous()) and (q_t is None or q_t.stride(1) == 1)
    log_sums = torch.empty(m, dtype=torch.float32, device=logits.device)
    losses = _row_pass(logits, targets, vocab, softcap, None, log_sums)
    if q is None:  # what the transpose is read from
        assert q_t is not None
        q = torch.empty(m, padded, dtype=q_t.dtype, device=logits.device)
    _gradient_quantize[(triton.cdiv(padded, ENTRIES), triton.cdiv(m, TOKENS))](
        logits, targets, log_sums, scale, factor, q, q_t, m, 0 if q_t is None else q_t.stride(0), VOCAB=vocab, PADDED=padded,
        CAP=softcap, DTYPE=DTYPES[q.dtype], TOKENS=TOKENS, ENTRIES=ENTRIES, num_warps=8,
    )  # fmt: skip
    return losses
