"""Products that are known to be symmetric, at half the price: a block above the diagonal is computed once and written twice.

XXᵀ, and any product of symmetric matrices that commute (powers and polynomials of one matrix), have nothing below the diagonal that
is not above it. Of T × T blocks of 128 rows T(T + 1)/2 are wanted; a tile is two blocks wide, which halves what the L2 cache must
send for the left operand, and the tiles that cover the wanted blocks have 84 of 144 at 1536 rows. βC + δI is added in fp32 before
the one rounding, so bA + cA² and aI + bG + cG² are one launch.

Persistent: a program walks over tiles, a matrix's first to last, so what runs together reads the same few matrices (a 1536 × 6144
one has 18.9 MB; the L2 cache has 50). Tiles and steps along k are one loop: the loads of the next tile run while this one is
written. TMA brings rows of X or columns of it as they lie, so XᵀX of a tall X takes no transpose; and takes a block and its mirror
image as whole lines, in parts of PART columns, since both wait in shared memory beside three stages of operands.

A block on the diagonal takes its lower half from its upper, so the result is exactly symmetric even where a·bᵀ is so only up to
rounding. bf16 and fp16 go to tensor cores and accumulate in fp32. fp32 is multiplied as fp32, for tests: no tensor core does that.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nvfp8.kernels.fp8 import INTERPRETED, roomy


@triton.jit
def _symmetric_product(
    A, B, C, OUT, OUT_T, MATRICES, SIZE, DEPTH, ALPHA, BETA, DIAGONAL,
    A_COLUMNS: tl.constexpr, B_COLUMNS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    last = tl.cdiv(SIZE, BN) - 1
    tiles = BN // BM * (last * (last + 1) // 2) + tl.cdiv(SIZE, BM)
    steps = tl.cdiv(DEPTH, BK)
    tile = tl.program_id(0)
    matrix, m, n = _place(tile, tiles, BM, BN)
    step = 0
    total = tl.zeros((BM, BN), tl.float32)
    for _ in range(tl.cdiv(tiles * MATRICES - tile, tl.num_programs(0)) * steps):
        a = _rows(A, matrix, m, step * BK, BM, BK, A_COLUMNS)
        b = _rows(B, matrix, n, step * BK, BN, BK, B_COLUMNS)
        total = tl.dot(a, b.T, total, input_precision="ieee")
        step += 1
        if step == steps:
            if BM == BN:
                _finish(total, C, OUT, OUT_T, matrix, m, n, ALPHA, BETA, DIAGONAL, BM, PART)
            else:
                left, right = _halves(total, BM, BN)
                _finish(left, C, OUT, OUT_T, matrix, m, n, ALPHA, BETA, DIAGONAL, BM, PART)
                _finish(right, C, OUT, OUT_T, matrix, m, n + BM, ALPHA, BETA, DIAGONAL, BM, PART)
            total = tl.zeros((BM, BN), tl.float32)
            step = 0
            tile += tl.num_programs(0)
            matrix, m, n = _place(tile, tiles, BM, BN)


@triton.jit
def _place(tile, tiles, BM: tl.constexpr, BN: tl.constexpr):
    # Tiles count down the columns: column j has w(j + 1) that touch the upper half (w = BN / BM), so it begins at w·j(j + 1)/2.
    number = tile % tiles
    pair = number // (BN // BM)
    j = ((tl.sqrt(8.0 * pair + 1.0) - 1.0) * 0.5).to(tl.int32)  # the root may be off by a bit
    j = tl.where((j + 1) * (j + 2) // 2 <= pair, j + 1, j)
    j = tl.where(j * (j + 1) // 2 > pair, j - 1, j)
    return tile // tiles, (number - BN // BM * (j * (j + 1) // 2)) * BM, j * BN


@triton.jit
def _rows(X, matrix, row, k, ROWS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr):
    if COLUMNS:
        return X.load([matrix, k, row]).reshape(DEPTH, ROWS).T
    else:
        return X.load([matrix, row, k]).reshape(ROWS, DEPTH)


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _finish(total, C, OUT, OUT_T, matrix, m, n, ALPHA, BETA, DIAGONAL, BLOCK: tl.constexpr, PART: tl.constexpr):
    if m <= n:
        total *= ALPHA
        if C is not None:
            total += BETA * C.load([matrix, m, n]).reshape(BLOCK, BLOCK).to(tl.float32)
        i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
        total += tl.where((m == n) & (i == j), DIAGONAL, 0.0)
        result = total.to(OUT.dtype)
        if m == n:
            _store(tl.where(i <= j, result, result.T), OUT, None, matrix, m, n, BLOCK, BLOCK, PART)
        else:
            _store(result, OUT, OUT_T, matrix, m, n, BLOCK, BLOCK, PART)


@triton.jit
def _store(result, OUT, OUT_T, matrix, m, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr):
    if COLUMNS == PART:
        OUT.store([matrix, m, n], result.reshape(1, ROWS, PART))
        if OUT_T is not None:
            OUT_T.store([matrix, n, m], result.T.reshape(1, PART, ROWS))
    else:
        left, right = _halves(result, ROWS, COLUMNS)
        _store(left, OUT, OUT_T, matrix, m, n, ROWS, COLUMNS // 2, PART)
        _store(right, OUT, OUT_T, matrix, m, n + COLUMNS // 2, ROWS, COLUMNS // 2, PART)


# BM and BN: rows of a and of b in a tile (BN is BM or twice that); BK: along k; PART: columns that are written at once;
# PER_SM: programs that run together on a multiprocessor.
TILES: dict[str, dict[str, int]] = {
    "hopper": {"BM": 128, "BN": 256, "BK": 64, "PART": 64, "PER_SM": 1, "num_warps": 8, "num_stages": 3},
    "other": {"BM": 128, "BN": 128, "BK": 32, "PART": 64, "PER_SM": 1, "num_warps": 8, "num_stages": 3},
    "fp32": {"BM": 64, "BN": 64, "BK": 32, "PART": 64, "PER_SM": 1, "num_warps": 4, "num_stages": 2},
    "interpreted": {"BM": 32, "BN": 64, "BK": 32, "PART": 16, "PER_SM": 1, "num_warps": 4, "num_stages": 2},
}


def _tiles(dtype: torch.dtype) -> dict[str, int]:
    if INTERPRETED.value:
        return TILES["interpreted"]
    if dtype == torch.float32:
        return TILES["fp32"]
    return TILES["hopper" if roomy() else "other"]


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def symmetric_product_(
    a: Tensor, b: Tensor, out: Tensor, alpha: float = 1.0, c: Tensor | None = None, beta: float = 0.0, diagonal: float = 0.0
) -> None:
    """See `nvfp8.reference.symmetric_product_`; all of one dtype, `out` and `c` contiguous, rows of whole 16 bytes (TMA)."""
    launch(a, b, out, alpha, c, beta, diagonal, _tiles(out.dtype))


def launch(
    a: Tensor, b: Tensor, out: Tensor, alpha: float, c: Tensor | None, beta: float, diagonal: float, tiles: dict[str, Any]
) -> None:
    """Launch `symmetric_product_` in tiles such as `TILES` has."""
    n, size, depth = a.shape
    assert a.shape == b.shape and out.shape == (n, size, size), "a and b must be (n, m, k), out (n, m, m)"
    assert out.is_contiguous() and (c is None or c.is_contiguous()), "symmetric_product_ works on contiguous results"
    assert a.dtype == b.dtype == out.dtype, "the operands and the result of a symmetric product have one dtype"
    options = dict(tiles)
    bm, bn, bk, per_sm = options["BM"], options["BN"], options["BK"], options.pop("PER_SM")
    wide, last = bn // bm, triton.cdiv(size, bn) - 1
    number = n * (wide * (last * (last + 1) // 2) + triton.cdiv(size, bm))

    def operand(x: Tensor, rows: int) -> TensorDescriptor:
        return _described(x.mT, bk, rows) if _by_columns(x) else _described(x, rows, bk)

    with torch.cuda.device_of(out):  # Triton launches on the current one
        _symmetric_product[(min(number, per_sm * _multiprocessors(out.device)),)](
            operand(a, bm), operand(b, bn), None if c is None else _described(c, bm, bm),
            _described(out, bm, options["PART"]), _described(out, options["PART"], bm), n, size, depth,
            float(alpha), float(beta), float(diagonal), A_COLUMNS=_by_columns(a), B_COLUMNS=_by_columns(b), **options,
        )  # fmt: skip


def _by_columns(x: Tensor) -> bool:
    return x.stride(-1) != 1


def _described(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    size = x.element_size()
    assert x.stride(-1) == 1 and x.stride(-2) * size % 16 == x.stride(0) * size % 16 == x.data_ptr() % 16 == 0, (
        f"TMA moves rows of whole 16 bytes: not of {tuple(x.shape)} with strides {x.stride()}"
    )
    return TensorDescriptor.from_tensor(x, [1, rows, columns])
