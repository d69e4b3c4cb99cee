"""Where a micro-batch's time goes: milliseconds of GPU kernels by family, and the largest kernels one by one.

    python -m benchmarks.profile --depth 24 --batch 16 [--window-pattern L] [--precision bf16] [--micro-batches 4] …
    python -m benchmarks.profile --depth 24 --batch 16 --precision te [--recipe delayed] [--te-head chunked] …

Forward and backward of random tokens under `torch.profiler`, gradients accumulating, no optimizer; T = 2048. Every kernel is in
exactly one family, found by its name, and what no family claims is under "other": look at the list of largest kernels before
believing a small "other". Output projections, which start at zero, get values: products of zeros draw less power than training's,
so the card would clock higher. Below stands how long the GPU waited, and before which kernel longest; the profiler slows the host,
so that is more than without it. The last line is timed without: what it exceeds the kernels by, the GPU waited.
"""

import os
import time
from collections.abc import Sequence

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch

from nanochat import idle
from nanochat.build import PRECISIONS, EngineOptions, build_model, choose_precision
from nanochat.errors import BadInput, Parser, run
from nanochat.gpt import GPT, GPTConfig
from nanochat.micro_batches import MicroBatches, refusal
from nanochat.step_profile import Kernel, by_family, family, recorded, without_profiler
from scripts.engine_flags import add_engine_flags, engine_options


def table(kernels: Sequence[Kernel], micro_batches: int, largest: int = 24) -> list[str]:
    """The lines to print: families by time, their sum, then the `largest` kernels; all per micro-batch."""
    rows = [(family(name), name, launches / micro_batches, ms / micro_batches) for name, launches, ms in kernels]
    total = sum(ms for *_, ms in rows)
    lines = [f"{'family':<24}{'ms':>9}{'share':>9}{'launches':>10}"]
    for kind, (launches, ms) in by_family(kernels, micro_batches).items():
        lines.append(f"{kind:<24}{ms:>9.2f}{ms / total:>9.1%}{launches:>10.0f}")
    lines.append(f"{'sum of kernels':<24}{total:>9.2f}")
    lines.append("")
    for kind, name, launches, ms in sorted(rows, key=lambda row: -row[3])[:largest]:
        lines.append(f"{ms:>9.2f} ms {launches:>6.0f} x  {kind}: {name[:120]}")
    return lines


def _model(config: GPTConfig, name: str, options: EngineOptions | None) -> tuple[GPT, str]:
    """Build a model without zero matrices, and say in what it runs."""
    precision, why = choose_precision(name, "cuda", options)
    model = build_model(config, precision, torch.device("cuda"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 and not parameter.any():
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model, f"{precision.name} ({why}), attention {model.attention_backend}"


def main() -> None:
    """Parse flags, warm up, time, profile, print."""
    parser = Parser("profile", description="where a micro-batch's time goes")
    parser.add_argument("--depth", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True, help="rows of 2048 tokens")
    parser.add_argument("--micro-batches", type=int, default=4, help="to average over")
    parser.add_argument("--window-pattern", default="L")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    parser.add_argument("--no-cuda-graphs", action="store_true")
    add_engine_flags(parser)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise BadInput("the profile is of GPU kernels, and torch finds no CUDA device")
    if args.batch < 1 or args.micro_batches < 1:
        raise BadInput("--batch and --micro-batches must be at least 1")
    try:
        config = GPTConfig.from_depth(args.depth, window_pattern=args.window_pattern)
    except ValueError as error:
        raise BadInput(str(error)) from error
    options = engine_options(args) if args.precision in ("te", "fp8", "auto") else None
    model, runs = _model(config, args.precision, options)
    tokens = torch.randint(0, config.vocab_size, (args.batch, config.sequence_len + 1), device="cuda")
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    runner = MicroBatches(model, "--no-cuda-graphs" if args.no_cuda_graphs else refusal(model))

    def micro_batches(count: int) -> float:
        """Run forward and backward `count` times; return milliseconds of each."""
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        start = time.perf_counter()
        runner.begin()
        for _ in range(count):
            runner.run(inputs, targets, 1 / args.micro_batches)
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start) / count

    micro_batches(2)  # kernels are compiled and chosen
    model.scaling.update()  # delayed scaling has a history from here on
    for _ in range(2):  # by the second time nothing has changed on the host, and graphs are captured
        micro_batches(2)
    wall = micro_batches(args.micro_batches)
    done = recorded(lambda: micro_batches(args.micro_batches), torch.device("cuda"))
    print(f"d{args.depth}, {args.batch} x {config.sequence_len} tokens, window {args.window_pattern}; {runs}; {runner.how}")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; per micro-batch, mean of {args.micro_batches}\n")
    print("\n".join(table(done.kernels(), args.micro_batches)))
    print("\nall micro-batches together, with the profiler around them:")
    print("\n".join(idle.lines(done.spans(), None)))
    whole = without_profiler(done.spans(), args.micro_batches * wall)
    print(f"\na micro-batch without the profiler: {wall:.2f} ms; all together: {whole}")


if __name__ == "__main__":
    run(main)
