"""Casts to FP8 and the running amax inside kernels: the convention of `nvfp8/reference_fp8.py` on registers.

On a GPU the cast is one instruction for two numbers, `cvt.rn.satfinite`: it rounds to nearest, ties to even, and *is* the clamp
(±inf becomes the format's largest number, NaN stays NaN), so none stands before it; a test looks for it in the compiled kernels.
Triton's interpreter rounds FP8 casts wrongly, so there the code is assembled from the bits of the fp32 number; both ways give
what PyTorch gives, over all bf16 numbers (tests).
"""

import os
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from nvfp8.reference_optim import Copies

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
# What a kernel calls the formats that PyTorch knows.
DTYPES = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}


@triton.jit
def to_fp8(value, DTYPE: tl.constexpr):
    """Clamp fp32 numbers to DTYPE's range and round them to it, to nearest, ties to even."""
    if INTERPRETED:
        if tl.float8e4nv == DTYPE:
            code = _code(value, 3, 7, 448.0, 0x7E)
        else:
            code = _code(value, 2, 15, 57344.0, 0x7B)
        return code.to(tl.uint8).to(DTYPE, bitcast=True)
    CAST: tl.constexpr = "cvt.rn.satfinite." + ("e4m3x2" if tl.float8e4nv == DTYPE else "e5m2x2") + ".f32 "
    # Four numbers a block of assembly. Of Triton's own casts, two numbers each, ptxas 12.8 (Triton 3.6) makes one register of four
    # for a store; where the halves were used again, for a transpose, it then read the stack pointer instead.
    codes = tl.inline_asm_elementwise(
        "{ .reg .b16 low, high; " + CAST + "low, $2, $1; " + CAST + "high, $4, $3; mov.b32 $0, {low, high}; }",
        "=r,f,f,f,f", [value], dtype=tl.uint8, is_pure=True, pack=4,
    )  # fmt: skip
    return codes.to(DTYPE, bitcast=True)


@triton.jit
def _code(value, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr, TOP: tl.constexpr):
    CUT: tl.constexpr = 23 - MANTISSA
    bits = value.to(tl.int32, bitcast=True)
    magnitude = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    # Half a step less one, plus the last bit that stays: carries where nearest, ties to even, rounds up.
    near = (bits & 0x7FFFFFFF) + ((1 << (CUT - 1)) - 1) + ((bits >> CUT) & 1)
    normal = (near >> CUT) - ((127 - BIAS) << MANTISSA)
    # Below the smallest normal number 2^(1 - BIAS) steps no longer shrink. Added to a number whose last bit is such a step, the
    # sum is rounded to it by the addition itself.
    ANCHOR: tl.constexpr = 2.0 ** (1 - BIAS - MANTISSA + 23)
    # Where the sum is not taken it may be anything, inf - inf included.
    small = (magnitude + ANCHOR).to(tl.int32, bitcast=True) - ((127 + 1 - BIAS - MANTISSA + 23) << 23)
    code = tl.where(magnitude < 2.0 ** (1 - BIAS), small, normal)
    code = tl.where(magnitude >= LARGEST, TOP, code)
    code = tl.where(value == value, code, 0x7F)
    return code | ((bits >> 24) & 0x80)


@triton.jit
def largest_bits(value):
    """The bits (int32) of the largest magnitude of a tile of fp32 numbers; as integers NaN > inf > finite."""
    return tl.max(tl.ravel(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF), 0)


@triton.jit
def raise_amax(AMAX, bits):
    """Raise the 0-D fp32 at AMAX, seen as int32, to `bits`: integers have an atomic maximum, and order changes no result.

    Thousands of programs would queue at one address, so only who has more to say than an (old, never too large) look says it.
    """
    tl.atomic_max(AMAX, bits, mask=bits > tl.load(AMAX), sem="relaxed")


@triton.jit
def store_copies(q, t, scale, amax, stride, value, row, column, at, mask, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Write a tile of a weight in FP8 as it lies and transposed, as `nvfp8.reference_optim.Copies` says.

    All but the tile are integers out of a table, `stride` the distance of columns in the transpose. value, at, mask: (R, C), the
    numbers that are stored, their places in the matrix and whether they exist; row (R,), column (C,).
    """
    q, t = q.to(tl.pointer_type(DTYPE)), t.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        q, t, stride = tl.multiple_of(q, 16), tl.multiple_of(t, 16), stride // 16 * 16  # no hint holds for an argument
    codes = to_fp8(value * tl.load(scale.to(tl.pointer_type(tl.float32))), DTYPE)
    raise_amax(amax.to(tl.pointer_type(tl.int32)), largest_bits(tl.where(mask, value, 0.0)))
    tl.store(q + at, codes, mask)
    tl.store(t + (column[None, :] * stride + row[:, None]), codes, mask)


def check_copies(copies: Copies, shape: torch.Size) -> None:
    """Refuse what `store_copies` would not write rightly for a matrix of this shape."""
    q, t = copies.q, copies.t
    assert q.shape == t.shape[::-1] == shape and q.dtype == t.dtype, "copies are (r, c) and (c, r) in one format"
    assert q.is_contiguous() and t.stride(1) == 1, "copies lie with the axis contiguous that a GEMM sums over"
    assert t.stride(0) * len(t) < 2**31, "inside a matrix, kernels count in int32"


def as_bits(amax: Tensor | None) -> Tensor | None:
    """The 0-D fp32 as the int32 that `raise_amax` takes."""
    return None if amax is None else amax.view(torch.int32)


@cache
def roomy() -> bool:
    """Whether a program may take 227 KiB of shared memory: on Hopper and the datacenter Blackwells. Others have 99."""
    return INTERPRETED.value or driver.active.get_current_target().arch in (90, 100, 103)
