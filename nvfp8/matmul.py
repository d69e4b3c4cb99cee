"""Matrix products: bf16 operands with fp32 results, which is what weight gradients want, and FP8 operands.

cuBLAS accumulates a bf16 GEMM in fp32 anyway; rounding its result to bf16 before adding it to an fp32 gradient loses eight
bits for nothing and costs a cast pass. PyTorch reaches the fp32 output through `out_dtype`, on CUDA only.

On a CPU without instructions for narrow floats PyTorch takes 4 to 70 times as long over bf16 as over fp32 (an EPYC, one thread,
256 × 256 × 768): there operands are widened, and the product is rounded once, as a GPU does it.

FP8 operands take half the bytes and twice the rate. The tensor core multiplies codes; both scales are divided out of the sum. On a
GPU they go to cuBLASLt (`nvfp8/cublaslt.py`), which can add a product to what is there: 8 bytes a weight for a further chunk's
gradient in fp32, where a product and an addition move 16.
"""

import torch
from torch import Tensor

from nvfp8 import cublaslt


def matmul(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """The product left · right, summed in fp32 at least and rounded once.

    Args:
        left: (..., K).
        right: (K, N), dtype of `left`.
        out: (..., N) of that dtype, written, or None for a new tensor.

    Returns:
        (..., N).
    """
    if left.is_cuda or left.dtype.itemsize > 2:
        return torch.matmul(left, right, out=out)
    rounded = (left.float() @ right.float()).to(left.dtype)
    return rounded if out is None else out.copy_(rounded)


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
    return matmul(left, right).to(dtype)


def add_matmul_(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left · right to `out` in place, accumulated in fp32.

    Args:
        out: (M, N) fp32 (or the operands' dtype).
        left: (M, K).
        right: (K, N), dtype of `left`.
    """
    if out.dtype == left.dtype and (out.is_cuda or out.dtype.itemsize > 2):
        out.addmm_(left, right)
    elif out.is_cuda:
        torch.addmm(out, left, right, out_dtype=torch.float32, out=out)
    else:
        out.copy_(out.float().addmm_(left.float(), right.float()))


def fp8_matmul(
    a: Tensor, b: Tensor, a_inverse: Tensor, b_inverse: Tensor, out_dtype: torch.dtype, fast: bool, *, emulated: bool = False,
    out: Tensor | None = None, add: bool = False,
) -> Tensor:  # fmt: skip
    """(a · a_inverse) · (b · b_inverse)ᵀ: a product of FP8 tensors, both contiguous along the summed axis ("TN").

    Args:
        a: (M, K) FP8.
        b: (N, K) FP8; not both float8_e5m2.
        a_inverse: 0-D fp32, 1 / the scale that a was cast with.
        b_inverse: 0-D fp32.
        out_dtype: of the result.
        fast: sum in the tensor core's own 14 bits or so rather than promote to fp32 now and then; emulation never does.
        emulated: decode and multiply in fp32, as is done without a GPU in any case.
        out: (M, N) contiguous in `out_dtype`, written, or None for a new tensor.
        add: whether the product, rounded to `out_dtype`, is added to what stands in `out`.

    Returns:
        (M, N).

    Raises:
        ValueError: shapes or formats that tensor cores do not multiply, refused on every device, or no `out` to add to.
    """
    if a.dtype == b.dtype == torch.float8_e5m2:
        raise ValueError("e5m2 times e5m2 is not a product that tensor cores offer")
    if a.shape[1] != b.shape[1] or b.shape[0] % 16 or b.shape[1] % 16:
        raise ValueError(f"({a.shape[0]}, {a.shape[1]}) times ({b.shape[0]}, {b.shape[1]})ᵀ: N and K must be multiples of 16")
    if not (a.is_contiguous() and b.is_contiguous()):
        raise ValueError("both operands must be contiguous along the summed axis")
    if (out is not None and out.dtype != out_dtype) or (out is None and add):
        raise ValueError(f"the product is written to {out_dtype}, and added to what there is")
    if a.is_cuda and not emulated:
        result = torch.empty(len(a), len(b), dtype=out_dtype, device=a.device) if out is None else out
        return cublaslt.matmul(a, b.t(), result, add=add, scales=(a_inverse, b_inverse), fast=fast)
    product = (a.float() @ b.float().t() * (a_inverse * b_inverse)).to(out_dtype)
    if out is None:
        return product
    return out.add_(product) if add else out.copy_(product)
