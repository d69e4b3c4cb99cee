"""Polar Express of small matrices: all five steps in registers, one program a matrix, one launch for all.

The gates' matrices, 12 columns wide, are nothing to compute; but by `torch.bmm` they are 15 launches, as many as a whole batch of
large ones takes, and the host pays for launches. A program pads its matrix with zeros, which stay zeros, and multiplies in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["ROWS", "COLUMNS"])
def _polar_express(X, ROWS, COLUMNS, STEPS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    matrix = tl.program_id(0)
    i, j = tl.arange(0, HEIGHT), tl.arange(0, WIDTH)
    mask = (i < ROWS)[:, None] & (j < COLUMNS)[None, :]
    places = X + (matrix * ROWS + i)[:, None] * COLUMNS + j[None, :]
    x = tl.load(places, mask, 0.0).to(tl.float32)
    for step in tl.static_range(0, len(STEPS), 3):
        # (XXᵀ)X is X(XᵀX), so the side of the rows serves tall matrices as well.
        gram = tl.dot(x, tl.trans(x), input_precision="ieee")
        poly = STEPS[step + 1] * gram + STEPS[step + 2] * tl.dot(gram, gram, input_precision="ieee")
        x = STEPS[step] * x + tl.dot(poly, x, input_precision="ieee")
    tl.store(places, x.to(X.dtype.element_ty), mask)


def polar_express_(x: Tensor, steps: tuple[float, ...]) -> Tensor:
    """See `nvfp8.reference.polar_express_`; contiguous, of few rows and columns: a program holds a matrix."""
    n, r, c = x.shape
    assert x.is_contiguous(), "polar_express_ works on contiguous memory"
    height, width = (max(16, triton.next_power_of_2(side)) for side in (r, c))  # 16 is the least that tl.dot takes
    warps = 1 if height * width <= 256 else 4  # one could not keep more in registers
    with torch.cuda.device_of(x):  # Triton launches on the current one
        _polar_express[(n,)](x, r, c, steps, HEIGHT=height, WIDTH=width, num_warps=warps)
    return x
