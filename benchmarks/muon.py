"""Polar Express by each kind of product, for each shape that Muon meets at a depth: milliseconds, TFLOP/s, singular values.

    python -m benchmarks.muon [--depth 12 24] [--repeats 10]

One table. A batch is as large as Muon's default workspace lets it be, and its time is scaled to all matrices of that shape. Every
way gets the same matrix of each of three spectra, and what it makes of it is held against fp64: `worst` is the largest deviation of
a singular value, `error` is ‖X − X₆₄‖ / ‖X₆₄‖. `ms` is the GPU's alone: it finds all launches waiting. `host ms` is until the call
returns: where it is the larger, the GPU waits for Python. Muon's own way (`fastest_products` in `nvfp8/polar_express.py`) is marked
with a star; it is to be the one with the fewest ms of those whose worst is no more than full's.
"""

import argparse
import math
import statistics
import time
from collections import Counter

import torch
from torch import Tensor

from benchmarks.timing import gpu_milliseconds
from nanochat.errors import BadInput, Parser, run
from nanochat.gpt import GPT, GPTConfig
from nanochat.param_groups import groups
from nanochat.roofline import polar_flops
from nvfp8.polar_express import SMALL, fastest_products, polar_express, room, worked_in
from nvfp8.precision import bf16

WAYS = ("full", "half", "gram")  # of matrices of some size
WORKSPACE = 2**29  # Muon's default


def arguments() -> argparse.Namespace:
    """Parse flags and refuse what cannot be measured."""
    parser = Parser("muon", description="Polar Express by each kind of product")
    parser.add_argument("--depth", type=int, nargs="+", default=[12, 24])
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise BadInput("Polar Express is timed on a GPU, and torch finds no CUDA device")
    if args.repeats < 1:
        raise BadInput("--repeats must be at least 1")
    return args


def shapes(depth: int) -> Counter[tuple[int, int]]:
    """How many matrices of each shape Muon has in a model of this depth."""
    config = GPTConfig.from_depth(depth)
    with torch.device("meta"):
        model = GPT(config, bf16())
    matrices = [p for group in groups(model, config, weight_decay=0.0) if group["kind"] == "muon" for p in group["params"]]
    return Counter((p.shape[0], p.shape[1]) for p in matrices)


def ways(rows: int, columns: int) -> tuple[str, ...]:
    """Those that a shape can go."""
    if max(rows, columns) <= SMALL:
        return "full", "small"
    return WAYS if rows % 8 == columns % 8 == 0 else ("full",)  # TMA takes rows of whole 16 bytes


def milliseconds(x: Tensor, products: str, repeats: int) -> tuple[float, float]:
    """Medians of one call on a copy of x, which is not timed: of the GPU alone, and until the call returns."""
    given: list[Tensor] = []
    dtype, factor = worked_in(products, x.dtype)
    x = (x * factor).to(dtype)  # as Muon's first pass writes it
    gpu = gpu_milliseconds(lambda: polar_express(given.pop(), products, lifted=True), repeats, lambda: given.append(x.clone()))
    host = []
    for _ in range(repeats):
        copy = x.clone()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        polar_express(copy, products, lifted=True)
        host.append(1e3 * (time.perf_counter() - begun))
    return gpu, statistics.median(host)


def spectra(rows: int, columns: int) -> Tensor:
    """A Gaussian matrix, and singular values that decay to 1e-4 and as 1/i, each of norm 1/1.01: (3, rows, columns) bf16."""
    torch.manual_seed(0)
    short = min(rows, columns)
    gaussian = torch.randn(rows, columns, device="cuda")
    u, v = (torch.linalg.qr(torch.randn(n, short, device="cuda"))[0] for n in (rows, columns))
    falling = torch.logspace(0, -4, short, device="cuda"), 1 / torch.arange(1, short + 1, device="cuda")
    x = torch.stack((gaussian, *(u * values @ v.mT for values in falling)))
    return (x / (1.01 * x.norm(dim=(-2, -1), keepdim=True))).bfloat16()


def accuracy(given: Tensor, exact: Tensor, values: Tensor, products: str) -> str:
    """The deviations of all spectra from fp64, as cells of the table."""
    ours = polar_express(given.clone(), products).double()
    worst = (torch.linalg.svdvals(ours) - values).abs().amax(-1)
    error = (ours - exact).norm(dim=(-2, -1)) / exact.norm(dim=(-2, -1))
    return " | ".join(f"{w:.4f}, {100 * e:.2f} %" for w, e in zip(worst.tolist(), error.tolist(), strict=True))


def main() -> None:
    """Parse flags, run, print."""
    args = arguments()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(
        "| depth | shape | products | ms, all | host ms, all | TFLOP/s | MiB a matrix "
        "| worst, error: Gaussian | decay to 1e-4 | 1/i |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for depth in args.depth:
        for (rows, columns), count in sorted(shapes(depth).items(), reverse=True):
            given = spectra(rows, columns)
            exact = polar_express(given.double(), "full")
            values = torch.linalg.svdvals(exact)
            chosen = fastest_products(rows, columns, torch.bfloat16, torch.cuda.get_device_capability())
            for products in ways(rows, columns):
                matrix = room(rows, columns, torch.bfloat16, products)
                batch = math.ceil(count / math.ceil(count / max(1, WORKSPACE // matrix)))
                one, host = milliseconds(given[:1].expand(batch, -1, -1), products, args.repeats)
                ms, host = one * count / batch, host * count / batch
                rate = count * polar_flops(rows, columns, products) / ms / 1e9
                star = "*" if products == chosen else ""
                print(
                    f"| {depth} | {count} x {rows} x {columns} | {products}{star} | {ms:.3f} | {host:.3f} | {rate:.1f} "
                    f"| {matrix / 2**20:.1f} "
                    f"| {accuracy(given, exact, values, products)} |",
                    flush=True,
                )


if __name__ == "__main__":
    run(main)
