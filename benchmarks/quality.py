"""What a choice does to the loss: training runs that differ in nothing else, spread over the GPUs, one JSON line a run.

    python -m benchmarks.quality --steps 770 reference= seed="--seed 43" momentum="--state-dtype momentum=e4m3" …

Each format of state and of masters by itself, over 100 M tokens:

    python -m benchmarks.quality --steps 764 fp32="--precision bf16" seed="--precision bf16 --seed 43" \
        first="--precision bf16 --state-dtype exp_avg=e4m3" second="--precision bf16 --state-dtype exp_avg_sq=e4m3" \
        momentum="--precision bf16 --state-dtype momentum=e4m3" bf16="--precision bf16 --master-weights bf16" \
        byte="--precision bf16 --master-weights bf16+8" split="--precision bf16 --master-weights bf16+16" \
        all="--precision bf16 --state-dtype e4m3 --master-weights bf16+8"

Each argument is a name and the flags it adds to `scripts.base_train`; the first is what the others are compared with. All see the
same tokens in the same order. `gap` is the relative difference of the final validation bits per byte from the first run's: hold it
against that of a run with another seed. Checkpoints are deleted, the runs' metrics.jsonl stay.

`--at-once 2` has two runs on each GPU at a time, so that it works while one of them starts or compiles. Their memory must fit
together. Each computes what it would alone; how fast says nothing then, so `tok_s` is left out.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import torch

from nanochat import metrics
from nanochat.dataset import base_dir, resolve
from nanochat.errors import BadInput, Parser, run
from nanochat.shards import open_or_build
from nanochat.tokenizer import Tokenizer

MAX_CHARACTERS = "100000000"  # a tokenizer of 100 MB of text: more changes little and takes minutes


def arm(text: str) -> tuple[str, list[str]]:
    """Return the name and the flags of "name=--flag value …".

    Raises:
        BadInput: there is no name.
    """
    name, equals, flags = text.partition("=")
    if not equals or not name or name.startswith("-"):
        raise BadInput(f"{text!r} is no run: write name=FLAGS, as in momentum='--state-dtype momentum=e4m3', or name= for none")
    return name, shlex.split(flags)


def prepare(data: str) -> None:
    """Tokenizer and shards, once, before several processes ask for them."""
    if not (base_dir() / "tokenizer" / "tokenizer.json").exists():
        command = [sys.executable, "-m", "scripts.tok_train", "--data", data, "--max-chars", MAX_CHARACTERS]
        subprocess.run(command, check=True, stdout=sys.stderr)
    tokenizer = Tokenizer.load(base_dir() / "tokenizer")
    open_or_build(resolve(data), tokenizer, base_dir() / "shards", lambda line: print(line, file=sys.stderr))


def result(name: str, flags: list[str], alone: bool) -> dict[str, object]:
    """What a finished run's metrics say, its rate only if it was `alone` on its GPU."""
    records = metrics.read(base_dir() / "base_checkpoints" / f"quality-{name}")
    steps = [record for record in records if record["kind"] == "step"]
    validation = [record for record in records if record["kind"] == "eval"]
    found: dict[str, object] = {
        "run": name, "flags": shlex.join(flags), "steps": len(steps), "bits_per_byte": round(validation[-1]["bpb"], 5),
        "loss": round(statistics.fmean(record["loss"] for record in steps[-20:]), 4),
    }  # fmt: skip
    if alone:
        found["tok_s"] = round(statistics.median(record["tokens_per_second"] for record in steps[2:]))
    return found


def main() -> None:
    """Parse flags, run all, print each as it ends."""
    parser = Parser("quality", description="final losses of runs that differ in one choice")
    parser.add_argument("runs", nargs="+", help="name=FLAGS of scripts.base_train; the first is the reference")
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--steps", type=int, default=770, help="of --batch tokens")
    parser.add_argument("--batch", type=int, default=131072, help="tokens a step")
    parser.add_argument("--data", default="python+site")
    parser.add_argument("--at-once", type=int, default=1, help="runs on each GPU at a time")
    args = parser.parse_args()
    if args.at_once < 1:
        raise BadInput("--at-once must be at least 1")
    arms = dict(arm(text) for text in args.runs)
    if len(arms) < len(args.runs):
        raise BadInput("two runs have the same name")
    if not torch.cuda.is_available():
        raise BadInput("these runs take hours on a CPU, and torch finds no CUDA device")
    prepare(args.data)
    gpus: SimpleQueue[int] = SimpleQueue()
    for slot in range(slots := args.at_once * torch.cuda.device_count()):
        gpus.put(slot % torch.cuda.device_count())

    def train(name: str) -> tuple[str, str | None]:
        gpu, tag = gpus.get(), f"quality-{name}"
        command = [
            sys.executable, "-m", "scripts.base_train", "--depth", str(args.depth), "--data", args.data, "--num-iterations",
            str(args.steps), "--total-batch-size", str(args.batch), "--eval-every", str(args.steps), "--sample-every", "-1",
            "--core-metric-every", "-1", "--model-tag", tag, *arms[name],
        ]  # fmt: skip
        done = subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)}, capture_output=True, text=True)
        gpus.put(gpu)
        for path in (base_dir() / "base_checkpoints" / tag).glob("step_*/*.safetensors"):
            path.unlink()
        return name, None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]

    reference: float | None = None
    with ThreadPoolExecutor(slots) as pool:
        for name, failure in pool.map(train, arms):
            record = {"run": name, "failed": failure} if failure else result(name, arms[name], args.at_once == 1)
            if not failure and reference is None:
                reference = float(str(record["bits_per_byte"]))
            elif not failure and reference is not None:
                record["gap"] = f"{float(str(record['bits_per_byte'])) / reference - 1:+.2%}"
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    run(main)
