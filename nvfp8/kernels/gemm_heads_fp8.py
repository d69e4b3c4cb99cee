"""The q/k/v projections in FP8 with rotary, QK norm and value embedding in their epilogue: attention's inputs out of one kernel.

So the projections in bf16, 6 bytes a token and channel of the stream, are neither written nor read again. Built as `gemm_fp8.py`
is: persistent, two programs an SM, TMA in and out, 128 tokens × 128 channels a tile. The product is not rounded in between.

A tile holds whole heads, and a thread's accumulators are columns of few rows, from all over the tile: so it is cut into parts of
one head, and those into the halves that rotary mixes, by giving registers other names, and the norm sums over the four threads
that share a row. Cosines and sines come by TMA as tiles, which shared memory hands out in the accumulators' layout; only rows of
the value embedding, gathered by token, cost a change of layout. Whether a part is of q, k or v, all threads decide alike.
Halves of 64 tokens leave one after the other, through 8 KiB. On sm_90: 114,728 bytes of shared memory, 223 to 240 registers a
thread (255 with promotion), none spilled.

Sums are fast or promoted, as in `gemm_fp8.py`. Heads of 64 or 128 channels; K a multiple of 16 (TMA).
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nvfp8.kernels.fp8 import INTERPRETED, roomy
from nvfp8.kernels.gemm_fp8 import GROUP, halves, place, product
from nvfp8.reference_math import FUSED_HEADS, NORM_EPS, QK_SCALE


@triton.jit
def _gemm_heads(
    X, W, COS, SIN, Q, K, V, RSTD, GATE, TABLE, IDS, X_INVERSE, W_INVERSE, M, D, T,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, VALUES: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr,
    IMPRECISE: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    DOWN: tl.constexpr = BM // 2 if BN == E else 0  # from one part of a tile to the other: tokens, or one head
    ROWS: tl.constexpr = BM - DOWN
    tl.assume(D > 0)  # see `gemm_fp8.py`
    tile_rows = tl.cdiv(M, BM)
    tile_columns = tl.cdiv((H + 2 * G) * E, BN)
    factor = tl.load(X_INVERSE) * tl.load(W_INVERSE)
    for tile in tl.range(tl.program_id(0), tile_rows * tile_columns, PROGRAMS, flatten=True):
        m, n = place(tile, tile_rows, tile_columns, GROUP, BM, BN)
        products = product(X, W, m, n, D, IMPRECISE, BM, BN, BK)
        if DOWN:
            first, second = tl.split(tl.permute(tl.reshape(products, (2, ROWS, E)), (1, 2, 0)))
        else:
            first, second = halves(products, BM, BN)
        head = n // E
        _finish(first, factor, COS, SIN, Q, K, V, RSTD, GATE, TABLE, IDS, M, T, m, head, H, G, E, VALUES, SCALE, EPS, ROWS)
        m += DOWN
        head += BN // E - 1
        _finish(second, factor, COS, SIN, Q, K, V, RSTD, GATE, TABLE, IDS, M, T, m, head, H, G, E, VALUES, SCALE, EPS, ROWS)


@triton.jit
def _finish(
    products, factor, COS, SIN, Q, K, V, RSTD, GATE, TABLE, IDS, M, T, m, head,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, VALUES: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Store one head of ROWS tokens from m on; nothing where the last tile reaches beyond the last head."""
    token = m + tl.arange(0, ROWS)
    rstd = tl.zeros((ROWS,), tl.float32)
    if head < H + G:
        a, b = halves(products * factor, ROWS, E)
        cos, sin = COS.load([m % T, 0]).to(tl.float32), SIN.load([m % T, 0]).to(tl.float32)
        rotated_a = a * cos + b * sin
        rotated_b = b * cos - a * sin
        rstd = tl.rsqrt((tl.sum(rotated_a * rotated_a, 1) + tl.sum(rotated_b * rotated_b, 1)) / E + EPS)
        rotated_a *= rstd[:, None] * SCALE
        rotated_b *= rstd[:, None] * SCALE
        if head < H:
            Q.store([m, head * E], rotated_a.to(Q.dtype))
            Q.store([m, head * E + E // 2], rotated_b.to(Q.dtype))
        else:
            K.store([m, (head - H) * E], rotated_a.to(Q.dtype))
            K.store([m, (head - H) * E + E // 2], rotated_b.to(Q.dtype))
    elif head < H + 2 * G:
        kv = head - H - G
        a, b = halves(products * factor, ROWS, E)
        if VALUES:
            gate = tl.load(GATE + token.to(tl.int64) * G + kv, token < M, 0.0).to(tl.float32)[:, None]
            row = TABLE + tl.load(IDS + token, token < M, 0)[:, None] * (G * E) + kv * E + tl.arange(0, E // 2)[None, :]
            a += gate * tl.load(row).to(tl.float32)
            b += gate * tl.load(row + E // 2).to(tl.float32)
        V.store([m, kv * E], a.to(V.dtype))
        V.store([m, kv * E + E // 2], b.to(V.dtype))
    # Last, for Triton up to 3.8 cannot flatten a loop whose body ends in an `if` (its pull request 11863).
    tl.store(RSTD + token.to(tl.int64) * (H + G) + head, rstd, (token < M) & (head < H + G))


@cache
def _tiles(device: torch.device, fast: bool, size: int) -> dict[str, int]:
    """Sizes of a tile, whole heads of `size` channels, and how it runs; see `gemm_fp8._tiles`."""
    if INTERPRETED.value:
        return {"BM": 32, "BN": 2 * size if fast else size, "BK": 32, "PROGRAMS": 2}
    programs = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
    if not roomy():
        return {"BM": 128, "BN": 128, "BK": 64, "PROGRAMS": programs, "num_warps": 8, "num_stages": 3}
    if fast and size == 128:
        return {"BM": 128, "BN": 128, "BK": 128, "PROGRAMS": 2 * programs, "num_warps": 4, "num_stages": 3}
    return {"BM": 256, "BN": 128, "BK": 128, "PROGRAMS": programs, "num_warps": 8, "num_stages": 3}


def gemm_heads(
    x_q: Tensor, w_q: Tensor, x_inverse: Tensor, w_inverse: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int],
    gate: Tensor | None, table: Tensor | None, ids: Tensor | None, shape: tuple[int, int], dtype: torch.dtype, fast: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `nvfp8.reference_fp8.gemm_heads`; heads of 64 or 128 channels."""
    (m, d), (n_head, n_kv) = x_q.shape, heads
    size = len(w_q) // (n_head + 2 * n_kv)
    assert w_q.shape[1] == d and shape[0] * shape[1] == m, "(B·T, D) · (N, D)ᵀ"
    assert d % 16 == 0 and (size in FUSED_HEADS or INTERPRETED.value), f"TMA moves rows of whole 16 bytes: {d}; heads: {size}"
    q = torch.empty(*shape, n_head, size, dtype=dtype, device=x_q.device)
    k, v = (torch.empty(*shape, n_kv, size, dtype=dtype, device=x_q.device) for _ in range(2))
    rstd = torch.empty(*shape, n_head + n_kv, dtype=torch.float32, device=x_q.device)
    if not m:
        return q, k, v, rstd
    tiles: dict[str, Any] = dict(_tiles(x_q.device, fast, size))
    bm, bn, bk = (tiles[name] for name in ("BM", "BN", "BK"))
    rows = bm // 2 if bn == size else bm
    if shape[1] % rows:  # the positions of a tile may begin again
        positions = torch.arange(shape[1] + rows, device=cos.device) % shape[1]
        cos, sin = cos[positions], sin[positions]
    x, w = (TensorDescriptor.from_tensor(t, [b, bk]) for t, b in ((x_q, bm), (w_q, bn)))
    out = (TensorDescriptor.from_tensor(t, [rows, size // 2]) for t in (cos, sin, *(t.view(m, -1) for t in (q, k, v))))
    _gemm_heads[(min(tiles["PROGRAMS"], triton.cdiv(m, bm) * triton.cdiv(len(w_q), bn)),)](
        x, w, *out, rstd, gate, table, ids, x_inverse, w_inverse, m, d, shape[1],
        H=n_head, G=n_kv, E=size, VALUES=gate is not None, SCALE=QK_SCALE, EPS=NORM_EPS,
        IMPRECISE=None if fast else bk, GROUP=GROUP, **tiles,
    )  # fmt: skip
    return q, k, v, rstd
