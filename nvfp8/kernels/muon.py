"""Muon's two passes over memory, one launch for all matrices of a shape: the host pays for a launch once, not once a matrix.

State lies in one buffer (n, r, c). Gradients and weights are tensors of their own, wherever autograd and the model put them,
so their addresses go to the GPU as a table of n int64 and a program looks up its matrix: nothing is stacked or copied. The
table is 8 bytes a matrix from pinned memory: the host does not wait, and torch keeps the buffer until the copy is done.

Each program takes 4096 elements of one matrix and touches each byte once. Of an address that comes from a table the compiler
knows nothing; ALIGNED says that all are multiples of 16 bytes, for without it every element would be a load of its own.
Hyperparameters are fp32 arguments and shapes are plain integers (of the columns alone the compiler learns whether 16 divides
them), so a schedule compiles nothing anew.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # elements a program
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


@triton.jit
def _matrix(TABLE, matrix, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(TABLE + matrix).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit(do_not_specialize=["ROWS"])
def _muon_nesterov(
    GRADIENTS, MOMENTUM, X, ROWS, COLUMNS, TAKE, MU, TYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    matrix = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < ROWS * COLUMNS
    start = matrix.to(tl.int64) * (ROWS * COLUMNS)
    g = tl.load(_matrix(GRADIENTS, matrix, TYPE, ALIGNED) + at, mask, 0.0).to(tl.float32)
    m = tl.load(MOMENTUM + start + at, mask, 0.0).to(tl.float32)
    m += TAKE * (g - m)
    tl.store(MOMENTUM + start + at, m.to(MOMENTUM.dtype.element_ty), mask)
    tl.store(X + start + at, (g + MU * (m - g)).to(X.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["ROWS"])
def _muon_descend(
    WEIGHTS, MASTER, X, SCALE, ROWS, COLUMNS, LR, LR_WD,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, MASTERED: tl.constexpr, BY_ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < ROWS * COLUMNS
    start = matrix.to(tl.int64) * (ROWS * COLUMNS)
    weight = _matrix(WEIGHTS, matrix, TYPE, ALIGNED)
    if BY_ROW:
        scale = tl.load(SCALE + matrix * ROWS + at // COLUMNS, mask, 0.0)
    else:
        scale = tl.load(SCALE + matrix * COLUMNS + at % COLUMNS, mask, 0.0)
    u = tl.load(X + start + at, mask, 0.0).to(tl.float32) * scale
    if MASTERED:
        w = tl.load(MASTER + start + at, mask, 0.0)
    else:
        w = tl.load(weight + at, mask, 0.0).to(tl.float32)
    w = w - LR * u - tl.where(u * w >= 0, LR_WD * w, 0.0)
    if MASTERED:
        tl.store(MASTER + start + at, w, mask)
    tl.store(weight + at, w.to(TYPE), mask)


def _table(tensors: Sequence[Tensor]) -> tuple[Tensor, dict[str, object]]:
    """The addresses of contiguous tensors of one dtype, on their device, and what the compiler is told of them."""
    addresses, first = [t.data_ptr() for t in tensors], tensors[0]
    table = torch.tensor(addresses, dtype=torch.int64, device="cpu", pin_memory=first.is_cuda)
    return table.to(first.device, non_blocking=True), {
        "TYPE": _TYPES[first.dtype],
        "ALIGNED": all(address % 16 == 0 for address in addresses),
    }


def _grid(x: Tensor) -> tuple[int, int]:
    n, r, c = x.shape
    assert r * c <= 2**31 - BLOCK, "inside a matrix, kernels count in int32"
    return triton.cdiv(r * c, BLOCK), n


def muon_nesterov_(gradients: Sequence[Tensor], momentum: Tensor, x: Tensor, take: float, mu: float) -> None:
    """See `nvfp8.reference.muon_nesterov_`; `momentum` and `x` must be contiguous."""
    assert momentum.is_contiguous() and x.is_contiguous(), "muon_nesterov_ writes contiguous memory"
    dtype = torch.bfloat16 if all(g.dtype == torch.bfloat16 for g in gradients) else torch.float32
    gradients = [g.to(dtype).contiguous() for g in gradients]  # a copy must outlive the launch, and under this name it does
    table, known = _table(gradients)
    _muon_nesterov[_grid(x)](table, momentum, x, *x.shape[1:], float(take), float(mu), **known, BLOCK=BLOCK, num_warps=8)


def muon_descend_(weights: Sequence[Tensor], master: Tensor | None, x: Tensor, scale: Tensor, lr: float, lr_wd: float) -> None:
    """See `nvfp8.reference.muon_descend_`; weights, `master` and `x` must be contiguous, the weights of one dtype."""
    assert x.is_contiguous() and (master is None or master.is_contiguous()), "muon_descend_ works on contiguous memory"
    assert all(w.is_contiguous() and w.dtype == weights[0].dtype for w in weights), "weights must be contiguous, of one dtype"
    assert weights[0].dtype in _TYPES, "weights must be fp32 or bf16"
    table, known = _table(weights)
    _muon_descend[_grid(x)](
        table, master, x, scale.contiguous(), *x.shape[1:], float(lr), float(lr_wd),
        **known, MASTERED=master is not None, BY_ROW=scale.shape[2] == 1, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
