"""Casts with a scale for every run of elements: a row (`rowwise`), or 128 of one (`blockwise`), measured and cast in one kernel.

A program takes whole runs: 4,096 elements in registers, or a longer run (a row of xᵀ is as long as a micro-batch has tokens)
in pieces, twice, the second time out of the L2 cache. So bf16 is read once from memory and FP8 written once, 3 bytes an element.
PyTorch, operation by operation, moves about 40 and holds three fp32 copies of what is cast.

Divisions are IEEE's, two a run, so that scales and hence codes are the twin's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp8.kernels.fp8 import DTYPES, to_fp8
from nvfp8.rounding import FORMATS

ELEMENTS = 4096  # a program's, 16 a thread


@triton.jit
def _quantize_rows(
    X, Q, INVERSE, COUNT, WIDTH, LARGEST: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, PIECE: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, PIECE)[None, :]
    largest = tl.zeros((ROWS, PIECE), tl.int32)
    for start in range(0, WIDTH, PIECE):
        mask = (row < COUNT) & (start + column < WIDTH)
        x = tl.load(X + row * WIDTH + start + column, mask, 0.0).to(tl.float32)
        largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)  # as integers NaN > inf > finite
    amax = tl.max(largest, 1).to(tl.float32, bitcast=True)[:, None]
    # NaN compares as false, so both that and inf make the scale NaN; a row of zeros has scale 1.
    scale = tl.minimum(tl.div_rn(tl.full([ROWS, 1], LARGEST, tl.float32), tl.where(amax > 0, amax, LARGEST)), 2.0**126)
    scale = tl.where(amax < float("inf"), scale, float("nan"))
    tl.store(INVERSE + row, tl.div_rn(tl.full([ROWS, 1], 1.0, tl.float32), scale), row < COUNT)
    for start in range(0, WIDTH, PIECE):
        mask = (row < COUNT) & (start + column < WIDTH)
        x = tl.load(X + row * WIDTH + start + column, mask, 0.0).to(tl.float32)
        tl.store(Q + row * WIDTH + start + column, to_fp8(x * scale, DTYPE), mask)


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `nvfp8.reference_fp8.quantize_rows`."""
    x = x.contiguous()
    count, width = x.shape
    q = torch.empty(count, width, dtype=dtype, device=x.device)
    inverse = torch.empty(count, dtype=torch.float32, device=x.device)
    piece = min(triton.next_power_of_2(width), ELEMENTS)
    rows = ELEMENTS // piece
    _quantize_rows[(triton.cdiv(count, rows),)](
        x, q, inverse, count, width, LARGEST=FORMATS[dtype][2], DTYPE=DTYPES[dtype], ROWS=rows, PIECE=piece, num_warps=8
    )
    return q, inverse
