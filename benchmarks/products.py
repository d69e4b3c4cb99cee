"""FP8 products of a micro-batch, and Muon's, by every algorithm of cuBLASLt beside PyTorch's call. One JSON line a product.

    python -m benchmarks.products [--widths 768 1536] [--energy] [--repeats 8]

65,536 tokens of width 768 (d12) or 32,768 of 1,536 (d24), heads' chunks of 8,192 rows; of Muon a chunk of squares and one of wide
matrices. `torch_ms` is `torch._scaled_mm`, or `torch.bmm`; `ms` the library's proposals in its own order, `added_ms` the fastest
where it adds to what is there, `addition_ms` an addition by itself. With `--energy` the first and the fastest run for a second
each, and `mJ` is what a launch takes of the board.
"""

import argparse
import json
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.timing import check_fp8, gpu_millijoules, gpu_milliseconds
from nanochat.errors import BadInput, Parser, run
from nvfp8.cublaslt import Product
from nvfp8.fp8_head import PARTS

VOCAB, CHUNK = 32768, 8192
TOKENS = {768: 65536, 1536: 32768}
SQUARES, WIDE = 27, 9  # matrices that Muon takes together at d24
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class Case(NamedTuple):
    """A product (M, K) · (K, N), or of n such.

    Attributes:
        name: what of a step it is.
        shape: M, N, K, and n where it is a batch.
        left: dtype of the left operand; the right one is E4M3, or fp16 beside fp16.
        out: of the result.
        fast: whether it accumulates fast.
    """

    name: str
    shape: tuple[int, ...]
    left: torch.dtype
    out: torch.dtype
    fast: bool = False


def cases(width: int) -> Iterator[Case]:
    """All of a model of some width that no kernel of ours computes."""
    tokens, d, h, bf16 = TOKENS[width], width, 4 * width, torch.bfloat16
    for name, m, n, k, left in (
        ("attention's output", tokens, d, d, E4M3), ("its dgrad", tokens, d, d, E5M2), ("q, k, v: dgrad", tokens, d, 3 * d, E5M2),
        ("MLP's projection", tokens, d, h, E4M3), ("MLP: dgrad", tokens, d, h, E5M2), ("logits", CHUNK // PARTS, VOCAB, d, E4M3),
    ):  # fmt: skip
        yield Case(name, (m, n, k), left, bf16, fast=True)
    for name, m, n in (("q, k, v", 3 * d, d), ("attention's output", d, d), ("MLP's first", h, d), ("MLP's projection", d, h)):
        yield Case(f"{name}: wgrad", (m, n, tokens), E5M2, bf16)
    yield Case("head: dx", (CHUNK, d, VOCAB), E5M2, bf16)
    yield Case("head: dW", (VOCAB, d, CHUNK), E5M2, torch.float32)
    for count, m, n in ((SQUARES, d, d), (WIDE, d, h)):
        yield Case(f"Muon: {count} of {m} x {n}", (m, n, d, count), torch.float16, torch.float16)


def measure(case: Case, repeats: int, energy: bool) -> dict[str, Any]:
    """One row of the table."""
    m, n, k, *count = case.shape
    one = torch.ones((), device="cuda")
    left = (torch.randn(*count, m, k, device="cuda") * 8).to(case.left)
    if count:
        right = torch.randn(*count, k, n, device="cuda").to(case.left)
    else:
        right = (torch.randn(n, k, device="cuda") * 8).to(E4M3).t()
    out = torch.empty(*count, m, n, dtype=case.out, device="cuda")
    product = Product(left, right, out, case.fast)
    product.scaled_by(*((None, None) if count else (one, one)))

    def by(which: int, added: Tensor | None = None) -> None:
        product.run(which, left, right, out, added, 1.0)

    def by_torch() -> object:
        if count:
            return torch.bmm(left, right, out=out)
        return torch._scaled_mm(left, right, one, one, out_dtype=case.out, use_fast_accum=case.fast, out=out)

    ms = [round(gpu_milliseconds(partial(by, which), repeats), 4) for which in range(len(product.proposals))]
    best = ms.index(min(ms))
    row = {
        "product": case.name, "shape": case.shape, "torch_ms": round(gpu_milliseconds(by_torch, repeats), 4), "fastest": best,
        "ms": ms, "TFLOP_s": round(2e-9 * left.numel() * n / ms[best]),
    }  # fmt: skip
    if "wgrad" in case.name or "dW" in case.name:
        row["added_ms"] = round(gpu_milliseconds(lambda: by(best, out), repeats), 4)
        row["addition_ms"] = round(gpu_milliseconds(partial(out.add_, torch.ones_like(out)), repeats), 4)
    if energy:
        row["mJ"] = {which: round(gpu_millijoules(partial(by, which))[0], 1) for which in sorted({0, best})}
    return row


def arguments() -> argparse.Namespace:
    """Parse flags and refuse what cannot be measured."""
    parser = Parser("products", description="products by every algorithm of cuBLASLt")
    parser.add_argument("--widths", type=int, nargs="+", default=sorted(TOKENS), choices=sorted(TOKENS))
    parser.add_argument("--energy", action="store_true", help="also mJ a launch, a second each")
    parser.add_argument("--repeats", type=int, default=8)
    args = parser.parse_args()
    if args.repeats < 1:
        raise BadInput("--repeats must be at least 1")
    check_fp8()
    return args


def main() -> None:
    """Parse flags, run, print."""
    args = arguments()
    gpu = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    for width in args.widths:
        for case in cases(width):
            print(json.dumps({"width": width, **measure(case, args.repeats, args.energy), **gpu}), flush=True)


if __name__ == "__main__":
    run(main)
