"""Muon's two passes over memory, one launch for all matrices of a shape: the host pays for a launch once, not once a matrix.

State lies in one buffer (n, r, c). Gradients and weights are tensors of their own, wherever autograd and the model put them,
so their addresses go to the GPU as a table of n int64 and a program looks up its matrix: nothing is stacked or copied. The
table is 8 bytes a matrix from pinned memory: the host does not wait, and torch keeps the buffer until the copy is done.

Each program takes 4096 elements of one matrix and touches each byte once. 4096 is 32 blocks of 128, so FP8 state is decoded,
updated and encoded with new scales in registers: no program needs another's maximum. Of an address that comes from a table the
compiler knows nothing; ALIGNED says that all are multiples of 16 bytes, for without it every element would be a load of its own.
Hyperparameters and the keys of stochastic rounding, one a matrix, are read from memory too: a schedule compiles nothing anew, and
the same launches, captured in a CUDA graph, do for every step. Shapes are plain integers (of the columns alone the compiler learns
whether 16 divides them, and where rows are scaled or FP8 is decoded by rows, whether 128 does).

Where layers keep FP8 copies of a weight, the second pass writes them too. Then the 4096 elements are a tile of 64 × 64, for a row
of a transpose is a column of the matrix: 64 bytes side by side in both copies. Elements draw the same bits as without.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp8.kernels import rounding
from nvfp8.kernels.fp8 import DTYPES, check_copies, store_copies
from nvfp8.reference_optim import Copies
from nvfp8.rounding import BLOCK as SCALED

BLOCK = 4096  # elements a program
SIDE = tl.constexpr(64)  # of a tile of them: 64 bytes of a row or column in FP8, 128 in bf16


@triton.jit
def located(TABLE, matrix, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a matrix of a table lies."""
    pointer = tl.load(TABLE + matrix).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _bits(KEYS, STEP, matrix, BLOCK: tl.constexpr):
    return rounding.draw(tl.program_id(0) * BLOCK, tl.load(KEYS + STEP * matrix), BLOCK)


# Numbers stand anywhere in a table: the compiler is not to care whether 16 divides their addresses.
@triton.jit(do_not_specialize=["ROWS", "STEP"], do_not_specialize_on_alignment=["TAKE", "MU", "KEYS"])
def _muon_nesterov(
    GRADIENTS, MOMENTUM, SCALES, X, SCALE, FACTOR, ROWS, COLUMNS, TAKE, MU, KEYS, STEP, TYPE: tl.constexpr,
    ALIGNED: tl.constexpr, FORMAT: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < ROWS * COLUMNS
    start = matrix.to(tl.int64) * (ROWS * COLUMNS)
    g = tl.load(located(GRADIENTS, matrix, TYPE, ALIGNED) + at, mask, 0.0).to(tl.float32)
    stored = tl.load(MOMENTUM + start + at, mask, 0.0)
    if FORMAT is not None:
        EACH: tl.constexpr = BLOCK // rounding.BLOCK
        blocks = tl.cdiv(ROWS * COLUMNS, rounding.BLOCK)
        block = tl.program_id(0) * EACH + tl.arange(0, EACH)
        scales = SCALES + matrix.to(tl.int64) * blocks + block
        m = rounding.decode(stored, tl.load(scales, block < blocks, 0.0), EACH, False)
    else:
        m = stored.to(tl.float32)
    m += tl.load(TAKE) * (g - m)
    x = g + tl.load(MU) * (m - g)
    if SCALE is not None:
        x *= of_rows(SCALE + matrix * ROWS, ROWS, COLUMNS, WHOLE, BLOCK) * FACTOR
    tl.store(X + start + at, x.to(X.dtype.element_ty), mask)
    if FORMAT is not None:
        m, scale = rounding.encode(m, _bits(KEYS, STEP, matrix, BLOCK), EACH, FORMAT, False)
        tl.store(scales, scale, block < blocks)
    if MOMENTUM.dtype.element_ty == tl.bfloat16:
        top, _ = rounding.split(m, _bits(KEYS, STEP, matrix, BLOCK), 0)
        tl.store((MOMENTUM + start + at).to(tl.pointer_type(tl.int16), bitcast=True), top.to(tl.int16), mask)
    else:
        tl.store(MOMENTUM + start + at, m.to(MOMENTUM.dtype.element_ty), mask)


@triton.jit
def of_rows(SCALE, ROWS, COLUMNS, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """The scale of the row that each of this program's elements stands in; WHOLE says that 128 divides COLUMNS."""
    if WHOLE:  # 128 elements of one row at a time: one division and one load for all of them
        EACH: tl.constexpr = BLOCK // rounding.BLOCK
        first = (tl.program_id(0) * EACH + tl.arange(0, EACH)) * rounding.BLOCK
        scale = tl.load(SCALE + first // COLUMNS, first < ROWS * COLUMNS, 0.0)
        return tl.reshape(tl.broadcast_to(scale[:, None], (EACH, rounding.BLOCK)), (BLOCK,))
    else:
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        return tl.load(SCALE + at // COLUMNS, at < ROWS * COLUMNS, 0.0)


@triton.jit(do_not_specialize=["ROWS", "STEP"], do_not_specialize_on_alignment=["LR", "LR_WD", "KEYS"])
def _muon_descend(
    WEIGHTS, KEPT, X, SCALE, ROWS, COLUMNS, LR, LR_WD, KEYS, STEP, TYPE: tl.constexpr, ALIGNED: tl.constexpr,
    MASTERED: tl.constexpr, EXTRA: tl.constexpr, BY_ROW: tl.constexpr, WHOLE: tl.constexpr, COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    NARROW: tl.constexpr = tl.int16 == TYPE  # bf16 weights are read and written as bits
    matrix = tl.program_id(1)
    if COPIES is None:
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = at < ROWS * COLUMNS
    else:
        if ALIGNED:
            ROWS = ROWS // 16 * 16  # tells the compiler; no hint holds for an argument
        tiles = tl.cdiv(COLUMNS, SIDE)
        first_row, first_column = tl.program_id(0) // tiles * SIDE, tl.program_id(0) % tiles * SIDE
        row, column = first_row + tl.arange(0, SIDE), first_column + tl.arange(0, SIDE)
        at = row[:, None] * COLUMNS + column[None, :]
        mask = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    start = matrix.to(tl.int64) * (ROWS * COLUMNS)
    weight = located(WEIGHTS, matrix, TYPE, ALIGNED) + at
    if COPIES is not None:
        if BY_ROW:
            scale = tl.load(SCALE + matrix * ROWS + row, row < ROWS, 0.0)[:, None]
        else:
            scale = tl.load(SCALE + matrix * COLUMNS + column, column < COLUMNS, 0.0)[None, :]
    elif BY_ROW:
        scale = of_rows(SCALE + matrix * ROWS, ROWS, COLUMNS, WHOLE, BLOCK)
    else:
        scale = tl.load(SCALE + matrix * COLUMNS + at % COLUMNS, mask, 0.0)
    u = tl.load(X + start + at, mask, 0.0).to(tl.float32) * scale
    if MASTERED:
        w = rounding.written(tl.load(weight, mask, 0), tl.load(KEPT + start + at, mask, 0.0))
    elif NARROW:
        stored = tl.load(weight, mask, 0)
        if EXTRA > 0:
            rest = tl.load(KEPT + start + at, mask, 0)
        else:
            rest = tl.zeros_like(stored)
        w = rounding.join(stored, rest, EXTRA)
    else:
        w = tl.load(weight, mask, 0.0)
    w = w - tl.load(LR) * u - tl.where(u * w >= 0, tl.load(LR_WD) * w, 0.0)
    if NARROW:
        if MASTERED:
            bits = rounding.nearest(w)
            tl.store(KEPT + start + at, w, mask)
        elif EXTRA == 16:
            bits = at  # nothing is cut off
        elif COPIES is None:
            bits = _bits(KEYS, STEP, matrix, BLOCK)
        else:
            key = tl.load(KEYS + STEP * matrix)
            bits = rounding.draw_tile(first_row * COLUMNS + first_column, COLUMNS, key, SIDE, SIDE)
        upper, rest = rounding.split(w, bits, EXTRA)
        tl.store(weight, upper.to(tl.int16), mask)
        if EXTRA > 0:
            tl.store(KEPT + start + at, rest.to(KEPT.dtype.element_ty), mask)
        w = rounding.join(upper, tl.zeros_like(upper), 0)
    else:
        tl.store(weight, w, mask)
    if COPIES is not None:
        n = tl.num_programs(1)
        copies = WEIGHTS + n + matrix
        q = tl.load(copies)
        if q != 0:
            t, by, amax, stride = tl.load(copies + n), tl.load(copies + 2 * n), tl.load(copies + 3 * n), tl.load(copies + 4 * n)
            store_copies(q, t, by, amax, stride.to(tl.int32), w, row, column, at, mask, COPIES, ALIGNED)


class Addressed(list[Tensor]):
    """Contiguous matrices with the table by which kernels find them.

    Attributes:
        table: (n,) int64 on their device, addresses; with copies (6n,): behind them the addresses of q, t, scale and amax, and t's
            stride, 0 where a matrix has none.
        aligned: whether 16 divides all addresses, and with copies the strides and the matrices' rows too.
        format: of the copies; None without.
    """

    def __init__(self, tensors: Sequence[Tensor], copies: Sequence[Copies | None] = ()) -> None:
        """Make the table; it is uploaded now."""
        super().__init__(tensors)
        first, addresses = tensors[0], [t.data_ptr() for t in tensors]
        written = [c for c in copies if c is not None]
        columns, multiples, self.format = [addresses], list(addresses), written[0].q.dtype if written else None
        for c in written:
            on_one_device(first, *c)
            check_copies(c, first.shape)
            assert c.q.dtype == self.format and first.shape[1] % 4 == 0, "copies are in one format, and of rows of fours"
        if written:
            rows = [(0,) * 5 if c is None else (*(x.data_ptr() for x in c), c.t.stride(0)) for c in copies]
            q, t, scale, amax, stride = (list(column) for column in zip(*rows, strict=True))
            columns += [q, t, scale, amax, stride]
            multiples += [*q, *t, *stride, len(first)]
        table = torch.tensor([x for column in columns for x in column], dtype=torch.int64, device="cpu", pin_memory=first.is_cuda)
        self.table, self.aligned = table.to(first.device, non_blocking=True), all(x % 16 == 0 for x in multiples)


def addressed(tensors: Sequence[Tensor], copies: Sequence[Copies | None] | None = None) -> Sequence[Tensor]:
    """See `nvfp8.reference.addressed`; gradients that a launch has to convert first stay as they are."""
    kind = tensors[0].dtype
    plain = kind in (torch.float32, torch.bfloat16) and all(t.is_contiguous() and t.dtype == kind for t in tensors)
    return Addressed(tensors, copies or ()) if plain else tensors


def readable(gradients: Sequence[Tensor]) -> tuple[Addressed, Any]:
    """Gradients as kernels find and read them, converted where they are not `addressed` yet, and Triton's name of their dtype."""
    if not isinstance(gradients, Addressed):
        dtype = torch.bfloat16 if all(g.dtype == torch.bfloat16 for g in gradients) else torch.float32
        gradients = Addressed([g.to(dtype).contiguous() for g in gradients])
    return gradients, tl.float32 if gradients[0].dtype == torch.float32 else tl.bfloat16


def check_scales(momentum: Tensor, scales: Tensor | None) -> None:
    """Refuse scales that are not those of n matrices of momentum (n, r, c), side by side."""
    n, r, c = momentum.shape
    assert (scales is None) == (momentum.dtype not in rounding.FORMATS), "FP8 state, and no other, has scales"
    if scales is not None:
        assert scales.is_contiguous() and scales.shape == (n, triton.cdiv(r * c, SCALED)), "each matrix has its own blocks"


def number(value: float | Tensor, x: Tensor) -> Tensor:
    """A number as kernels read it, 0-D fp32 on x's device."""
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32, device=x.device)


def _keys(keys: Sequence[int] | Tensor | None, x: Tensor) -> tuple[Tensor | None, int]:
    """Keys on x's device, one a matrix, and how far each is from the next."""
    if keys is None:
        return None, 0
    if not isinstance(keys, Tensor):
        keys = torch.tensor(list(keys), dtype=torch.int32, device=x.device)
    assert len(keys) == len(x) and keys.dtype == torch.int32, "a matrix has one key"
    return keys, keys.stride(0)


def on_one_device(x: Tensor, *others: Tensor | None) -> None:
    """Refuse what a launch could not reach."""
    assert all(other is None or other.device == x.device for other in others), "what a launch is given lies on one device"


def grid(x: Tensor) -> tuple[int, int]:
    """Programs for each matrix, and matrices."""
    n, r, c = x.shape
    assert r * c <= 2**31 - BLOCK, "inside a matrix, kernels count in int32"
    return triton.cdiv(r * c, BLOCK), n


def muon_nesterov_(
    gradients: Sequence[Tensor], momentum: Tensor, scales: Tensor | None, x: Tensor, take: float | Tensor, mu: float | Tensor,
    keys: Sequence[int] | Tensor | None = None, rows: Tensor | None = None, factor: float = 1.0,
) -> None:  # fmt: skip
    """See `nvfp8.reference.muon_nesterov_`; `momentum`, `scales`, `x` and `rows` must be contiguous."""
    n, r, c = x.shape
    assert momentum.is_contiguous() and x.is_contiguous(), "muon_nesterov_ writes contiguous memory"
    on_one_device(x, *gradients, momentum, scales, rows)
    assert rows is None or (rows.is_contiguous() and rows.shape == (n, r, 1)), "a row has one scale"
    check_scales(momentum, scales)
    drawn = momentum.dtype != torch.float32
    assert not drawn or keys is not None, "what is rounded stochastically needs a key for each matrix"
    gradients, kind = readable(gradients)  # copies must outlive the launch, and here they do
    with torch.cuda.device_of(x):  # Triton launches on the current one
        _muon_nesterov[grid(x)](
            gradients.table, momentum, scales, x, rows, float(factor), r, c, number(take, x), number(mu, x),
            *_keys(keys if drawn else None, x), kind, gradients.aligned, rounding.FORMATS.get(momentum.dtype),
            WHOLE=c % SCALED == 0, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip


def muon_descend_(
    weights: Sequence[Tensor], kept: Tensor | None, x: Tensor, scale: Tensor, lr: float | Tensor, lr_wd: float | Tensor,
    keys: Sequence[int] | Tensor | None = None, copies: Sequence[Copies | None] | None = None,
) -> None:  # fmt: skip
    """See `nvfp8.reference.muon_descend_`; weights, `kept` and `x` must be contiguous, the weights of one dtype.

    Copies of weights that are `addressed` were given there.
    """
    narrow = weights[0].dtype == torch.bfloat16
    assert x.is_contiguous() and (kept is None or kept.is_contiguous()), "muon_descend_ works on contiguous memory"
    on_one_device(x, *weights, kept, scale)
    assert all(w.is_contiguous() and w.dtype == weights[0].dtype for w in weights), "weights must be contiguous, of one dtype"
    assert narrow or weights[0].dtype == torch.float32, "weights must be fp32 or bf16"
    assert narrow or kept is None, "an fp32 weight is whole"
    mastered = kept is not None and kept.dtype == torch.float32
    extra = 0 if kept is None or mastered else 8 * kept.element_size()
    drawn = narrow and not mastered and extra < 16
    assert not drawn or keys is not None, "what is rounded stochastically needs a key for each matrix"
    if not isinstance(weights, Addressed):
        weights = Addressed(weights, copies or ())
    programs, n = grid(x)
    if weights.format is not None:
        programs = triton.cdiv(x.shape[1], SIDE.value) * triton.cdiv(x.shape[2], SIDE.value)
    with torch.cuda.device_of(x):
        _muon_descend[(programs, n)](
            weights.table, kept, x, scale.contiguous(), *x.shape[1:], number(lr, x), number(lr_wd, x),
            *_keys(keys if drawn else None, x), tl.int16 if narrow else tl.float32, weights.aligned, mastered, extra,
            BY_ROW=scale.shape[2] == 1, WHOLE=x.shape[2] % SCALED == 0,
            COPIES=None if weights.format is None else DTYPES[weights.format], BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
