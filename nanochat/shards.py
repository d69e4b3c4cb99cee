"""Tokenize once, then map the tokens into memory.

Tokenizing while training would cost every run the same CPU time again and starve a fast GPU. So a source's tokens are
written once, each split as one long array of ids (two bytes each up to 65,535 ids) beside the offsets of its documents,
and every later run maps that file: no reading, no parsing, memory shared by all processes of the machine.

The directory is named by what its content follows from (source and tokenizer fingerprints), written aside and renamed
when whole; a lock makes a second run wait for the first instead of doing the work twice. Every file's size and sha256
are recorded. Sizes are checked whenever the directory is opened, checksums once per process: a flipped bit would crash
nothing, it would only train on the wrong token.
"""

import fcntl
import hashlib
import io
import json
import math
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from nanochat import durable, parallel
from nanochat.dataset import Source, Split
from nanochat.errors import BadInput
from nanochat.tokenizer import Tokenizer

Ints = npt.NDArray[np.int64]

_FORMAT = "token shards 1"
_SPLITS: tuple[Split, ...] = ("train", "val")
# Text encoded at once: enough to keep all cores busy, while the encodings (120 bytes a token) stay near 50 MB.
_BATCH_CHARACTERS = 1 << 20
_verified: set[tuple[str, int]] = set()  # (path, modification time) of what this process has checksummed


class Documents:
    """The tokens of one split; each document begins with `<|bos|>`.

    Attributes:
        lengths: tokens per document, int64 (documents,).
    """

    def __init__(self, tokens: npt.NDArray[np.unsignedinteger[Any]], offsets: Ints) -> None:
        """Cut `tokens` into documents: number i is `tokens[offsets[i]:offsets[i + 1]]`."""
        self._tokens = tokens
        self._offsets = offsets
        self.lengths: Ints = np.diff(offsets)

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.lengths)

    @property
    def total_tokens(self) -> int:
        """Tokens of all documents together."""
        return len(self._tokens)

    def tokens(self, index: int) -> npt.NDArray[np.unsignedinteger[Any]]:
        """The ids of one document, (length,) uint16 or uint32: a view of the mapped file."""
        return self._tokens[self._offsets[index] : self._offsets[index + 1]]


class TokenStore:
    """A finished directory of shards, opened."""

    def __init__(self, directory: Path) -> None:
        """Map the files of `directory`; see `open_or_build`.

        Raises:
            BadInput: a file is missing, unreadable, or not as long as it was written.
        """
        self.directory = directory
        self._about = _about(directory)
        for name, written in self._about["files"].items():
            _check_size(directory / name, written["bytes"])

    @property
    def vocab_size(self) -> int:
        """Number of ids of the tokenizer that made the tokens."""
        return int(self._about["vocab_size"])

    def split(self, split: Split) -> Documents:
        """The documents of "train" or "val"."""
        tokens = np.memmap(self.directory / f"{split}.bin", dtype=self._about["dtype"], mode="r")
        return Documents(tokens, np.load(self.directory / f"{split}.offsets.npy"))

    def counts(self, split: Split) -> Ints:
        """How often each id occurs in a split, int64 (vocab_size,)."""
        counts: Ints = np.load(self.directory / f"{split}.counts.npy")
        return counts


def open_or_build(source: Source, tokenizer: Tokenizer, cache_dir: Path, say: Callable[[str], None] = print) -> TokenStore:
    """The tokens of `source`, from `cache_dir` or else made now and kept there.

    With torch.distributed initialized every rank must call it, and all must see `cache_dir`: rank 0 builds and
    verifies, the others wait for it; what it finds wrong it raises, and the others exit.

    Args:
        source: the documents.
        tokenizer: how to cut them.
        cache_dir: holds one directory for every pair of source and tokenizer.
        say: called with one line for people when tokenizing begins and when it is done.

    Raises:
        BadInput: the source cannot be read, the disk is full, or cached files are damaged (the message says which).
    """
    name = hashlib.sha256(f"{_FORMAT} {source.fingerprint} {tokenizer.fingerprint}".encode()).hexdigest()[:16]
    directory = Path(cache_dir) / name
    if dist.is_initialized():
        _on_rank_0(lambda: _ensure(source, tokenizer, directory, say))
    else:
        _ensure(source, tokenizer, directory, say)
    return TokenStore(directory)


def unigram_bits_per_byte(store: TokenStore, token_bytes: torch.Tensor) -> float:
    """What a model that ignores context reaches on validation; a run that does not get below it has learned nothing.

    The cross-entropy of the validation tokens under their frequencies in training, each counted once more than it
    occurs (so that nothing is impossible), in bits per byte. As in the loss it stands beside, specials count nowhere.

    Args:
        store: gives the counts of both splits.
        token_bytes: bytes per id, (vocab_size,), 0 for specials.
    """
    size = token_bytes.cpu().numpy().astype(np.int64)
    is_text = size > 0
    train, val = store.counts("train")[is_text] + 1, store.counts("val")[is_text]
    bits = -(val * np.log2(train / train.sum())).sum()
    return float(bits / (val * size[is_text]).sum()) if val.any() else math.inf


def _on_rank_0(work: Callable[[], None]) -> None:
    """Run `work` on rank 0 while the others wait; what it fails with ends all of them."""
    # A group of its own: tokenizing may take longer than the ten minutes after which NCCL gives up on a peer.
    group = dist.new_group(backend="gloo", timeout=timedelta(days=2))
    with parallel.together(group):
        if dist.get_rank() == 0:
            work()
    dist.destroy_process_group(group)


def _ensure(source: Source, tokenizer: Tokenizer, directory: Path, say: Callable[[str], None]) -> None:
    """After this `directory` is whole and verified."""
    if not directory.exists():
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            with open(directory.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets go of it when this process dies, however it dies
                if not directory.exists():
                    say(f"tokenizing {source.describe()}, once; kept in {directory}")
                    _build(source, tokenizer, directory)
                    for split, of in _about(directory)["splits"].items():
                        say(f"{split}: {of['documents']:,} documents, {of['tokens']:,} tokens")
        except OSError as error:
            raise BadInput(
                f"{directory}: cannot write token shards ({error.strerror}): free space or set NANOCHAT_BASE_DIR"
            ) from error
    _verify(directory)


def _build(source: Source, tokenizer: Tokenizer, directory: Path) -> None:
    aside = directory.with_suffix(".tmp")
    shutil.rmtree(aside, ignore_errors=True)  # of a killed run: whoever holds the lock is alone here
    aside.mkdir()
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 65535 else "<u4")
    files: dict[str, dict[str, Any]] = {}
    splits: dict[str, dict[str, int]] = {}
    try:
        for split in _SPLITS:
            offsets = array("q", [0])
            counts = np.zeros(tokenizer.vocab_size, np.int64)
            encoded = _encoded(source.documents(split), tokenizer, dtype, offsets, counts)
            for name, chunks in (
                (f"{split}.bin", encoded),
                (f"{split}.offsets.npy", _npy(offsets)),
                (f"{split}.counts.npy", _npy(counts)),
            ):
                files[name] = durable.write(aside / name, chunks)
            splits[split] = {"documents": len(offsets) - 1, "tokens": offsets[-1]}
        about = {
            "format": _FORMAT,
            "source": source.name,
            "source_fingerprint": source.fingerprint,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "dtype": dtype.str,
            "splits": splits,
            "files": files,
        }
        durable.write(aside / "shards.json", [json.dumps(about, indent=1).encode()])
        durable.sync(aside)
        aside.rename(directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # gone already when all went well
    durable.sync(directory.parent)


def _encoded(
    texts: Iterable[str], tokenizer: Tokenizer, dtype: np.dtype[Any], offsets: "array[int]", counts: Ints
) -> Iterator[bytes]:
    """Yield the ids of all documents as bytes; append the end of each to `offsets`, add each id to `counts`."""
    for batch in _batches(texts):
        rows = tokenizer.encode(batch, bos=True)
        ids = np.concatenate([np.array(row, dtype) for row in rows])
        counts += np.bincount(ids, minlength=len(counts))
        for row in rows:
            offsets.append(offsets[-1] + len(row))
        yield ids.tobytes()


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _npy(values: "array[int] | Ints") -> Iterator[memoryview]:
    """An int64 array as the bytes of a .npy file; made when asked for, for `offsets` grows until then."""
    file = io.BytesIO()
    np.save(file, np.asarray(values, np.int64))
    yield file.getbuffer()


def _about(directory: Path) -> dict[str, Any]:
    path = directory / "shards.json"
    try:
        about: dict[str, Any] = json.loads(path.read_bytes())
        if about["format"] == _FORMAT and about["files"].keys() >= {f"{split}.bin" for split in _SPLITS}:
            return about
        raise ValueError("not what was written")
    except OSError as error:
        raise _damaged(path, error.strerror or "cannot be read") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, "not the JSON that was written") from error


def _verify(directory: Path) -> None:
    for name, written in _about(directory)["files"].items():
        path = directory / name
        _check_size(path, written["bytes"])
        key = (str(path), path.stat().st_mtime_ns)
        if key not in _verified:
            if durable.sha256(path) != written["sha256"]:
                raise _damaged(path, "its checksum is wrong")
            _verified.add(key)


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise _damaged(path, error.strerror or "cannot be read") from error
    if size != expected:
        raise _damaged(path, f"{size} bytes, {expected} were written")


def _damaged(path: Path, reason: str) -> BadInput:
    return BadInput(f"token shard {path} is damaged ({reason}): delete {path.parent}, it will be rebuilt")
