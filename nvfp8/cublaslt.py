"""cuBLASLt by its C interface: products in FP8 or fp16 by the fastest of its algorithms, which may add to what is there.

PyTorch multiplies FP8 by the same library (`torch._scaled_mm`), but takes the one algorithm that the library thinks best, and
none that adds to its result. On an H200 the best one is another for every second of our shapes: the logits' product takes 0.074 ms
instead of 0.092, an output projection's 0.059 instead of 0.069, its weight gradient, which needs room to split its long sum, 0.064
instead of 0.104 (docs/results.md). So the first time that a product of some shape is asked for, all algorithms that the library
proposes are timed on it, some 20 ms; from then on the fastest is called.

Which one that is may differ between two runs, and with it how a sum is rounded. Under `torch.use_deterministic_algorithms` the
library's own first choice is taken; so it is while a CUDA graph is captured, when nothing can be timed, unless the shape was met
before.
"""

import ctypes
import statistics
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

WORKSPACE = 32 * 2**20  # bytes that an algorithm may take: what NVIDIA recommends for Hopper
ALGORITHMS = 16  # to ask for; the library proposes 8 for our shapes
ROUNDS, CALLS = 3, 4  # an algorithm is timed so often, so many calls each time

# Numbers out of cublasLt.h, cublas_api.h and library_types.h of CUDA 12 and 13.
_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14, torch.float8_e4m3fn: 28, torch.float8_e5m2: 29}
_COMPUTE_32F = 68
_TRANSPOSE_A, _TRANSPOSE_B, _A_SCALE, _B_SCALE, _FAST_ACCUMULATION = 3, 4, 17, 18, 25  # of a product
_BATCH, _BATCH_STRIDE = 5, 6  # of a matrix
_MOST_WORKSPACE, _REDUCTIONS, _ALIGNMENTS = 1, 3, (5, 6, 7, 8)  # of a preference
_IN_COMPUTE_TYPE = 2  # parts of a split sum are added in fp32, in one order


class _Algorithm(ctypes.Structure):
    _fields_ = (("data", c_uint64 * 8),)


class _Proposal(ctypes.Structure):
    _fields_ = (
        ("algorithm", _Algorithm), ("workspace", c_size_t), ("state", c_int), ("waves", c_float), ("reserved", c_int * 4),
    )  # fmt: skip


@cache
def _library() -> Any:
    """The library that PyTorch has loaded."""
    name = f"libcublasLt.so.{str(torch.version.cuda).split('.')[0]}"
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise RuntimeError(f"{name}, which PyTorch {torch.__version__} is made for, is not there: reinstall PyTorch") from error
    pointer = c_void_p
    library.cublasLtCreate.argtypes = [pointer]
    library.cublasLtMatmulDescCreate.argtypes = [pointer, c_int, c_int]
    library.cublasLtMatmulDescSetAttribute.argtypes = [pointer, c_int, pointer, c_size_t]
    library.cublasLtMatrixLayoutCreate.argtypes = [pointer, c_int, c_uint64, c_uint64, c_int64]
    library.cublasLtMatrixLayoutSetAttribute.argtypes = [pointer, c_int, pointer, c_size_t]
    library.cublasLtMatmulPreferenceCreate.argtypes = [pointer]
    library.cublasLtMatmulPreferenceSetAttribute.argtypes = [pointer, c_int, pointer, c_size_t]
    library.cublasLtMatmulPreferenceDestroy.argtypes = [pointer]
    library.cublasLtMatmulAlgoGetHeuristic.argtypes = [*[pointer] * 7, c_int, pointer, pointer]
    library.cublasLtMatmul.argtypes = [*[pointer] * 14, c_size_t, pointer]
    return library


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_library(), name)(*arguments)
    if status:
        raise RuntimeError(f"{name} of cuBLASLt failed with status {status}")


@cache
def _handle(device: int) -> c_void_p:
    handle = c_void_p()
    with torch.cuda.device(device):
        _call("cublasLtCreate", byref(handle))
    return handle


def _layout(x: Tensor) -> tuple[c_void_p, bool]:
    """The library's description of a matrix or a batch of them, and whether its columns are what is contiguous."""
    by_columns = x.stride(-1) != 1
    across, along = (x.shape[-1], x.shape[-2]) if by_columns else (x.shape[-2], x.shape[-1])
    line = x.stride(-1) if by_columns else x.stride(-2)
    assert not by_columns or x.stride(-2) == 1, "rows or columns are contiguous"
    layout = c_void_p()
    _call("cublasLtMatrixLayoutCreate", byref(layout), _TYPES[x.dtype], along, across, line)
    if x.ndim == 3:
        for which, value in ((_BATCH, c_int32(len(x))), (_BATCH_STRIDE, c_int64(x.stride(0)))):
            _call("cublasLtMatrixLayoutSetAttribute", layout, which, byref(value), ctypes.sizeof(value))
    return layout, by_columns


def _alignment(x: Tensor) -> int:
    """The largest power of two up to 256 that divides its address."""
    return min(256, x.data_ptr() & -x.data_ptr())


class _Product:
    """A product of matrices of some shapes, and the algorithm for it.

    The library counts by columns: what it calls A is `right`, B is `left`, and C and D are out, all transposed.
    """

    def __init__(self, left: Tensor, right: Tensor, out: Tensor, fast: bool):
        (self.b, left_by_columns), (self.a, right_by_columns), (self.d, _) = _layout(left), _layout(right), _layout(out)
        self.description = c_void_p()
        _call("cublasLtMatmulDescCreate", byref(self.description), _COMPUTE_32F, _TYPES[torch.float32])
        self._set(_TRANSPOSE_A, c_int32(right_by_columns))
        self._set(_TRANSPOSE_B, c_int32(left_by_columns))
        self._set(_FAST_ACCUMULATION, ctypes.c_int8(fast))
        self.handle = _handle(out.device.index)
        self.proposals = self._propose([_alignment(x) for x in (right, left, out, out)])
        self.chosen: int | None = None

    def _set(self, which: int, value: Any) -> None:
        _call("cublasLtMatmulDescSetAttribute", self.description, which, byref(value), ctypes.sizeof(value))

    def _propose(self, alignments: list[int]) -> list[_Proposal]:
        """Ask the library for algorithms, what it thinks the best one first."""
        preference, found, count = c_void_p(), (_Proposal * ALGORITHMS)(), c_int()
        _call("cublasLtMatmulPreferenceCreate", byref(preference))
        settings: list[tuple[int, Any]] = [(_MOST_WORKSPACE, c_size_t(WORKSPACE)), (_REDUCTIONS, c_int32(_IN_COMPUTE_TYPE))]
        settings += zip(_ALIGNMENTS, map(c_int32, alignments), strict=True)
        for which, value in settings:
            _call("cublasLtMatmulPreferenceSetAttribute", preference, which, byref(value), ctypes.sizeof(value))
        _call(
            "cublasLtMatmulAlgoGetHeuristic", self.handle, self.description, self.a, self.b, self.d, self.d, preference,
            ALGORITHMS, found, byref(count),
        )  # fmt: skip
        _call("cublasLtMatmulPreferenceDestroy", preference)
        proposals = [proposal for proposal in found[: count.value] if not proposal.state]
        if not proposals:
            raise RuntimeError("cuBLASLt has no algorithm for this product")
        return proposals

    def scaled_by(self, left: Tensor | None, right: Tensor | None) -> None:
        """Multiply FP8 operands by these numbers."""
        for which, scale in ((_A_SCALE, right), (_B_SCALE, left)):
            if scale is not None:
                self._set(which, c_void_p(scale.data_ptr()))

    def run(self, which: int, left: Tensor, right: Tensor, out: Tensor, alpha: float, c: Tensor | None, beta: float) -> None:
        """Launch it by one of the proposed algorithms."""
        algorithm, room = self.proposals[which].algorithm, self.proposals[which].workspace
        workspace = torch.empty(room, dtype=torch.uint8, device=out.device)
        _call(
            "cublasLtMatmul", self.handle, self.description, byref(c_float(alpha)), right.data_ptr(), self.a, left.data_ptr(),
            self.b, byref(c_float(beta)), (out if c is None else c).data_ptr(), self.d, out.data_ptr(), self.d,
            byref(algorithm), workspace.data_ptr(), room, torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip

    def fastest(self, *arguments: Any) -> int:
        """Time every algorithm, a few calls of each in turn, and return the one of the least median."""
        times: list[list[float]] = [[] for _ in self.proposals]
        for _ in range(ROUNDS):
            for which, those in enumerate(times):
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                self.run(which, *arguments)
                start.record()
                for _ in range(CALLS):
                    self.run(which, *arguments)
                end.record()
                end.synchronize()
                those.append(start.elapsed_time(end))
        medians = [statistics.median(those) for those in times]
        return medians.index(min(medians))


_products: dict[tuple[Any, ...], _Product] = {}
_lock = Lock()  # the numbers of a call are set before it


def matmul(
    left: Tensor, right: Tensor, out: Tensor, *, alpha: float = 1.0, c: Tensor | None = None, beta: float = 1.0,
    scales: tuple[Tensor | None, Tensor | None] = (None, None), fast: bool = False,
) -> Tensor:  # fmt: skip
    """Write alpha · left · right + beta · c to `out`, summed in fp32 and rounded once.

    Args:
        left: (M, K), or (n, M, K); rows or columns contiguous. FP8: rows.
        right: (K, N) or (n, K, N), of left's dtype; FP8: columns contiguous, and not both float8_e5m2.
        out: (M, N) or (n, M, N), rows contiguous; neither operand.
        alpha: factor of the product.
        c: what is added, laid out and of a dtype as `out` is, which it may be; None for nothing.
        beta: factor of c.
        scales: 0-D fp32 by which FP8 operands are multiplied.
        fast: whether FP8 products are summed in the tensor core's own 14 bits or so rather than promoted now and then.

    Returns:
        `out`.

    Raises:
        RuntimeError: the library has no algorithm for such a product.
    """
    if c is None:
        beta = 0.0
    elif c.stride() != out.stride() or c.shape != out.shape or c.dtype != out.dtype:
        raise ValueError("what is added must be laid out as the result is")
    tensors = (left, right, out)
    key = (out.device, fast, *((x.dtype, x.shape, x.stride(), _alignment(x)) for x in tensors))
    with torch.cuda.device_of(out), _lock:
        if (product := _products.get(key)) is None:
            product = _products[key] = _Product(*tensors, fast)
        product.scaled_by(*scales)
        which = 0
        if not torch.are_deterministic_algorithms_enabled():
            if product.chosen is None and not torch.cuda.is_current_stream_capturing():
                target = out if c is None else torch.empty_like(out)
                product.chosen = product.fastest(left, right, target, alpha, c, beta)
            which = product.chosen or 0
        product.run(which, left, right, out, alpha, c, beta)
    return out
