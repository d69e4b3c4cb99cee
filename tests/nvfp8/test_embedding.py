"""Lookups whose gradients are added in place by one sort: against PyTorch's own, over several micro-batches."""

import pytest
import torch
import torch.nn.functional as F

from nvfp8.embedding import add_rows_to_gradient, embedding, token_order

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


def test_gradients_accumulate_as_pytorchs_do() -> None:
    torch.manual_seed(0)
    table = torch.nn.Parameter(torch.randn(50, 24, device=DEVICE))
    plain = torch.nn.Parameter(table.detach().clone())
    for step in range(3):
        ids = torch.randint(50, (4, 9), device=DEVICE)
        weigh = torch.randn(4, 9, 24, device=DEVICE)
        out = embedding(table, ids, token_order(ids))
        assert torch.equal(out, F.embedding(ids, table)), step
        (out * weigh).sum().backward()
        (F.embedding(ids, plain) * weigh).sum().backward()
    torch.testing.assert_close(table.grad, plain.grad, rtol=1e-5, atol=1e-5)


def test_the_same_tokens_give_the_same_bits() -> None:
    torch.manual_seed(1)
    ids = torch.randint(5, (2, 700), device=DEVICE)
    rows = torch.randn(2, 700, 32, device=DEVICE, dtype=torch.bfloat16)
    results = []
    for _ in range(2):
        table = torch.nn.Parameter(torch.zeros(5, 32, device=DEVICE, dtype=torch.bfloat16))
        add_rows_to_gradient(table, rows, None, token_order(ids))
        results.append(table.grad)
    assert torch.equal(*results)


def test_sums_are_fp32() -> None:
    """4,000 times 1 in bf16 would stop at 256."""
    table = torch.nn.Parameter(torch.zeros(3, 16, device=DEVICE, dtype=torch.bfloat16))
    ids = torch.ones(4000, dtype=torch.int64, device=DEVICE)
    add_rows_to_gradient(table, torch.ones(4000, 16, device=DEVICE, dtype=torch.bfloat16), None, token_order(ids))
    assert table.grad is not None and table.grad.float().sum(1).tolist() == [0, 16 * 4000, 0]


def test_order_of_ids() -> None:
    order = token_order(torch.tensor([[2, 0, 2], [4, 2, 0]], device=DEVICE))
    assert order.positions.tolist() == [1, 5, 0, 2, 4, 3]
    assert order.ids.tolist() == [0, 0, 2, 2, 2, 4]


def test_a_table_that_is_no_parameter_is_refused() -> None:
    table = torch.zeros(3, 4, requires_grad=True) * 2
    with pytest.raises(RuntimeError, match="must be a Parameter"):
        add_rows_to_gradient(table, torch.zeros(2, 4), None, token_order(torch.tensor([0, 1])))
