"""Train a tokenizer on the training documents of a data source: `python -m scripts.tok_train --data python`.

Seconds for the standard library. Prints how many bytes a token stands for on validation text: the more, the fewer steps
the same text takes.
"""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from nanochat.dataset import base_dir, resolve
from nanochat.errors import BadInput, Parser, run
from nanochat.tokenizer import Tokenizer

VALIDATION_CHARACTERS = 10_000_000


def first(texts: Iterable[str], characters: int, each: int) -> Iterator[str]:
    """The beginning of every text, at most `each` characters of it, until there are `characters` in all."""
    left = characters
    for text in texts:
        yield text[: min(each, left)]
        left -= min(len(text), each)
        if left <= 0:
            return


def main() -> None:
    """Parse flags, train, save, measure."""
    parser = Parser("tok_train", description="train the tokenizer")
    parser.add_argument("--data", default="python", help="python, python+site, a file or a directory")
    parser.add_argument("--vocab-size", type=int, default=32768, help="number of ids, specials included")
    parser.add_argument("--max-chars", type=int, default=2_000_000_000, help="characters to train on, at most")
    parser.add_argument("--doc-cap", type=int, default=10_000, help="characters of one document, at most")
    parser.add_argument("--out", type=Path, default=None, help="directory of tokenizer.json; default <base>/tokenizer")
    flags = parser.parse_args()
    if flags.max_chars < 1 or flags.doc_cap < 1:
        raise BadInput("--max-chars and --doc-cap must be at least 1")

    source = resolve(flags.data)
    print(f"training a tokenizer on {source.describe()}")
    start = time.perf_counter()
    tokenizer = Tokenizer.train(first(source.documents("train"), flags.max_chars, flags.doc_cap), flags.vocab_size)
    path = tokenizer.save(flags.out or base_dir() / "tokenizer")
    fewer = "" if tokenizer.vocab_size == flags.vocab_size else f" ({flags.vocab_size:,} asked: nothing is left to merge)"
    print(f"{path}: {tokenizer.vocab_size:,} ids{fewer}, {time.perf_counter() - start:.1f} s")

    size = tokens = 0
    for text in first(source.documents("val"), VALIDATION_CHARACTERS, VALIDATION_CHARACTERS):
        size += len(text.encode())
        tokens += len(tokenizer.encode(text, bos=False))
    print(f"{size / tokens:.3f} bytes per token on {size:,} bytes of validation text")


if __name__ == "__main__":
    run(main)
