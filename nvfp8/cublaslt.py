"""cuBLASLt by its C interface: products in FP8, fp16 or bf16 by the fastest of its algorithms, which may add to what is there.

PyTorch multiplies FP8 by the same library (`torch._scaled_mm`), but takes the one algorithm that the library thinks best, and
none that adds to its result. By time another one is best for half of our shapes, by 5 to 40 % (docs/results.md, "The library's
algorithms"). So the first time that a product of some shape is asked for, all algorithms that the library proposes are timed on it,
some 20 ms; from then on the fastest is called.

Which one that is may differ between two processes, and with it how a sum is rounded. The library's own first choice is taken

* under `torch.use_deterministic_algorithms`,
* where a caller says that several processes must compute the same (`alike`),
* where nothing can be timed: for a shape that is met first while a CUDA graph is captured, or inside `untimed`,
* and beyond the first TIMED shapes: where lengths vary freely, timing would never end.
"""

import contextlib
import ctypes
import weakref
from collections.abc import Iterator
from ctypes import byref, c_float, c_int, c_int8, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

WORKSPACE = 32 * 2**20  # bytes that an algorithm may take: what NVIDIA recommends for Hopper
ALGORITHMS = 16  # to ask for; the library proposes 8 for our shapes
ROUNDS, CALLS = 3, 4  # an algorithm is timed so often, so many calls each time
TIMED, KEPT = 64, 256  # shapes that are timed, and that are remembered, those among them: a model has some 20

# Numbers out of cublasLt.h, cublas_api.h and library_types.h, the same in CUDA 12 and 13.
_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14, torch.float8_e4m3fn: 28, torch.float8_e5m2: 29}
_COMPUTE_32F = 68
_TRANSPOSE_A, _TRANSPOSE_B, _A_SCALE, _B_SCALE, _FAST_ACCUMULATION = 3, 4, 17, 18, 25  # of a product
_BATCH, _BATCH_STRIDE = 5, 6  # of a matrix
_MOST_WORKSPACE, _REDUCTIONS, _ALIGNMENTS = 1, 3, (5, 6, 7, 8)  # of a preference; alignments of A, B, C, D
_IN_COMPUTE_TYPE = 2  # parts of a split sum are added in fp32, in one order
_NOT_SUPPORTED = 15


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
    numbers: dict[str, list[Any]] = {
        "MatmulDesc": [c_int, c_int], "MatrixLayout": [c_int, c_uint64, c_uint64, c_int64], "MatmulPreference": [],
    }  # fmt: skip
    for kind, given in numbers.items():
        getattr(library, f"cublasLt{kind}Create").argtypes = [pointer, *given]
        getattr(library, f"cublasLt{kind}SetAttribute").argtypes = [pointer, c_int, pointer, c_size_t]
        getattr(library, f"cublasLt{kind}Destroy").argtypes = [pointer]
    library.cublasLtCreate.argtypes = [pointer]
    library.cublasLtMatmulAlgoGetHeuristic.argtypes = [*[pointer] * 7, c_int, pointer, pointer]
    library.cublasLtMatmul.argtypes = [*[pointer] * 14, c_size_t, pointer]
    return library


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_library(), name)(*arguments)
    if status:
        raise RuntimeError(f"{name} of cuBLASLt failed with status {status}")


class _Described:
    """Something that the library makes, of which attributes are set, and that is destroyed with this."""

    def __init__(self, kind: str, *arguments: Any):
        self.kind, self.handle = kind, c_void_p()
        _call(f"cublasLt{kind}Create", byref(self.handle), *arguments)
        weakref.finalize(self, getattr(_library(), f"cublasLt{kind}Destroy"), self.handle).atexit = False

    def set(self, which: int, value: Any) -> None:
        _call(f"cublasLt{self.kind}SetAttribute", self.handle, which, byref(value), ctypes.sizeof(value))


@cache
def _handle(device: int) -> c_void_p:
    handle = c_void_p()
    with torch.cuda.device(device):
        _call("cublasLtCreate", byref(handle))
    return handle


def _by_columns(x: Tensor) -> bool:
    """Whether the columns of a matrix, or of all of a batch, are contiguous rather than its rows.

    Raises:
        ValueError: neither are.
    """
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        return False
    if x.stride(-2) == 1 or x.shape[-2] == 1:
        return True
    raise ValueError(f"rows or columns of a {tuple(x.shape)} must be contiguous, not {x.stride()}")


def _layout(x: Tensor) -> _Described:
    by_columns = _by_columns(x)
    across, along = (x.shape[-1], x.shape[-2]) if by_columns else (x.shape[-2], x.shape[-1])
    line = along if across == 1 else x.stride(-1) if by_columns else x.stride(-2)  # of a single one PyTorch may say anything
    layout = _Described("MatrixLayout", _TYPES[x.dtype], along, across, line)
    if x.ndim == 3:
        layout.set(_BATCH, c_int32(len(x)))
        layout.set(_BATCH_STRIDE, c_int64(x.stride(0)))
    return layout


def _alignment(x: Tensor) -> int:
    """The largest power of two up to 256 that divides its address."""
    return min(256, x.data_ptr() & -x.data_ptr())


class Product:
    """A product of matrices of some shapes, and the algorithms for it.

    The library counts by columns: what it calls A is `right`, B is `left`, and C and D are out, all transposed.

    Attributes:
        proposals: the library's algorithms, what it thinks the best one first; none where it has none.
        chosen: the fastest of them, once that is known.
    """

    def __init__(self, left: Tensor, right: Tensor, out: Tensor, fast: bool):
        """Ask the library; arguments as of `matmul`."""
        self.b, self.a, self.d = _layout(left), _layout(right), _layout(out)
        self.description = _Described("MatmulDesc", _COMPUTE_32F, _TYPES[torch.float32])
        self.description.set(_TRANSPOSE_A, c_int32(_by_columns(right)))
        self.description.set(_TRANSPOSE_B, c_int32(_by_columns(left)))
        self.description.set(_FAST_ACCUMULATION, c_int8(fast))
        self.handle = _handle(out.device.index)
        self.proposals = self._propose([_alignment(x) for x in (right, left, out, out)])
        self.chosen: int | None = None

    def _propose(self, alignments: list[int]) -> list[_Proposal]:
        preference, found, count = _Described("MatmulPreference"), (_Proposal * ALGORITHMS)(), c_int()
        preference.set(_MOST_WORKSPACE, c_size_t(WORKSPACE))
        preference.set(_REDUCTIONS, c_int32(_IN_COMPUTE_TYPE))
        for which, alignment in zip(_ALIGNMENTS, alignments, strict=True):
            preference.set(which, c_int32(alignment))
        layouts = (self.a.handle, self.b.handle, self.d.handle, self.d.handle)
        status = _library().cublasLtMatmulAlgoGetHeuristic(
            self.handle, self.description.handle, *layouts, preference.handle, ALGORITHMS, found, byref(count)
        )
        if status not in (0, _NOT_SUPPORTED):
            raise RuntimeError(f"cublasLtMatmulAlgoGetHeuristic of cuBLASLt failed with status {status}")
        return [proposal for proposal in found[: count.value] if not proposal.state]

    def scaled_by(self, left: Tensor | None, right: Tensor | None) -> None:
        """Multiply FP8 operands by these numbers, None for 1, from now on."""
        for which, scale in ((_A_SCALE, right), (_B_SCALE, left)):
            self.description.set(which, c_void_p(None if scale is None else scale.data_ptr()))

    def run(self, which: int, left: Tensor, right: Tensor, out: Tensor, added: Tensor | None, alpha: float) -> None:
        """Launch it by one of the proposed algorithms: `out` becomes alpha · left · right, plus `added`, laid out as `out` is."""
        algorithm, room = self.proposals[which].algorithm, self.proposals[which].workspace
        c, beta = (out, 0.0) if added is None else (added, 1.0)
        workspace = torch.empty(room, dtype=torch.uint8, device=out.device)
        _call(
            "cublasLtMatmul", self.handle, self.description.handle, byref(c_float(alpha)), right.data_ptr(), self.a.handle,
            left.data_ptr(), self.b.handle, byref(c_float(beta)), c.data_ptr(), self.d.handle, out.data_ptr(), self.d.handle,
            byref(algorithm), workspace.data_ptr(), room, torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip

    def fastest(self, *arguments: Any) -> int:
        """Time every algorithm, a few calls of each in turn: what the host adds by being late is never the least time."""
        times = [float("inf")] * len(self.proposals)
        for _ in range(ROUNDS):
            for which in range(len(times)):
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                self.run(which, *arguments)
                start.record()
                for _ in range(CALLS):
                    self.run(which, *arguments)
                end.record()
                end.synchronize()
                times[which] = min(times[which], start.elapsed_time(end))
        return times.index(min(times))


_products: dict[tuple[Any, ...], Product] = {}
_lock = Lock()  # the numbers of a call are set before it
_timing = True


@contextlib.contextmanager
def untimed() -> Iterator[None]:
    """Inside, no algorithm is timed, in any thread: what is computed is not what will be, or the host is busy."""
    global _timing
    before, _timing = _timing, False
    try:
        yield
    finally:
        _timing = before


def _may_time() -> bool:
    timed = sum(product.chosen is not None for product in _products.values())
    return _timing and timed < TIMED and not torch.cuda.is_current_stream_capturing()


def matmul(
    left: Tensor, right: Tensor, out: Tensor, *, alpha: float = 1.0, add: bool = False,
    scales: tuple[Tensor | None, Tensor | None] = (None, None), fast: bool = False, alike: bool = False,
) -> Tensor:  # fmt: skip
    """Write alpha · left · right to `out`, summed in fp32, or add it to what stands there.

    What is added in 16 bits may be rounded twice, as by a GEMM and an addition: on an H200 it is, the product first.

    Args:
        left: (M, K), or (n, M, K) with n of all the same distance; FP8 with rows contiguous, else rows or columns.
        right: (K, N) or (n, K, N); FP8 with columns contiguous, and one of both float8_e4m3fn; else of left's dtype.
        out: (M, N) or (n, M, N), rows contiguous; fp32, fp16 or bf16, neither operand.
        alpha: factor of the product.
        add: whether to add.
        scales: 0-D fp32 by which FP8 operands are multiplied, left's and right's; None for 1.
        fast: whether FP8 products are summed in the tensor core's own 14 bits or so rather than promoted now and then.
        alike: whether all processes are to take the same algorithm.

    Returns:
        `out`.

    Raises:
        ValueError: strides that the library has no word for, or what lies on another device.
        RuntimeError: the library has no algorithm for such a product.
    """
    if any(x.device != out.device for x in (left, right, *(scale for scale in scales if scale is not None))):
        raise ValueError(f"all of a product lies on one device, {out.device}")
    if not out.numel() or not left.shape[-1]:
        return out if add else out.zero_()
    if _by_columns(out):
        raise ValueError("the result must have contiguous rows")
    key = (out.device, fast, *((x.dtype, x.shape, x.stride(), _alignment(x)) for x in (left, right, out)))
    added = out if add else None
    with torch.cuda.device_of(out), _lock:
        if (product := _products.get(key)) is None:
            if len(_products) == KEPT:
                del _products[next(old for old, product in _products.items() if product.chosen is None)]
            product = _products[key] = Product(left, right, out, fast)
        if not product.proposals:
            shapes = f"{tuple(left.shape)} {left.dtype} · {tuple(right.shape)} {right.dtype} to {out.dtype}"
            raise RuntimeError(f"cuBLASLt has no algorithm for {shapes}")
        product.scaled_by(*scales)
        which = 0
        if not alike and not torch.are_deterministic_algorithms_enabled():
            if product.chosen is None and _may_time():
                # Adding or not, the same one is best; what is added to must not be written now.
                target = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device=out.device) if add else out
                product.chosen = product.fastest(left, right, target, added, alpha)
            which = product.chosen or 0
        product.run(which, left, right, out, added, alpha)
    return out
