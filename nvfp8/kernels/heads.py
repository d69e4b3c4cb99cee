"""From the q/k/v projections to attention's inputs and back: rotary, QK norm and value embedding in one pass each way.

A program takes a tile of tokens and one head. The two halves of a head are two tiles, so the rotation is arithmetic between
registers and the norm a reduction over one axis. v-heads are copied, with gate · table[id] added where the layer has a value
embedding: the table's row is gathered here and never stands as a tensor, nor does its gradient (`embedding.py` forms it).
Backward starts from q and k as attention kept them: q/1.2 is x̂, and rotating back is rotating by the negative angle.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp8.reference import NORM_EPS, QK_SCALE

TOKENS = 32  # tokens a program


@triton.jit
def _heads_forward(
    QKV, COS, SIN, GATE, TABLE, IDS, Q, K, V, RSTD, N, T,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, VALUES: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr,
    TOKENS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, HALF)[None, :]
    mask = (token < N)[:, None] & (column < E // 2)
    source = QKV + token[:, None] * ((H + 2 * G) * E) + head * E + column
    a = tl.load(source, mask, 0.0).to(tl.float32)
    b = tl.load(source + E // 2, mask, 0.0).to(tl.float32)
    if head < H + G:
        angle = (token % T)[:, None] * (E // 2) + column
        cos = tl.load(COS + angle, mask, 0.0).to(tl.float32)
        sin = tl.load(SIN + angle, mask, 0.0).to(tl.float32)
        rotated_a = a * cos + b * sin
        rotated_b = b * cos - a * sin
        rstd = tl.rsqrt((tl.sum(rotated_a * rotated_a, 1) + tl.sum(rotated_b * rotated_b, 1)) / E + EPS)
        tl.store(RSTD + token * (H + G) + head, rstd, token < N)
        a = rotated_a * rstd[:, None] * SCALE
        b = rotated_b * rstd[:, None] * SCALE
        if head < H:
            target = Q + (token[:, None] * H + head) * E + column
        else:
            target = K + (token[:, None] * G + (head - H)) * E + column
    else:
        kv = head - H - G
        if VALUES:
            gate = tl.load(GATE + token * G + kv, token < N, 0.0).to(tl.float32)[:, None]
            row = TABLE + tl.load(IDS + token, token < N, 0)[:, None] * (G * E) + kv * E + column
            a += gate * tl.load(row, mask, 0.0).to(tl.float32)
            b += gate * tl.load(row + E // 2, mask, 0.0).to(tl.float32)
        target = V + (token[:, None] * G + kv) * E + column
    tl.store(target, a.to(Q.dtype.element_ty), mask)
    tl.store(target + E // 2, b.to(Q.dtype.element_ty), mask)


@triton.jit
def heads_gradient(
    DQ, DK, DV, Q, K, V, RSTD, COS, SIN, GATE, TABLE, IDS, D_GATE, ALONG, head, first_token, N, T,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, VALUES: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr,
    TOKENS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Both halves of d_qkv (TOKENS, HALF) fp32 for one head and a tile of tokens from `first_token` (int64).

    Writes D_GATE, and Σ d_qkv·qkv of the head to ALONG, for which v is read, where ALONG is not None.
    """
    token = tl.arange(0, TOKENS)  # within the tile: what follows counts from its first token, in 32 bits
    column = tl.arange(0, HALF)[None, :]
    inside = token < N - first_token
    mask = inside[:, None] & (column < E // 2)
    if head < H + G:
        if head < H:
            at = token[:, None] * (H * E) + column
            gradient = DQ + (first_token * H + head) * E + at
            output = Q + (first_token * H + head) * E + at
        else:
            at = token[:, None] * (G * E) + column
            gradient = DK + (first_token * G + head - H) * E + at
            output = K + (first_token * G + head - H) * E + at
        da = tl.load(gradient, mask, 0.0).to(tl.float32) * SCALE
        db = tl.load(gradient + E // 2, mask, 0.0).to(tl.float32) * SCALE
        a = tl.load(output, mask, 0.0).to(tl.float32) / SCALE
        b = tl.load(output + E // 2, mask, 0.0).to(tl.float32) / SCALE
        rstd = tl.load(RSTD + first_token * (H + G) + head + token * (H + G), inside, 0.0)[:, None]
        mean = ((tl.sum(da * a, 1) + tl.sum(db * b, 1)) / E)[:, None]
        da = rstd * (da - a * mean)
        db = rstd * (db - b * mean)
        angle = ((first_token.to(tl.int32) + token) % T)[:, None] * (E // 2) + column
        cos = tl.load(COS + angle, mask, 0.0).to(tl.float32)
        sin = tl.load(SIN + angle, mask, 0.0).to(tl.float32)
        raw_a = da * cos - db * sin
        raw_b = db * cos + da * sin
        if ALONG is not None:  # a norm's gradient is orthogonal to its input, but for eps
            along = tl.sum(mean * (E * EPS) * rstd * rstd, 1)
    else:
        kv = head - H - G
        of_value = (first_token * G + kv) * E + (token[:, None] * (G * E) + column)
        raw_a = tl.load(DV + of_value, mask, 0.0).to(tl.float32)
        raw_b = tl.load(DV + of_value + E // 2, mask, 0.0).to(tl.float32)
        if ALONG is not None:
            va = tl.load(V + of_value, mask, 0.0).to(tl.float32)
            vb = tl.load(V + of_value + E // 2, mask, 0.0).to(tl.float32)
            along = tl.sum(raw_a * va, 1) + tl.sum(raw_b * vb, 1)
        if VALUES:
            row = TABLE + tl.load(IDS + first_token + token, inside, 0)[:, None] * (G * E) + kv * E + column
            va = tl.load(row, mask, 0.0).to(tl.float32)
            vb = tl.load(row + E // 2, mask, 0.0).to(tl.float32)
            d_gate = tl.sum(raw_a * va, 1) + tl.sum(raw_b * vb, 1)
            of_gate = first_token * G + kv + token * G
            tl.store(D_GATE + of_gate, d_gate.to(D_GATE.dtype.element_ty), inside)
            if ALONG is not None:  # what the value embedding added to v is none of the projection's
                along -= tl.load(GATE + of_gate, inside, 0.0).to(tl.float32) * d_gate
    if ALONG is not None:
        tl.store(ALONG + head.to(tl.int64) * N + first_token + token, along, inside)
    return raw_a, raw_b


@triton.jit
def _heads_backward(
    DQ, DK, DV, Q, K, RSTD, COS, SIN, TABLE, IDS, D_QKV, D_GATE, N, T,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, VALUES: tl.constexpr, SCALE: tl.constexpr,
    TOKENS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    first = tl.program_id(1).to(tl.int64) * TOKENS
    a, b = heads_gradient(
        DQ, DK, DV, Q, K, None, RSTD, COS, SIN, None, TABLE, IDS, D_GATE, None, head, first, N, T,
        H, G, E, VALUES, SCALE, 0.0, TOKENS, HALF,
    )  # fmt: skip
    token = first + tl.arange(0, TOKENS)
    column = tl.arange(0, HALF)[None, :]
    mask = (token < N)[:, None] & (column < E // 2)
    target = D_QKV + token[:, None] * ((H + 2 * G) * E) + head * E + column
    tl.store(target, a.to(D_QKV.dtype.element_ty), mask)
    tl.store(target + E // 2, b.to(D_QKV.dtype.element_ty), mask)


def heads_forward(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int], gate: Tensor | None, table: Tensor | None, ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `nvfp8.reference.heads_forward`."""
    batch, length, width = qkv.shape
    n_head, n_kv = heads
    size = width // (n_head + 2 * n_kv)
    q = torch.empty(batch, length, n_head, size, dtype=qkv.dtype, device=qkv.device)
    k, v = (torch.empty(batch, length, n_kv, size, dtype=qkv.dtype, device=qkv.device) for _ in range(2))
    rstd = torch.empty(batch, length, n_head + n_kv, dtype=torch.float32, device=qkv.device)
    tokens = batch * length
    _heads_forward[n_head + 2 * n_kv, triton.cdiv(tokens, TOKENS)](
        qkv.contiguous(), cos, sin, gate, table, ids, q, k, v, rstd, tokens, length,
        H=n_head, G=n_kv, E=size, VALUES=gate is not None, SCALE=QK_SCALE, EPS=NORM_EPS,
        TOKENS=TOKENS, HALF=triton.next_power_of_2(size // 2),
    )  # fmt: skip
    return q, k, v, rstd


def heads_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, q: Tensor, k: Tensor, rstd: Tensor, cos: Tensor, sin: Tensor,
    gate: Tensor | None, table: Tensor | None, ids: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """See `nvfp8.reference.heads_backward`."""
    batch, length, n_head, size = q.shape
    n_kv = k.shape[2]
    d_qkv = torch.empty(batch, length, (n_head + 2 * n_kv) * size, dtype=q.dtype, device=q.device)
    d_gate = None if gate is None else torch.empty_like(gate)
    tokens = batch * length
    _heads_backward[n_head + 2 * n_kv, triton.cdiv(tokens, TOKENS)](
        dq, dk, dv, q, k, rstd, cos, sin, table, ids, d_qkv, d_gate, tokens, length,
        H=n_head, G=n_kv, E=size, VALUES=gate is not None, SCALE=QK_SCALE,
        TOKENS=TOKENS, HALF=triton.next_power_of_2(size // 2),
    )  # fmt: skip
    return d_qkv, d_gate
