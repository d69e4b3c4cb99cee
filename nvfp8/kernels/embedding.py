"""Gradients of lookup tables, summed row by row: one program a table row and block of columns, no atomics.

The tokens of a micro-batch were sorted once (`nvfp8.embedding.TokenOrder`), so the positions of one id are a run: a program reads
them, sums in fp32 and adds to the table's gradient in place. Only rows that occur are touched, nothing of the size of
the table is made, and the order of summation is fixed, so it is deterministic.
"""

import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 512  # of a program
TOGETHER = 16  # positions read at once where an id has many: most have one or two, the frequent ones thousands


@triton.jit
def _add_rows(
    GRAD, ROWS, GATE, POSITIONS, STARTS, W, E, GATED: tl.constexpr, TOGETHER: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(STARTS + row)
    end = tl.load(STARTS + row + 1)
    if start < end:
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < W
        head = column // E
        many = start + (end - start) // TOGETHER * TOGETHER
        total = tl.zeros((COLUMNS,), tl.float32)
        for first in range(start, many, TOGETHER):
            position = tl.load(POSITIONS + first + tl.arange(0, TOGETHER))[:, None]
            value = tl.load(ROWS + position * W + column[None, :], inside[None, :], 0.0).to(tl.float32)
            if GATED:
                value *= tl.load(GATE + position * (W // E) + head[None, :], inside[None, :], 0.0).to(tl.float32)
            total += tl.sum(value, 0)
        for index in range(many, end):
            position = tl.load(POSITIONS + index)
            value = tl.load(ROWS + position * W + column, inside, 0.0).to(tl.float32)
            if GATED:
                value *= tl.load(GATE + position * (W // E) + head, inside, 0.0).to(tl.float32)
            total += value
        at = GRAD + row * W + column
        total += tl.load(at, inside, 0.0).to(tl.float32)
        tl.store(at, total.to(GRAD.dtype.element_ty), inside)


def add_rows_(grad: Tensor, rows: Tensor, gate: Tensor | None, positions: Tensor, starts: Tensor) -> None:
    """See `nvfp8.reference.add_rows_`."""
    width = grad.shape[1]
    _add_rows[grad.shape[0], triton.cdiv(width, COLUMNS)](
        grad, rows, gate, positions, starts, width, width if gate is None else width // gate.shape[-1],
        GATED=gate is not None, TOGETHER=TOGETHER, COLUMNS=COLUMNS,
    )  # fmt: skip
