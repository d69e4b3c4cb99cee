"""Products that are known to be symmetric, at half the price: a block above the diagonal is computed once and written twice.

XXᵀ, and any product of symmetric matrices that commute (powers and polynomials of one matrix), have nothing below the diagonal
that is not above it. Of T × T tiles of 128 × 128, T(T + 1)/2 are computed: 78 of 144 at 1536 rows. βC + δI is added in fp32 before
the one rounding, so bA + cA² and aI + bG + cG² are one launch. What the rounding takes off may be written beside the result.

Persistent: a program walks over tiles, a matrix's first to last, so what runs together reads the same few matrices (a 1536 × 6144
one has 18.9 MB; the L2 cache has 50). Two programs share a multiprocessor, so that one multiplies while the other writes its tile.
TMA brings rows of X or columns of it as they lie, so XᵀX of a tall X takes no transpose; and takes a tile and its mirror image as
whole squares from where operands lay before, so three stages of operands are all the shared memory that a program needs: 96 KiB.
Programs make their descriptors themselves, 128 bytes each, so a launch is pointers and integers.

A tile on the diagonal of XXᵀ, whose two operands are one, loads it once: of 78 tiles 12, of 21 at 768 rows 6. Any on the diagonal
takes its lower half from its upper, so the result is exactly symmetric even where a·bᵀ is so only up to rounding. bf16 and fp16 go
to tensor cores and accumulate in fp32. fp32 is multiplied as fp32, for tests: no tensor core does that.

Time on an H200 in ms, and as a share of cuBLAS's for the full product, by `torch.bmm`, and `torch.baddbmm` where C is added
(2026-11-29, torch 2.11, Triton 3.6, fp16; medians of 10). The tiles that are computed are 0.54 of all at 1536 rows, 0.58 at 768:

| | XXᵀ | XᵀX, X tall | bA + cA² | PG |
| --- | --- | --- | --- | --- |
| 24 of 1536 × 1536 | 0.1614, 0.677 | | 0.1681, 0.520 | 0.1770, 0.715 |
| 8 of 1536 × 1536 | | | 0.0677, 0.584 | |
| 8 of 1536 × 6144 | 0.2114, 0.712 | 0.2133, 0.713 | | |
| 48 of 768 × 768 | 0.0563, 0.824 | | 0.0605, 0.516 | |
| 12 of 768 × 3072 | 0.0443, 0.631 | | | |

Tried beside it: tiles of 128 × 256, one program a multiprocessor, took 0.98 to 1.16 times as long at 1536 rows, 1.23 to 1.81 at
768. Descriptors from the host saved the GPU some 1 % of the large products (0.1598, 0.1654, 0.2093 for 0.1614, 0.1681, 0.2114) and
cost the host 74 to 99 µs a launch instead of 56 to 76, more than a GPU takes for the small ones, where they saved 2 to 5 %. With
them, a program a tile took 0.99 to 1.04 of the time of persistent ones; in one measurement 0.92 (XXᵀ, 8 of 1536 × 6144: 0.1936).
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp8 import reference_optim
from nvfp8.kernels.fp8 import INTERPRETED, roomy

_REST = tl.constexpr(reference_optim.REST)


# No number is specialized: n, sizes and strides are only what descriptors are made of, and one binary serves all shapes.
@triton.jit(do_not_specialize=["MATRICES", "SIZE", "DEPTH", "A_MATRIX", "A_LINE", "B_MATRIX", "B_LINE"])
def _symmetric_product(
    A, B, C, OUT, REST, MATRICES, SIZE, DEPTH, A_MATRIX, A_LINE, B_MATRIX, B_LINE, ALPHA, BETA, DIAGONAL,
    A_COLUMNS: tl.constexpr, B_COLUMNS: tl.constexpr, BLOCK: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    a_tiles = _operand(A, MATRICES, SIZE, DEPTH, A_MATRIX, A_LINE, BLOCK, BK, A_COLUMNS)
    b_tiles = a_tiles if B is None else _operand(B, MATRICES, SIZE, DEPTH, B_MATRIX, B_LINE, BLOCK, BK, B_COLUMNS)
    c_tiles = None if C is None else _square(C, MATRICES, SIZE, BLOCK)
    out = _square(OUT, MATRICES, SIZE, BLOCK)
    rest = None if REST is None else _square(REST, MATRICES, SIZE, BLOCK)
    blocks = tl.cdiv(SIZE, BLOCK)
    tiles = blocks * (blocks + 1) // 2
    # One stage: a square waits in memory that operands have left. In 32 KiB of its own, two programs would no longer fit.
    for tile in tl.range(tl.program_id(0), tiles * MATRICES, tl.num_programs(0), num_stages=1):
        matrix = tile // tiles
        m, n = _place(tile % tiles, BLOCK)
        # Each with an end of its own: where sums meet behind a branch, ptxas waits for every wgmma before it begins the next.
        if B is None and m == n:
            square = _product(a_tiles, None, matrix, m, m, DEPTH, BLOCK, BK, A_COLUMNS, A_COLUMNS)
            _finish(square, c_tiles, out, rest, matrix, m, m, ALPHA, BETA, DIAGONAL, BLOCK)
        else:
            total = _product(a_tiles, b_tiles, matrix, m, n, DEPTH, BLOCK, BK, A_COLUMNS, B_COLUMNS)
            _finish(total, c_tiles, out, rest, matrix, m, n, ALPHA, BETA, DIAGONAL, BLOCK)


@triton.jit
def _product(
    A, B, matrix, m, n, DEPTH, BLOCK: tl.constexpr, BK: tl.constexpr, A_COLUMNS: tl.constexpr, B_COLUMNS: tl.constexpr
):  # fmt: skip
    """Rows m of A times rows n of B; B None: times themselves, loaded once."""
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, DEPTH, BK):
        a = _rows(A, matrix, m, k, BLOCK, BK, A_COLUMNS)
        b = a if B is None else _rows(B, matrix, n, k, BLOCK, BK, B_COLUMNS)
        total = tl.dot(a, b.T, total, input_precision="ieee")
    return total


@triton.jit
def _operand(
    X, MATRICES, SIZE, DEPTH, MATRIX, LINE, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BY_COLUMNS: tl.constexpr
):  # fmt: skip
    """(MATRICES, SIZE, DEPTH) as it lies; MATRIX and LINE: elements from a matrix, and from a row or column, to the next."""
    matrix, line = MATRIX.to(tl.int64), LINE.to(tl.int64)
    if BY_COLUMNS:
        return tl.make_tensor_descriptor(X, [MATRICES, DEPTH, SIZE], [matrix, line, 1], [1, COLUMNS, ROWS])
    else:
        return tl.make_tensor_descriptor(X, [MATRICES, SIZE, DEPTH], [matrix, line, 1], [1, ROWS, COLUMNS])


@triton.jit
def _square(X, MATRICES, SIZE, BLOCK: tl.constexpr):
    line = SIZE.to(tl.int64)
    return tl.make_tensor_descriptor(X, [MATRICES, SIZE, SIZE], [line * line, line, 1], [1, BLOCK, BLOCK])


@triton.jit
def _place(number, BLOCK: tl.constexpr):
    # Tiles count down the columns: column j has j + 1 in the upper half, so it begins at j(j + 1)/2.
    j = ((tl.sqrt(8.0 * number + 1.0) - 1.0) * 0.5).to(tl.int32)  # the root may be off by a bit
    j = tl.where((j + 1) * (j + 2) // 2 <= number, j + 1, j)
    j = tl.where(j * (j + 1) // 2 > number, j - 1, j)
    return (number - j * (j + 1) // 2) * BLOCK, j * BLOCK


@triton.jit
def _rows(X, matrix, row, k, ROWS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr):
    if COLUMNS:
        return X.load([matrix, k, row]).reshape(DEPTH, ROWS).T
    else:
        return X.load([matrix, row, k]).reshape(ROWS, DEPTH)


@triton.jit
def _finish(total, C, OUT, REST, matrix, m, n, ALPHA, BETA, DIAGONAL, BLOCK: tl.constexpr):
    """Write α·total + β·C + δ·I and what rounding takes off it."""
    total *= ALPHA
    if C is not None:
        total += BETA * C.load([matrix, m, n]).reshape(BLOCK, BLOCK).to(tl.float32)
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    total += tl.where((m == n) & (i == j), DIAGONAL, 0.0)
    result = total.to(OUT.dtype)
    if REST is not None:
        _mirror(REST, ((total - result.to(tl.float32)) * _REST).to(REST.dtype), matrix, m, n, BLOCK)
    _mirror(OUT, result, matrix, m, n, BLOCK)


@triton.jit
def _mirror(OUT, tile, matrix, m, n, BLOCK: tl.constexpr):
    """Write a tile at (m, n) and its mirror image at (n, m)."""
    if m == n:
        i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
        OUT.store([matrix, m, n], tl.where(i <= j, tile, tile.T).reshape(1, BLOCK, BLOCK))
    else:
        OUT.store([matrix, m, n], tile.reshape(1, BLOCK, BLOCK))
        OUT.store([matrix, n, m], tile.T.reshape(1, BLOCK, BLOCK))


# BLOCK: rows and columns of a tile; BK: along k.
TILES: dict[str, dict[str, int]] = {
    "hopper": {"BLOCK": 128, "BK": 64, "num_warps": 4, "num_stages": 3},
    "other": {"BLOCK": 128, "BK": 32, "num_warps": 8, "num_stages": 3},
    "fp32": {"BLOCK": 64, "BK": 32, "num_warps": 4, "num_stages": 2},
    "interpreted": {"BLOCK": 32, "BK": 32, "num_warps": 4, "num_stages": 2},
}


def _tiles(dtype: torch.dtype) -> dict[str, int]:
    if INTERPRETED.value:
        return TILES["interpreted"]
    if dtype == torch.float32:
        return TILES["fp32"]
    return TILES["hopper" if roomy() else "other"]


@cache
def _together(device: torch.device) -> int:
    """How many programs run at once: two of a Hopper tile's on a multiprocessor."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count * (2 if roomy() else 1)


def symmetric_product_(
    a: Tensor, b: Tensor, out: Tensor, alpha: float = 1.0, c: Tensor | None = None, beta: float = 0.0, diagonal: float = 0.0,
    rest: Tensor | None = None,
) -> None:  # fmt: skip
    """See `nvfp8.reference.symmetric_product_`; all of one dtype, its squares contiguous, rows of whole 16 bytes (TMA)."""
    n, size, depth = a.shape
    assert (b is a or b.shape == a.shape) and out.shape == (n, size, size), "a and b must be (n, m, k), out (n, m, m)"
    assert a.dtype == b.dtype == out.dtype, "the operands and the result of a symmetric product have one dtype"
    for square in (out, c, rest):
        if square is not None:
            assert square.is_contiguous(), "symmetric_product_ works on contiguous results"
            assert square.dtype == out.dtype and square.shape == out.shape, "c and the rest are to be as the result is"
            _lines(square)
    a_matrix, a_line, a_columns = _lines(a)
    b_matrix, b_line, b_columns = (0, 0, a_columns) if b is a else _lines(b)
    options = _tiles(out.dtype)
    blocks = -(-size // options["BLOCK"])  # triton.cdiv takes 2.6 µs of the host
    programs = min(n * blocks * (blocks + 1) // 2, _together(out.device))
    triton.set_allocator(_scratch)  # at each launch: it holds for one thread, and autograd's run optimizers, too
    with torch.cuda.device_of(out):  # Triton launches on the current one
        _symmetric_product[(programs,)](
            a, None if b is a else b, c, out, rest, n, size, depth, a_matrix, a_line, b_matrix, b_line,
            float(alpha), float(beta), float(diagonal), A_COLUMNS=a_columns, B_COLUMNS=b_columns, **options,
        )  # fmt: skip


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Room for the descriptors of all programs; torch gives it to nobody else before the kernel, on this stream, is done."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _lines(x: Tensor) -> tuple[int, int, bool]:
    """The elements from a matrix and from a line to the next, and whether lines are columns."""
    matrix, row, column = x.stride()
    columns = column != 1
    line = column if columns else row
    assert not columns or row == 1, "rows or columns must be contiguous"
    assert (x.data_ptr() | (matrix | line) * x.element_size()) % 16 == 0, "lines and matrices must be 16-byte aligned"
    return matrix, line, columns
