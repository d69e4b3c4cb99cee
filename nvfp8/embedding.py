"""Lookup tables whose gradients share one sort of the micro-batch's tokens.

PyTorch's backward of an embedding sorts the tokens again for every table, makes a gradient of the table's whole size and adds it
to the one before: 0.5 ms and 400 MiB a table at 32,768 entries of 1,536, 13 tables at d24. Here the tokens are sorted
once, and each table's gradient is added in place, only where a token occurs.

That is why autograd is handed no gradient for a table: whatever runs backward, `torch.autograd.grad` of something else included,
writes `.grad` of the Parameter itself. `torch.autograd.grad` of a table is an error, and hooks on its gradient do not see it.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nvfp8.ops import ops


class TokenOrder(NamedTuple):
    """Where each id stands in a micro-batch.

    Attributes:
        positions: (N,) int64, positions in the flattened ids, sorted by id, in order among equal ids.
        ids: (N,) int64, the ids in that order.
    """

    positions: Tensor
    ids: Tensor


def token_order(ids: Tensor) -> TokenOrder:
    """Sort a micro-batch's ids, int64 of any shape."""
    ordered, positions = ids.flatten().sort(stable=True)
    return TokenOrder(positions, ordered)


def add_rows_to_gradient(table: Tensor, rows: Tensor, gate: Tensor | None, order: TokenOrder) -> None:
    """Add to `table.grad` what the positions of each id hold; makes it where there is none.

    Args:
        table: (V, W) Parameter.
        rows: (..., W) gradients of what was looked up.
        gate: (..., K), factor of W/K channels each, or None.
        order: of the ids that were looked up.

    Raises:
        RuntimeError: `table` is not a leaf, so it has no gradient of its own.
    """
    if not table.is_leaf:
        raise RuntimeError("the gradient of a table is written in place: it must be a Parameter, not the result of something")
    if table.grad is None:
        table.grad = torch.zeros_like(table)
    ops(rows).add_rows_(table.grad, rows.contiguous(), None if gate is None else gate.contiguous(), *order)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, order: TokenOrder) -> Tensor:
        ctx.table, ctx.order = table, order
        return F.embedding(ids, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor) -> tuple[None, None, None]:
        add_rows_to_gradient(ctx.table, d_rows, None, ctx.order)
        return None, None, None


def embedding(table: Tensor, ids: Tensor, order: TokenOrder | None) -> Tensor:
    """Rows of a table.

    Args:
        table: (V, W) Parameter.
        ids: (...) int64.
        order: of ids; None where no gradient will be asked for.

    Returns:
        (..., W), the table's dtype.
    """
    if order is None:
        return F.embedding(ids, table)
    return _Embedding.apply(table, ids, order)
