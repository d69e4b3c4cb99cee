"""Rounding to few bits without losing what is small: stochastically, by block scales, and of weights into two parts.

An average kept in FP8 moves by less than half a step per update, so rounding to nearest never moves it: it freezes. Rounded up
with the probability of the part that is cut off, it moves as it should on average. The random bits are a hash of (key, index):
the same step of the same run rounds alike on every machine, on any number of ranks, in this file and in the Triton kernels
(`nvfp8/kernels/rounding.py` has the same functions), and nothing has to be stored.

FP8 alone spans 2^18 (E4M3) or 2^32 (E5M2) from its smallest to its largest number. A scale for every 128 elements, the block's
largest magnitude over the format's, puts each block's range where its values are.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

BLOCK = 128  # elements that share a scale: fp32 scales are 3 % of one byte an element; half the block would be 6 %

# Exponent of the smallest normal number, bits of mantissa, largest number.
FORMATS = {torch.float8_e4m3fn: (-6, 3, 448.0), torch.float8_e5m2: (-14, 2, 57344.0)}
# A scale is so much larger that its block's largest magnitude, times the scale's rounded reciprocal, is not above the format's.
HEADROOM = 2.0**-20
OTHERS = (0x85EBCA77, 0x27D4EB2F, 0xC2B2AE3D)  # of four neighbours that share a hash (xxHash's primes, but that of `three`)
_MASK = 0xFFFFFFFF


_Word = TypeVar("_Word", int, Tensor)


def mix(value: _Word) -> _Word:
    """Hash 32 bits to 32 bits: every bit of the result depends on every bit of `value` (the constants are Wellons' lowbias32).

    Of an int64 tensor each element.
    """
    value = value & _MASK
    value = value ^ value >> 16
    value = value * 0x7FEB352D & _MASK
    value = value ^ value >> 15
    value = value * 0x846CA68B & _MASK
    return value ^ value >> 16


def key(seed: int, step: int, tensor: int, purpose: int) -> int:
    """The key of one tensor's rounding in one step, 31 bits, so that a kernel takes it as int32 whatever it is."""
    return mix(mix(_begun(seed, step) ^ spread(tensor)) ^ spread(purpose)) & 0x7FFFFFFF


def keys(seeds: Sequence[int], steps: Sequence[int], tensors: Tensor, purposes: Sequence[int]) -> Tensor:
    """The keys of many tensors, each with its seed and step, for each purpose: (tensors, purposes) int64.

    Args:
        seeds: n.
        steps: n.
        tensors: (n,) int64 on the CPU, each already `spread`.
        purposes: as for `key`.
    """
    # A step asks for one or two keys of every tensor: one by one, that is thousands of operations of Python.
    begun = [_begun(seed, step) for seed, step in zip(seeds, steps, strict=True)]
    of_tensors = mix(torch.tensor(begun, device="cpu") ^ tensors)
    return mix(of_tensors[:, None] ^ torch.tensor([spread(purpose) for purpose in purposes], device="cpu")) & 0x7FFFFFFF


@lru_cache(maxsize=64)
def _begun(seed: int, step: int) -> int:
    return mix(mix(spread(seed)) ^ spread(step))


@lru_cache(maxsize=4096)
def spread(part: int) -> int:
    """Hash a part of a key by itself."""
    return mix(part + 0x9E3779B9)


def random_bits(index: Tensor, key: int) -> Tensor:
    """32 random bits for each index.

    Args:
        index: int64, non-negative, below 2^32.
        key: 31 bits.

    Returns:
        int64 in [0, 2^32), shape of `index`.
    """
    value = (index * 0x9E3779B1 + key) & _MASK
    value = value ^ (value >> 16)
    value = (value * 0x7FEB352D) & _MASK
    value = value ^ (value >> 15)
    value = (value * 0x846CA68B) & _MASK
    return value ^ (value >> 16)


def draw(value: Tensor, key: int) -> Tensor:
    """32 random bits for each element of `value`, by its place in memory order: int64 in [0, 2^32), value's shape.

    A hash serves four neighbours, a quarter of the arithmetic: the first takes it as it is, the others times an odd number, with
    the upper half mixed into the lower. Each is as uniform as the hash; what one says of another is a line through 2^32 points.
    """
    count = value.numel()
    bits = random_bits(torch.arange(-(-count // 4), device=value.device), key)
    others = [(bits * odd) & _MASK for odd in OTHERS]
    return torch.stack([bits, *(other ^ (other >> 15) for other in others)], 1).flatten()[:count].view(value.shape)


def three(bits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of one draw three, each with 16 random bits on top: a hash an element is what kernels can afford, not three.

    The halves of a draw share nothing. The third mixes both: whatever one half is, the other makes its upper bits uniform, so
    any two of the three are independent; all three together are not, which no rounding asks for. 16 bits round a bf16 weight
    without bias, and anything else with a bias below 2^-16 of a step.

    Args:
        bits: int64 in [0, 2^32).

    Returns:
        Three of the same kind: the upper half, the mixture, the lower half.
    """
    return bits, (bits * 0x9E3779B1) & _MASK, (bits << 16) & _MASK


def uniform(bits: Tensor) -> Tensor:
    """Random bits as fp32 in [0, 1]."""
    return bits.float() * 2.0**-32


def to_grid(value: Tensor, dtype: torch.dtype, bits: Tensor | None, squared: bool = False) -> Tensor:
    """The numbers of an FP8 format that `value` is rounded to.

    Cutting off the low bits of an fp32 number rounds it down to the format's mantissa; random bits added there before carry it up
    as often as they should. Below the format's smallest normal number steps no longer shrink. Added to that number, values
    have just those steps, so both ranges take one way, which is a few integer instructions in a kernel.

    Args:
        value: fp32, at most the format's largest number in magnitude; NaN and inf become NaN.
        dtype: a key of FORMATS.
        bits: of `draw`, value's shape. None rounds to nearest, ties up.
        squared: the square of the result, not the result, is right on average (for second moments kept as roots, not negative);
            but what is not 0 never becomes 0, for the step of a weight is divided by it.

    Returns:
        fp32, exact in `dtype`.
    """
    smallest, mantissa, _ = FORMATS[dtype]
    cut = 23 - mantissa  # bits
    magnitude = value.abs()
    shift = torch.where(magnitude < 2.0**smallest, 2.0**smallest, 0.0)
    whole = (magnitude + shift).view(torch.int32)
    if squared and bits is not None:
        lower = (whole >> cut << cut).view(torch.float32) - shift
        step = ((whole & 0x7F800000) - (mantissa << 23)).view(torch.float32)
        up = (uniform(bits) * (step * (2 * lower + step)) < value * value - lower * lower) | ((lower == 0) & (value > 0))
        rounded = torch.where(up, lower + step, lower)
    else:
        added = 1 << cut - 1 if bits is None else (bits >> 32 - cut).to(torch.int32)
        rounded = (whole + added >> cut << cut).view(torch.float32) - shift
    return torch.where(value.isfinite(), rounded.copysign(value), torch.nan)


def square_root(value: Tensor) -> Tensor:
    """√value (fp32, not negative), at least 2^-63 but of 0: what kernels make of denormal numbers is not the CPU's."""
    result = value.sqrt()
    return torch.where(value > 0, result.clamp_min(2.0**-63), result)


def encode(value: Tensor, dtype: torch.dtype, bits: Tensor | None, root: bool) -> tuple[Tensor, Tensor]:
    """Store fp32 numbers as FP8 with a scale for every block.

    Args:
        value: (n,) fp32; with `root` not negative.
        dtype: a key of FORMATS.
        bits: (n,) of `draw`, or None for rounding to nearest.
        root: store square roots, which spans twice the exponents: for second moments.

    Returns:
        (n,) in `dtype`, and (⌈n / BLOCK⌉,) fp32 scales; a block of zeros has scale 0, one with NaN or inf has that.
    """
    count = len(value)
    blocks = torch.nn.functional.pad(square_root(value) if root else value, (0, -count % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1) * ((1 + HEADROOM) / FORMATS[dtype][2])
    # Multiplied by a reciprocal, as the kernels do; a scale so small that it has none is of a block that is as good as zero.
    inverse = torch.where(scale > 2.0**-126, 1 / scale, 0.0)
    scale = torch.where(scale > 2.0**-126, scale, torch.where(scale.isfinite(), 0.0, scale))
    return to_grid((blocks * inverse[:, None]).view(-1)[:count], dtype, bits, squared=root).to(dtype), scale


def decode(stored: Tensor, scale: Tensor, root: bool) -> Tensor:
    """What `encode` stored, (n,) fp32."""
    value = stored.float() * scale.repeat_interleave(BLOCK)[: len(stored)]
    return value * value if root else value


def split(value: Tensor, remainder: torch.dtype | None, bits: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Store fp32 weights as bf16, with none, 8 or 16 bits of what bf16 cuts off.

    The bf16 part is the nearest bf16 number of the whole (ties away from zero), so it can be computed with as it is. Whatever
    the remainder does not hold is rounded stochastically; 16 bits hold all of it.

    Args:
        value: fp32. NaN becomes the NaN whose low bits are 0: carried up, others would come out as −0.
        remainder: None, torch.int8 or torch.int16.
        bits: random int64 in [0, 2^32), value's shape; None rounds to nearest. Not used with int16.

    Returns:
        bf16, and the signed remainder or None.
    """
    whole = torch.where(value.isnan(), 0x7FC00000, value.view(torch.int32).to(torch.int64) & _MASK)
    kept = {None: 16, torch.int8: 24, torch.int16: 32}[remainder]
    cut = 32 - kept  # bits that are rounded away
    if cut:
        whole = whole + (1 << (cut - 1) if bits is None else bits >> (32 - cut))
    whole = whole >> cut
    extra = kept - 16
    top = whole + ((1 << extra) >> 1) >> extra
    weight = _signed(top & 0xFFFF, 16).to(torch.int16).view(torch.bfloat16)
    if remainder is None:
        return weight, None
    return weight, (whole - (top << extra)).to(remainder)


def join(weight: Tensor, remainder: Tensor | None) -> Tensor:
    """The fp32 value that `split` stored.

    It leaves nothing negative beside 0, which would be taken from the exponent and make NaN. Where a user set a weight to 0, what
    is left beside it counts as 0 then.
    """
    if remainder is None:
        return weight.float()
    extra = 8 * remainder.element_size()
    top = weight.view(torch.int16).to(torch.int64) & 0xFFFF
    remainder = torch.where(top & 0x7FFF == 0, remainder.clamp_min(0), remainder)
    whole = ((top << extra) + remainder.to(torch.int64) << (16 - extra)) & _MASK
    return _signed(whole, 32).to(torch.int32).view(torch.float32)


def _signed(value: Tensor, bits: int) -> Tensor:
    return value - ((value >> (bits - 1)) << bits)
