"""Products that are known to be symmetric, at half the price: a block above the diagonal is computed once and written twice.

XXᵀ, and any product of symmetric matrices that commute (powers and polynomials of one matrix), have nothing below the diagonal
that is not above it. Of T × T tiles of 128 × 128, T(T + 1)/2 are computed: 78 of 144 at 1536 rows. βC + δI is added in fp32 before
the one rounding, so bA + cA² and aI + bG + cG² are one launch.

Persistent: a program walks over tiles, a matrix's first to last, so what runs together reads the same few matrices (a 1536 × 6144
one has 18.9 MB; the L2 cache has 50). Two programs share a multiprocessor, so that one multiplies while the other writes its tile.
TMA brings rows of X or columns of it as they lie, so XᵀX of a tall X takes no transpose; and takes a tile and its mirror image as
whole squares from where operands lay before, so three stages of operands are all the shared memory that a program needs: 96 KiB.

What bounds it is likely the way from the L2 cache: a square of 128 × 128 reads 512 bytes for 2 · 128² operations, at the tensor
cores' full rate (4096 a cycle) 64 bytes a cycle, all that a multiprocessor can take. So a square on the diagonal of XXᵀ, whose two
operands are one, loads it once: of 78 squares 12, of 21 at 768 rows 6. Tiles of WIDTH 256 read a quarter less, but leave
one program to a multiprocessor, and nothing runs while that one writes.

A tile on the diagonal takes its lower half from its upper, so the result is exactly symmetric even where a·bᵀ is so only up to
rounding. bf16 and fp16 go to tensor cores and accumulate in fp32. fp32 is multiplied as fp32, for tests: no tensor core does that.

Descriptors of 128 bytes tell TMA where operands lie. Programs make them themselves, so a launch is pointers and integers; large
products get them from the host, whose time the GPU then hides. With four or five a launch the host took some 0.24 ms, and Muon at
d12 waited for Python (48 of 768 × 768: 2.64 ms there, 2.71 with the GPU); with descriptors made on the GPU it took a sixth, but 24
of 1536 × 1536 took the GPU 0.196 ms for XXᵀ instead of 0.185, and 0.202 for bA + cA² instead of 0.184 (H100; docs/log.md).

Time on an H100 as a share of cuBLAS's for the full product, by `torch.bmm`, and `torch.baddbmm` where C is added (torch 2.11,
Triton 3.6, bf16, at 4c4c891: four warps, both squares written in four parts, all descriptors from the host, two loads on the
diagonal; the present form is not measured yet). The tiles that are computed are 0.54 of all at 1536 rows and 0.58 at 768:

| | A² | bA + cA² | XXᵀ | XᵀX, X tall |
| --- | --- | --- | --- | --- |
| 24 of 1536 × 1536; 8 of 1536 × 6144 | 0.76 | 0.53 | 0.69 | 0.68 |
| 48 of 768 × 768; 12 of 768 × 3072 | | 0.48 | 0.53 | 0.66 |

(ms, in the order of the table: 0.185, 0.184, 0.230, 0.226; 0.063, 0.044, 0.046.) Tiles of 128 × 256, one program a multiprocessor,
took 0.75, 0.59, 0.65, 0.67; 0.61, 0.91, 1.07. With one loop over tiles and steps along k, so that the next tile's loads run while
this one is written, they took 0.95, 0.69, 0.86, 1.12; 0.72, 1.25, 1.95.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nvfp8.kernels.fp8 import INTERPRETED, roomy


# No number is specialized: n, sizes and strides are only what descriptors are made of, and one binary serves all shapes.
@triton.jit(do_not_specialize=["MATRICES", "SIZE", "DEPTH", "A_MATRIX", "A_LINE", "B_MATRIX", "B_LINE"])
def _symmetric_product(
    A, B, C, OUT, MATRICES, SIZE, DEPTH, A_MATRIX, A_LINE, B_MATRIX, B_LINE, ALPHA, BETA, DIAGONAL,
    A_COLUMNS: tl.constexpr, B_COLUMNS: tl.constexpr, SAME: tl.constexpr, DESCRIBED: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, BK: tl.constexpr, STORING: tl.constexpr,
):  # fmt: skip
    if DESCRIBED:
        a_tiles, b_tiles, c_tiles, out = A, B, C, OUT
    else:
        a_tiles = _operand(A, MATRICES, SIZE, DEPTH, A_MATRIX, A_LINE, BLOCK, BK, A_COLUMNS)
        b_tiles = None if B is None else _operand(B, MATRICES, SIZE, DEPTH, B_MATRIX, B_LINE, WIDTH, BK, B_COLUMNS)
        c_tiles = None if C is None else _square(C, MATRICES, SIZE, BLOCK)
        out = _square(OUT, MATRICES, SIZE, BLOCK)
    if B is None:
        b_tiles = a_tiles
    blocks = tl.cdiv(SIZE, WIDTH)
    tiles = WIDTH // BLOCK * (blocks * (blocks + 1) // 2)
    for tile in tl.range(tl.program_id(0), tiles * MATRICES, tl.num_programs(0), num_stages=STORING):
        matrix = tile // tiles
        m, n = _place(tile % tiles, BLOCK, WIDTH)
        # Each with an end of its own: where sums meet behind a branch, ptxas waits for every wgmma before it begins the next.
        if SAME and m - n == WIDTH - BLOCK:  # what else is in a wide tile there is below the diagonal
            square = _self_product(a_tiles, matrix, m, DEPTH, BLOCK, BK, A_COLUMNS)
            _finish(square, c_tiles, out, matrix, m, m, ALPHA, BETA, DIAGONAL, BLOCK, BLOCK)
        else:
            total = _product(a_tiles, b_tiles, matrix, m, n, DEPTH, BLOCK, WIDTH, BK, A_COLUMNS, B_COLUMNS)
            _finish(total, c_tiles, out, matrix, m, n, ALPHA, BETA, DIAGONAL, BLOCK, WIDTH)


@triton.jit
def _product(
    A, B, matrix, m, n, DEPTH, ROWS: tl.constexpr, WIDTH: tl.constexpr, BK: tl.constexpr, A_COLUMNS: tl.constexpr,
    B_COLUMNS: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for k in range(0, DEPTH, BK):
        a = _rows(A, matrix, m, k, ROWS, BK, A_COLUMNS)
        b = _rows(B, matrix, n, k, WIDTH, BK, B_COLUMNS)
        total = tl.dot(a, b.T, total, input_precision="ieee")
    return total


@triton.jit
def _self_product(A, matrix, m, DEPTH, ROWS: tl.constexpr, BK: tl.constexpr, COLUMNS: tl.constexpr):
    """A square on the diagonal of XXᵀ: what it multiplies is loaded once."""
    total = tl.zeros((ROWS, ROWS), tl.float32)
    for k in range(0, DEPTH, BK):
        a = _rows(A, matrix, m, k, ROWS, BK, COLUMNS)
        total = tl.dot(a, a.T, total, input_precision="ieee")
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
def _place(number, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    # Tiles count down the columns: column j has (j + 1)·WIDTH/BLOCK in the upper half, so it begins at j(j + 1)/2 of those.
    EACH: tl.constexpr = WIDTH // BLOCK
    square = number // EACH
    j = ((tl.sqrt(8.0 * square + 1.0) - 1.0) * 0.5).to(tl.int32)  # the root may be off by a bit
    j = tl.where((j + 1) * (j + 2) // 2 <= square, j + 1, j)
    j = tl.where(j * (j + 1) // 2 > square, j - 1, j)
    return (number - EACH * (j * (j + 1) // 2)) * BLOCK, j * WIDTH


@triton.jit
def _rows(X, matrix, row, k, ROWS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr):
    if COLUMNS:
        return X.load([matrix, k, row]).reshape(DEPTH, ROWS).T
    else:
        return X.load([matrix, row, k]).reshape(ROWS, DEPTH)


@triton.jit
def _finish(total, C, OUT, matrix, m, n, ALPHA, BETA, DIAGONAL, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write α·total + β·C + δ·I at (m, n) and its mirror image at (n, m), a square at a time; none that is below the diagonal."""
    if COLUMNS > ROWS:
        left, right = tl.split(tl.permute(tl.reshape(total, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
        if n >= m:
            _finish(left, C, OUT, matrix, m, n, ALPHA, BETA, DIAGONAL, ROWS, COLUMNS // 2)
        _finish(right, C, OUT, matrix, m, n + COLUMNS // 2, ALPHA, BETA, DIAGONAL, ROWS, COLUMNS // 2)
    else:
        total *= ALPHA
        if C is not None:
            total += BETA * C.load([matrix, m, n]).reshape(ROWS, ROWS).to(tl.float32)
        i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, ROWS)[None, :]
        total += tl.where((m == n) & (i == j), DIAGONAL, 0.0)
        result = total.to(OUT.dtype)
        if m == n:
            OUT.store([matrix, m, n], tl.where(i <= j, result, result.T).reshape(1, ROWS, ROWS))
        else:
            OUT.store([matrix, m, n], result.reshape(1, ROWS, ROWS))
            OUT.store([matrix, n, m], result.T.reshape(1, ROWS, ROWS))


# BLOCK: rows of a tile; WIDTH: columns of it, BLOCK or twice as many; BK: along k; STORING: stages of the loop over tiles. With 1 a
# square waits in memory that operands have left until it is written; with more it waits in memory of its own, beside the next tile.
TILES: dict[str, dict[str, int]] = {
    "hopper": {"BLOCK": 128, "WIDTH": 128, "BK": 64, "STORING": 1, "num_warps": 8, "num_stages": 3, "maxnreg": 128},
    "other": {"BLOCK": 128, "WIDTH": 128, "BK": 32, "STORING": 1, "num_warps": 8, "num_stages": 3},
    "fp32": {"BLOCK": 64, "WIDTH": 64, "BK": 32, "STORING": 1, "num_warps": 4, "num_stages": 2},
    "interpreted": {"BLOCK": 32, "WIDTH": 32, "BK": 32, "STORING": 1, "num_warps": 4, "num_stages": 2},
}
# n·m·m·k from which the host describes the operands: d24's 24 of 1536 × 1536 (8.7e10) and 8 of 1536 × 6144, which take the GPU as
# long as four descriptors take the host; not 8 of 1536 × 1536 (2.9e10, some 0.07 ms), nor anything of d12 (2.2e10).
LARGE = 5 * 10**10


def _tiles(dtype: torch.dtype) -> dict[str, int]:
    if INTERPRETED.value:
        return TILES["interpreted"]
    if dtype == torch.float32:
        return TILES["fp32"]
    return TILES["hopper" if roomy() else "other"]


@cache
def _together(device: torch.device, wide: bool) -> int:
    """How many programs run at once: two of a Hopper tile's on a multiprocessor, one if the tile is wide."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count * (2 if roomy() and not wide else 1)


def symmetric_product_(
    a: Tensor, b: Tensor, out: Tensor, alpha: float = 1.0, c: Tensor | None = None, beta: float = 0.0, diagonal: float = 0.0
) -> None:
    """See `nvfp8.reference.symmetric_product_`; all of one dtype, `out` and `c` contiguous, rows of whole 16 bytes (TMA)."""
    n, size, depth = a.shape
    assert (b is a or b.shape == a.shape) and out.shape == (n, size, size), "a and b must be (n, m, k), out (n, m, m)"
    assert a.dtype == b.dtype == out.dtype, "the operands and the result of a symmetric product have one dtype"
    assert out.is_contiguous() and (c is None or c.is_contiguous()), "symmetric_product_ works on contiguous results"
    assert c is None or (c.dtype == out.dtype and c.shape == out.shape), "c is to be as the result is"
    for written in (out,) if c is None else (out, c):
        _lines(written)
    options = _tiles(out.dtype)
    block, width, bk = options["BLOCK"], options["WIDTH"], options["BK"]
    a_matrix, a_line, a_columns = b_matrix, b_line, b_columns = _lines(a)
    if b is not a:
        b_matrix, b_line, b_columns = _lines(b)
    operands: list[Any] = [a, None if b is a and width == block else b, c, out]
    described = n * size * size * depth >= LARGE
    if described:
        operands[0] = _described(a, a_matrix, a_line, a_columns, block, bk)
        if operands[1] is not None:
            operands[1] = _described(b, b_matrix, b_line, b_columns, width, bk)
        operands[2:] = [x if x is None else _described(x, size * size, size, False, block, block) for x in (c, out)]
    blocks = -(-size // width)  # triton.cdiv takes 2.6 µs of the host
    programs = min(n * blocks * (blocks + 1) // 2 * (width // block), _together(out.device, width > block))
    triton.set_allocator(_scratch)  # at each launch: it holds for one thread, and autograd's run optimizers, too
    with torch.cuda.device_of(out):  # Triton launches on the current one
        _symmetric_product[(programs,)](
            *operands, n, size, depth, a_matrix, a_line, b_matrix, b_line, float(alpha), float(beta), float(diagonal),
            A_COLUMNS=a_columns, B_COLUMNS=b_columns, SAME=b is a, DESCRIBED=described, **options,
        )  # fmt: skip


def _described(x: Tensor, matrix: int, line: int, by_columns: bool, rows: int, columns: int) -> TensorDescriptor:
    """What `_operand` makes on the GPU."""
    n, size, depth = x.shape
    if by_columns:
        return TensorDescriptor(x, [n, depth, size], [matrix, line, 1], [1, columns, rows])
    return TensorDescriptor(x, [n, size, depth], [matrix, line, 1], [1, rows, columns])


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
