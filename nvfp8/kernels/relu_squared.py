"""relu² in place, and its gradient from its output in place: one read and one write of what must be touched.

Written over their input, the MLP's hidden tensor and its gradient (the largest of a block) exist once instead of twice.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # elements a program


@triton.jit
def _relu_squared_forward(HIDDEN, SIZE, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    positive = tl.maximum(tl.load(HIDDEN + at, at < SIZE, 0.0).to(tl.float32), 0.0)
    tl.store(HIDDEN + at, (positive * positive).to(HIDDEN.dtype.element_ty), at < SIZE)


@triton.jit
def _relu_squared_backward(D_ACTIVATED, ACTIVATED, SIZE, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gradient = tl.load(D_ACTIVATED + at, at < SIZE, 0.0).to(tl.float32)
    root = tl.sqrt(tl.load(ACTIVATED + at, at < SIZE, 0.0).to(tl.float32))
    tl.store(D_ACTIVATED + at, (gradient * 2 * root).to(D_ACTIVATED.dtype.element_ty), at < SIZE)


def relu_squared_(hidden: Tensor) -> Tensor:
    """See `nvfp8.reference.relu_squared_`; `hidden` must be contiguous."""
    assert hidden.is_contiguous(), "relu_squared_ works in place on contiguous memory"
    _relu_squared_forward[(triton.cdiv(hidden.numel(), BLOCK),)](hidden, hidden.numel(), BLOCK=BLOCK, num_warps=8)
    return hidden


def relu_squared_backward_(d_activated: Tensor, activated: Tensor) -> Tensor:
    """See `nvfp8.reference.relu_squared_backward_`; both must be contiguous."""
    assert d_activated.is_contiguous() and activated.is_contiguous(), "relu_squared_backward_ works on contiguous memory"
    grid = (triton.cdiv(activated.numel(), BLOCK),)
    _relu_squared_backward[grid](d_activated, activated, activated.numel(), BLOCK=BLOCK, num_warps=8)
    return d_activated
