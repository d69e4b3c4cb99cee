"""Gates of a few channels: what each multiplies, and its gradient, in the kernel that computes it.

Smear adds to every position the one before it, times λ·σ(gate). Forward a program takes a row, reads the row before too (another
program's, out of L2) and writes the sum: 2 + 2 bytes an element. Backward a program walks 16 rows from the last to the first, so
that what a row hands to the one before stays in registers: 2·2 bytes an element read (gradient and x; 2 more where x0 has a
gradient of its own), 2 written, and one partial sum a program for the weight and λ, added up in a fixed order.

A value embedding's gate has a few channels and a number for each head: next to nothing, so what it costs are launches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16  # rows a program of smear's backward
TOKENS = 32  # tokens a program of a value embedding's gate


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _smear_forward(X, PREVIOUS, WEIGHT, LAMBDA, OUT, T, D, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < D
    x = tl.load(X + row * D + column, mask, 0.0).to(tl.float32)
    weight = tl.load(WEIGHT + column, column < CHANNELS, 0.0).to(tl.float32)
    gate = tl.load(LAMBDA) * _sigmoid(tl.sum(x * weight, 0))
    first = row % T == 0
    before = tl.load(X + (row - 1) * D + column, mask & (first == 0), 0.0).to(tl.float32)
    if PREVIOUS is not None:
        before += tl.load(PREVIOUS + row // T * D + column, mask & first, 0.0).to(tl.float32)
    tl.store(OUT + row * D + column, (x + gate * before).to(OUT.dtype.element_ty), mask)


@triton.jit
def _arriving(D_OUT, D_X0, row, column, mask, D):
    gradient = tl.load(D_OUT + row * D + column, mask, 0.0).to(tl.float32)
    if D_X0 is not None:
        gradient += tl.load(D_X0 + row * D + column, mask, 0.0).to(tl.float32)
    return gradient


@triton.jit
def _smear_backward(
    D_OUT, D_X0, X, WEIGHT, LAMBDA, DX, PARTIAL, N, T, D, CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    begin = tl.program_id(0).to(tl.int64) * ROWS
    end = tl.minimum(begin + ROWS, N)
    column = tl.arange(0, BLOCK)
    mask = column < D
    weight = tl.load(WEIGHT + column, column < CHANNELS, 0.0).to(tl.float32)
    smear = tl.load(LAMBDA)
    # What the position after the last of these hands back to it, if that is of the same text.
    inside = mask & (end < N) & (end % T != 0)
    x = tl.load(X + end * D + column, inside, 0.0).to(tl.float32)
    handed = smear * _sigmoid(tl.sum(x * weight, 0)) * _arriving(D_OUT, D_X0, end, column, inside, D)
    x = tl.load(X + (end - 1) * D + column, mask, 0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK,), tl.float32)
    d_smear = 0.0
    for back in range(0, end - begin):
        row = end - 1 - back
        gradient = _arriving(D_OUT, D_X0, row, column, mask, D)
        before = tl.load(X + (row - 1) * D + column, mask & (row > 0), 0.0).to(tl.float32)
        first = row % T == 0
        sigmoid = _sigmoid(tl.sum(x * weight, 0))
        d_gate = tl.where(first, 0.0, tl.sum(gradient * before, 0))
        d_smear += d_gate * sigmoid
        d_logit = d_gate * smear * (sigmoid * (1.0 - sigmoid))
        d_weight += d_logit * x
        tl.store(DX + row * D + column, (gradient + handed + d_logit * weight).to(DX.dtype.element_ty), mask)
        handed = tl.where(first, 0.0, smear * sigmoid * gradient)
        x = before
    partial = PARTIAL + tl.program_id(0) * (CHANNELS + 1)
    tl.store(partial + column, d_weight, column < CHANNELS)
    tl.store(partial + CHANNELS, d_smear)


@triton.jit
def _value_gate_forward(X, WEIGHT, GATE, N, CHANNELS: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, C: tl.constexpr):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, C)
    inside = (token < N)[:, None] & (channel < CHANNELS)[None, :]
    x = tl.load(X + token[:, None] * CHANNELS + channel[None, :], inside, 0.0).to(tl.float32)
    for head in tl.static_range(HEADS):
        weight = tl.load(WEIGHT + head * CHANNELS + channel, channel < CHANNELS, 0.0).to(tl.float32)
        gate = 3.0 * _sigmoid(tl.sum(x * weight[None, :], 1))
        tl.store(GATE + token * HEADS + head, gate.to(GATE.dtype.element_ty), token < N)


@triton.jit
def _value_gate_backward(
    D_GATE, X, WEIGHT, DX, PARTIAL, N, CHANNELS: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, C: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, C)
    inside = (token < N)[:, None] & (channel < CHANNELS)[None, :]
    at = token[:, None] * CHANNELS + channel[None, :]
    x = tl.load(X + at, inside, 0.0).to(tl.float32)
    dx = tl.zeros((TOKENS, C), tl.float32)
    # Head by head: of a sum of products over (token, head, channel) Triton 3.6 makes a matrix product in TF32 (`combine` pass).
    for head in tl.static_range(HEADS):
        weight = tl.load(WEIGHT + head * CHANNELS + channel, channel < CHANNELS, 0.0).to(tl.float32)
        sigmoid = _sigmoid(tl.sum(x * weight[None, :], 1))
        d_gate = tl.load(D_GATE + token * HEADS + head, token < N, 0.0).to(tl.float32)
        d_logit = d_gate * (3.0 * sigmoid * (1.0 - sigmoid))
        dx += d_logit[:, None] * weight[None, :]
        partial = PARTIAL + (tl.program_id(0) * HEADS + head) * CHANNELS + channel
        tl.store(partial, tl.sum(d_logit[:, None] * x, 0), channel < CHANNELS)
    tl.store(DX + at, dx.to(DX.dtype.element_ty), inside)


def smear_forward(x: Tensor, previous: Tensor | None, weight: Tensor, smear: Tensor) -> Tensor:
    """See `nvfp8.reference.smear_forward`."""
    x = x.contiguous()
    batch, length, d = x.shape
    out, block = torch.empty_like(x), triton.next_power_of_2(d)
    _smear_forward[(batch * length,)](
        x, None if previous is None else previous.contiguous(), weight, smear, out, length, d,
        CHANNELS=weight.shape[1], BLOCK=block, num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return out


def smear_backward(d_out: Tensor, d_x0: Tensor | None, x: Tensor, weight: Tensor, smear: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `nvfp8.reference.smear_backward`."""
    batch, length, d = x.shape
    rows, channels = batch * length, weight.shape[1]
    dx, block = torch.empty_like(x), triton.next_power_of_2(d)
    programs = triton.cdiv(rows, ROWS)
    partial = torch.empty(programs, channels + 1, dtype=torch.float32, device=x.device)
    _smear_backward[(programs,)](
        d_out, d_x0, x, weight, smear, dx, partial, rows, length, d,
        CHANNELS=channels, ROWS=ROWS, BLOCK=block, num_warps=min(16, max(1, block // 256)),
    )  # fmt: skip
    sums = partial.sum(0)
    return dx, sums[None, :channels], sums[channels:]


def _sizes(weight: Tensor) -> dict[str, int]:
    heads, channels = weight.shape
    return {"CHANNELS": channels, "HEADS": heads, "TOKENS": TOKENS, "C": triton.next_power_of_2(channels)}


def value_gate_forward(x: Tensor, weight: Tensor) -> Tensor:
    """See `nvfp8.reference.value_gate_forward`."""
    gate = torch.empty(*x.shape[:-1], len(weight), dtype=x.dtype, device=x.device)
    rows = x.numel() // x.shape[-1]
    _value_gate_forward[(triton.cdiv(rows, TOKENS),)](x.contiguous(), weight, gate, rows, **_sizes(weight))
    return gate


def value_gate_backward(d_gate: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """See `nvfp8.reference.value_gate_backward`."""
    x, rows = x.contiguous(), x.numel() // x.shape[-1]
    dx, programs = torch.empty_like(x), triton.cdiv(rows, TOKENS)
    partial = torch.empty(programs, *weight.shape, dtype=torch.float32, device=x.device)
    _value_gate_backward[(programs,)](d_gate.contiguous(), x, weight, dx, partial, rows, **_sizes(weight))
    return dx, partial.sum(0)
