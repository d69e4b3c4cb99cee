"""What fast accumulation costs on real gradients: every FP8 GEMM of a trained model, summed both ways. A Markdown table.

    python -m scripts.base_train --depth 12 --data python+site --num-iterations 300 --precision fp8 --model-tag fp8
    python -m benchmarks.accumulation --model-tag fp8 --data python+site

One micro-batch of the run's training text goes through its checkpoint, each operand cast with its own amax (recipe `current`, which
fuses no GEMM). The error of a sum is ‖product − exact‖ / ‖exact‖, exact being the fp64 product of the same codes, over 1,024 rows
of the result; worst and median over layers. Beside it what the casts of both operands cost anyway: the rounding error of normally
distributed numbers in that format, both operands' added as squares. `worst entry` is the largest error of one entry, relative to
the result's root mean square.
"""

import statistics
from collections import defaultdict
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from nanochat.build import EngineOptions, build_model, choose_precision, config_of, load_weights
from nanochat.checkpoint import find
from nanochat.dataloader import BatchLoader
from nanochat.dataset import base_dir, resolve
from nanochat.errors import BadInput, Parser, run
from nanochat.shards import open_or_build
from nanochat.tokenizer import Tokenizer
from nvfp8.matmul import fp8_matmul

ROWS = 1024


def rounding(dtype: torch.dtype) -> float:
    """Relative rounding error of normally distributed numbers in an FP8 format, far from its ends."""
    x = torch.randn(2**20, device="cuda") * 16
    return float((x.to(dtype).float() - x).norm() / x.norm())


def errors(a: Tensor, b: Tensor) -> dict[bool, tuple[float, float]]:
    """Of a (M, K) · b (N, K)ᵀ in FP8: error of the whole and of the worst entry, with (True) and without fast accumulation."""
    some = a[:: max(1, len(a) // ROWS)][:ROWS].contiguous()
    exact, one = some.double() @ b.double().t(), torch.ones((), device=a.device)
    found = {}
    for fast in (True, False):
        apart = fp8_matmul(some, b, one, one, torch.float32, fast).double() - exact
        found[fast] = float(apart.norm() / exact.norm()), float(apart.abs().max() / exact.square().mean().sqrt())
    return found


def main() -> None:
    """Parse flags, run, print."""
    parser = Parser("accumulation", description="errors of FP8 sums on real gradients")
    parser.add_argument("--model-tag", required=True)
    parser.add_argument("--data", default="python", help="as in base_train")
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise BadInput("tensor cores add on a GPU, and torch finds no CUDA device")
    device = torch.device("cuda")
    saved = find(base_dir() / "base_checkpoints" / args.model_tag, None)
    model = build_model(config_of(saved), choose_precision("fp8", "cuda", EngineOptions(recipe="current"))[0], device)
    load_weights(model, saved)
    measured: dict[tuple[str, str, str], list[dict[bool, tuple[float, float]]]] = defaultdict(list)

    def watched(a: Tensor, b: Tensor, *more: Any, **options: Any) -> Tensor:
        gemm = "fprop" if a.dtype == torch.float8_e4m3fn else "wgrad" if a.shape[1] == tokens else "dgrad"
        casts = f"{(rounding(a.dtype) ** 2 + rounding(b.dtype) ** 2) ** 0.5:.2%}"
        measured[gemm, f"{len(a):,} × {len(b):,} × {a.shape[1]:,}", casts].append(errors(a, b))
        return fp8_matmul(a, b, *more, **options)

    store = open_or_build(resolve(args.data), Tokenizer.load(base_dir() / "tokenizer"), base_dir() / "shards")
    batches = BatchLoader(store.split("train"), args.batch, model.config.sequence_len, rank=0, world_size=1, device=device)
    try:
        inputs, targets = next(batches)
    finally:
        batches.close()
    tokens = inputs.numel()
    with patch("nvfp8.quantize.fp8_matmul", watched):
        model(inputs, targets, 1.0).backward()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {saved.path}, {tokens:,} tokens\n")
    print("| GEMM | M × N × K | casts | fast: worst, median | worst entry | promoted: worst, median | worst entry |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for key, found in sorted(measured.items()):
        line = [*key]
        for fast in (True, False):
            whole, entry = zip(*(each[fast] for each in found), strict=True)
            line += [f"{max(whole):.4%}, {statistics.median(whole):.4%}", f"{max(entry):.3%}"]
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    run(main)
