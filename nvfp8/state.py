"""Codecs: how one tensor of optimizer state lies in memory between two steps.

An optimizer does its math in fp32 and only stores low. So the update and the storage are kept apart: the update asks a
codec for fp32 values, and hands fp32 values back. A codec is frozen data without state of its own, so it can be passed
into a compiled function, where decode and encode fuse with the math into one pass over memory. A Triton kernel cannot call it
and goes by the dtype of what is stored, which says the same of these codecs (`nvfp8/kernels/muon.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Codec:
    """State kept as plain numbers of one floating dtype, rounded to nearest.

    Attributes:
        name: what a user writes to choose it.
        dtype: of the stored tensor.
    """

    name: str
    dtype: torch.dtype

    def allocate(self, shape: Sequence[int], device: torch.device | str) -> Tensor:
        """Return the stored form of zeros of `shape`, on `device`."""
        return torch.zeros(tuple(shape), dtype=self.dtype, device=device)

    def decode(self, stored: Tensor) -> Tensor:
        """Return `stored` as fp32, same shape. It may be `stored` itself: read it, do not write it."""
        return stored.float()

    def encode_(self, stored: Tensor, value: Tensor) -> None:
        """Write fp32 `value` into `stored`, in place; same shape."""
        stored.copy_(value)


_CODECS = {c.name: c for c in (Codec("fp32", torch.float32), Codec("bf16", torch.bfloat16))}


def codec(name: str) -> Codec:
    """Return the codec called `name`.

    Raises:
        ValueError: there is none of that name; the message lists those that exist.
    """
    if name not in _CODECS:
        raise ValueError(f"no optimizer state codec is called {name!r}; there are {', '.join(_CODECS)}")
    return _CODECS[name]


def codec_of(dtype: torch.dtype) -> Codec:
    """Return the codec that stores plain `dtype`.

    Raises:
        ValueError: no codec does; the message lists the dtypes that have one.
    """
    for candidate in _CODECS.values():
        if candidate.dtype == dtype:
            return candidate
    known = ", ".join(str(c.dtype) for c in _CODECS.values())
    raise ValueError(f"no optimizer state codec stores {dtype}; there are codecs for {known}")
