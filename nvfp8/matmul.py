"""Matrix products with fp32 results from bf16 operands: what weight gradients want.

cuBLAS accumulates a bf16 GEMM in fp32 anyway; rounding its result to bf16 before adding it to an fp32 gradient loses eight
bits for nothing and costs a cast pass. PyTorch reaches the fp32 output through `out_dtype`, on CUDA only.
"""

import torch
from torch import Tensor


def weight_gradient(d_out: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """d_outᵀ · x, the gradient of a weight (O, I) from the output's gradient and the input.

    Args:
        d_out: (..., O).
        x: (..., I), same leading shape and dtype.
        dtype: dtype of the result, normally the weight's.

    Returns:
        (O, I) in `dtype`; fp32 comes straight from the accumulators.
    """
    left, right = d_out.flatten(0, -2).t(), x.flatten(0, -2)
    if left.is_cuda and left.dtype != dtype == torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right).to(dtype)


def add_matmul_(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left · right to `out` in place, accumulated in fp32.

    Args:
        out: (M, N) fp32 (or the operands' dtype).
        left: (M, K).
        right: (K, N), dtype of `left`.
    """
    if out.dtype == left.dtype:
        out.addmm_(left, right)
    elif out.is_cuda:
        torch.addmm(out, left, right, out_dtype=torch.float32, out=out)
    else:
        out.addmm_(left.to(out.dtype), right.to(out.dtype))
