"""`nvfp8/rounding.py` inside kernels: the same functions on registers.

Integers and single operations come out bit for bit. Roots and quotients do not: a GPU's cheap ones are off by up to 2 units in
fp32's last place, a scale's reciprocal too, and a value that close to the border of two codes may be stored as the other. Exact
ones would make AdamW's kernel in E4M3 128 instructions an element long instead of 97 (sm_90).
"""

import triton
import triton.language as tl

from nvfp8 import rounding

BLOCK = tl.constexpr(rounding.BLOCK)
# What kernels must know of a format: bits of mantissa, smallest normal number, smallest number, scale of a block whose amax is 1.
FORMATS = {
    dtype: (mantissa, 2.0**smallest, 2.0 ** (smallest - mantissa), (1 + rounding.HEADROOM) / largest)
    for dtype, (smallest, mantissa, largest) in rounding.FORMATS.items()
}


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
def to_grid(value, bits, MANTISSA: tl.constexpr, NORMAL: tl.constexpr, SQUARED: tl.constexpr):
    """The FP8 numbers that fp32 `value` is rounded to, stochastically."""
    CUT: tl.constexpr = 23 - MANTISSA
    magnitude = tl.abs(value)
    shift = tl.where(magnitude < NORMAL, NORMAL, 0.0)
    whole = (magnitude + shift).to(tl.int32, bitcast=True)
    if SQUARED:
        lower = ((whole >> CUT) << CUT).to(tl.float32, bitcast=True) - shift
        step = ((whole & 0x7F800000) - (MANTISSA << 23)).to(tl.float32, bitcast=True)
        noise = bits.to(tl.float32) * 2.3283064365386963e-10
        up = (noise * (step * (2 * lower + step)) < value * value - lower * lower) | ((lower == 0) & (value > 0))
        rounded = tl.where(up, lower + step, lower)
    else:
        whole += (bits >> (32 - CUT)).to(tl.int32)
        rounded = ((whole >> CUT) << CUT).to(tl.float32, bitcast=True) - shift
        sign = (value.to(tl.int32, bitcast=True) >> 31) << 31
        rounded = (rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return rounded


@triton.jit
def square_root(value):
    """√value, and of no other number than 0 is it 0: the GPU's root takes denormal numbers for 0, whose roots are up to 2^-63."""
    result = tl.sqrt(value)
    return tl.where(value > 0, tl.maximum(result, 1.0842021724855044e-19), result)


@triton.jit
def encode(value, bits, ROWS: tl.constexpr, FORMAT: tl.constexpr, ROOT: tl.constexpr):
    """(ROWS * BLOCK,) fp32 -> the same on the FP8 grid, and (ROWS,) scales; lanes beyond a tensor's end must hold 0.

    With ROOT, `value` holds the roots already. Magnitudes are compared as integers, among which NaN is the largest: scales show it.
    """
    magnitudes = tl.reshape(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, (ROWS, BLOCK))
    scale = tl.max(magnitudes, 1).to(tl.float32, bitcast=True) * FORMAT[3]
    normal = scale > 1.1754943508222875e-38
    inverse = tl.where(normal, 1.0 / scale, 0.0)
    scale = tl.where(normal, scale, tl.where(scale < float("inf"), 0.0, scale))
    scaled = tl.reshape(tl.reshape(value, (ROWS, BLOCK)) * inverse[:, None], (ROWS * BLOCK,))
    return to_grid(scaled, bits, FORMAT[0], FORMAT[1], ROOT), scale


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
def written(weight, master):
    """A weight (bf16 bits, int16) beside its fp32 master -> fp32: the master, but where the weight is not its rounding."""
    top, _ = split(master, nearest(master), 0)
    return tl.where(top == (weight.to(tl.int32) & 0xFFFF), master, join(weight, tl.zeros_like(weight), 0))


@triton.jit
def join(weight, remainder, EXTRA: tl.constexpr):
    """bf16 bits (int16) and remainder -> fp32."""
    top = weight.to(tl.int32) & 0xFFFF
    whole = ((top << EXTRA) + remainder.to(tl.int32)) << (16 - EXTRA)
    return whole.to(tl.float32, bitcast=True)
