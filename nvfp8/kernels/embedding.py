"""Gradients of lookup tables, summed row by row: one program a table row and block of columns, no atomics.

The tokens of a micro-batch were sorted once (`nvfp8.embedding.TokenOrder`), so the positions of one id are a run: a program reads
them, sums in fp32 and adds to the table's gradient in place. Only rows that occur are touched, nothing of the size of
the table is made, and the order of summation is fixed, so it is deterministic.
"""

import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 512  # of a program
ROWS = 8  # positions read at once: most ids occur once or twice, the frequent ones a thousand times


@triton.jit
def _add_rows(
    GRAD, ROWS_, GATE, POSITIONS, STARTS, W, E,
    GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    start = tl.load(STARTS + row)
    end = tl.load(STARTS + row + 1)
    if start < end:
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < W
        total = tl.zeros((COLUMNS,), tl.float32)
        for first in range(start, end, ROWS):
            index = first + tl.arange(0, ROWS)
            position = tl.load(POSITIONS + index, index < end, 0).to(tl.int64)[:, None]
            mask = (index < end)[:, None] & inside[None, :]
            value = tl.load(ROWS_ + position * W + column[None, :], mask, 0.0).to(tl.float32)
            if GATED:
                value *= tl.load(GATE + position * (W // E) + column[None, :] // E, mask, 0.0).to(tl.float32)
            total += tl.sum(value, 0)
        at = GRAD + row.to(tl.int64) * W + column
        total += tl.load(at, inside, 0.0).to(tl.float32)
        tl.store(at, total.to(GRAD.dtype.element_ty), inside)


def add_rows_(grad: Tensor, rows: Tensor, gate: Tensor | None, positions: Tensor, starts: Tensor) -> None:
    """See `nvfp8.reference.add_rows_`."""
    width = grad.shape[1]
    _add_rows[grad.shape[0], triton.cdiv(width, COLUMNS)](
        grad, rows, gate, positions, starts, width, width if gate is None else width // gate.shape[-1],
        GATED=gate is not None, ROWS=ROWS, COLUMNS=COLUMNS,
    )  # fmt: skip
