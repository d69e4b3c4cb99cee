"""`nvfp8/rounding.py` inside kernels: the same functions on registers.

Integers and single operations come out bit for bit. Roots and quotients do not: a GPU's cheap ones are off by up to 2 units in
fp32's last place (a quotient is a reciprocal, off by 1, and a product, off by half a unit), a scale's reciprocal too, and a value
that close to the border of two codes may be stored as the other.

What each piece costs is counted in the compiler's output, for where FP8 is read and written instructions bound a kernel as soon
as memory: AdamW's in E4M3 beside bf16+8 weights is 72 of them an element long (sm_90). With PyTorch's exact roots and quotients, a
hash an element and a case of its own for small numbers it would be 128.
"""

import triton
import triton.language as tl

from nvfp8 import rounding
from nvfp8.kernels.fp8 import INTERPRETED

BLOCK = tl.constexpr(rounding.BLOCK)
OTHERS = tl.constexpr(rounding.OTHERS)
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
def draw(first, key, COUNT: tl.constexpr):
    """32 random bits (uint32) for each of COUNT elements from `first` on, a multiple of 4: a hash serves four neighbours."""
    return tl.reshape(_four(random_bits(first // 4 + tl.arange(0, COUNT // 4), key)), (COUNT,))


@triton.jit
def draw_tile(first, stride, key, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """As `draw`, for a tile of a matrix: from its element `first` on, rows of `stride` elements, all multiples of 4."""
    quads = first // 4 + tl.arange(0, ROWS)[:, None] * (stride // 4) + tl.arange(0, COLUMNS // 4)[None, :]
    return tl.reshape(_four(random_bits(quads, key)), (ROWS, COLUMNS))


@triton.jit
def _four(bits):
    """Four draws of each hash, on two more axes."""
    second, third, fourth = bits * OTHERS[0], bits * OTHERS[1], bits * OTHERS[2]
    second ^= second >> 15
    third ^= third >> 15
    fourth ^= fourth >> 15
    return tl.join(tl.join(bits, third), tl.join(second, fourth))


@triton.jit
def three(bits):
    """Of one draw (uint32) three, each with 16 random bits on top: a shift and an addition of the first are one instruction."""
    return bits, bits * 0x9E3779B1, bits << 16


@triton.jit
def to_grid(value, bits, FORMAT: tl.constexpr, SQUARED: tl.constexpr):
    """The FP8 numbers that fp32 `value` is rounded to, stochastically.

    Times 2^-120 (E5M2: 2^-112) the format's smallest normal number is fp32's: what is denormal there is denormal here, with steps
    that no longer shrink, so cutting off bits takes one way. The sign stands above all that is added, and stays.
    """
    CUT: tl.constexpr = 23 - FORMAT[0]
    TINY: tl.constexpr = 2.0**-126 / FORMAT[1]
    if SQUARED:  # what is not 0 is at least the smallest number: roots are 2^-63 or more (`square_root`), scales below 2^56
        value = tl.maximum(value, tl.minimum(value * 8.507059173023462e37, FORMAT[2]))  # 2^126
    whole = (value * TINY).to(tl.int32, bitcast=True)
    if SQUARED:
        cut = (whole >> CUT) << CUT
        lower = cut.to(tl.float32, bitcast=True) * (1 / TINY)
        upper = (cut + (1 << CUT)).to(tl.float32, bitcast=True) * (1 / TINY)
        noise = bits.to(tl.float32) * 2.3283064365386963e-10
        square = lower * lower
        return tl.where(noise * (upper * upper - square) < value * value - square, upper, lower)
    whole += (bits >> (32 - CUT)).to(tl.int32)
    return ((whole >> CUT) << CUT).to(tl.float32, bitcast=True) * (1 / TINY)


@triton.jit
def reciprocal(value):
    """1/value, off by 1 unit in the last place; of denormal numbers inf, of those above 2^126 0."""
    if INTERPRETED:
        return 1.0 / value
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [value], tl.float32, is_pure=True, pack=1)


@triton.jit
def square_root(value):
    """√value, and of no other number than 0 is it 0: the GPU's root takes denormal numbers for 0, whose roots are up to 2^-63."""
    result = tl.sqrt(value)
    return tl.where(value > 0, tl.maximum(result, 1.0842021724855044e-19), result)


@triton.jit
def encode(value, bits, ROWS: tl.constexpr, FORMAT: tl.constexpr, ROOT: tl.constexpr):
    """ROWS * BLOCK fp32 numbers -> the same on the FP8 grid, and (ROWS,) scales; lanes beyond a tensor's end must hold 0.

    With ROOT, `value` holds the roots already. Magnitudes are compared as integers, among which NaN is the largest: scales show it.
    """
    magnitudes = value.to(tl.int32, bitcast=True)
    if not ROOT:
        magnitudes &= 0x7FFFFFFF
    scale = tl.max(tl.reshape(magnitudes, (ROWS, BLOCK)), 1).to(tl.float32, bitcast=True) * FORMAT[3]
    normal = scale > 1.1754943508222875e-38
    inverse = tl.where(normal, reciprocal(scale), 0.0)
    scale = tl.where(normal, scale, tl.where(scale < float("inf"), 0.0, scale))
    scaled = tl.reshape(tl.reshape(value, (ROWS, BLOCK)) * inverse[:, None], value.shape)
    return to_grid(scaled, bits, FORMAT, ROOT), scale


@triton.jit
def decode(stored, scale, ROWS: tl.constexpr, ROOT: tl.constexpr):
    """ROWS * BLOCK numbers in FP8 and (ROWS,) scales -> fp32, in the shape they have."""
    value = tl.reshape(stored.to(tl.float32), (ROWS, BLOCK)) * scale[:, None]
    value = tl.reshape(value, stored.shape)
    if ROOT:
        value = value * value
    return value


@triton.jit
def split(value, bits, EXTRA: tl.constexpr):
    """fp32 -> the bits of the nearest bf16 (int32, low half) and a signed remainder of EXTRA bits (0, 8 or 16)."""
    # A GPU's NaN is 0x7FFFFFFF, which would be carried up to -0; below it as integers stands every other number.
    whole = tl.minimum(value.to(tl.int32, bitcast=True), 0x7FC00000).to(tl.uint32, bitcast=True)
    CUT: tl.constexpr = 16 - EXTRA
    if CUT > 0:
        whole += bits >> (32 - CUT)
    top = whole
    if EXTRA > 0:
        top += 0x8000
    # Modulo 2^EXTRA the remainder is what stands below the upper half: a signed number of so many bits is just those bits.
    return (top >> 16).to(tl.int32), (whole >> CUT).to(tl.int32, bitcast=True)


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
    """bf16 bits (int16) and remainder -> fp32; see `nvfp8.rounding.join`."""
    top = weight.to(tl.int32) & 0xFFFF
    if EXTRA > 0:
        remainder = tl.where((top & 0x7FFF) == 0, tl.maximum(remainder, 0), remainder)
    whole = ((top << EXTRA) + remainder.to(tl.int32)) << (16 - EXTRA)
    return whole.to(tl.float32, bitcast=True)
