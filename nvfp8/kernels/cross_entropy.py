"""Softcap, cross-entropy and their gradient over one row of logits a program, the gradient written where the logits were.

The softcap bounds |z| by c = 15, so Σ exp(z) fits fp32 without a maximum: one pass sums, a second one (which finds the row
in L2) writes the gradient. With r = 1/(1 + e^(2x/c)), tanh(x/c) is 1 − 2r, z is c − 2c·r, and dz/dx 4r(1 − r).

By that formula a logit takes two exponentials and a reciprocal, of which a multiprocessor makes 16 a cycle, where it has time for
128 other operations: they bound the sum before memory does. So r is a polynomial where |x| ≤ c, which is nearly always, and by the
formula in those groups of four logits where one is larger. In the sum it is a polynomial for log₂ exp(z), without a step between.

Exponentials are PTX's instructions themselves. Triton's functions take three more each for results below 2⁻¹²⁶ and divisors above
2¹²⁶: here a probability that no format holds, and a saturated tanh.
"""

import math
import struct
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp8.kernels.fp8 import INTERPRETED

BLOCK = 2048  # columns in registers at a time
# 1/(1 + e^(2y)) = ½ + y·q(y²) for |y| ≤ 1, q of degree 6 in fp32, lowest power first: off by at most 7e-8, of which 1e-8 before
# rounding. Weighted least squares on 400 Chebyshev nodes, weights raised where the error was largest.
SHARE = (
    -0.49999985098838806, 0.16666065156459808, -0.06659791618585587, 0.026632901281118393, -0.009986613877117634,
    0.002975618466734886, -0.0004818793386220932,
)  # fmt: skip


def scaled(cap: float, slope: float) -> list[float]:
    """`slope`·x/c·q(x²/c²) as x times a polynomial in x², lowest power first: what r is multiplied by costs nothing then."""
    return [slope * value / cap ** (2 * power + 1) for power, value in enumerate(SHARE)]


@cache
def _of_four(cap: float, first: float, slope: float) -> str:
    """PTX for `first` + `slope`·r of four logits: $0 … $3 from $4 … $7. Of a NaN the polynomial makes a NaN."""

    def constant(value: float) -> str:
        return f"0f{struct.unpack('<I', struct.pack('<f', value))[0]:08X}"

    highest, *lower = [constant(value) for value in reversed(scaled(cap, slope))]
    middle = first + slope / 2  # at x = 0
    ways: dict[str, list[str]] = {"near": [], "far": []}
    for to in range(4):
        out, x = f"${to}", f"${to + 4}"
        ways["near"] += [f"mul.f32 s, {x}, {x};", f"mov.f32 q, {highest};"]
        ways["near"] += [f"fma.rn.f32 q, q, s, {value};" for value in lower]
        ways["near"].append(f"fma.rn.f32 {out}, q, {x}, {constant(middle)};" if middle else f"mul.f32 {out}, q, {x};")
        ways["far"] += [f"mul.f32 s, {x}, {constant(2 / math.log(2) / cap)};", "ex2.approx.ftz.f32 s, s;"]
        ways["far"] += [f"add.f32 s, s, {constant(1)};", "rcp.approx.ftz.f32 s, s;"]
        ways["far"].append(f"fma.rn.f32 {out}, s, {constant(slope)}, {constant(first)};")
    largest = [f"abs.f32 q, ${at}; max.f32 s, s, q;" for at in (5, 6, 7)]
    lines = [
        "{",
        ".reg .pred far;",
        ".reg .f32 s, q;",
        "abs.f32 s, $4;",
        *largest,
        f"setp.gt.f32 far, s, {constant(cap)};",
        "@far bra FAR;",
    ]
    return "\n".join([*lines, *ways["near"], "bra.uni DONE;", "FAR:", *ways["far"], "DONE:", "}"])


def exponents(cap: float) -> str:
    """PTX for log₂ exp(z) of four logits, what `of_shares` takes."""
    return _of_four(cap, cap / math.log(2), -2 * cap / math.log(2))


@triton.jit
def power_of_2(x):
    """2^x, 0 where that is below 2^-126."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def softcap_share(logits, CAP: tl.constexpr):
    """1/(1 + e^(2x/c)) of logits x, fp32: r, which the softcap z = c − 2c·r and its derivative 4r(1 − r) follow from."""
    LOG2E: tl.constexpr = 1.4426950408889634
    below = 1.0 + power_of_2((2.0 * LOG2E / CAP) * logits)
    if INTERPRETED:
        return 1.0 / below
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [below], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def of_shares(logits, CAP: tl.constexpr, FIRST: tl.constexpr, SLOPE: tl.constexpr, OF_FOUR: tl.constexpr):
    """FIRST + SLOPE·r of many logits, by the polynomial where it serves."""
    if INTERPRETED:
        return FIRST + SLOPE * softcap_share(logits, CAP)
    return tl.inline_asm_elementwise(OF_FOUR, "=&f,=&f,=&f,=&f,f,f,f,f", [logits], dtype=tl.float32, is_pure=True, pack=4)


@triton.jit
def _softcap_cross_entropy(
    LOGITS, TARGETS, SCALE, LOSSES, STRIDE, VOCAB: tl.constexpr, PADDED: tl.constexpr, CAP: tl.constexpr,
    GRADIENT: tl.constexpr, EXPONENTS: tl.constexpr, SHARES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    LOG2E: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(TARGETS + row)
    logits = LOGITS + row * STRIDE
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, VOCAB, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, column < VOCAB, 0.0).to(tl.float32)
        exponential = power_of_2(of_shares(x, CAP, LOG2E * CAP, -2.0 * LOG2E * CAP, EXPONENTS))
        total += tl.where(column < VOCAB, exponential, 0.0) if VOCAB % BLOCK else exponential
    log_sum = tl.log(tl.sum(total, 0))
    valid = target >= 0
    z_target = CAP - 2.0 * CAP * softcap_share(tl.load(logits + tl.maximum(target, 0)).to(tl.float32), CAP)
    tl.store(LOSSES + row, tl.where(valid, log_sum - z_target, 0.0))
    if GRADIENT:
        tl.debug_barrier()  # every thread has read the target's logit before any overwrites it
        scale = tl.where(valid, tl.load(SCALE), 0.0)
        for start in range(0, PADDED, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(logits + column, column < VOCAB, 0.0).to(tl.float32)
            share = of_shares(x, CAP, 0.0, 1.0, SHARES)
            gradient = power_of_2(LOG2E * (CAP - log_sum) - (2.0 * LOG2E * CAP) * share) - tl.where(column == target, 1.0, 0.0)
            gradient = tl.where(column < VOCAB, gradient * (4.0 * share * (1.0 - share)) * scale, 0.0)
            tl.store(logits + column, gradient.to(LOGITS.dtype.element_ty), column < PADDED)


@triton.jit
def _scale(X, FACTOR, N, BLOCK: tl.constexpr):
    factor = tl.load(FACTOR)
    if factor != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(X + at, at < N, 0.0)
        tl.store(X + at, (x.to(tl.float32) * factor).to(X.dtype.element_ty), at < N)


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """See `nvfp8.reference.scale_`; a factor of 1, which a loss's gradient nearly always is, costs no pass over x."""
    _scale[(triton.cdiv(x.numel(), BLOCK),)](x, factor, x.numel(), BLOCK=BLOCK)
    return x


def softcap_cross_entropy_(logits: Tensor, targets: Tensor, vocab: int, softcap: float, scale: Tensor | None) -> Tensor:
    """See `nvfp8.reference.softcap_cross_entropy_`; rows of `logits` must be contiguous."""
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    _softcap_cross_entropy[(logits.shape[0],)](
        logits, targets, scale, losses, logits.stride(0), VOCAB=vocab, PADDED=logits.shape[1], CAP=softcap,
        GRADIENT=scale is not None, EXPONENTS=exponents(softcap), SHARES=_of_four(softcap, 0.0, 1.0), BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return losses
