"""`nvfp8/rounding.py` inside kernels: the same functions, bit for bit, on registers."""

import triton
import triton.language as tl

from nvfp8 import rounding

BLOCK = tl.constexpr(rounding.BLOCK)


@triton.jit
def random_bits(index, key):
    """32 random bits (uint32) for each index; `key` is 31 bits."""
    value = index.to(tl.uint32) * 0x9E3779B1 + key.to(tl.uint32)
    value ^= value >> 16
    value *= 0x7FEB352D
    value ^= value >> 15
    value *= 0x846CA68B
    return value ^ (value >> 16)


@triton.jit
def three(bits):
    """Of one draw (uint32) three, each with 16 random bits on top."""
    return bits, bits << 16, bits * 0x9E3779B1


@triton.jit
def uniform(bits):
    """Random bits as fp32 in [0, 1), multiples of 2^-24."""
    return (bits >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def to_grid(value, noise, SMALLEST: tl.constexpr, MANTISSA: tl.constexpr, LARGEST: tl.constexpr, SQUARED: tl.constexpr):
    """The FP8 numbers that fp32 `value` is rounded to, stochastically."""
    magnitude = tl.abs(value)
    exponent = tl.maximum((magnitude.to(tl.int32, bitcast=True) >> 23) - 127, SMALLEST)
    step = ((exponent - MANTISSA + 127) << 23).to(tl.float32, bitcast=True)
    per_step = ((127 - (exponent - MANTISSA)) << 23).to(tl.float32, bitcast=True)
    steps = magnitude * per_step
    below = tl.floor(steps)
    if SQUARED:
        up = (noise * (2 * below + 1) < steps * steps - below * below) | ((below == 0) & (steps > 0))
    else:
        up = noise < steps - below
    rounded = tl.minimum((below + up.to(tl.float32)) * step, LARGEST)
    rounded = tl.where(value < 0, -rounded, rounded)
    return tl.where(magnitude < float("inf"), rounded, float("nan"))


@triton.jit
def encode(
    value, noise, ROWS: tl.constexpr, SMALLEST: tl.constexpr, MANTISSA: tl.constexpr, LARGEST: tl.constexpr, ROOT: tl.constexpr
):  # fmt: skip
    """(ROWS * BLOCK,) fp32 -> the same on the FP8 grid, and (ROWS,) scales; lanes beyond a tensor's end must hold 0."""
    if ROOT:
        value = tl.sqrt(value)
    blocks = tl.reshape(value, (ROWS, BLOCK))
    scale = tl.max(tl.abs(blocks), 1) / LARGEST
    normal = scale > 1.1754943508222875e-38
    inverse = tl.where(normal, 1.0 / scale, 0.0)
    scale = tl.where(normal, scale, tl.where(scale < float("inf"), 0.0, scale))
    scaled = tl.reshape(blocks * inverse[:, None], (ROWS * BLOCK,))
    scaled = tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST)
    return to_grid(scaled, noise, SMALLEST, MANTISSA, LARGEST, ROOT), scale


@triton.jit
def decode(stored, scale, ROWS: tl.constexpr, ROOT: tl.constexpr):
    """(ROWS * BLOCK,) FP8 and (ROWS,) scales -> fp32."""
    value = tl.reshape(stored.to(tl.float32), (ROWS, BLOCK)) * scale[:, None]
    value = tl.reshape(value, (ROWS * BLOCK,))
    if ROOT:
        value = value * value
    return value


@triton.jit
def split(value, bits, EXTRA: tl.constexpr):
    """fp32 -> the bits of the nearest bf16 (int32, low half) and a signed remainder of EXTRA bits (0, 8 or 16)."""
    whole = tl.where(value == value, value.to(tl.uint32, bitcast=True), 0x7FC00000)
    CUT: tl.constexpr = 16 - EXTRA
    if CUT > 0:
        whole += bits >> (32 - CUT)
    whole = whole >> CUT
    top = whole
    if EXTRA > 0:
        top = (whole + ((1 << EXTRA) >> 1)) >> EXTRA
    return (top & 0xFFFF).to(tl.int32), (whole - (top << EXTRA)).to(tl.int32, bitcast=True)


@triton.jit
def nearest(value):
    """The bits with which `split` without remainder rounds to nearest, ties to even, as PyTorch's casts do."""
    return (((value.to(tl.uint32, bitcast=True) >> 16) & 1) + 0x7FFF) << 16


@triton.jit
def join(weight, remainder, EXTRA: tl.constexpr):
    """bf16 bits (int16) and remainder -> fp32."""
    top = weight.to(tl.int32) & 0xFFFF
    whole = ((top << EXTRA) + remainder.to(tl.int32)) << (16 - EXTRA)
    return whole.to(tl.float32, bitcast=True)
