"""Softcap, cross-entropy and a gradient in FP8, as it lies and transposed: the first pass by rows, the second by tiles.

The weight's gradient wants the logits' one transposed, and a transpose wants tiles of many rows, which no L2 holds between two
passes. So the first pass is that of `cross_entropy.py`, which sums rows, and the second takes tiles of 128 × 128 and reads logits
once more from memory: 2 bytes each, beside 2 + 2 for the GEMM's write and the first pass, and 1 + 1 for both layouts. A thread has
64 elements, 17 instructions each, 3 of them exponentials and a reciprocal, and takes 40 registers (sm_90; disassembled).
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
def _quarter(logits, log_sum, CAP: tl.constexpr):
    """r, and softmax · (r − r²), a quarter of its product with 1 − tanh² = 4r(1 − r)."""
    LOG2E: tl.constexpr = 1.4426950408889634
    r = softcap_share(logits.to(tl.float32), CAP)
    return r, power_of_2((-2.0 * LOG2E * CAP) * r + LOG2E * (CAP - log_sum)) * (r - r * r)


@triton.jit
def _gradient_quantize(
    LOGITS, TARGETS, LOG_SUMS, SCALE, FACTOR, Q, Q_T, M, STRIDE_T, VOCAB: tl.constexpr, PADDED: tl.constexpr, CAP: tl.constexpr,
    DTYPE: tl.constexpr, TOKENS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    first_token = tl.program_id(1).to(tl.int64) * TOKENS
    token = first_token + tl.arange(0, TOKENS)
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    target = tl.load(TARGETS + token, token < M, -1).to(tl.int32)
    log_sum = tl.load(LOG_SUMS + token, token < M, 0.0)
    at = token[:, None] * PADDED + entry[None, :]
    inside = (token < M)[:, None] & (entry < PADDED)[None, :]
    first_entry = tl.program_id(0) * ENTRIES
    here = (target >= first_entry) & (target < first_entry + ENTRIES)
    at_target = token * PADDED + target
    of_target = tl.load(LOGITS + at_target, here, 0.0).to(tl.float32)
    # An ignored token's logits are read as 0, and none of them has a probability.
    logits = tl.load(LOGITS + at, inside & (target >= 0)[:, None], 0.0)
    _, quarter = _quarter(logits, tl.where(target >= 0, log_sum, float("inf"))[:, None], CAP)
    if VOCAB < PADDED:
        quarter = tl.where((entry < VOCAB)[None, :], quarter, 0.0)
    scale = 4.0 * tl.load(SCALE)
    tl.store(Q + at, to_fp8(quarter * scale, DTYPE), inside)
    # A tile has a target in few of its rows: taking 1 from a probability there is a store of its own, which the tile's precede.
    of_share, of_quarter = _quarter(of_target, log_sum, CAP)
    of_quarter -= of_share - of_share * of_share
    if FACTOR is not None:
        factor = 4.0 * tl.load(FACTOR)
        tl.debug_barrier()  # every thread has read what it needs of the logits
        tl.store(LOGITS + at, (quarter * factor).to(LOGITS.dtype.element_ty), inside)
    tl.debug_barrier()
    tl.store(Q + at_target, to_fp8(of_quarter * scale, DTYPE), here)
    if FACTOR is not None:
        tl.store(LOGITS + at_target, (of_quarter * factor).to(LOGITS.dtype.element_ty), here)
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
        CAP=softcap, DTYPE=DTYPES[q.dtype], TOKENS=TOKENS, ENTRIES=ENTRIES, num_warps=8, maxnreg=None if factor is None else 64,
    )  # fmt: skip
