"""Products that are known to be symmetric, at half the price: a tile above the diagonal is computed once and written twice.

XXᵀ, and any product of symmetric matrices that commute (powers and polynomials of one matrix), have nothing below the diagonal that
is not above it. Of T × T tiles T(T + 1)/2 are computed: 78 of 144 where 1536 rows make 12 tiles of 128, and 4.6 of a batch's
matrices keep an H100's 132 multiprocessors busy once. βC + δI is added in fp32 before the one rounding, so bA + cA² and
aI + bG + cG² are one launch.

Both tiles are read along k in the layout they have, rows of X or columns of it, so XᵀX of a tall X takes no transpose. Two adjacent
programs share a tile of b, and a whole 1536 × 6144 matrix (18.9 MB) fits the L2 cache. A tile on the diagonal is computed whole and
its upper half written twice, so the result is exactly symmetric even where a·bᵀ is so only up to rounding.

bf16 and fp16 go to tensor cores and accumulate in fp32. fp32 is multiplied as fp32, for tests: no tensor core does that.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128  # rows and columns a program


@triton.jit
def _symmetric_product(
    A, B, C, OUT, SIZE, DEPTH, A_MATRIX, A_ROW, A_DEPTH, B_MATRIX, B_ROW, B_DEPTH, ALPHA, BETA, DIAGONAL,
    EVEN: tl.constexpr, ADDED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Programs count the tiles above the diagonal by columns: column j has j + 1, so tile (i, j) is number j(j + 1)/2 + i.
    number = tl.program_id(0)
    matrix = tl.program_id(1).to(tl.int64)
    j = ((tl.sqrt(8.0 * number + 1.0) - 1.0) * 0.5).to(tl.int32)  # the root may be off by a bit
    j = tl.where((j + 1) * (j + 2) // 2 <= number, j + 1, j)
    j = tl.where(j * (j + 1) // 2 > number, j - 1, j)
    i = number - j * (j + 1) // 2
    row, column = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK_K)
    # Rows beyond the end wrap round: what they make is not written, and no load needs a mask for them.
    a = A + matrix * A_MATRIX + (row % SIZE).to(tl.int64)[:, None] * A_ROW + k[None, :] * A_DEPTH
    b = B + matrix * B_MATRIX + (column % SIZE).to(tl.int64)[None, :] * B_ROW + k[:, None] * B_DEPTH
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for done in range(0, DEPTH, BLOCK_K):
        if EVEN:
            left, right = tl.load(a), tl.load(b)
        else:
            inside = k < DEPTH - done
            left, right = tl.load(a, inside[None, :], 0.0), tl.load(b, inside[:, None], 0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
        a += BLOCK_K * A_DEPTH
        b += BLOCK_K * B_DEPTH
    start = matrix * SIZE * SIZE
    at = start + row[:, None] * SIZE + column[None, :]
    upper = (row[:, None] <= column[None, :]) & (column[None, :] < SIZE)
    total *= ALPHA
    if ADDED:
        total += BETA * tl.load(C + at, upper, 0.0).to(tl.float32)
    total += tl.where(row[:, None] == column[None, :], DIAGONAL, 0.0)
    result = total.to(OUT.dtype.element_ty)
    tl.store(OUT + at, result, upper)
    mirrored = start + column[:, None] * SIZE + row[None, :]
    tl.store(OUT + mirrored, tl.trans(result), (column[:, None] > row[None, :]) & (column[:, None] < SIZE))


def symmetric_product_(
    a: Tensor, b: Tensor, out: Tensor, alpha: float = 1.0, c: Tensor | None = None, beta: float = 0.0, diagonal: float = 0.0
) -> None:
    """See `nvfp8.reference.symmetric_product_`; all of one dtype, `out` and `c` contiguous."""
    n, size, depth = a.shape
    assert a.shape == b.shape and out.shape == (n, size, size), "a and b must be (n, m, k), out (n, m, m)"
    assert out.is_contiguous() and (c is None or c.is_contiguous()), "symmetric_product_ works on contiguous results"
    assert a.dtype == b.dtype == out.dtype, "the operands and the result of a symmetric product have one dtype"
    block_k = 64 if a.element_size() == 2 else 32  # 96 KiB of tiles in three stages: a GB10's block may have 99
    tiles = triton.cdiv(size, BLOCK)
    with torch.cuda.device_of(out):  # Triton launches on the current one
        _symmetric_product[tiles * (tiles + 1) // 2, n](
            a, b, c, out, size, depth, *a.stride(), *b.stride(), float(alpha), float(beta), float(diagonal),
            EVEN=depth % block_k == 0, ADDED=c is not None, BLOCK=BLOCK, BLOCK_K=block_k, num_warps=8, num_stages=3,
        )  # fmt: skip
