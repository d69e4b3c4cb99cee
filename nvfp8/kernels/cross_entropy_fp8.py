"""Softcap, cross-entropy and a gradient in FP8, as it lies and transposed: the first pass by rows, the second by tiles.

The weight's gradient wants the logits' one transposed, and a transpose wants tiles of many rows, which no L2 holds between two
passes. So the first pass is that of `cross_entropy.py`, which sums rows, and the second takes tiles of 128 × 128 and reads logits
once more from memory: 2 bytes each, beside 2 + 2 for the GEMM's write and the first pass, and 1 + 1 for both layouts. A thread has
64 elements, 21 instructions each, 3 of them exponentials and a reciprocal (sm_90; disassembled). It would take 73 registers, but
with 64, where nothing is spilled either, four programs fit a multiprocessor instead of three.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp8.kernels.cross_entropy import power_of_2, row_pass, softcap_share
from nvfp8.kernels.fp8 import DTYPES, to_fp8
from nvfp8.kernels.quantize_fp8 import interleaved

TOKENS, ENTRIES = 128, 128  # a tile: rows of it and of its transpose are 128 bytes


@triton.jit
def _written(which: tl.constexpr, Q, first_token, entry, M, PADDED: tl.constexpr, TOKENS: tl.constexpr):
    """Every fourth row of the tile, from row `which` on."""
    token = first_token + tl.arange(0, TOKENS // 4) * 4 + which
    return tl.load(Q + token[:, None] * PADDED + entry[None, :], (token < M)[:, None] & (entry < PADDED)[None, :])


@triton.jit
def _gradient_quantize(
    LOGITS, TARGETS, LOG_SUMS, SCALE, FACTOR, Q, Q_T, M, STRIDE_T, VOCAB: tl.constexpr, PADDED: tl.constexpr, CAP: tl.constexpr,
    DTYPE: tl.constexpr, TOKENS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    LOG2E: tl.constexpr = 1.4426950408889634
    first_token = tl.program_id(1).to(tl.int64) * TOKENS
    token = first_token + tl.arange(0, TOKENS)
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    target = tl.load(TARGETS + token, token < M, -1).to(tl.int32)[:, None]
    log_sum = tl.load(LOG_SUMS + token, token < M, 0.0)[:, None]
    at = token[:, None] * PADDED + entry[None, :]
    inside = (token < M)[:, None] & (entry < PADDED)[None, :]
    r = softcap_share(tl.load(LOGITS + at, inside, 0.0).to(tl.float32), CAP)
    p = power_of_2((-2.0 * LOG2E * CAP) * r + LOG2E * (CAP - log_sum))
    quarter = (p - tl.where(entry[None, :] == target, 1.0, 0.0)) * (r - r * r)  # of the gradient: 1 − tanh² is 4r(1 − r)
    quarter = tl.where((target >= 0) & (entry < VOCAB)[None, :], quarter, 0.0)
    if FACTOR is not None:
        tl.store(LOGITS + at, (quarter * (4.0 * tl.load(FACTOR))).to(LOGITS.dtype.element_ty), inside)
    tl.store(Q + at, to_fp8(quarter * (4.0 * tl.load(SCALE)), DTYPE), inside)
    if Q_T is not None:
        # Read again, from L2: of codes in registers Triton 3.6 makes the transposed ones by computing everything a second time,
        # 256 exponentials a thread for 64 elements, at 255 registers and with spills (sm_90). In quarters, see `quantize_fp8.py`.
        tl.debug_barrier()  # every thread has written its codes
        c0 = _written(0, Q, first_token, entry, M, PADDED, TOKENS)
        c1 = _written(1, Q, first_token, entry, M, PADDED, TOKENS)
        c2 = _written(2, Q, first_token, entry, M, PADDED, TOKENS)
        c3 = _written(3, Q, first_token, entry, M, PADDED, TOKENS)
        across = entry.to(tl.int64)[None, :] * STRIDE_T + token[:, None]
        tl.store(Q_T + across, interleaved(c0, c1, c2, c3, TOKENS, ENTRIES), inside)


def softcap_cross_entropy_quantize(
    logits: Tensor, targets: Tensor, losses: Tensor, vocab: int, softcap: float, scale: Tensor, factor: Tensor | None,
    q: Tensor | None, q_t: Tensor | None,
) -> None:  # fmt: skip
    """See `nvfp8.reference_fp8.softcap_cross_entropy_quantize`."""
    m, padded = logits.shape
    assert logits.is_contiguous() and (q is None or q.is_contiguous()) and (q_t is None or q_t.stride(1) == 1)
    log_sums = torch.empty(m, dtype=torch.float32, device=logits.device)
    row_pass(logits, targets, losses, vocab, softcap, None, log_sums)
    if q is None:  # what the transpose is read from
        assert q_t is not None
        q = torch.empty(m, padded, dtype=q_t.dtype, device=logits.device)
    _gradient_quantize[(triton.cdiv(padded, ENTRIES), triton.cdiv(m, TOKENS))](
        logits, targets, log_sums, scale, factor, q, q_t, m, 0 if q_t is None else q_t.stride(0), VOCAB=vocab, PADDED=padded,
        CAP=softcap, DTYPE=DTYPES[q.dtype], TOKENS=TOKENS, ENTRIES=ENTRIES, num_warps=8, maxnreg=64,
    )  # fmt: skip
