"""Gradients of lookup tables in milliseconds: ours, by one sort for all tables, beside PyTorch's; medians of 20.

    python -m benchmarks.embedding [--tokens 32768] [--width 1536]

Ids are uniform over 32,768 entries, or follow Zipf's law as those of text do. `added` is one table's share of a micro-batch with
a gradient already there, `sort` what all tables share. PyTorch's is `embedding_dense_backward` and the addition of its result.
"""

import json
import statistics
from collections.abc import Callable
from functools import partial

import torch

from nanochat.errors import BadInput, Parser, run
from nvfp8.embedding import add_rows_to_gradient, token_order

VOCAB = 32768


def _milliseconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(23):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return round(statistics.median(times[3:]), 3)


def main() -> None:
    """Parse flags, time both kinds of ids."""
    parser = Parser("embedding", description="gradients of lookup tables")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--width", type=int, default=1536)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise BadInput("this times GPU kernels, and torch finds no CUDA device")
    uniform = torch.ones(VOCAB, device="cuda")
    zipf = 1 / torch.arange(1, VOCAB + 1, device="cuda")
    for name, weights in (("uniform", uniform), ("zipf", zipf)):
        ids = torch.multinomial(weights, args.tokens, replacement=True)
        rows = torch.randn(args.tokens, args.width, device="cuda", dtype=torch.bfloat16)
        table = torch.nn.Parameter(torch.zeros(VOCAB, args.width, device="cuda", dtype=torch.bfloat16))
        gate = torch.rand(args.tokens, args.width // 128, device="cuda", dtype=torch.bfloat16)
        order = token_order(ids)
        grad = torch.zeros_like(table)

        def pytorch(rows: torch.Tensor, ids: torch.Tensor, grad: torch.Tensor) -> None:
            grad.add_(torch.ops.aten.embedding_dense_backward(rows, ids, VOCAB, -1, False))

        record = {
            "ids": name, "most_frequent": int(ids.bincount().max()),
            "sort": _milliseconds(partial(token_order, ids)),
            "added": _milliseconds(partial(add_rows_to_gradient, table, rows, None, order)),
            "added_gated": _milliseconds(partial(add_rows_to_gradient, table, rows, gate, order)),
            "pytorch": _milliseconds(partial(pytorch, rows, ids, grad)), "gpu": torch.cuda.get_device_name(),
        }  # fmt: skip
        print(json.dumps(record))


if __name__ == "__main__":
    run(main)
