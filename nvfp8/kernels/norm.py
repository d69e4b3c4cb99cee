"""RMSNorm, with or without the residual mix before it: one row a program, everything between load and store in registers.

Forward reads x (and x0) and writes x̂ (and the mixed stream). Backward reads the gradients and x again, recomputes the mixed
row and x̂, and writes dx, x̂ for the weight gradient, and x0's running gradient: no tensor is kept for it but x and one
number a row. dλ leaves as one partial sum a row, added up in a fixed order, so it is deterministic.

A branch that is still to be added to x is added here, in fp32, and the sum is rounded once: after a mix, which takes it off bf16's
grid, or as it is (docs/architecture.md).

`mix_backward` is for layers that do the norm themselves and keep the mixed stream: it starts from that, since Σg·x follows from
Σg·s and Σg·x0 for s = λ₀·x + λ₁·x0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp8.reference import NORM_EPS


@triton.jit
def _norm_forward(
    X, PENDING, X0, LAMBDAS, STREAM, NORMED, RSTD, D, WIDTH,
    EPS: tl.constexpr, ADD: tl.constexpr, MIX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < D
    at = row * D + column
    x = tl.load(X + at, mask, 0.0).to(tl.float32)
    if ADD:
        x += tl.load(PENDING + at, mask, 0.0).to(tl.float32)
    if MIX:
        x = tl.load(LAMBDAS) * x + tl.load(LAMBDAS + 1) * tl.load(X0 + at, mask, 0.0).to(tl.float32)
    if ADD or MIX:
        stored = x.to(STREAM.dtype.element_ty)
        tl.store(STREAM + at, stored, mask)
        x = stored.to(tl.float32)  # the norm sees the stream as it is stored, here and in backward
    rstd = tl.rsqrt(tl.sum(x * x, 0) / D + EPS)
    tl.store(RSTD + row, rstd)
    tl.store(NORMED + row * WIDTH + column, (x * rstd).to(NORMED.dtype.element_ty), column < WIDTH)


@triton.jit
def _norm_backward(
    D_NORMED, X, PENDING, RSTD, D_STREAM, X0, LAMBDAS, D_X0_IN, DX, D_X0, D_LAMBDAS, NORMED, D,
    ADD: tl.constexpr, STREAM: tl.constexpr, MIX: tl.constexpr, ADD_X0: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < D
    at = row * D + column
    x = tl.load(X + at, mask, 0.0).to(tl.float32)
    if ADD:
        x += tl.load(PENDING + at, mask, 0.0).to(tl.float32)
    mixed = x
    if MIX:
        x0 = tl.load(X0 + at, mask, 0.0).to(tl.float32)
        resid_lambda = tl.load(LAMBDAS)
        x0_lambda = tl.load(LAMBDAS + 1)
        mixed = (resid_lambda * x + x0_lambda * x0).to(X.dtype.element_ty).to(tl.float32)
    rstd = tl.load(RSTD + row)
    normed = mixed * rstd
    d_normed = tl.load(D_NORMED + at, mask, 0.0).to(tl.float32)
    ds = rstd * (d_normed - normed * (tl.sum(d_normed * normed, 0) / D))
    if STREAM:
        ds += tl.load(D_STREAM + at, mask, 0.0).to(tl.float32)
    if NORMED is not None:
        tl.store(NORMED + at, normed.to(NORMED.dtype.element_ty), mask)
    if MIX:
        tl.store(DX + at, (ds * resid_lambda).to(DX.dtype.element_ty), mask)
        dx0 = ds * x0_lambda
        if ADD_X0:
            dx0 += tl.load(D_X0_IN + at, mask, 0.0).to(tl.float32)
        tl.store(D_X0 + at, dx0.to(D_X0.dtype.element_ty), mask)
        tl.store(D_LAMBDAS + 2 * row, tl.sum(ds * x, 0))
        tl.store(D_LAMBDAS + 2 * row + 1, tl.sum(ds * x0, 0))
    else:
        tl.store(DX + at, ds.to(DX.dtype.element_ty), mask)


@triton.jit
def _mix_backward(
    D_STREAM, D_BRANCH, D_HEAD, STREAM, X0, LAMBDAS, RSTD, D_X0_IN, DX, D_X0, D_LAMBDAS, D, WIDTH,
    BRANCH: tl.constexpr, HEAD: tl.constexpr, ADD_X0: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < D
    at = row * D + column
    stream = tl.load(STREAM + at, mask, 0.0).to(tl.float32)
    x0 = tl.load(X0 + at, mask, 0.0).to(tl.float32)
    resid_lambda = tl.load(LAMBDAS)
    x0_lambda = tl.load(LAMBDAS + 1)
    ds = tl.load(D_STREAM + at, mask, 0.0).to(tl.float32)
    if BRANCH:
        ds += tl.load(D_BRANCH + at, mask, 0.0).to(tl.float32)
    if HEAD:
        rstd = tl.load(RSTD + row)
        normed = stream * rstd
        d_head = tl.load(D_HEAD + row * WIDTH + column, column < WIDTH, 0.0).to(tl.float32)
        ds += rstd * (d_head - normed * (tl.sum(d_head * normed, 0) / D))
    tl.store(DX + at, (ds * resid_lambda).to(DX.dtype.element_ty), mask)
    dx0 = ds * x0_lambda
    if ADD_X0:
        dx0 += tl.load(D_X0_IN + at, mask, 0.0).to(tl.float32)
    tl.store(D_X0 + at, dx0.to(D_X0.dtype.element_ty), mask)
    along_x0 = tl.sum(ds * x0, 0)
    tl.store(D_LAMBDAS + 2 * row, (tl.sum(ds * stream, 0) - x0_lambda * along_x0) / resid_lambda)
    tl.store(D_LAMBDAS + 2 * row + 1, along_x0)


def _launch(x: Tensor) -> tuple[tuple[int], dict[str, int]]:
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    return (x.numel() // width,), {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def norm_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `nvfp8.reference.norm_forward`."""
    x = x.contiguous()
    normed, rstd = torch.empty_like(x), torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    grid, options = _launch(x)
    width = x.shape[-1]
    _norm_forward[grid](x, None, None, None, None, normed, rstd, width, width, EPS=NORM_EPS, ADD=False, MIX=False, **options)
    return normed, rstd


def add_norm_forward(stream: Tensor, branch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `nvfp8.reference.add_norm_forward`."""
    stream, branch = stream.contiguous(), branch.contiguous()
    x, normed = torch.empty_like(stream), torch.empty_like(stream)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    grid, options = _launch(x)
    width = x.shape[-1]
    _norm_forward[grid](stream, branch, None, None, x, normed, rstd, width, width, EPS=NORM_EPS, ADD=True, MIX=False, **options)
    return x, normed, rstd


def mix_forward(x: Tensor, pending: Tensor | None, x0: Tensor, lambdas: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `nvfp8.reference.mix_forward`."""
    x, x0, lambdas = x.contiguous(), x0.contiguous(), lambdas.contiguous()
    stream, head = torch.empty_like(x), x.new_empty(*x.shape[:-1], width)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    grid, options = _launch(x)
    _norm_forward[grid](
        x, None if pending is None else pending.contiguous(), x0, lambdas, stream, head, rstd, x.shape[-1], width,
        EPS=NORM_EPS, ADD=pending is not None, MIX=True, **options,
    )  # fmt: skip
    return stream, head, rstd


def mix_backward(
    d_stream: Tensor, d_branch: Tensor | None, d_head: Tensor | None, stream: Tensor, x0: Tensor, lambdas: Tensor, rstd: Tensor,
    d_x0: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `nvfp8.reference.mix_backward`."""
    dx, new_d_x0 = torch.empty_like(stream), torch.empty_like(stream)
    grid, options = _launch(stream)
    partial = torch.empty(grid[0], 2, dtype=torch.float32, device=stream.device)
    _mix_backward[grid](
        d_stream, d_branch, d_head, stream, x0, lambdas, rstd, None if d_x0 is None else d_x0.contiguous(), dx, new_d_x0, partial,
        stream.shape[-1], 0 if d_head is None else d_head.shape[-1],
        BRANCH=d_branch is not None, HEAD=d_head is not None, ADD_X0=d_x0 is not None, **options,
    )  # fmt: skip
    return dx, new_d_x0, partial.sum(0)


def norm_backward(
    d_normed: Tensor, x: Tensor, rstd: Tensor, d_stream: Tensor | None, again: bool = True
) -> tuple[Tensor, Tensor | None]:
    """See `nvfp8.reference.norm_backward`."""
    x = x.contiguous()
    dx, normed = torch.empty_like(x), torch.empty_like(x) if again else None
    grid, options = _launch(x)
    _norm_backward[grid](
        d_normed, x, None, rstd, d_stream, None, None, None, dx, None, None, normed, x.shape[-1],
        ADD=False, STREAM=d_stream is not None, MIX=False, ADD_X0=False, **options,
    )  # fmt: skip
    return dx, normed


def mix_norm_backward(
    d_stream: Tensor, d_normed: Tensor, x: Tensor, pending: Tensor | None, x0: Tensor, lambdas: Tensor, rstd: Tensor,
    d_x0: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `nvfp8.reference.mix_norm_backward`."""
    x, x0, lambdas = x.contiguous(), x0.contiguous(), lambdas.contiguous()
    dx, normed, new_d_x0 = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    grid, options = _launch(x)
    partial = torch.empty(grid[0], 2, dtype=torch.float32, device=x.device)
    _norm_backward[grid](
        d_normed, x, None if pending is None else pending.contiguous(), rstd, d_stream, x0, lambdas,
        None if d_x0 is None else d_x0.contiguous(), dx, new_d_x0, partial, normed, x.shape[-1],
        ADD=pending is not None, STREAM=True, MIX=True, ADD_X0=d_x0 is not None, **options,
    )  # fmt: skip
    return dx, new_d_x0, partial.sum(0), normed
