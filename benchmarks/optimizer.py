"""Muon's and AdamW's step by themselves: median milliseconds of each, on random gradients. One JSON line.

    python -m benchmarks.optimizer --depth 12 [--precision bf16] [--steps 20]
    python -m benchmarks.optimizer --depth 12 --precision te [--recipe delayed] [--te-weights fp8] …

`ms` is from an idle GPU to an idle GPU, what a step of training pays. `host_ms` is until `step` returns: where it comes close to
`ms`, the GPU waits for Python. Gradients are new tensors every step, as in training, with the dtype that backward gives them.
"""

import argparse
import json
import os
import statistics
import time

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch

from nanochat.build import build_model, build_optimizers, choose_precision
from nanochat.errors import BadInput, Parser, run
from nanochat.gpt import GPTConfig
from nanochat.optimizer import NamedOptimizer
from nanochat.param_groups import groups, ownership
from scripts.engine_flags import add_engine_flags, engine_options

WARM = 3  # steps before the measured ones: kernels are compiled, memory is taken


def arguments() -> argparse.Namespace:
    """Parse flags and refuse what cannot be measured."""
    parser = Parser("optimizer", description="milliseconds of an optimizer step")
    parser.add_argument("--depth", type=int, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--precision", choices=("te", "bf16", "fp32"), default="bf16")
    add_engine_flags(parser)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise BadInput("the optimizers are timed on a GPU, and torch finds no CUDA device")
    if args.steps < 1:
        raise BadInput("--steps must be at least 1")
    return args


def main() -> None:
    """Parse flags, run, print."""
    args = arguments()
    try:
        config = GPTConfig.from_depth(args.depth)
    except ValueError as error:
        raise BadInput(str(error)) from error
    precision, _ = choose_precision(args.precision, "cuda", engine_options(args) if args.precision == "te" else None)
    model = build_model(config, precision, torch.device("cuda"))
    tokens = torch.randint(0, config.vocab_size, (1, config.sequence_len + 1), device="cuda")
    model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).backward()
    dtypes = {name: p.grad.dtype for name, p in model.named_parameters() if p.grad is not None}
    all_groups = groups(model, config, weight_decay=0.28)
    adamw, muon = build_optimizers(all_groups, ownership(all_groups, 1), 0, precision.compute_dtype)

    def step(optimizer: NamedOptimizer) -> tuple[float, float]:
        """Give every parameter a new gradient and update; return milliseconds in all and of the host."""
        for name, parameter in optimizer.named_parameters():
            if name in dtypes:
                parameter.grad = None
                parameter.grad = torch.randn_like(parameter, dtype=dtypes[name])
        torch.cuda.synchronize()
        start = time.perf_counter()
        optimizer.step()
        host = time.perf_counter()
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start), 1e3 * (host - start)

    result: dict[str, object] = {"depth": args.depth, "precision": precision.name}
    for optimizer in (muon, adamw):
        times = [step(optimizer) for _ in range(WARM + args.steps)][WARM:]
        for what, values in zip(("ms", "host_ms"), zip(*times, strict=True), strict=True):
            result[f"{optimizer.kind}_{what}"] = round(statistics.median(values), 2)
    print(json.dumps({**result, "gpu": torch.cuda.get_device_name(), "torch": torch.__version__}))


if __name__ == "__main__":
    run(main)
