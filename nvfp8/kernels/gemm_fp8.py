"""An FP8 GEMM that ends in relu² or in its gradient, and writes the result in both FP8 layouts.

The widest tensor of a block in bf16, 8 bytes a token and channel of the stream each way, never exists.

Persistent: programs walk over tiles of tokens × channels, 8 tile rows at a time so that the weight's tiles are read from L2. TMA
brings both operands (a tensor descriptor knows where the tensor ends: beyond it reads are zeros and writes do not happen), and
takes both results: they go through shared memory, so the transposed tile leaves as whole 128-byte lines.
The accumulators leave in two halves, which halves the shared memory that results need. Forward that makes room on an SM for two
programs of 128 × 128, each with 3 stages of operands (112 KiB): one multiplies while the other finishes a tile. Backward a tile
of aᵀ lies there too, and it is one program of 128 × 256 (192 KiB), or two with shallower stages where sums are short and so the
end of a tile is half of it. 168 and 217 registers a thread on sm_90, none spilled.
The result is quantized in the epilogue, so its scale must be known beforehand: this is for delayed scaling. Backward also writes
each tile's share of Σ dh·h, one more multiplication an element: the norm before the layer need not read its rows for it.

Sums: a tensor core adds FP8 products in about 14 bits, fast; or the sum is promoted to fp32 every 128 terms. A recipe chooses
(`nvfp8/recipe.py`). M, N and K must be multiples of 16 (TMA).
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nvfp8.kernels.fp8 import DTYPES, INTERPRETED, as_bits, largest_bits, raise_amax, roomy, to_fp8

GROUP = 8  # tile rows that are walked together
# Sums of fewer products take two small programs backward: on an H200 0.41 ms for 0.42 at K = 768, but 0.63 for 0.60 at 1536.
SHORT = 1024


@triton.jit
def _gemm_relu_squared(
    X, W, A_T, OUT, OUT_T, ALONG, X_INVERSE, W_INVERSE, A_SCALE, SCALE, AMAX, M, N, K,
    BACKWARD: tl.constexpr, DTYPE: tl.constexpr, IMPRECISE: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tl.assume(K > 0)  # or the flattened loop has all of its epilogue twice, for sums of nothing too, and 255 registers for 217
    tile_rows = tl.cdiv(M, BM)
    tile_columns = tl.cdiv(N, BN)
    factor = tl.load(X_INVERSE) * tl.load(W_INVERSE)
    scale = tl.load(SCALE)
    if BACKWARD:
        per_root = tl.rsqrt(tl.load(A_SCALE))
        factor *= 2.0 * per_root  # 2·√(a / its scale) = √a · (2 / √its scale)
    else:  # squares are where they are cast: their amax is brought back at the end
        factor *= tl.sqrt(scale)
    largest = 0
    for tile in tl.range(tl.program_id(0), tile_rows * tile_columns, PROGRAMS, flatten=True):
        m, n = place(tile, tile_rows, tile_columns, GROUP, BM, BN)
        products = product(X, W, m, n, K, IMPRECISE, BM, BN, BK)
        left, right = halves(products, BM, BN)
        a_left, a_right = left, right
        if BACKWARD:  # one load for both halves: it is waited for
            a_left, a_right = halves(A_T.load([n, m]).T, BM, BN)
        largest, along_left = _finish(left, a_left, OUT, OUT_T, factor, scale, largest, m, n, BACKWARD, DTYPE)
        largest, along = _finish(right, a_right, OUT, OUT_T, factor, scale, largest, m, n + BN // 2, BACKWARD, DTYPE)
        if BACKWARD:
            row = m + tl.arange(0, BM)
            tl.store(ALONG + (n // BN).to(tl.int64) * M + row, (along_left + along) * per_root, row < M)
    if AMAX is not None:
        if not BACKWARD:
            largest = tl.cast(tl.cast(largest, tl.float32, bitcast=True) / scale, tl.int32, bitcast=True) & 0x7FFFFFFF
        raise_amax(AMAX, largest)


@triton.jit
def place(tile, tile_rows, tile_columns, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """First row and first column of a tile, in the order in which tiles are walked."""
    group = tile // (GROUP * tile_columns)
    rows = min(tile_rows - group * GROUP, GROUP)
    m = (group * GROUP + (tile % (GROUP * tile_columns)) % rows) * BM
    return m, (tile % (GROUP * tile_columns)) // rows * BN


@triton.jit
def product(X, W, m, n, K, IMPRECISE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Rows m … and n … of two descriptors multiplied along the K columns of both: (BM, BN) fp32."""
    products = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        x = X.load([m, k])
        w = W.load([n, k])
        products = tl.dot(x, w.T, products, max_num_imprecise_acc=IMPRECISE)
    return products


@triton.jit
def halves(tile, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right half of a tile (BM, BN): another name for registers, where a thread holds columns of both."""
    return tl.split(tl.permute(tl.reshape(tile, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def _finish(products, a, OUT, OUT_T, factor, scale, largest, m, n, BACKWARD: tl.constexpr, DTYPE: tl.constexpr):
    value = products * factor
    along = 0.0
    if BACKWARD:
        root = tl.sqrt(a.to(tl.float32))
        value *= root
        along = tl.sum(value * root, 1)
    else:
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
        value = value * value
    largest = tl.maximum(largest, largest_bits(value))
    codes = to_fp8(value * scale if BACKWARD else value, DTYPE)
    if OUT is not None:
        OUT.store([m, n], codes)
    if OUT_T is not None:
        OUT_T.store([n, m], codes.T)
    return largest, along


@cache
def _tiles(device: torch.device, fast: bool, backward: bool, k: int) -> dict[str, int]:
    """Sizes of a tile, and how it runs, for sums of `k` products.

    Promotion keeps sums twice. A warp group has its 128 × 128 sums of a 256 × 128 tile in two parts and promotes one after the
    other; of 128 × 256 it has one part, twice which is more than its registers.
    """
    if INTERPRETED.value:
        return {"BM": 32, "BN": 64, "BK": 32, "PROGRAMS": 2}
    programs = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
    if not roomy():
        return {"BM": 128, "BN": 128, "BK": 64, "PROGRAMS": programs, "num_warps": 8, "num_stages": 3}
    if fast and (not backward or k < SHORT):
        bk, stages = (64, 4) if backward else (128, 3)
        return {"BM": 128, "BN": 128, "BK": bk, "PROGRAMS": 2 * programs, "num_warps": 4, "num_stages": stages}
    bm, bn = (128, 256) if fast else (256, 128)
    return {"BM": bm, "BN": bn, "BK": 128, "PROGRAMS": programs, "num_warps": 8, "num_stages": 3}


def _launch(
    x: Tensor, w: Tensor, x_inverse: Tensor, w_inverse: Tensor, a_t: Tensor | None, a_scale: Tensor | None, scale: Tensor,
    dtype: torch.dtype, fast: bool, amax: Tensor | None, rows: bool = True, columns: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    m, k = x.shape
    n = w.shape[0]
    assert w.shape[1] == k and (a_t is None or a_t.shape == (n, m)), "(M, K) · (N, K)ᵀ, aᵀ (N, M)"
    assert m % 16 == n % 16 == k % 16 == 0, f"TMA moves rows of whole 16 bytes: {m} × {n} × {k}"
    out = torch.empty(m, n, dtype=dtype, device=x.device) if rows else None
    out_t = torch.empty(n, m, dtype=dtype, device=x.device) if columns else None
    tiles: dict[str, Any] = dict(_tiles(x.device, fast, a_t is not None, k))
    bm, bn, bk = (tiles[name] for name in ("BM", "BN", "BK"))
    along = None if a_t is None else torch.empty(triton.cdiv(n, bn), m, dtype=torch.float32, device=x.device)
    if not m * n:
        return out, out_t, along

    def described(tensor: Tensor | None, rows: int, columns: int) -> TensorDescriptor | None:
        return None if tensor is None else TensorDescriptor.from_tensor(tensor, [rows, columns])

    _gemm_relu_squared[(min(tiles["PROGRAMS"], triton.cdiv(m, bm) * triton.cdiv(n, bn)),)](
        described(x, bm, bk), described(w, bn, bk), described(a_t, bn, bm),
        described(out, bm, bn // 2), described(out_t, bn // 2, bm), along,
        x_inverse, w_inverse, a_scale, scale, as_bits(amax), m, n, k,
        BACKWARD=a_t is not None, DTYPE=DTYPES[dtype], IMPRECISE=None if fast else bk, GROUP=GROUP,
        **tiles,
    )  # fmt: skip
    return out, out_t, along


def gemm_relu_squared(
    x_q: Tensor, w_q: Tensor, x_inverse: Tensor, w_inverse: Tensor, scale: Tensor, dtype: torch.dtype, fast: bool,
    amax: Tensor | None, *, rows: bool = True, columns: bool = True,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """See `nvfp8.reference_fp8.gemm_relu_squared`; M, N and K must be multiples of 16."""
    return _launch(x_q, w_q, x_inverse, w_inverse, None, None, scale, dtype, fast, amax, rows, columns)[:2]


def gemm_relu_squared_backward(
    dy_q: Tensor, w_t: Tensor, dy_inverse: Tensor, w_inverse: Tensor, a_t: Tensor, a_scale: Tensor, scale: Tensor,
    dtype: torch.dtype, fast: bool, amax: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `nvfp8.reference_fp8.gemm_relu_squared_backward`; M, N and K must be multiples of 16."""
    dh, dh_t, along = _launch(dy_q, w_t, dy_inverse, w_inverse, a_t, a_scale, scale, dtype, fast, amax)
    assert dh is not None and dh_t is not None and along is not None
    return dh, dh_t, along
