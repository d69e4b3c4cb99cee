"""Gradients of lookup tables: rows of equal ids are summed, in a fixed order and without atomics.

The tokens of a micro-batch were sorted once (`nvfp8.embedding.TokenOrder`), so the positions of one id are a run. A program takes
32 sorted positions and a block of columns and sums in fp32; where a run ends, it adds the sum to the table's gradient. So
an id that occurs thousands of times costs no more than as many rare ones: its run is cut at the borders of programs, each
part goes to a small workspace, and a second kernel adds the parts in order. Only rows that occur are touched.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 32  # sorted positions of a program
COLUMNS = 512  # columns of a program


@triton.jit
def _row(ROWS, GATE, position, column, inside, head, W, E, GATED: tl.constexpr):
    row = tl.load(ROWS + position * W + column, inside, 0.0)
    gate = row
    if GATED:
        gate = tl.load(GATE + position * (W // E) + head, inside, 0.0)
    return row, gate


@triton.jit
def _add_runs(
    GRAD, ROWS, GATE, POSITIONS, IDS, PARTS, N, W, E, GATED: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < W
    head = column // E
    begin = chunk * CHUNK
    end = tl.minimum(begin + CHUNK, N)
    current = tl.load(IDS + begin)
    began_before = tl.load(IDS + begin - 1, begin > 0, -1) == current
    total = tl.zeros((COLUMNS,), tl.float32)
    row, gate = _row(ROWS, GATE, tl.load(POSITIONS + begin), column, inside, head, W, E, GATED)
    for index in range(begin, end):
        value = row.to(tl.float32)
        if GATED:
            value *= gate.to(tl.float32)
        total += value
        # The next row is asked for before this one's sum is stored: the compiler moves no load across a store.
        following_position = tl.load(POSITIONS + index + 1, index + 1 < end, 0)
        row, gate = _row(ROWS, GATE, following_position, column, inside & (index + 1 < end), head, W, E, GATED)
        following = tl.load(IDS + index + 1, index + 1 < N, -1)
        if (following != current) | (index + 1 == end):
            if (following != current) & (began_before == 0):
                at = GRAD + current * W + column
                total += tl.load(at, inside, 0.0).to(tl.float32)
                tl.store(at, total.to(GRAD.dtype.element_ty), inside)
            else:  # a part of a run that other programs have parts of: its last or middle one in slot 0, its first in slot 1
                slot = 2 * chunk + (began_before == 0).to(tl.int64)
                tl.store(PARTS + slot * W + column, total, inside)
            total = tl.zeros((COLUMNS,), tl.float32)
            began_before = tl.full((), 0, tl.int1)
            current = following


@triton.jit
def _add_parts(GRAD, IDS, PARTS, N, W, CHUNK: tl.constexpr, COLUMNS: tl.constexpr):
    chunk = tl.program_id(0).to(tl.int64)
    begin = chunk * CHUNK
    end = begin + CHUNK
    following = tl.load(IDS + end, end < N, -1)
    current = tl.load(IDS + end - 1, end < N, -2)
    began_before = (tl.load(IDS + begin) == current) & (tl.load(IDS + begin - 1, begin > 0, -1) == current)
    if (following == current) & (began_before == 0):  # the run that goes on after this chunk began in it
        # Ids are sorted: bisect for the first chunk that begins with another one.
        low = chunk + 1
        high = tl.cdiv(N, CHUNK).to(tl.int64)
        for _ in range(32):
            middle = (low + high) // 2
            same = tl.load(IDS + middle * CHUNK, low < high, -1) == current
            low = tl.where(same, middle + 1, low)
            high = tl.where(same, high, middle)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < W
        at = GRAD + current * W + column
        total = tl.load(at, inside, 0.0).to(tl.float32) + tl.load(PARTS + (2 * chunk + 1) * W + column, inside, 0.0)
        for other in range(chunk + 1, low):
            total += tl.load(PARTS + 2 * other * W + column, inside, 0.0)
        tl.store(at, total.to(GRAD.dtype.element_ty), inside)


def add_rows_(grad: Tensor, rows: Tensor, gate: Tensor | None, positions: Tensor, ids: Tensor) -> None:
    """See `nvfp8.reference.add_rows_`."""
    count, width = len(ids), grad.shape[1]
    grid = triton.cdiv(count, CHUNK), triton.cdiv(width, COLUMNS)
    parts = torch.empty(grid[0], 2, width, dtype=torch.float32, device=grad.device)
    channels = width if gate is None else width // gate.shape[-1]
    _add_runs[grid](
        grad, rows, gate, positions, ids, parts, count, width, channels,
        GATED=gate is not None, CHUNK=CHUNK, COLUMNS=COLUMNS, num_warps=2,
    )  # fmt: skip
    _add_parts[grid](grad, ids, parts, count, width, CHUNK=CHUNK, COLUMNS=COLUMNS, num_warps=2)
