"""How optimizer state and weights lie in memory between two steps; an optimizer's math is fp32 and knows nothing of it.

State: `Codec`. fp32 and bf16 are plain numbers; e4m3 and e5m2 are FP8 with an fp32 scale for every 128 elements. All but fp32 are
rounded stochastically (`nvfp8/rounding.py` says why): to nearest, even a bf16 average stands still where β is over 0.996. A second
moment spans many more orders of magnitude than a first, so in FP8 its square root is kept: E4M3's 2^18 become 2^36, with steps of
at most 1/4. (COAT, arXiv 2410.19313, expands the range with a power chosen for each block; the fixed power 1/2 needs no second
scale and no logarithm.) Roots that are not 0 are never rounded to 0: a weight whose second moment vanished would move by its first
over eps.

Weights: `Master`. Beside bf16 weights, which layers compute with, what bf16 cuts off: nothing, a byte, or 16 bits, which make the
weight exact fp32; or a whole fp32 copy. What is not kept is rounded stochastically, so updates far below bf16's spacing add up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nvfp8 import rounding


class Stored(NamedTuple):
    """One tensor of state.

    Attributes:
        data: the state's shape.
        scale: fp32, one for each block of 128 consecutive elements; None where the codec has none. Of a stack (n, …) each
            of the n tensors has its own blocks: (n, blocks).
    """

    data: Tensor
    scale: Tensor | None


@dataclass(frozen=True)
class Codec:
    """How one kind of state is stored.

    Attributes:
        name: what a user writes to choose it.
        dtype: of the stored numbers.
        root: whether square roots are stored; for second moments in FP8.
    """

    name: str
    dtype: torch.dtype
    root: bool = False

    @property
    def blocked(self) -> bool:
        """Whether blocks have scales."""
        return self.dtype in rounding.FORMATS

    def allocate(self, shape: Sequence[int], device: torch.device | str, stacked: bool = False) -> Stored:
        """Zeros of `shape`, stored; `stacked` if the first axis counts tensors."""
        data = torch.zeros(tuple(shape), dtype=self.dtype, device=device)
        if not self.blocked:
            return Stored(data, None)
        tensors = shape[0] if stacked else 1
        blocks = -(-(data.numel() // max(1, tensors)) // rounding.BLOCK)
        scale = torch.zeros((tensors, blocks) if stacked else (blocks,), dtype=torch.float32, device=device)
        return Stored(data, scale)

    def decode(self, stored: Stored) -> Tensor:
        """One tensor's state in fp32, its shape. It may be `stored.data` itself: read it, do not write it."""
        if stored.scale is None:
            return stored.data.float()
        return rounding.decode(stored.data.flatten(), stored.scale, self.root).view(stored.data.shape)

    def smallest(self, stored: Stored) -> Tensor | None:
        """The number next to 0 that each element could have been stored as, fp32, the shape of `data`; None without scales."""
        if stored.scale is None:
            return None
        smallest, mantissa, _ = rounding.FORMATS[self.dtype]
        each = stored.scale.repeat_interleave(rounding.BLOCK)[: stored.data.numel()]
        return (each * 2.0 ** (smallest - mantissa)).view(stored.data.shape)

    def encode_(self, stored: Stored, value: Tensor, bits: Tensor | None) -> None:
        """Write fp32 `value` into `stored`, in place.

        Args:
            stored: as `allocate` made it.
            value: its shape.
            bits: of `rounding.draw`; None rounds to nearest, as fp32 state always is.
        """
        if stored.scale is None:
            stored.data.copy_(value if bits is None or self.dtype == torch.float32 else rounding.split(value, None, bits)[0])
            return
        flat = value.flatten()
        data, scale = rounding.encode(flat, self.dtype, None if bits is None else bits.flatten(), self.root)
        stored.data.copy_(data.view(stored.data.shape))
        stored.scale.copy_(scale)


STATE_DTYPES = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2,
}  # fmt: skip


def codec(name: str, second_moment: bool = False) -> Codec:
    """The codec called `name`.

    Args:
        name: a key of STATE_DTYPES.
        second_moment: in FP8, keep square roots.

    Raises:
        ValueError: there is none of that name; the message lists those that exist.
    """
    if name not in STATE_DTYPES:
        raise ValueError(f"no optimizer state codec is called {name!r}; there are {', '.join(STATE_DTYPES)}")
    dtype = STATE_DTYPES[name]
    return Codec(name, dtype, second_moment and dtype in rounding.FORMATS)


def codec_of(dtype: torch.dtype, second_moment: bool = False) -> Codec:
    """The codec whose numbers are of `dtype`: what a stored tensor was written with.

    Raises:
        ValueError: there is none; the message lists the dtypes that have one.
    """
    for name, stored in STATE_DTYPES.items():
        if stored == dtype:
            return codec(name, second_moment)
    raise ValueError(f"no optimizer state codec stores {dtype}; there are codecs for {', '.join(map(str, STATE_DTYPES.values()))}")


@dataclass(frozen=True)
class Master:
    """What is kept of a weight beside the bf16 number that layers compute with.

    Attributes:
        name: what a user writes to choose it.
        dtype: of the tensor kept beside the weight; None keeps nothing.
    """

    name: str
    dtype: torch.dtype | None

    def allocate(self, parameter: Tensor) -> Tensor | None:
        """What is kept beside `parameter` as it is now; nothing beside fp32, which is whole."""
        if parameter.dtype == torch.float32 or self.dtype is None:
            return None
        if self.dtype == torch.float32:
            return parameter.detach().float()
        return torch.zeros_like(parameter, dtype=self.dtype, requires_grad=False)


# "fp32" is a copy, the others are remainders of `rounding.split`.
MASTERS = {
    master.name: master
    for master in (
        Master("fp32", torch.float32), Master("bf16", None), Master("bf16+8", torch.int8), Master("bf16+16", torch.int16)
    )
}  # fmt: skip


def master(name: str) -> Master:
    """The master format called `name`.

    Raises:
        ValueError: there is none of that name; the message lists those that exist.
    """
    if name not in MASTERS:
        raise ValueError(f"no master weights are called {name!r}; there are {', '.join(MASTERS)}")
    return MASTERS[name]


def read_weight(parameter: Tensor, rest: Tensor | None) -> Tensor:
    """A weight in fp32, from itself and what is kept beside it. It may be one of the two: read it, do not write it.

    Where a bf16 weight is not the rounding of its fp32 copy, it has been written since, and counts itself.
    """
    if rest is None:
        return parameter.float()
    if rest.dtype != torch.float32:
        return rounding.join(parameter, rest)
    return torch.where(parameter == rest.to(parameter.dtype), rest, parameter.float())


def write_weight(parameter: Tensor, rest: Tensor | None, value: Tensor, bits: Tensor | None) -> None:
    """Store fp32 `value` as a weight and what is kept beside it, in place.

    Args:
        parameter: fp32 or bf16.
        rest: as `Master.allocate` made it.
        value: the parameter's shape.
        bits: of `rounding.draw`, for the rounding of what is not kept; None rounds to nearest. Beside fp32 copies they are
            not used.
    """
    if parameter.dtype == torch.float32 or (rest is None and bits is None):
        parameter.copy_(value)
        return
    if rest is not None and rest.dtype == torch.float32:
        rest.copy_(value)
        parameter.copy_(value)
        return
    weight, remainder = rounding.split(value.contiguous(), None if rest is None else rest.dtype, bits)
    parameter.copy_(weight)
    if rest is not None and remainder is not None:
        rest.copy_(remainder)
