"""Muon's and AdamW's step by themselves: median milliseconds of each, on random gradients. One JSON line.

    python -m benchmarks.optimizer --depth 12 [--precision bf16] [--steps 20]
    python -m benchmarks.optimizer --depth 12 --precision te [--recipe delayed] [--te-weights fp8] …
    python -m benchmarks.optimizer --depth 24 --state-dtype e4m3 --master-weights bf16+8 [--precision fp8]

`ms` is from an idle GPU to an idle GPU, what a step of training pays. `host_ms` is until `step` returns: where it comes close to
`ms`, the GPU waits for Python. Gradients are new tensors every step, as in training, with the dtype that backward gives them.

`state_GiB` is all that the two keep between steps, `parameter_bytes` what a parameter of each takes in all: weight, what completes
it, state and gradient. AdamW is one pass over memory: `adamw_gpu_ms` is its time on the GPU alone, `adamw_GB` what it must read and
write, and `adamw_of_copy` the share of the copy rate measured beside it.

`step_ms`, `step_host_ms` and `step_gpu_ms` are of both in one CUDA graph, as a run on one GPU makes its steps
(`nanochat/updates.py`): gradients where they were, FP8 copies of weights written where layers have them. `kernels_ms` are that
graph's kernels under the profiler, the largest first; AdamW's run beside Muon's, for which they wait.

With FP8 layers, whose copies of weights optimizers write, `<kind>_gpu_ms_with_copies` and `…_without_copies` are what they take on
the GPU, and `cast_gpu_ms` what the layers take instead to cast all weights. The first figures are without copies.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch

from benchmarks.timing import WARM, copy_bandwidth, gpu_milliseconds
from nanochat.adamw import AdamW
from nanochat.build import build_model, build_optimizers, choose_precision
from nanochat.errors import BadInput, Parser, run
from nanochat.gpt import GPT, GPTConfig
from nanochat.micro_batches import MicroBatches, refusal
from nanochat.optimizer import NamedOptimizer, StoredByName
from nanochat.param_groups import groups, ownership
from nanochat.step_profile import recorded
from nvfp8.optim.update import Replayed
from nvfp8.quantize import Projection
from nvfp8.scaling import Scaling
from scripts.engine_flags import add_engine_flags, engine_options
from scripts.state_flags import add_state_flags, state_formats


def arguments() -> argparse.Namespace:
    """Parse flags and refuse what cannot be measured."""
    parser = Parser("optimizer", description="milliseconds of an optimizer step")
    parser.add_argument("--depth", type=int, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--precision", choices=("te", "fp8", "bf16", "fp32"), default="bf16")
    add_state_flags(parser)
    add_engine_flags(parser)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise BadInput("the optimizers are timed on a GPU, and torch finds no CUDA device")
    if args.steps < 1:
        raise BadInput("--steps must be at least 1")
    return args


def bytes_of_state(optimizer: NamedOptimizer) -> int:
    """All that it keeps between steps, scales and what completes weights included."""
    return sum(value.nbytes for value in optimizer.named_state().values())


def bytes_moved(optimizer: AdamW) -> int:
    """What a step must read and write: gradients once, weights and state twice, but a weight beside its fp32 master once."""
    total = 2 * bytes_of_state(optimizer)
    for _, p in optimizer.named_parameters():
        total += optimizer.gradient(p).nbytes + (1 if "master" in optimizer.state[p] else 2) * p.nbytes
    return total


def beside_copies(
    model: GPT, optimizers: Sequence[NamedOptimizer], steps: int, backward: Callable[[], None],
    renew: Callable[[NamedOptimizer], None],
) -> dict[str, float]:  # fmt: skip
    """Milliseconds on the GPU of each optimizer with and without FP8 copies of weights, and of the layers' casts."""
    parts = [part for module in model.modules() for part in getattr(module, "projections", ()) if isinstance(part, Projection)]
    scaling, result = model.scaling, {}
    if not isinstance(scaling, Scaling) or not any(part.w.remembers for part in parts):
        return {}
    for _ in range(2):  # the first step moves what starts from zero, and then every weight has a history
        model.zero_grad()
        backward()
        scaling.update()
        for optimizer in optimizers:
            renew(optimizer)
            optimizer.step()
    with_history = scaling.seen
    for what, seen in (("with", with_history), ("without", [False] * len(with_history))):
        scaling.seen = seen
        for optimizer in optimizers:
            milliseconds = gpu_milliseconds(optimizer.step, steps, partial(renew, optimizer))
            result[f"{optimizer.kind}_gpu_ms_{what}_copies"] = round(milliseconds, 3)
    scaling.seen = with_history
    weights = [weight for part in parts for weight in part.weights]
    milliseconds = gpu_milliseconds(
        lambda: [part.weight() for part in parts], steps, lambda: torch.autograd.graph.increment_version(weights)
    )
    return {**result, "cast_gpu_ms": round(milliseconds, 3)}


def in_a_graph(model: GPT, optimizers: Sequence[StoredByName], steps: int) -> dict[str, float | dict[str, float]]:
    """Milliseconds of all optimizers' steps, replayed: in all, until the call returns, on the GPU alone, and by its kernels."""
    replayed, capture = Replayed(optimizers), MicroBatches(model, None).capture
    gradients = [p.grad for p in model.parameters() if p.grad is not None]

    def renew() -> None:
        for gradient in gradients:
            gradient.normal_()

    def step() -> None:
        if not replayed.step(capture):
            raise RuntimeError("the step's launches are not what they were")

    times = []
    for _ in range(WARM + steps):
        renew()
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        host = time.perf_counter()
        torch.cuda.synchronize()
        times.append((1e3 * (time.perf_counter() - start), 1e3 * (host - start)))
    whole, of_host = (statistics.median(values) for values in zip(*times[WARM:], strict=True))
    of_gpu = gpu_milliseconds(step, steps, renew)
    kernels = sorted(recorded(step, torch.device("cuda")).kernels(), key=lambda kernel: -kernel[2])
    return {
        "step_ms": round(whole, 2), "step_host_ms": round(of_host, 2), "step_gpu_ms": round(of_gpu, 2),
        "kernels_ms": {name[:60]: round(ms, 3) for name, _, ms in kernels[:14]},
    }  # fmt: skip


def main() -> None:
    """Parse flags, run, print."""
    args = arguments()
    try:
        config = GPTConfig.from_depth(args.depth)
    except ValueError as error:
        raise BadInput(str(error)) from error
    precision, _ = choose_precision(args.precision, "cuda", engine_options(args) if args.precision in ("te", "fp8") else None)
    formats = state_formats(args, precision)
    precision = formats.stored_by(precision, "cuda")
    model = build_model(config, precision, torch.device("cuda"))
    tokens = torch.randint(0, config.vocab_size, (1, config.sequence_len + 1), device="cuda")

    def backward() -> None:
        model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).backward()

    backward()
    dtypes = {name: p.grad.dtype for name, p in model.named_parameters() if p.grad is not None}
    all_groups = groups(model, config, weight_decay=0.28)
    adamw, muon = build_optimizers(all_groups, ownership(all_groups, 1), 0, precision.compute_dtype, formats=formats)
    assert isinstance(adamw, AdamW)

    def renew(optimizer: NamedOptimizer) -> None:
        """Give every parameter a new gradient."""
        for name, parameter in optimizer.named_parameters():
            if name in dtypes:
                parameter.grad = None
                parameter.grad = torch.randn_like(parameter, dtype=dtypes[name])

    def step(optimizer: NamedOptimizer) -> tuple[float, float]:
        """Update with new gradients; return milliseconds in all and of the host."""
        renew(optimizer)
        torch.cuda.synchronize()
        start = time.perf_counter()
        optimizer.step()
        host = time.perf_counter()
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start), 1e3 * (host - start)

    result: dict[str, object] = {"depth": args.depth, "precision": precision.name, **formats.describe(precision)}
    for optimizer in (muon, adamw):
        times = [step(optimizer) for _ in range(WARM + args.steps)][WARM:]
        for what, values in zip(("ms", "host_ms"), zip(*times, strict=True), strict=True):
            result[f"{optimizer.kind}_{what}"] = round(statistics.median(values), 2)
        parameters = [p for _, p in optimizer.named_parameters()]
        held = bytes_of_state(optimizer) + sum(p.nbytes + (0 if p.grad is None else p.grad.nbytes) for p in parameters)
        result[f"{optimizer.kind}_parameter_bytes"] = round(held / sum(p.numel() for p in parameters), 2)
    result["state_GiB"] = round((bytes_of_state(adamw) + bytes_of_state(muon)) / 2**30, 3)
    milliseconds, moved, copy = (
        gpu_milliseconds(adamw.step, args.steps, lambda: renew(adamw)),
        bytes_moved(adamw),
        copy_bandwidth(),
    )
    result |= {"adamw_gpu_ms": round(milliseconds, 3), "adamw_GB": round(moved / 1e9, 3), "copy_GB_s": round(copy / 1e9)}
    result["adamw_of_copy"] = round(moved / (1e-3 * milliseconds) / copy, 3)
    result |= beside_copies(model, (muon, adamw), args.steps, backward, renew)
    if refusal(model) is None:
        result |= in_a_graph(model, (adamw, muon), args.steps)
    print(json.dumps({**result, "gpu": torch.cuda.get_device_name(), "torch": torch.__version__}))


if __name__ == "__main__":
    run(main)
