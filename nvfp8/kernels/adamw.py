"""AdamW's step for any number of tensors of one storage combination in one launch; every byte of state is touched once.

Decoding, fp32 update, encoding and the weight's write happen in registers: no tensor is ever whole in fp32. What bounds it is
memory, so nothing else may: the host pays for one upload a step and one launch a combination of dtypes, however many tensors.

The upload is a table, a row of 120 bytes for each tensor, from pinned memory: its addresses, its size, and where its numbers are,
its key for rounding and its factors. Those come from memory too, so the same launches, captured in a CUDA graph, do for every step;
and values from memory never compile anything anew, as arguments may. A second table stays on the device, with the optimizer: which
tensor and which block of 1024 elements each program takes. It depends on sizes only.

A block is 8 rows of 128 elements, the elements that share a scale in FP8. Of an address or size that comes from a table the
compiler knows nothing, and would load element by element; ALIGNED says that 16 divides them. Tensors for which that is not so,
such as a scalar, are a launch of their own. Random numbers depend on (key, element), not on how the work is cut. One hash serves
four neighbours (`rounding.draw`), and of each both moments and the weight (`rounding.three`): with twelve, arithmetic would bound
the kernel rather than memory.

Of a matrix with FP8 copies a program takes 32 rows of 128 columns, so 4096 elements, and writes the copies too: 128 bytes side by
side in one, 32 in its transpose.
"""

import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp8.kernels import rounding
from nvfp8.kernels.fp8 import DTYPES, INTERPRETED, check_copies, store_copies
from nvfp8.reference_optim import AdamWTensor

# Elements a program, and one that writes FP8 copies. Small ones even out what a multiprocessor reads, computes and writes: an H200
# gives 0.855 of a copy's rate for 1024, 0.85 for 2048, 0.82 for 4096 (E4M3 moments, bf16+8). The interpreter's time is programs.
BLOCK, COPIED = 4096 if INTERPRETED.value else 1024, 4096
PER_WARP = 512  # 16 elements a thread
# A thread's: 768 threads share a multiprocessor's 65,536, so some compute while others load. H100, E4M3 moments,
# share of a copy's rate with the cap and without: bf16+8 0.96, bf16 0.94, fp32 masters 0.80 and 0.68, bf16+16 0.89 and 0.91. There
# is none where it spills much: beside int16 remainders, and where elements are loaded one by one.
REGISTERS = 80
PLANS = 64  # 8 bytes a program each: 0.8 % of its 1024 elements at one byte each
_TYPES = {
    torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5,
    torch.int8: tl.int8, torch.int16: tl.int16,
}  # fmt: skip
# int64 words 0 to 6: addresses of parameter, gradient, m, its scales, v, its scales, rest; 7: size; 8 to 11: addresses of the FP8
# copies q and t, their scale and amax; 12, 13: the matrix's columns and t's stride; 14: address of `AdamWTensor.numbers`.
_ROW = struct.Struct("<15q")
_WORDS = tl.constexpr(_ROW.size // 8)


@triton.jit
def _pointer(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(address).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _read(
    data, scales, at, size, row, TYPE: tl.constexpr, FORMAT: tl.constexpr, ROOT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A moment's block in fp32, and the number next to 0 of each element's scale; `row` says which scales these are."""
    stored = tl.load(data + at, at < size, 0.0)
    if FORMAT is None:
        value = stored.to(tl.float32)
        least = value
    else:
        ROWS: tl.constexpr = BLOCK // rounding.BLOCK
        scale = tl.load(scales + row, row * rounding.BLOCK < size, 0.0)
        value = rounding.decode(stored, scale, ROWS, ROOT)
        least = tl.reshape(tl.broadcast_to((scale * FORMAT[2])[:, None], (ROWS, rounding.BLOCK)), stored.shape)
    return value, least


@triton.jit
def _write(
    data, scales, value, at, size, row, bits,
    TYPE: tl.constexpr, FORMAT: tl.constexpr, ROOT: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store a moment's block; beyond the tensor's end `value` must be 0."""
    if FORMAT is None:
        if tl.bfloat16 == TYPE:
            if not STOCHASTIC:
                bits = rounding.nearest(value)
            top, _ = rounding.split(value, bits, 0)
            tl.store(data.to(tl.pointer_type(tl.int16), bitcast=True) + at, top.to(tl.int16), at < size)
        else:
            tl.store(data + at, value, at < size)
    else:
        ROWS: tl.constexpr = BLOCK // rounding.BLOCK
        on_grid, scale = rounding.encode(value, bits, ROWS, FORMAT, ROOT)
        tl.store(data + at, on_grid.to(TYPE), at < size)
        tl.store(scales + row, scale, row * rounding.BLOCK < size)


@triton.jit
def _adamw(
    TABLE, BLOCKS,
    PARAMETER: tl.constexpr, GRADIENT: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, REST: tl.constexpr,
    FIRST_FORMAT: tl.constexpr, SECOND_FORMAT: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr,
    COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor = tl.load(BLOCKS + 2 * tl.program_id(0))
    block = tl.load(BLOCKS + 2 * tl.program_id(0) + 1)
    # All is read before anything is written: the compiler must take a store for one to any address, and moves no load across.
    row = TABLE + tensor * _WORDS
    parameter = _pointer(row, tl.float32 if tl.float32 == PARAMETER else tl.int16, ALIGNED)  # bf16, as bits
    gradient = _pointer(row + 1, GRADIENT, ALIGNED)
    first, first_scales = _pointer(row + 2, FIRST, ALIGNED), _pointer(row + 3, tl.float32, False)
    second, second_scales = _pointer(row + 4, SECOND, ALIGNED), _pointer(row + 5, tl.float32, False)
    size = tl.load(row + 7).to(tl.int32)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    numbers = tl.load(row + 14).to(tl.pointer_type(tl.float32))
    key = tl.load(numbers.to(tl.pointer_type(tl.int32), bitcast=True))
    take1, take2, step_size, unbias2 = tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3), tl.load(numbers + 4)
    eps, keep, root_unbias2 = tl.load(numbers + 5), tl.load(numbers + 6), tl.load(numbers + 7)

    ROWS: tl.constexpr = BLOCK // rounding.BLOCK
    if COPIES is None:
        at = block * BLOCK + tl.arange(0, BLOCK)
        scaled = block * ROWS + tl.arange(0, ROWS)
        # Where nothing is rounded by them, the compiler drops them.
        drawn = rounding.draw(block * BLOCK, key, BLOCK)
    else:  # as many blocks that share a scale, one below the other
        tiles = tl.load(row + 12).to(tl.int32) // rounding.BLOCK
        columns = tiles * rounding.BLOCK
        first_row, tile = block // tiles * ROWS, block % tiles
        line, column = first_row + tl.arange(0, ROWS), tile * rounding.BLOCK + tl.arange(0, rounding.BLOCK)
        at = line[:, None] * columns + column[None, :]
        scaled = line * tiles + tile
        drawn = rounding.draw_tile(first_row * columns + tile * rounding.BLOCK, columns, key, ROWS, rounding.BLOCK)
    mask = at < size
    g = tl.load(gradient + at, mask, 0.0).to(tl.float32)
    m, least = _read(first, first_scales, at, size, scaled, FIRST, FIRST_FORMAT, False, BLOCK)
    v, _ = _read(second, second_scales, at, size, scaled, SECOND, SECOND_FORMAT, True, BLOCK)
    stored = tl.load(parameter + at, mask, 0)
    if REST is not None:
        rest = _pointer(row + 6, REST, ALIGNED) + at
        beside = tl.load(rest, mask, 0)
    for_first, bits, for_second = rounding.three(drawn)

    m += take1 * (g - m)
    v += take2 * (g * g - v)
    if SECOND_FORMAT is None:
        counted = v
        if FIRST_FORMAT is not None:
            counted = tl.maximum(v, least * least)
        counted = rounding.square_root(counted * unbias2)
    else:
        v = rounding.square_root(v)  # what is stored
        counted = v
        if FIRST_FORMAT is not None:
            counted = tl.maximum(v, least)
        counted = counted * root_unbias2
    step = step_size * (m * rounding.reciprocal(counted + eps))
    _write(first, first_scales, m, at, size, scaled, for_first, FIRST, FIRST_FORMAT, False, STOCHASTIC, BLOCK)
    _write(second, second_scales, v, at, size, scaled, for_second, SECOND, SECOND_FORMAT, True, STOCHASTIC, BLOCK)

    if tl.float32 == PARAMETER:
        value = stored * keep - step
        tl.store(parameter + at, value, mask)
    else:
        EXTRA: tl.constexpr = 8 if tl.int8 == REST else 16 if tl.int16 == REST else 0
        if REST is None:
            value = rounding.join(stored, tl.zeros_like(stored), 0)
        elif tl.float32 == REST:
            value = rounding.written(stored, beside)
        else:
            value = rounding.join(stored, beside, EXTRA)
        value = value * keep - step
        if tl.float32 == REST or not STOCHASTIC:  # beside a whole copy nothing is lost
            bits = rounding.nearest(value)
        top, remainder = rounding.split(value, bits, EXTRA)
        tl.store(parameter + at, top.to(tl.int16), mask)
        if tl.float32 == REST:
            tl.store(rest, value, mask)
        elif EXTRA > 0:
            tl.store(rest, remainder.to(REST), mask)
        value = rounding.join(top, tl.zeros_like(top), 0)
    if COPIES is not None:
        q, t, scale, amax = tl.load(row + 8), tl.load(row + 9), tl.load(row + 10), tl.load(row + 11)
        across, rows = tl.load(row + 13).to(tl.int32), size // columns
        if ALIGNED:
            rows = rows // 16 * 16  # tells the compiler
        exists = tl.broadcast_to((line < rows)[:, None], at.shape)
        store_copies(q, t, scale, amax, across, value, line, column, at, exists, COPIES, ALIGNED)


def _blocks(members: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """For each program the row of its tensor and its block there, (programs, 2) int32; `members` are rows and numbers of blocks."""
    counts = torch.tensor([count for _, count in members], device="cpu")
    first = counts.cumsum(0) - counts
    rows = torch.tensor([row for row, _ in members], device="cpu").repeat_interleave(counts)
    blocks = torch.arange(len(rows), device="cpu") - first.repeat_interleave(counts)
    return torch.stack((rows, blocks), 1).to(device, torch.int32)


def adamw_(tensors: Sequence[AdamWTensor], plans: dict[Any, Tensor] | None = None) -> None:
    """See `nvfp8.reference.adamw_`; all on one device, what is updated contiguous, in dtypes of `nvfp8.state`."""
    adamw_prepared(tensors, plans)()


def adamw_prepared(tensors: Sequence[AdamWTensor], plans: dict[Any, Tensor] | None = None) -> Callable[[], None]:
    """See `nvfp8.reference.adamw_prepared`. A gradient that is strided, or neither fp32 nor bf16, is read now instead."""
    plans = {} if plans is None else plans
    if not tensors:
        return lambda: None
    device = tensors[0].parameter.device
    rows, gradients = [], list[Tensor]()
    launches: dict[tuple[Any, ...], list[tuple[int, int]]] = {}
    for row, t in enumerate(tensors):
        plain = t.gradient if t.gradient.dtype in (torch.float32, torch.bfloat16) else t.gradient.float()
        gradients.append(plain.contiguous())
        size, moments = t.parameter.numel(), (*t.exp_avg, *t.exp_avg_sq)
        assert size <= 2**31 - COPIED, "inside a tensor, the kernel counts in int32"
        assert all(x is None or x.is_contiguous() for x in (t.parameter, *moments, t.rest)), "adamw_ writes contiguous memory"
        elements = (t.parameter, gradients[-1], t.exp_avg.data, t.exp_avg_sq.data, t.rest)
        c, copied, programs, multiples = t.copies, [0] * 6, triton.cdiv(size, BLOCK), [size]
        assert all(x is None or x.numel() == size for x in elements), "state and gradient have the parameter's elements"
        blocks = triton.cdiv(size, rounding.BLOCK.value)
        assert all(s is None or s.numel() == blocks for s in (t.exp_avg.scale, t.exp_avg_sq.scale)), "a block has one scale"
        assert all(x is None or x.device == device for x in (*elements, *moments)), "what a launch is given lies on one device"
        addresses = [0 if x is None else x.data_ptr() for x in (*elements[:2], *moments, t.rest)]
        if c is not None:
            check_copies(c, t.parameter.shape)
            (r, columns), stride, side = c.q.shape, c.t.stride(0), rounding.BLOCK.value
            assert columns % side == 0, "a tile is of whole blocks that share a scale"
            assert all(x.device == device for x in c), "what a launch is given lies on one device"
            copied, programs = [*(x.data_ptr() for x in c), columns, stride], triton.cdiv(r, COPIED // side) * (columns // side)
            multiples = [r, stride, c.q.data_ptr(), c.t.data_ptr()]
        # Scales are few: they are loaded one by one wherever they are.
        aligned = not any(x % 16 for x in multiples) and all(x is None or x.data_ptr() % 16 == 0 for x in elements)
        assert t.numbers.shape == (8,) and t.numbers.is_contiguous() and t.numbers.device == device, "a tensor has eight numbers"
        rows.append(_ROW.pack(*addresses, size, *copied, t.numbers.data_ptr()))
        if size:
            dtypes = [None if x is None else x.dtype for x in (*elements, None if c is None else c.q)]
            launches.setdefault((*dtypes, t.stochastic, aligned), []).append((row, programs))
    table = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.int64)
    if device.type == "cuda":
        table = table.pin_memory()  # the host does not wait, and torch keeps the buffer until the copy is done
    table = table.to(device, non_blocking=True)
    calls: list[tuple[Tensor, dict[str, Any]]] = []
    for (parameter, gradient, first, second, rest, copy, stochastic, aligned), members in launches.items():
        plan = (device, *members)
        if plan not in plans:
            if len(plans) == PLANS:
                del plans[next(iter(plans))]  # the oldest
            plans[plan] = _blocks(members, device)
        capped = aligned and (rest in (None, torch.int8) or (rest == torch.float32 and first in rounding.FORMATS))
        block = BLOCK if copy is None else COPIED
        options = {
            "PARAMETER": _TYPES[parameter], "GRADIENT": _TYPES[gradient], "FIRST": _TYPES[first], "SECOND": _TYPES[second],
            "REST": None if rest is None else _TYPES[rest], "FIRST_FORMAT": rounding.FORMATS.get(first),
            "SECOND_FORMAT": rounding.FORMATS.get(second), "STOCHASTIC": stochastic, "ALIGNED": aligned,
            "COPIES": DTYPES.get(copy), "BLOCK": block, "num_warps": block // PER_WARP,
            "maxnreg": REGISTERS if capped else None,
        }  # fmt: skip
        calls.append((plans[plan], options))

    return partial(_launch, table, calls, (tensors, gradients))


def _launch(table: Tensor, calls: Sequence[tuple[Tensor, dict[str, Any]]], pointed_to: object) -> None:
    """Launch each of `calls`, blocks and constants; `pointed_to` is what must not be freed while the table may be used."""
    with torch.cuda.device_of(table):  # Triton launches on the current one
        for blocks, options in calls:
            _adamw[(len(blocks),)](table, blocks, **options)
