"""The twins of the optimizers' kernels; `nvfp8/reference.py` says what a twin is, and offers these beside its own.

They decode whole tensors to fp32 (fp64 for fp64 input) and encode them again, which the kernels do in registers; but for a
GPU's roots and quotients (`nvfp8/kernels/rounding.py`) and its fused multiply-adds every number is the same. What is rounded
stochastically takes one key a matrix, and each element's position inside its matrix: neither the order of matrices in a stack nor
the way a stack is cut into chunks changes a bit.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nvfp8.reference_fp8 import quantize
from nvfp8.rounding import FORMATS, draw, square_root, three
from nvfp8.state import Stored, codec_of, read_weight, write_weight


class Copies(NamedTuple):
    """Where a matrix (r, c) is written in FP8 once it has been updated: what its layer's GEMMs read.

    Attributes:
        q: (r, c) contiguous FP8: its rows of a stacked weight's copy.
        t: (c, r) FP8, columns side by side: its columns of the transpose.
        scale: 0-D fp32, multiplies.
        amax: 0-D fp32, raised to the largest magnitude of what is stored of the matrix.
    """

    q: Tensor
    t: Tensor
    scale: Tensor
    amax: Tensor


def _write_copies(weight: Tensor, copies: Copies | None) -> None:
    if copies is not None:
        q, t = quantize(weight, copies.scale, copies.q.dtype, copies.amax, rows=True, columns=True)
        assert q is not None and t is not None
        copies.q.copy_(q)
        copies.t.copy_(t)


class AdamWTensor(NamedTuple):
    """One tensor in one step of AdamW.

    Attributes:
        parameter: fp32 or bf16, contiguous.
        gradient: any float, as many elements.
        exp_avg: the first moment m, of the parameter's shape; the codec is known by the dtype.
        exp_avg_sq: the second moment v; in FP8 its square root.
        rest: what is kept beside the parameter, as `nvfp8.state.Master` says, or None.
        numbers: (8,) fp32, where the parameter is: what changes from step to step. The bits of an int32 key (31 bits; with an
            element's place it decides how m, v and the parameter are rounded), 1 − β₁, 1 − β₂, lr / (1 − β₁ᵗ), 1 / (1 − β₂ᵗ),
            eps, 1 − lr·wd, and the root of 1 / (1 − β₂ᵗ). Differences from 1 come exact to fp32.
        stochastic: whether bf16 is, too, or to nearest, as a parameter beside an fp32 master always is.
        copies: where the parameter, a matrix with 128 dividing its rows, is written in FP8 too, or None.
    """

    parameter: Tensor
    gradient: Tensor
    exp_avg: Stored
    exp_avg_sq: Stored
    rest: Tensor | None
    numbers: Tensor
    stochastic: bool
    copies: Copies | None = None


def adamw_(tensors: Sequence[AdamWTensor], plans: dict[Any, Tensor] | None = None) -> None:
    """One step of AdamW for many tensors, in place; `nvfp8/optim/adamw.py` has the formula.

    Where m is FP8, √v counts as no less than the number next to 0 that m could have been stored as. An m far below it is rounded
    up to it now and then, and beside a √v that is as small as the true m that would make a step of thousands of lr.

    Args:
        tensors: all on one device.
        plans: where kernels keep what they have worked out of sizes, for the same tensors' next step; the twin needs nothing.
    """
    for t in tensors:
        _, take1, take2, step_size, unbias2, eps, keep, root_unbias2 = t.numbers.tolist()
        first, second = codec_of(t.exp_avg.data.dtype), codec_of(t.exp_avg_sq.data.dtype, second_moment=True)
        g = t.gradient.reshape(t.parameter.shape).float()
        m, least = first.decode(t.exp_avg), first.smallest(t.exp_avg)
        m = m + take1 * (g - m)
        v = second.decode(t.exp_avg_sq)
        v = v + take2 * (g * g - v)
        value = read_weight(t.parameter, t.rest)
        if second.root:  # the root is at hand
            root = square_root(v) if least is None else torch.maximum(square_root(v), least)
            root = root * root_unbias2
        else:
            root = square_root((v if least is None else torch.maximum(v, least * least)) * unbias2)
        value = value * keep - step_size * (m / (root + eps))
        for_first, for_weight, for_second = three(draw(value, int(t.numbers.view(torch.int32)[0])))
        for codec, stored, moment, bits in ((first, t.exp_avg, m, for_first), (second, t.exp_avg_sq, v, for_second)):
            codec.encode_(stored, moment, bits if t.stochastic or codec.blocked else None)
        write_weight(t.parameter, t.rest, value, for_weight if t.stochastic else None)
        _write_copies(t.parameter, t.copies)


def adamw_prepared(tensors: Sequence[AdamWTensor], plans: dict[Any, Tensor] | None = None) -> Callable[[], None]:
    """`adamw_` to be called any number of times, with what is in the same tensors then; kernels get all but launches done here."""
    return lambda: adamw_(tensors, plans)


def addressed(tensors: Sequence[Tensor], copies: Sequence[Copies | None] | None = None) -> Sequence[Tensor]:
    """Matrices, with their FP8 copies, that Muon's passes will be given again and again: of kernels, with a table of addresses."""
    return tensors


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _nesterov(
    gradient: Tensor, stored: Tensor, scales: Tensor | None, take: float | Tensor, mu: float | Tensor
) -> tuple[Tensor, Tensor]:
    """The momentum m ← m + take·(g − m) before it is rounded to be stored, and the Nesterov gradient x = g + mu·(m − g)."""
    g = _wide(gradient)
    m = _wide(stored) if scales is None else codec_of(stored.dtype).decode(Stored(stored, scales))
    m = m + take * (g - m)
    return m, g + mu * (m - g)


def muon_nesterov_(
    gradients: Sequence[Tensor], momentum: Tensor, scales: Tensor | None, x: Tensor, take: float | Tensor, mu: float | Tensor,
    keys: Sequence[int] | Tensor | None = None, rows: Tensor | None = None, factor: float = 1.0,
) -> None:  # fmt: skip
    """Momentum of n matrices of one shape, and their Nesterov gradient: m ← m + take·(g − m), x = g + mu·(m − g).

    x sees the momentum before it is rounded to be stored.

    Args:
        gradients: n of (r, c), any floats.
        momentum: (n, r, c), in the dtype it is stored in; updated.
        scales: (n, ⌈rc / 128⌉) fp32 where the momentum is FP8, else None; updated.
        x: (n, r, c); written.
        take: 1 − mu, exact to fp32. It and mu are numbers, or 0-D fp32 on x's device, where a launch that is repeated finds others.
        mu: μ.
        keys: n of 31 bits, for FP8 and bf16; or (n,) int32 on x's device.
        rows: (n, r, 1) fp32, by which the rows of x are multiplied on their way, or None for ones.
        factor: of all of x, where there are `rows`.
    """
    drawn = momentum.dtype in (torch.bfloat16, *FORMATS)
    assert not drawn or keys is not None, "what is rounded stochastically needs a key for each matrix"
    for i, (grad, stored, out) in enumerate(zip(gradients, momentum, x, strict=True)):
        scale = None if scales is None else scales[i]
        m, value = _nesterov(grad, stored, scale, take, mu)
        if drawn and keys is not None:
            codec_of(stored.dtype).encode_(Stored(stored, scale), m.float(), draw(m, int(keys[i])))
        else:
            stored.copy_(m)
        out.copy_(value if rows is None else value * (rows[i] * factor))


def equilibrating_scale(
    gradients: Sequence[Tensor], momentum: Tensor, scales: Tensor | None, take: float | Tensor, mu: float | Tensor
) -> Tensor:
    """What brings the rows of x to equal norm, and the whole to norm 1/1.01 (arXiv 2603.28254); arguments as of `muon_nesterov_`.

    x is what that is to write: to be called before it, for it changes the momentum.

    Returns:
        (n, r, 1) fp32.
    """
    every = [
        _nesterov(g, m, None if scales is None else scales[i], take, mu)[1]
        for i, (g, m) in enumerate(zip(gradients, momentum, strict=True))
    ]
    row_norm: Tensor = torch.linalg.vector_norm(torch.stack(every), dim=-1, keepdim=True, dtype=torch.float32)  # (n, r, 1)
    unit = 1 / row_norm.clamp_min(1e-6)
    rms = torch.linalg.vector_norm(row_norm, dim=-2, keepdim=True) / math.sqrt(row_norm.size(-2))  # (n, 1, 1)
    norm = rms * torch.linalg.vector_norm(row_norm * unit, dim=-2, keepdim=True)  # of the scaled matrix
    scale: Tensor = rms * unit / (1.01 * norm + 1e-6)
    return scale


def normuon_scale(x: Tensor, second_moment: Tensor, take: float | Tensor) -> Tensor:
    """What x is to be multiplied by: each row or column over the root of an average mean square, the norm √min(r, c).

    NorMuon (arXiv 2510.05491) keeps the norm, which before is set to √min(r, c) (arXiv 2602.21545). Both need no more of x than
    sums of squares over one axis.

    Args:
        x: (n, r, c), as Polar Express left it.
        second_moment: (n, r, 1) or (n, 1, c) fp32, an EMA of mean squares; updated.
        take: 1 − β₂ of the EMA, exact to fp32; a number, or 0-D fp32 on x's device.

    Returns:
        fp32, of second_moment's shape.
    """
    axis = -1 if second_moment.size(-1) == 1 else -2
    square = torch.linalg.vector_norm(x, dim=axis, keepdim=True, dtype=torch.float32).square()
    to_norm = math.sqrt(min(x.shape[-2:])) / square.sum(dim=(-2, -1), keepdim=True).sqrt().clamp_min(1e-6)
    square = square * to_norm.square()
    second_moment.lerp_(square / x.size(axis), take)
    root = second_moment.clamp_min(1e-10).rsqrt()
    before = square.sum(dim=(-2, -1), keepdim=True).sqrt()
    after = (square * root.square()).sum(dim=(-2, -1), keepdim=True).sqrt().clamp_min(1e-10)
    scale: Tensor = to_norm * root * (before / after)
    return scale


def muon_descend_(
    weights: Sequence[Tensor], kept: Tensor | None, x: Tensor, scale: Tensor, lr: float | Tensor, lr_wd: float | Tensor,
    keys: Sequence[int] | Tensor | None = None, copies: Sequence[Copies | None] | None = None,
) -> None:  # fmt: skip
    """One step of n matrices along u = x·scale, decayed where u pulls the same way: w ← w − lr·u − lr_wd·w [u·w ≥ 0].

    Args:
        weights: n of (r, c), of one dtype; stepped.
        kept: (n, r, c), what `nvfp8.state.Master` keeps beside bf16 weights: fp32 copies, int8 or int16 remainders. None: the
            weights are all there is, and bf16 is rounded stochastically.
        x: (n, r, c), as Polar Express left it.
        scale: (n, r, 1) or (n, 1, c) fp32.
        lr: learning rate; it and lr_wd are numbers, or 0-D fp32 on x's device.
        lr_wd: learning rate times weight decay.
        keys: n of 31 bits, for bf16 with int8 or nothing beside it; or (n,) int32 on x's device.
        copies: where each matrix is written in FP8 too, all in one format; None for those, or for all, that are not.
    """
    drawn = weights[0].dtype == torch.bfloat16 and (kept is None or kept.dtype == torch.int8)
    assert not drawn or keys is not None, "what is rounded stochastically needs a key for each matrix"
    for i, weight in enumerate(weights):
        beside = None if kept is None else kept[i]
        w = weight if weight.dtype == torch.float64 else read_weight(weight, beside)
        u = _wide(x[i]) * scale[i]
        value = w - lr * u - lr_wd * w * (u * w >= 0)
        write_weight(weight, beside, value, draw(value, int(keys[i])) if drawn and keys is not None else None)
        _write_copies(weight, None if copies is None else copies[i])


# By what `symmetric_product_` multiplies a rest. A rounding to fp16 takes off 2⁻¹¹ at most, so that is as large as what is kept.
REST = 2.0**11


def symmetric_product_(
    a: Tensor, b: Tensor, out: Tensor, alpha: float = 1.0, c: Tensor | None = None, beta: float = 0.0, diagonal: float = 0.0,
    rest: Tensor | None = None,
) -> None:  # fmt: skip
    """Write α·a·bᵀ + β·c + δ·I, of which the caller knows that it is symmetric: the upper half counts.

    Args:
        a: (n, m, k), any strides.
        b: (n, m, k), any strides; a itself, or such that a·bᵀ is symmetric (as for two symmetric matrices that commute).
        out: (n, m, m); written, exactly symmetric. None of the operands.
        alpha: α.
        c: (n, m, m) symmetric, or None.
        beta: β.
        diagonal: δ.
        rest: (n, m, m); written, exactly symmetric: REST times what `out`'s rounding took off. None if nobody asks for it.
    """
    value = alpha * (_wide(a) @ _wide(b).mT)
    if c is not None:
        value = value + beta * _wide(c)
    value.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    value = value.triu() + value.triu(1).mT
    out.copy_(value)
    if rest is not None:
        rest.copy_(REST * (value - _wide(out)))


def polar_express_(x: Tensor, steps: tuple[float, ...]) -> Tensor:
    """Polar Express in place, rounded only at its end: X ← aX + (bA + cA²)X with A = XXᵀ.

    Args:
        x: (n, r, c), each of norm at most 1; overwritten.
        steps: a, b, c of each step, one behind the other.

    Returns:
        `x`.
    """
    value = _wide(x)
    for a, b, c in zip(steps[::3], steps[1::3], steps[2::3], strict=True):
        gram = value @ value.mT
        value = a * value + (b * gram + c * gram @ gram) @ value
    return x.copy_(value)
