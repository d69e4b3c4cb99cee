"""Evaluate a checkpoint: bits per byte on training and validation text, and samples.

    python -m scripts.base_eval --model-tag d12 [--step 1000] [--eval bpb,sample] [--precision bf16]

nanochat's flags keep their names. CORE is not evaluated here.
"""

import os

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

from pathlib import Path

from nanochat import parallel
from nanochat.build import PRECISIONS, check_tokenizer, load_model
from nanochat.dataloader import BatchLoader
from nanochat.dataset import base_dir, resolve
from nanochat.errors import BadInput, Parser, run
from nanochat.evaluate import bits_per_byte
from nanochat.generate import PROMPTS, continuations
from nanochat.shards import open_or_build, unigram_bits_per_byte
from nanochat.tokenizer import Tokenizer


def main() -> None:
    """Parse the command line, evaluate, print."""
    parser = Parser("base_eval", description="evaluate a checkpoint")
    parser.add_argument("--model-tag", required=True, help="the run: d12, or a directory of checkpoints")
    parser.add_argument("--step", type=int, default=None, help="which checkpoint; default the newest good one")
    parser.add_argument("--eval", default="bpb,sample", help="comma-separated: bpb, sample")
    parser.add_argument("--split-tokens", type=int, default=40 * 524288, help="tokens of each split, at most one pass")
    parser.add_argument("--device-batch-size", type=int, default=32, help="rows per device and micro-batch")
    parser.add_argument("--device-type", default="", help="cuda or cpu; empty = cuda if there is one")
    parser.add_argument("--data", default="python", help="as in base_train")
    parser.add_argument("--tokenizer", type=Path, default=None, help="directory of tokenizer.json; default <base>/tokenizer")
    parser.add_argument("--precision", default="auto", choices=PRECISIONS)
    flags = parser.parse_args()
    wanted = set(flags.eval.split(","))
    if wanted - {"bpb", "sample"}:
        raise BadInput(f"--eval {flags.eval}: choose among bpb and sample (CORE is not evaluated here)")
    if flags.device_batch_size < 1 or flags.split_tokens < 1:
        raise BadInput("--device-batch-size and --split-tokens must be at least 1")

    world = parallel.init(flags.device_type)
    try:
        with parallel.together():
            tokenizer = Tokenizer.load(flags.tokenizer or base_dir() / "tokenizer")
        model, saved = load_model(flags.model_tag, flags.step, world.device, flags.precision)
        with parallel.together():
            check_tokenizer(tokenizer, saved)
        if world.rank == 0:
            print(f"{saved.path}: precision {model.precision.name}, attention {model.attention_backend}")
        if "bpb" in wanted:
            store = open_or_build(resolve(flags.data), tokenizer, base_dir() / "shards")
            rows, length = flags.device_batch_size, model.config.sequence_len
            for split in ("train", "val"):
                documents = store.split(split)
                steps = min(flags.split_tokens, documents.total_tokens) // (rows * length * world.size)
                batches = BatchLoader(documents, rows, length, rank=world.rank, world_size=world.size, device=world.device)
                try:
                    bpb = bits_per_byte(model, batches, max(1, steps), tokenizer.token_bytes().to(world.device))
                finally:
                    batches.close()
                if world.rank == 0:
                    print(f"{split}: {bpb:.4f} bits per byte")
            if world.rank == 0:
                print(f"token frequencies alone: {unigram_bits_per_byte(store, tokenizer.token_bytes()):.4f} bits per byte")
        if "sample" in wanted and world.rank == 0:
            for text in continuations(model, tokenizer, PROMPTS):
                print(f"sample: {text}")
    finally:
        parallel.shutdown()


if __name__ == "__main__":
    run(main)
