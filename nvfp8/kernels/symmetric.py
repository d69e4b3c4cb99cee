"""Products that are known to be symmetric, at half the price: a block above the diagonal is computed once and written twice.

XXᵀ, and any product of symmetric matrices that commute (powers and polynomials of one matrix), have nothing below the diagonal
that is not above it. Of T × T tiles of 128 × 128, T(T + 1)/2 are computed: 78 of 144 at 1536 rows. βC + δI is added in fp32 before
the one rounding, so bA + cA² and aI + bG + cG² are one launch.

Persistent: a program walks over tiles, a matrix's first to last, so what runs together reads the same few matrices (a 1536 × 6144
one has 18.9 MB; the L2 cache has 50). Two programs share a multiprocessor, so that one multiplies while the other writes its tile.
TMA brings rows of X or columns of it as they lie, so XᵀX of a tall X takes no transpose; and takes a tile and its mirror image as
whole lines, in parts of PART columns, since both wait in shared memory beside three stages of operands.

A tile on the diagonal takes its lower half from its upper, so the result is exactly symmetric even where a·bᵀ is so only up to
rounding. bf16 and fp16 go to tensor cores and accumulate in fp32. fp32 is multiplied as fp32, for tests: no tensor core does that.

Programs make their descriptors themselves, 128 bytes each, so a launch is pointers and integers. Made on the host, four or five a
launch, they cost it some 0.24 ms, and Muon at d12 waited for Python (48 of 768 × 768: 2.64 ms there, 2.71 with the GPU; H100).

Time on an H100 (torch 2.11, Triton 3.6, bf16, descriptors from the host) as a share of cuBLAS's for the full product, by
`torch.bmm`, and `torch.baddbmm` where C is added; the tiles that are computed are 0.54 of all at 1536 rows and 0.58 at 768:

| | A² | bA + cA² | XXᵀ | XᵀX, X tall |
| --- | --- | --- | --- | --- |
| 24 of 1536 × 1536; 8 of 1536 × 6144 | 0.76 | 0.53 | 0.69 | 0.68 |
| 48 of 768 × 768; 12 of 768 × 3072 | | 0.48 | 0.53 | 0.66 |

(ms, in the order of the table: 0.185, 0.184, 0.230, 0.226; 0.063, 0.044, 0.046.) Tiles of 128 × 256, one program a multiprocessor,
took 0.75, 0.59, 0.65, 0.67; 0.61, 0.91, 1.07. With one loop over tiles and steps along k, so that the next tile's loads run while
this one is written, they took 0.95, 0.69, 0.86, 1.12; 0.72, 1.25, 1.95.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp8.kernels.fp8 import INTERPRETED, roomy


# No number is specialized: n, sizes and strides are only what descriptors are made of, and one binary serves all shapes.
@triton.jit(do_not_specialize=["MATRICES", "SIZE", "DEPTH", "A_MATRIX", "A_LINE", "B_MATRIX", "B_LINE"])
def _symmetric_product(
    A, B, C, OUT, MATRICES, SIZE, DEPTH, A_MATRIX, A_LINE, B_MATRIX, B_LINE, ALPHA, BETA, DIAGONAL,
    A_COLUMNS: tl.constexpr, B_COLUMNS: tl.constexpr, BLOCK: tl.constexpr, BK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    a_tiles = _operand(A, MATRICES, SIZE, DEPTH, A_MATRIX, A_LINE, BLOCK, BK, A_COLUMNS)
    if B is None:
        b_tiles = a_tiles
    else:
        b_tiles = _operand(B, MATRICES, SIZE, DEPTH, B_MATRIX, B_LINE, BLOCK, BK, B_COLUMNS)
    out = _square(OUT, MATRICES, SIZE, BLOCK, PART)
    out_t = _square(OUT, MATRICES, SIZE, PART, BLOCK)
    if C is not None:
        c_tiles = _square(C, MATRICES, SIZE, BLOCK, BLOCK)
    blocks = tl.cdiv(SIZE, BLOCK)
    tiles = blocks * (blocks + 1) // 2
    for tile in range(tl.program_id(0), tiles * MATRICES, tl.num_programs(0)):
        matrix = tile // tiles
        m, n = _place(tile % tiles, BLOCK)
        total = tl.zeros((BLOCK, BLOCK), tl.float32)
        for k in range(0, DEPTH, BK):
            a = _rows(a_tiles, matrix, m, k, BLOCK, BK, A_COLUMNS)
            b = _rows(b_tiles, matrix, n, k, BLOCK, BK, B_COLUMNS)
            total = tl.dot(a, b.T, total, input_precision="ieee")
        total *= ALPHA
        if C is not None:
            total += BETA * c_tiles.load([matrix, m, n]).reshape(BLOCK, BLOCK).to(tl.float32)
        i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
        total += tl.where((m == n) & (i == j), DIAGONAL, 0.0)
        result = total.to(OUT.dtype.element_ty)
        if m == n:
            _store(tl.where(i <= j, result, result.T), out, None, matrix, m, n, BLOCK, BLOCK, PART)
        else:
            _store(result, out, out_t, matrix, m, n, BLOCK, BLOCK, PART)


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
def _square(X, MATRICES, SIZE, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    line = SIZE.to(tl.int64)
    return tl.make_tensor_descriptor(X, [MATRICES, SIZE, SIZE], [line * line, line, 1], [1, ROWS, COLUMNS])


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
def _store(result, OUT, OUT_T, matrix, m, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr):
    if COLUMNS == PART:
        OUT.store([matrix, m, n], result.reshape(1, ROWS, PART))
        if OUT_T is not None:
            OUT_T.store([matrix, n, m], result.T.reshape(1, PART, ROWS))
    else:
        left, right = tl.split(tl.permute(tl.reshape(result, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
        _store(left, OUT, OUT_T, matrix, m, n, ROWS, COLUMNS // 2, PART)
        _store(right, OUT, OUT_T, matrix, m, n + COLUMNS // 2, ROWS, COLUMNS // 2, PART)


# BLOCK: rows and columns of a tile; BK: along k; PART: columns that are written at once.
TILES: dict[str, dict[str, int]] = {
    "hopper": {"BLOCK": 128, "BK": 64, "PART": 32, "num_warps": 4, "num_stages": 3},
    "other": {"BLOCK": 128, "BK": 32, "PART": 64, "num_warps": 8, "num_stages": 3},
    "fp32": {"BLOCK": 64, "BK": 32, "PART": 64, "num_warps": 4, "num_stages": 2},
    "interpreted": {"BLOCK": 32, "BK": 32, "PART": 16, "num_warps": 4, "num_stages": 2},
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
    a_matrix, a_line, a_columns = _lines(a)
    b_matrix, b_line, b_columns = (0, 0, a_columns) if b is a else _lines(b)
    options = _tiles(out.dtype)
    blocks = triton.cdiv(size, options["BLOCK"])
    programs = min(n * blocks * (blocks + 1) // 2, _together(out.device))
    triton.set_allocator(_scratch)  # at each launch: it holds for one thread, and autograd's run optimizers, too
    with torch.cuda.device_of(out):  # Triton launches on the current one
        _symmetric_product[(programs,)](
            a, None if b is a else b, c, out, n, size, depth, a_matrix, a_line, b_matrix, b_line,
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
