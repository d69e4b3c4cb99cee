"""Pretrain a GPT.

    python -m scripts.base_train --depth 12
    torchrun --nproc_per_node=8 -m scripts.base_train -- --depth 24

nanochat's flags keep their names and defaults, so its commands run unchanged; those under "beyond nanochat" are ours.
"""

import os
from dataclasses import fields

# Before torch touches CUDA: segments that grow spare 5-10% of fragmentation.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

from nanochat.build import PRECISIONS
from nanochat.errors import Parser, run
from nanochat.te_adam import CHOICES
from nanochat.train import train
from nanochat.train_config import TrainConfig
from scripts.engine_flags import add_engine_flags
from scripts.state_flags import add_state_flags


def _parser() -> Parser:
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    parser = Parser(prog="base_train", description=__doc__)

    def add(group: object, name: str, kind: type, text: str, **more: object) -> None:
        default = defaults[name.replace("-", "_")]
        group.add_argument(f"--{name}", type=kind, default=default, help=f"{text} (default: {default})", **more)  # type: ignore[attr-defined]

    model = parser.add_argument_group("model")
    add(model, "depth", int, "number of blocks")
    add(model, "aspect-ratio", int, "width = depth x this, rounded up to whole heads")
    add(model, "head-dim", int, "width of an attention head")
    add(model, "max-seq-len", int, "context length in tokens")
    add(model, "window-pattern", str, "attention windows tiled over the layers: L all, S a quarter")

    horizon = parser.add_argument_group("horizon (the first one given counts; -1 = not given)")
    add(horizon, "num-iterations", int, "optimizer steps")
    add(horizon, "target-flops", float, "training FLOPs")
    add(horizon, "target-param-data-ratio", float, "tokens per scaling parameter")

    optimization = parser.add_argument_group("optimization")
    add(optimization, "device-batch-size", int, "rows per device and micro-batch")
    add(optimization, "total-batch-size", int, "tokens per step over all devices; -1 = by the scaling rule")
    add(optimization, "embedding-lr", float, "AdamW, embeddings")
    add(optimization, "unembedding-lr", float, "AdamW, lm_head")
    add(optimization, "matrix-lr", float, "Muon, block matrices")
    add(optimization, "scalar-lr", float, "AdamW, per-layer scalars")
    add(optimization, "weight-decay", float, "cautious decay of the block matrices, before scaling")
    add(optimization, "warmup-steps", int, "linear warm-up")
    add(optimization, "warmdown-ratio", float, "last part of the run over which the learning rate falls")
    add(optimization, "final-lr-frac", float, "learning rate at the end, as part of the peak")

    checkpoints = parser.add_argument_group("checkpoints")
    add(checkpoints, "resume-from-step", int, "resume from this step; -1 = do not")
    add(checkpoints, "save-every", int, "steps between checkpoints; -1 = only at the end")
    add(checkpoints, "model-tag", str, "name of the checkpoint directory; default d<depth>")

    evaluation = parser.add_argument_group("evaluation")
    add(evaluation, "eval-every", int, "steps between validation losses; -1 = never")
    add(evaluation, "eval-tokens", int, "tokens of a validation loss, at most one pass over the validation text")
    add(evaluation, "sample-every", int, "steps between samples; -1 = never")
    add(evaluation, "core-metric-every", int, "accepted for nanochat's sake: CORE is not evaluated here")
    add(evaluation, "core-metric-max-per-task", int, "accepted for nanochat's sake")

    runtime = parser.add_argument_group("runtime")
    add(runtime, "run", str, "wandb run name; 'dummy' = no wandb")
    add(runtime, "device-type", str, "cuda or cpu; empty = cuda if there is one")
    parser.add_argument("--fp8", action="store_true", help="nanochat's way to say --precision fp8 --recipe delayed, or rowwise")
    add(runtime, "fp8-recipe", str, "with --fp8", choices=("rowwise", "tensorwise"))

    ours = parser.add_argument_group("beyond nanochat")
    add(ours, "data", str, "python, python+site, or a file or directory of .txt .md .py .jsonl .parquet (.gz, .zst)")
    add(ours, "tokenizer", str, "directory of tokenizer.json; empty = <base>/tokenizer")
    add(
        ours,
        "precision",
        str,
        "auto: the first of fp8 (our own layers), te, bf16, fp32 that runs here; fp8-emulated: anywhere",
        choices=PRECISIONS,
    )
    add(ours, "adamw", str, "ours, or Transformer Engine's with its state in that form, for comparison", choices=CHOICES)
    add_state_flags(parser)
    parser.add_argument(
        "--update-early", action="store_true",
        help="apply each update as soon as its gradient is complete, and free that: one micro-batch a step, one process; "
        "a gradient that is not finite stops the rest of its step, not what backward reached before it",
    )  # fmt: skip
    parser.add_argument("--no-cuda-graphs", action="store_true", help="launch all kernels one by one")
    add(ours, "attention", str, "auto, fa3, cudnn, sdpa or plain", choices=("auto", "fa3", "cudnn", "sdpa", "plain"))
    parser.add_argument("--resume", action="store_true", help="resume from the newest good checkpoint of this model tag")
    add(ours, "keep", int, "newest checkpoints kept")
    parser.add_argument("--deterministic", action="store_true", help="bitwise repeatable on a GPU, at some cost in speed")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="one step by kernel family, with its trace and a snapshot of memory, beside the metrics",
    )
    add(ours, "max-bad-steps", int, "stop after this many steps in a row with a non-finite loss or gradient")
    add(ours, "seed", int, "of the initial weights and the order of the documents")
    add_engine_flags(parser)
    return parser


def main() -> None:
    """Parse the command line and train."""
    train(TrainConfig(**vars(_parser().parse_args())))


if __name__ == "__main__":
    run(main)
