"""The PyTorch twins of the optimizers' kernels: `nvfp8.reference` hands them on beside the others.

They decode whole tensors to fp32 and encode them again, which the kernels do in registers; every number is the same.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from nvfp8.state import Stored, codec_of, read_weight, write_weight


class AdamWTensor(NamedTuple):
    """One tensor in one step of AdamW.

    Attributes:
        parameter: fp32 or bf16, contiguous.
        gradient: any float, as many elements.
        exp_avg: the first moment m, of the parameter's shape; the codec is known by the dtype.
        exp_avg_sq: the second moment v; in FP8 its square root.
        rest: what is kept beside the parameter, as `nvfp8.state.Master` says, or None.
        factors: 1 − β₁, 1 − β₂, lr / (1 − β₁ᵗ), 1 / (1 − β₂ᵗ), eps, 1 − lr·wd: differences from 1 come exact to fp32.
        keys: of the rounding of m, v and the parameter, 31 bits each; those of moments count in FP8 only. None for the
            parameter rounds it to nearest.
    """

    parameter: Tensor
    gradient: Tensor
    exp_avg: Stored
    exp_avg_sq: Stored
    rest: Tensor | None
    factors: tuple[float, float, float, float, float, float]
    keys: tuple[int, int, int | None]


def adamw_(tensors: Sequence[AdamWTensor]) -> None:
    """One step of AdamW for many tensors, in place; `nanochat/adamw.py` has the formula."""
    for t in tensors:
        take1, take2, step_size, unbias2, eps, keep = t.factors
        first, second = codec_of(t.exp_avg.data.dtype), codec_of(t.exp_avg_sq.data.dtype, second_moment=True)
        g = t.gradient.reshape(t.parameter.shape).float()
        m = first.decode(t.exp_avg)
        m = m + take1 * (g - m)
        v = second.decode(t.exp_avg_sq)
        v = v + take2 * (g * g - v)
        value = read_weight(t.parameter, t.rest)
        value = value * keep - step_size * (m / ((v * unbias2).sqrt() + eps))
        first.encode_(t.exp_avg, m, t.keys[0])
        second.encode_(t.exp_avg_sq, v, t.keys[1])
        write_weight(t.parameter, t.rest, value, t.keys[2])
