"""Whole training steps on random tokens: tokens per second, peak memory, optimizer time, warm-up. One JSON line.

    python -m benchmarks.step --depth 24 --batch 16 --accumulation 8 [--steps 20] [--window-pattern L] [--precision bf16]
    python -m benchmarks.step --depth 24 --batch 16 --precision te [--recipe delayed] [--te-layers separate] [--te-head chunked] …
    python -m benchmarks.step --depth 24 --batch 16 --precision fp8 [--recipe current]
    python -m benchmarks.step --depth 24 --batch 16 --state-dtype e4m3 --master-weights bf16+8 [--accumulation 1 --update-early]

The counterpart for karpathy/nanochat is peers.py of the project's shared bench folder: same shapes, same protocol. `warm_s` is the
first two steps and the compilation ahead of them, which is `ahead_s`; imports and model initialization not. Before it
`TRITON_CACHE_DIR=$(mktemp -d)` is to make Triton's cache cold. Medians. `peak_GiB` counts what CUDA graphs hold. `optimizer_ms` is
between the end of backward and the end of the update on the GPU, with what the host does in between, but for a look at gradients.

`losses`, one a step, show that a step learns, not how well a format does: rates are full from the first step on, so scalars with a
rate of 0.5 overshoot, and single steps reach 2 to 18 in any format (docs/log.md). Compare curves, not ends.
"""

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch

from nanochat import gauges
from nanochat.ahead import compile_kernels
from nanochat.build import build_model, build_optimizers, choose_precision
from nanochat.gpt import GPTConfig
from nanochat.memory import Counted, Setup, predict
from nanochat.micro_batches import MicroBatches, refusal
from nanochat.optimizer import StoredByName
from nanochat.param_groups import groups, ownership
from nanochat.process import make_deterministic
from nanochat.te_adam import CHOICES, check
from nanochat.updates import Updates
from nvfp8.optim import UpdateEarly
from scripts.engine_flags import add_engine_flags, engine_options
from scripts.state_flags import add_state_flags, state_formats

# Steps after the first two until a step is captured: one in which nothing has changed on the host, and that of the capture.
SETTLING = 2


def _outside() -> float:
    """GiB of the device that are taken now and not by the allocator: CUDA's context, loaded kernels, and other processes."""
    free, total = torch.cuda.mem_get_info()
    return (total - free - torch.cuda.memory_reserved()) / 2**30


def main() -> None:
    """Parse flags, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--accumulation", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--window-pattern", default="L")
    parser.add_argument("--precision", choices=("te", "fp8", "bf16", "fp32"), default="bf16")
    parser.add_argument("--adamw", choices=CHOICES, default="own")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--no-cuda-graphs", action="store_true", help="launch all kernels one by one")
    parser.add_argument("--update-early", action="store_true", help="with --accumulation 1: updates in the middle of backward")
    add_state_flags(parser)
    add_engine_flags(parser)
    args = parser.parse_args()
    if args.update_early and (args.accumulation != 1 or args.adamw != "own" or args.te_weights == "fp8"):
        parser.error("--update-early goes with --accumulation 1, --adamw own and --te-weights bf16")
    if args.deterministic:
        make_deterministic()
    device = torch.device("cuda")
    config = GPTConfig.from_depth(args.depth, window_pattern=args.window_pattern)
    options = engine_options(args) if args.precision in ("te", "fp8") else None
    precision, _ = choose_precision(args.precision, "cuda", options)
    check(args.adamw, "cuda", precision.matrix_dtype)
    formats = state_formats(args, precision, args.adamw)
    precision = formats.stored_by(precision, "cuda", args.adamw)
    model = build_model(config, precision, device)
    tokens = torch.randint(0, config.vocab_size, (args.batch, config.sequence_len + 1), device=device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    optimizer_ms, losses = [], []
    start = time.perf_counter()
    compile_kernels(model, args.batch, args.adamw, formats)
    ahead = time.perf_counter() - start
    all_groups = groups(model, config, weight_decay=0.28)
    optimizers = build_optimizers(all_groups, ownership(all_groups, 1), 0, precision.compute_dtype, args.adamw, formats)
    own = [optimizer for optimizer in optimizers if isinstance(optimizer, StoredByName)]
    early = UpdateEarly(own) if args.update_early else None
    micro_batches = MicroBatches(model, "--no-cuda-graphs" if args.no_cuda_graphs else refusal(model, 1, args.update_early))
    updates = Updates(optimizers, micro_batches)
    backward_done, updated = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def step() -> None:
        if early is not None:
            loss = model(inputs, targets)
            early.begin()
            loss.backward()
            early.finish()
            model.scaling.update()
            losses.append(loss.detach())
            return
        micro_batches.begin()
        for _ in range(args.accumulation):
            loss = micro_batches.run(inputs, targets, 1 / args.accumulation)
        updates.prepare()
        backward_done.record()
        backward_done.synchronize()  # training looks at gradients here
        model.scaling.update()
        updates.step()
        updated.record()
        model.zero_grad(set_to_none=True)
        losses.append(loss * args.accumulation)
        updated.synchronize()
        optimizer_ms.append(backward_done.elapsed_time(updated))

    start = time.perf_counter()
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    warm = ahead + time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    for _ in range(SETTLING if micro_batches.capturing else 0):
        step()
    seconds = []
    for _ in range(args.steps):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    setup = Setup(
        config, precision, args.batch, args.accumulation, formats, model.attention_backend, args.deterministic, args.update_early,
        micro_batches.capturing, args.adamw == "own", capability=torch.cuda.get_device_capability(),
    )  # fmt: skip
    predicted = predict(setup, Counted(setup, args.adamw)).total / 2**30
    held = sum(value.nbytes for optimizer in optimizers for value in optimizer.named_state().values())
    rate = args.batch * config.sequence_len * args.accumulation / statistics.median(seconds)
    print(
        json.dumps(
            {
                "depth": args.depth, "batch": args.batch, "accumulation": args.accumulation, "window": args.window_pattern,
                "precision": args.precision, "engine": asdict(options) if options else None,
                "adamw": args.adamw, "deterministic": args.deterministic, "attention": model.attention_backend,
                "micro_batches": micro_batches.how, "optimizers": updates.how,
                "tok_s": round(rate), "peak_GiB": round(gauges.peak_gib(device, micro_batches.hidden), 2),
                "predicted_GiB": round(predicted, 2), "reserved_GiB": round(torch.cuda.max_memory_reserved() / 2**30, 2),
                "outside_GiB": round(_outside(), 2),
                "state": formats.describe(precision, args.adamw), "state_GiB": round(held / 2**30, 3),
                "update_early": args.update_early,
                "optimizer_ms": round(statistics.median(optimizer_ms[-args.steps :]), 1) if early is None else None,
                "warm_s": round(warm, 1), "ahead_s": round(ahead, 1),
                "loss": round(losses[-1].item(), 4), "losses": [round(loss.item(), 3) for loss in losses],
                "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
