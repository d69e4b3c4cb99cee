"""Muon's passes before and after Polar Express: sums of squares, and rows scaled on their way into fp16.

What both norms need of x is a sum of squares for each row, or each column of a wide matrix: one pass that reads 2 bytes a
parameter in tiles of 4096, and keeps fp32 sums in registers until a row ends. Columns are long, so a program takes PART rows of a
stripe, and a matrix's partial sums are added in one order: results are the same in every run.

All that follows from n·r sums is one launch of a program a matrix, where torch made a dozen, each of them 5 to 10 µs of host. It
walks over a few thousand sums three times, out of L2: every sum depends on a total over the ones before.

The rows' scale is not a pass of its own: `scale_rows` multiplies by it while it converts bf16 to fp16 for the products.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp8.kernels.muon import BLOCK, grid, number, of_rows, on_one_device
from nvfp8.rounding import BLOCK as SCALED

ROW_TILE = (8, 512)
COLUMN_TILE = (32, 128)
PART = 256  # rows of one partial sum: at 1536 × 6144, 288 programs a matrix
SUMS = 2048  # that a program holds at once
ALL = tl.constexpr(tl.PropagateNan.ALL)  # torch's clamp_min lets NaN through, too


@triton.jit(do_not_specialize=["ROWS"])
def _row_squares(X, OUT, ROWS, COLUMNS, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    lines = X + row.to(tl.int64)[:, None] * COLUMNS
    total = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for first in range(0, COLUMNS, WIDTH):
        column = first + tl.arange(0, WIDTH)
        x = tl.load(lines + column[None, :], (row < ROWS)[:, None] & (column < COLUMNS)[None, :], 0.0).to(tl.float32)
        total += x * x
    tl.store(OUT + row, tl.sum(total, 1), row < ROWS)


@triton.jit(do_not_specialize=["ROWS"])
def _column_squares(X, OUT, ROWS, COLUMNS, PART: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    part, matrix = tl.program_id(1), tl.program_id(2)
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    stripe = X + matrix.to(tl.int64) * (ROWS * COLUMNS) + column[None, :]
    total = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for first in range(0, PART, HEIGHT):
        row = part * PART + first + tl.arange(0, HEIGHT)
        x = tl.load(stripe + row[:, None] * COLUMNS, (row < ROWS)[:, None] & (column < COLUMNS)[None, :], 0.0).to(tl.float32)
        total += x * x
    out = OUT + (matrix * tl.num_programs(1) + part) * COLUMNS + column
    tl.store(out, tl.sum(total, 0), column < COLUMNS)


@triton.jit(do_not_specialize=["ROWS"])
def _equilibrium(SQUARES, SCALE, ROWS, SUMS: tl.constexpr):
    start = tl.program_id(0) * ROWS
    total = tl.zeros((SUMS,), tl.float32)
    for first in range(0, ROWS, SUMS):
        at = first + tl.arange(0, SUMS)
        total += tl.load(SQUARES + start + at, at < ROWS, 0.0)
    rms = tl.sqrt(tl.sum(total, 0) / ROWS)
    total = tl.zeros((SUMS,), tl.float32)
    for first in range(0, ROWS, SUMS):
        at = first + tl.arange(0, SUMS)
        norm = tl.sqrt(tl.load(SQUARES + start + at, at < ROWS, 0.0))
        scaled = norm / tl.maximum(norm, 1e-6, ALL)
        total += scaled * scaled
    factor = rms / (1.01 * (rms * tl.sqrt(tl.sum(total, 0))) + 1e-6)
    for first in range(0, ROWS, SUMS):
        at = first + tl.arange(0, SUMS)
        norm = tl.sqrt(tl.load(SQUARES + start + at, at < ROWS, 0.0))
        tl.store(SCALE + start + at, factor / tl.maximum(norm, 1e-6, ALL), at < ROWS)


@triton.jit(do_not_specialize=["ROWS"])
def _scale_rows(X, SCALE, OUT, FACTOR, ROWS, COLUMNS, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    matrix = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < ROWS * COLUMNS
    start = matrix.to(tl.int64) * (ROWS * COLUMNS)
    x = tl.load(X + start + at, mask, 0.0).to(tl.float32) * FACTOR
    if SCALE is not None:
        x *= of_rows(SCALE + matrix * ROWS, ROWS, COLUMNS, WHOLE, BLOCK)
    tl.store(OUT + start + at, x.to(OUT.dtype.element_ty), mask)


@triton.jit
def _mean_square(SQUARES, MOMENT, at, start, WIDTH, PARTS, LENGTH, take, to_norm, TOGETHER: tl.constexpr):
    """Sums of squares after the norm is set, and the average that they are taken into."""
    square = _whole(SQUARES, at, start, WIDTH, PARTS, TOGETHER) * (to_norm * to_norm)
    moment = tl.load(MOMENT + start + at, at < WIDTH, 0.0)
    return square, moment + take * (square / LENGTH - moment)


@triton.jit
def _whole(SQUARES, at, start, WIDTH, PARTS, TOGETHER: tl.constexpr):
    part = tl.arange(0, TOGETHER)[:, None]
    places = SQUARES + start * PARTS + part * WIDTH + at[None, :]
    return tl.sum(tl.load(places, (part < PARTS) & (at < WIDTH)[None, :], 0.0), 0)


@triton.jit(do_not_specialize=["WIDTH", "PARTS"], do_not_specialize_on_alignment=["TAKE"])
def _normuon(SQUARES, MOMENT, SCALE, WIDTH, PARTS, LENGTH, NORM, TAKE, TOGETHER: tl.constexpr, SUMS: tl.constexpr):
    start, take = tl.program_id(0) * WIDTH, tl.load(TAKE)
    total = tl.zeros((SUMS,), tl.float32)
    for first in range(0, WIDTH, SUMS):
        total += _whole(SQUARES, first + tl.arange(0, SUMS), start, WIDTH, PARTS, TOGETHER)
    to_norm = NORM / tl.maximum(tl.sqrt(tl.sum(total, 0)), 1e-6, ALL)
    before = tl.zeros((SUMS,), tl.float32)
    after = tl.zeros((SUMS,), tl.float32)
    for first in range(0, WIDTH, SUMS):
        at = first + tl.arange(0, SUMS)
        square, moment = _mean_square(SQUARES, MOMENT, at, start, WIDTH, PARTS, LENGTH, take, to_norm, TOGETHER)
        before += square
        after += square / tl.maximum(moment, 1e-10, ALL)
    kept = tl.sqrt(tl.sum(before, 0)) / tl.maximum(tl.sqrt(tl.sum(after, 0)), 1e-10, ALL)
    for first in range(0, WIDTH, SUMS):
        at = first + tl.arange(0, SUMS)
        _, moment = _mean_square(SQUARES, MOMENT, at, start, WIDTH, PARTS, LENGTH, take, to_norm, TOGETHER)
        tl.store(MOMENT + start + at, moment, at < WIDTH)
        tl.store(SCALE + start + at, to_norm * kept / tl.sqrt(tl.maximum(moment, 1e-10, ALL)), at < WIDTH)


def _squares(x: Tensor, by_row: bool) -> Tensor:
    """Sums of squares of each row (n, 1, r), or of PART rows of each column (n, parts, c)."""
    assert x.is_contiguous(), "sums are taken of contiguous matrices"
    n, r, c = x.shape
    if by_row:
        out = torch.empty((n, 1, r), dtype=torch.float32, device=x.device)
        height, width = ROW_TILE
        _row_squares[(triton.cdiv(n * r, height),)](x, out, n * r, c, HEIGHT=height, WIDTH=width, num_warps=8)
    else:
        parts = triton.cdiv(r, PART)
        out = torch.empty((n, parts, c), dtype=torch.float32, device=x.device)
        height, width = COLUMN_TILE
        _column_squares[(triton.cdiv(c, width), parts, n)](x, out, r, c, PART=PART, HEIGHT=height, WIDTH=width, num_warps=8)
    return out


def equilibrating_scale(x: Tensor) -> Tensor:
    """See `nvfp8.reference.equilibrating_scale`; x must be contiguous."""
    n, r, _ = x.shape
    scale = torch.empty((n, r, 1), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):  # Triton launches on the current one
        _equilibrium[(n,)](_squares(x, True), scale, r, SUMS=SUMS, num_warps=16)
    return scale


def scale_rows_(x: Tensor, scale: Tensor | None, factor: float, out: Tensor) -> Tensor:
    """See `nvfp8.reference.scale_rows_`; all contiguous."""
    assert x.shape == out.shape and x.is_contiguous() and out.is_contiguous(), "scale_rows_ works on contiguous memory"
    assert scale is None or (scale.is_contiguous() and scale.shape == (*x.shape[:2], 1)), "a row has one scale"
    on_one_device(x, scale, out)
    _, r, c = x.shape
    with torch.cuda.device_of(x):
        _scale_rows[grid(x)](x, scale, out, float(factor), r, c, WHOLE=c % SCALED == 0, BLOCK=BLOCK, num_warps=8)
    return out


def normuon_scale(x: Tensor, second_moment: Tensor, take: float | Tensor) -> Tensor:
    """See `nvfp8.reference.normuon_scale`; x and `second_moment` must be contiguous."""
    n, r, c = x.shape
    by_row = second_moment.shape[2] == 1
    assert second_moment.is_contiguous() and second_moment.shape == ((n, r, 1) if by_row else (n, 1, c)), "one mean a row or column"
    on_one_device(x, second_moment)
    scale = torch.empty_like(second_moment)
    with torch.cuda.device_of(x):
        squares = _squares(x, by_row)
        parts, width = squares.shape[1:]
        _normuon[(n,)](
            squares, second_moment, scale, width, parts, float(c if by_row else r), math.sqrt(min(r, c)), number(take, x),
            TOGETHER=triton.next_power_of_2(parts), SUMS=SUMS, num_warps=16,
        )  # fmt: skip
    return scale
