"""The twins of the optimizers' kernels; `nvfp8/reference.py` says what a twin is, and offers these beside its own.

State and weights are decoded to fp32 (fp64 for fp64 input), updated, and encoded as `nvfp8/rounding.py` does. What is rounded
stochastically takes one key a matrix, and each element's position inside its matrix: neither the order of matrices in a stack nor
the way a stack is cut into chunks changes a bit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nvfp8 import rounding


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _bits(keys: Sequence[int] | None, matrix: int, like: Tensor) -> Tensor:
    assert keys is not None, "what is rounded stochastically needs a key for each matrix"
    return rounding.random_bits(torch.arange(like.numel(), device=like.device), keys[matrix]).view(like.shape)


def muon_nesterov_(
    gradients: Sequence[Tensor], momentum: Tensor, scales: Tensor | None, x: Tensor, take: float, mu: float,
    keys: Sequence[int] | None = None,
) -> None:  # fmt: skip
    """Momentum of n matrices of one shape, and their Nesterov gradient: m ← m + take·(g − m), x = g + mu·(m − g).

    x sees the momentum before it is rounded to be stored.

    Args:
        gradients: n of (r, c), any floats.
        momentum: (n, r, c), in the dtype it is stored in; updated.
        scales: (n, ⌈rc / 128⌉) fp32 where the momentum is FP8, else None; updated.
        x: (n, r, c); written.
        take: 1 − mu, exact.
        mu: μ.
        keys: n of 31 bits, for FP8.
    """
    for i, (grad, stored, out) in enumerate(zip(gradients, momentum, x, strict=True)):
        g = _wide(grad)
        m = _wide(stored) if scales is None else rounding.decode(stored.flatten(), scales[i], root=False).view(g.shape)
        m = m + take * (g - m)
        if scales is None:
            stored.copy_(m)
        else:
            noise = rounding.uniform(_bits(keys, i, m)).flatten()
            data, scale = rounding.encode(m.flatten(), momentum.dtype, noise, root=False)
            stored.copy_(data.view(m.shape))
            scales[i] = scale
        out.copy_(g + mu * (m - g))


def muon_descend_(
    weights: Sequence[Tensor], kept: Tensor | None, x: Tensor, scale: Tensor, lr: float, lr_wd: float,
    keys: Sequence[int] | None = None,
) -> None:  # fmt: skip
    """One step of n matrices along u = x·scale, decayed where u pulls the same way: w ← w − lr·u − lr_wd·w [u·w ≥ 0].

    Args:
        weights: n of (r, c), of one dtype; stepped.
        kept: (n, r, c), what is kept beside bf16 weights: fp32 masters, of which the weights become the rounded copy; int8 or
            int16 remainders of `rounding.split`. None: the weights are all there is, and bf16 is rounded stochastically.
        x: (n, r, c), any float.
        scale: (n, r, 1) or (n, 1, c) fp32.
        lr: learning rate.
        lr_wd: learning rate times weight decay.
        keys: n of 31 bits, for bf16 with int8 or nothing beside it.
    """
    for i, weight in enumerate(weights):
        beside = None if kept is None else kept[i]
        whole = weight if beside is None or beside.is_floating_point() else None  # not to be joined from two parts
        if beside is not None and beside.is_floating_point():
            whole = beside
        w = rounding.join(weight, beside) if whole is None else _wide(whole)
        u = _wide(x[i]) * scale[i]
        value = w - lr * u - lr_wd * w * (u * w >= 0)
        if beside is not None and beside.is_floating_point():
            beside.copy_(value)
            weight.copy_(value)
        elif weight.dtype != torch.bfloat16:
            weight.copy_(value)
        else:
            remainder = None if beside is None else beside.dtype
            bits = None if remainder is torch.int16 else _bits(keys, i, value)
            upper, lower = rounding.split(value, remainder, bits)
            weight.copy_(upper)
            if beside is not None and lower is not None:
                beside.copy_(lower)


def symmetric_product_(
    a: Tensor, b: Tensor, out: Tensor, alpha: float = 1.0, c: Tensor | None = None, beta: float = 0.0, diagonal: float = 0.0
) -> None:
    """out = α·a·bᵀ + β·c + δ·I, of which the caller knows that it is symmetric: only the upper half is computed.

    Args:
        a: (n, m, k), any strides.
        b: (n, m, k), any strides; a itself, or such that a·bᵀ is symmetric (as for two symmetric matrices that commute).
        out: (n, m, m); written, exactly symmetric. None of the operands.
        alpha: α.
        c: (n, m, m) symmetric, or None.
        beta: β.
        diagonal: δ.
    """
    value = alpha * (_wide(a) @ _wide(b).mT)
    if c is not None:
        value = value + beta * _wide(c)
    value.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    out.copy_(value.triu() + value.triu(1).mT)
