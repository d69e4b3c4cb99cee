"""What a run will need on a GPU one may not own: memory line by line, the largest micro-batch and depth, speed, days, energy.

python -m scripts.plan --depth 24 --gpu spark
python -m scripts.plan --depth 12 --gpu h100 --precision te --device-batch-size 32 --window-pattern L
python -m scripts.plan --depth 24 --gpu 4090 --state-dtype e4m3 --master-weights bf16+8
"""

import math
from dataclasses import replace

from nanochat.errors import BadInput, Parser, run
from nanochat.planner import choices, device, plan, report
from nanochat.train_config import TrainConfig
from nvfp8.attention import BACKENDS
from nvfp8.hardware import NICKNAMES
from scripts.state_flags import add_state_flags


def main() -> None:
    """Parse the command line, plan, print."""
    default = TrainConfig()
    parser = Parser("plan", description="what a run will need; nothing is run")
    parser.add_argument("--depth", type=int, required=True, help="number of blocks")
    parser.add_argument("--gpu", required=True, help=f"one of {', '.join(NICKNAMES)}, or a name as PyTorch gives it")
    parser.add_argument("--precision", choices=("all", "bf16", "fp8", "te"), default="all")
    parser.add_argument("--recipe", default="auto", help="of FP8: auto, delayed, current, blockwise, mxfp8, nvfp4, …")
    parser.add_argument("--device-batch-size", type=int, default=None, help="rows (default: the largest power of two that fits)")
    parser.add_argument("--tokens", type=float, default=None, help="of the run (default: nanochat's ratio, 12 a scaling parameter)")
    parser.add_argument("--attention", choices=BACKENDS[:-1], default="cudnn")
    parser.add_argument("--vocab-size", type=int, default=32768)
    for name in ("aspect-ratio", "head-dim", "max-seq-len", "total-batch-size"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name.replace("-", "_")))
    parser.add_argument("--target-param-data-ratio", type=float, default=default.target_param_data_ratio)
    parser.add_argument("--window-pattern", default=default.window_pattern)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--update-early", action="store_true")
    parser.add_argument("--recompute-mlp", action="store_true", help="own FP8 layers make relu² again in backward")
    add_state_flags(parser)
    flags = parser.parse_args()
    if flags.device_batch_size is not None and flags.device_batch_size < 1:
        raise BadInput(f"--device-batch-size is {flags.device_batch_size}: it must be at least 1")
    if flags.tokens is not None and not (math.isfinite(flags.tokens) and flags.tokens >= 1):
        raise BadInput(f"--tokens is {flags.tokens:g}: it must be a finite number from 1 on")
    if flags.vocab_size < 1:
        raise BadInput(f"--vocab-size is {flags.vocab_size}: it must be at least 1")
    config = replace(
        default, depth=flags.depth, aspect_ratio=flags.aspect_ratio, head_dim=flags.head_dim, max_seq_len=flags.max_seq_len,
        total_batch_size=flags.total_batch_size, target_param_data_ratio=flags.target_param_data_ratio,
        window_pattern=flags.window_pattern, deterministic=flags.deterministic, update_early=flags.update_early,
        state_dtype=flags.state_dtype, master_weights=flags.master_weights,
    )  # fmt: skip
    where = device(flags.gpu)
    ways = choices(where, config, flags.precision, flags.recipe, flags.recompute_mlp)
    rows = [plan(where, config, way, flags.vocab_size, flags.device_batch_size, flags.attention) for way in ways]
    print("\n".join(report(where, config, rows, flags.tokens)))


if __name__ == "__main__":
    run(main)
