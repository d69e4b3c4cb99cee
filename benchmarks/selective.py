"""What each GEMM, kind of layer and block costs in FP8: losses and gradients of one trained model in every choice of `bf16=`.

    python -m scripts.base_train --depth 12 --data python+site --num-iterations 300 --precision fp8 --model-tag fp8
    python -m benchmarks.selective --model-tag fp8 --data python+site

Training runs differ by what their seeds do too; here weights and text are the same, so what is seen is the rounding. A JSON line a
choice, then a table. Choices: everything in bf16; everything in FP8; FP8 without one GEMM, kind of layer or block; and bf16 but for
one GEMM or kind, which shows its cost alone. Each model first makes 3 steps that change no weight, so that delayed scaling has a
history of other text than is measured.

* **loss**: mean of 16 micro-batches of validation text minus that of the same weights in bf16, thousandths of a nat a token, ± its
  standard error over micro-batches.
* **error**: ‖g − exact‖ / ‖exact‖ of the gradients of all matrices that a recipe may cast, together; exact is the fp32 model of the
  same weights. Of one micro-batch, and of the mean of 4: an error that is independent from one to the next gets smaller then, but
  so does the part of the gradient that is noise. Beside it the cosine of both, for the mean.
* **median, worst**: the same error of the mean, matrix by matrix: Muon and Adam make each one's update as large as any other's,
  whatever its gradient's size.

`all bf16` is what bf16 itself costs: an error below it does not exist. Errors that are independent add as squares.
"""

import json
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nanochat.build import EngineOptions, build_model, check_tokenizer, choose_precision, config_of, load_weights
from nanochat.checkpoint import find
from nanochat.dataloader import BatchLoader
from nanochat.dataset import base_dir, resolve
from nanochat.errors import BadInput, Parser, run
from nanochat.gpt import GPT, GPTConfig
from nanochat.shards import open_or_build
from nanochat.tokenizer import Tokenizer
from nvfp8.hardware import missing
from nvfp8.precision import fp32
from nvfp8.recipe import GEMMS

WARM, LOSSES, AVERAGED = 3, 16, 4  # micro-batches: before the measurement, of the loss, of the mean gradient
KINDS = ("h.*.attn.qkv", "h.*.attn.c_proj", "h.*.mlp.c_fc", "h.*.mlp.c_proj", "lm_head")
BF16 = "*"

Batches = Sequence[tuple[Tensor, Tensor]]  # inputs and targets, (B, T) int64 each


def choices(blocks: int) -> dict[str, str]:
    """What stays in bf16, as recipes write it, by the name of the choice."""
    gemms = [f"*:{gemm}" for gemm in GEMMS]
    named = {
        "all bf16": BF16,
        "all FP8": "",
        **{f"bf16: {gemm}": f"*:{gemm}" for gemm in GEMMS},
        **{f"bf16: {kind}": kind for kind in KINDS},
        **{f"bf16: h.{block}": f"h.{block}" for block in range(blocks)},
    }
    for every in (gemms, KINDS):
        named |= {f"FP8: {one.removeprefix('*:')}": "+".join(other for other in every if other != one) for one in every}
    return named


def build(config: GPTConfig, in_bf16: str | None, device: torch.device) -> GPT:
    """A model in FP8 but for what is `in_bf16`; None makes one in fp32."""
    real = device.type == "cuda" and missing("fp8", torch.cuda.get_device_capability(device)) is None
    options = EngineOptions(f"delayed:bf16={in_bf16}")
    precision = fp32() if in_bf16 is None else choose_precision("fp8" if real else "fp8-emulated", device.type, options)[0]
    return build_model(config, precision, device)


def matrices(model: GPT) -> dict[str, Tensor]:
    """The gradients of what recipes may cast, by name."""
    found = {}
    for name, parameter in model.named_parameters():
        if name.startswith(("transformer.h.", "lm_head.")) and "ve_gate" not in name:
            assert parameter.grad is not None
            found[name.removeprefix("transformer.").removesuffix(".weight")] = parameter.grad
    return found


def backward(model: GPT, batches: Batches) -> Iterator[dict[str, Tensor]]:
    """Sum the gradients of `AVERAGED` micro-batches as a training step does; they are handed out after the first and the last."""
    model.zero_grad(set_to_none=True)
    for index, (inputs, targets) in enumerate(batches[:AVERAGED]):
        model(inputs, targets, 1 / AVERAGED).backward()
        if index in (0, AVERAGED - 1):
            yield matrices(model)


@torch.no_grad()
def losses(model: GPT, batches: Batches) -> list[float]:
    """Nats a token of each micro-batch, by the forward of training."""
    return torch.stack([model(inputs, targets, 1 / AVERAGED) * AVERAGED for inputs, targets in batches]).tolist()


class Apart(NamedTuple):
    """How far a gradient is from the exact one: relative error and cosine."""

    error: float
    cosine: float


def apart(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> tuple[Apart, dict[str, Apart]]:
    """Of all matrices together, and of each."""

    def sums(g: Tensor, e: Tensor) -> Tensor:
        g, e = g.double(), e.double()
        return torch.stack(((g - e).square().sum(), e.square().sum(), g.square().sum(), (g * e).sum()))

    def of(error: float, e: float, g: float, product: float) -> Apart:
        return Apart(math.sqrt(error / e), product / math.sqrt(e * g))

    each = torch.stack([sums(found[name], exact[name]) for name in exact])
    return of(*each.sum(0).tolist()), {name: of(*row) for name, row in zip(exact, each.tolist(), strict=True)}


def records(
    config: GPTConfig, weights: Mapping[str, Tensor], wanted: Mapping[str, str], batches: Batches, device: torch.device
) -> Iterator[dict[str, object]]:
    """One record a choice, and before them one of fp32, which has a loss only.

    Args:
        config: the shape.
        weights: state of a model made by `build` in FP8 or bf16, so that every choice, and fp32, computes with the same numbers.
        wanted: of `choices`.
        batches: WARM to make a history of, then at least AVERAGED to measure.
        device: of batches.
    """
    warm, text = batches[:WARM], batches[WARM:]

    def loaded(in_bf16: str | None) -> GPT:
        model = build(config, in_bf16, device)
        model.load_state_dict(weights)
        return model

    bf16 = losses(loaded(BF16), text)

    def difference(found: list[float]) -> dict[str, object]:
        each = [1e3 * (a - b) for a, b in zip(found, bf16, strict=True)]
        return {"loss": statistics.fmean(each), "loss_error": statistics.stdev(each) / math.sqrt(len(each))}

    reference = loaded(None)
    yield {"choice": "fp32", **difference(losses(reference, text))}
    exact = [{name: gradient.clone() for name, gradient in gradients.items()} for gradients in backward(reference, text)]
    del reference
    for choice, in_bf16 in wanted.items():
        model = loaded(in_bf16)
        for inputs, targets in warm:
            model(inputs, targets, 1 / AVERAGED).backward()
            if bad := model.scaling.update():
                raise BadInput(f"{choice}: {bad[0]} is not finite")
        record = {"choice": choice, "bf16": in_bf16, **difference(losses(model, text))}
        (first, _), (mean, each) = (apart(found, right) for found, right in zip(backward(model, text), exact, strict=True))
        worst = max(each, key=lambda name: each[name].error)
        yield record | {
            "error_of_one": first.error, "error": mean.error, "cosine": mean.cosine,
            "median": statistics.median(one.error for one in each.values()),
            "worst": each[worst].error, "worst_cosine": each[worst].cosine, "worst_matrix": worst,
        }  # fmt: skip


def table(found: Sequence[Mapping[str, object]]) -> list[str]:
    """The lines to print, in the order of `found`."""
    head = f"{'':<22}{'loss, mnat':>18}{'error of 1':>12}{f'of {AVERAGED}':>9}{'cosine':>10}"
    lines = [head + f"{'median':>9}{'worst':>9}{'cosine':>10}  matrix"]
    for record in found:
        line = f"{record['choice']:<22}{record['loss']:>+10.3f} ±{record['loss_error']:>6.3f}"
        if "error" in record:
            line += f"{record['error_of_one']:>12.2%}{record['error']:>9.2%}{record['cosine']:>10.6f}{record['median']:>9.2%}"
            line += f"{record['worst']:>9.2%}{record['worst_cosine']:>10.6f}  {record['worst_matrix']}"
        lines.append(line)
    return lines


def main() -> None:
    """Parse flags, measure, print."""
    parser = Parser("selective", description="what each GEMM, kind of layer and block costs in FP8")
    parser.add_argument("--model-tag", required=True)
    parser.add_argument("--data", default="python", help="as in base_train")
    parser.add_argument("--batch", type=int, default=16, help="rows of a micro-batch")
    args = parser.parse_args()
    if args.batch < 1:
        raise BadInput("--batch must be at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    saved = find(base_dir() / "base_checkpoints" / args.model_tag, None)
    config = config_of(saved)
    tokenizer = Tokenizer.load(base_dir() / "tokenizer")
    check_tokenizer(tokenizer, saved)
    store = open_or_build(resolve(args.data), tokenizer, base_dir() / "shards", lambda line: print(line, file=sys.stderr))
    loader = BatchLoader(store.split("val"), args.batch, config.sequence_len, device=device)
    try:
        batches = [next(loader) for _ in range(WARM + LOSSES)]
    finally:
        loader.close()
    rounded = build(config, BF16, device)
    load_weights(rounded, saved)
    found = []
    for record in records(config, rounded.state_dict(), choices(config.n_layer), batches, device):
        print(json.dumps(record), flush=True)
        found.append(record)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, FP8 emulated"
    print(f"\n{where}, torch {torch.__version__}, {saved.path}, {args.batch} × {config.sequence_len:,} tokens of validation text")
    print("\n".join(table(found)))


if __name__ == "__main__":
    run(main)
