"""Muon's passes before and after Polar Express that read sums of squares of rows and columns.

What both norms need of x is a sum of squares for each row, or each column of a wide matrix: one pass that reads in tiles of 4096,
and keeps fp32 sums in registers until a row ends. Columns are long, so a program takes PART rows of a stripe, and a matrix's
partial sums are added in one order: results are the same in every run.

Before Polar Express x is not there yet: the pass reads what x is made of, gradient and momentum, and `muon_nesterov_` behind it
makes x of the same again and writes it scaled, in the dtype that is worked in. With an FP8 momentum and bf16 gradients that moves 9
bytes a parameter; to write x, read it for its sums, read it for its scale and write it again would move 12.

All that follows from n·r sums is one launch of a program a matrix, where torch made a dozen, each of them 5 to 10 µs of host. It
walks over a few thousand sums three times, out of L2: every sum depends on a total over the ones before.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp8.kernels import rounding
from nvfp8.kernels.muon import check_scales, located, number, on_one_device, readable
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


# Numbers stand anywhere in a table: the compiler is not to care whether 16 divides their addresses.
@triton.jit(do_not_specialize=["ROWS"], do_not_specialize_on_alignment=["TAKE", "MU"])
def _nesterov_squares(
    GRADIENTS, MOMENTUM, SCALES, OUT, ROWS, COLUMNS, TAKE, MU, TYPE: tl.constexpr, ALIGNED: tl.constexpr, FP8: tl.constexpr,
    WHOLE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    matrix, take, mu = tl.program_id(1), tl.load(TAKE), tl.load(MU)
    row = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    gradient = located(GRADIENTS, matrix, TYPE, ALIGNED)
    momentum = MOMENTUM + matrix.to(tl.int64) * (ROWS * COLUMNS)
    total = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for first in range(0, COLUMNS, WIDTH):
        column = first + tl.arange(0, WIDTH)
        at, mask = row[:, None] * COLUMNS + column[None, :], (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
        g = tl.load(gradient + at, mask, 0.0).to(tl.float32)
        m = tl.load(momentum + at, mask, 0.0).to(tl.float32)
        if FP8:
            scales = SCALES + matrix * tl.cdiv(ROWS * COLUMNS, rounding.BLOCK)
            if WHOLE:  # a row is of whole blocks: one load for each
                EACH: tl.constexpr = WIDTH // rounding.BLOCK
                block = first // rounding.BLOCK + tl.arange(0, EACH)
                many = COLUMNS // rounding.BLOCK
                scale = tl.load(scales + row[:, None] * many + block[None, :], (row < ROWS)[:, None] & (block < many)[None, :], 0.0)
                m = tl.reshape(tl.reshape(m, (HEIGHT, EACH, rounding.BLOCK)) * scale[:, :, None], (HEIGHT, WIDTH))
            else:
                m *= tl.load(scales + at // rounding.BLOCK, mask, 0.0)
        m += take * (g - m)
        x = g + mu * (m - g)
        total += x * x
    tl.store(OUT + matrix * ROWS + row, tl.sum(total, 1), row < ROWS)


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


def equilibrating_scale(
    gradients: Sequence[Tensor], momentum: Tensor, scales: Tensor | None, take: float | Tensor, mu: float | Tensor
) -> Tensor:
    """See `nvfp8.reference.equilibrating_scale`; `momentum` and `scales` must be contiguous."""
    n, r, c = momentum.shape
    assert momentum.is_contiguous(), "sums are taken of contiguous matrices"
    on_one_device(momentum, *gradients, scales)
    check_scales(momentum, scales)
    gradients, kind = readable(gradients)
    squares, scale = (torch.empty((n, r, 1), dtype=torch.float32, device=momentum.device) for _ in range(2))
    height, width = ROW_TILE
    with torch.cuda.device_of(momentum):  # Triton launches on the current one
        _nesterov_squares[(triton.cdiv(r, height), n)](
            gradients.table, momentum, scales, squares, r, c, number(take, momentum), number(mu, momentum), kind,
            gradients.aligned, scales is not None, scales is not None and c % SCALED == 0, HEIGHT=height, WIDTH=width, num_warps=8,
        )  # fmt: skip
        _equilibrium[(n,)](squares, scale, r, SUMS=SUMS, num_warps=16)
    return scale


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
