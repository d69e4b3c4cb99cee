"""Token shards: what is stored, reuse, every kind of damage, several processes."""

import errno
import json
import math
import multiprocessing
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from nanochat import durable
from nanochat.dataset import Source, resolve
from nanochat.errors import BadInput
from nanochat.shards import TokenStore, open_or_build, unigram_bits_per_byte
from nanochat.tokenizer import Tokenizer

TEXTS = [f"def f{i}(x):\n    return {'x + ' * (i % 7)}{i}\n" for i in range(150)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return resolve(str(path))


def quiet(line: str) -> None:
    """Say nothing."""


def test_documents_are_the_encoded_texts(source: Source, tokenizer: Tokenizer, tmp_path: Path) -> None:
    store = open_or_build(source, tokenizer, tmp_path / "cache", quiet)
    for split in ("train", "val"):
        expected = [tokenizer.encode(text, bos=True) for text in source.documents(split)]
        documents = store.split(split)
        assert [documents.tokens(i).tolist() for i in range(len(documents))] == expected
        assert documents.lengths.tolist() == [len(ids) for ids in expected]
        assert documents.lengths.dtype == np.int64
        assert documents.total_tokens == sum(map(len, expected))
        assert documents.tokens(0).dtype == np.uint16
        counts = np.bincount([token for ids in expected for token in ids], minlength=300)
        assert (store.counts(split) == counts).all()
    assert store.vocab_size == 300


def test_batches_do_not_change_what_is_stored(
    source: Source, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = open_or_build(source, tokenizer, tmp_path / "a", quiet)
    monkeypatch.setattr("nanochat.shards._BATCH_CHARACTERS", 100)
    cut = open_or_build(source, tokenizer, tmp_path / "b", quiet)
    assert (whole.directory / "train.bin").read_bytes() == (cut.directory / "train.bin").read_bytes()
    assert (whole.split("train").lengths == cut.split("train").lengths).all()


def test_built_once_and_reused(source: Source, tokenizer: Tokenizer, tmp_path: Path) -> None:
    said: list[str] = []
    first = open_or_build(source, tokenizer, tmp_path / "cache", said.append)
    assert "tokenizing" in said[0] and "train: " in said[1] and "val: " in said[2] and len(said) == 3
    again = open_or_build(source, tokenizer, tmp_path / "cache", said.append)
    assert len(said) == 3 and again.directory == first.directory
    assert open_or_build(source, Tokenizer.train(TEXTS, 299), tmp_path / "cache", quiet).directory != first.directory
    os.utime(source.files[0], (1, 1))
    changed = resolve(source.name)
    assert open_or_build(changed, tokenizer, tmp_path / "cache", quiet).directory != first.directory


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65535, np.uint16), (65536, np.uint32)])
def test_wide_ids_take_four_bytes(source: Source, tmp_path: Path, vocab_size: int, dtype: type) -> None:
    class Wide:
        fingerprint = "wide"

        def __init__(self) -> None:
            self.vocab_size = vocab_size

        def encode(self, texts: list[str], bos: bool) -> list[list[int]]:
            return [[0, vocab_size - 1] for _ in texts]

    store = open_or_build(source, Wide(), tmp_path / "cache", quiet)  # type: ignore[arg-type]
    assert store.split("train").tokens(3).tolist() == [0, vocab_size - 1]
    assert store.split("train").tokens(3).dtype == dtype


def rewrite(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    os.utime(path, ns=(time.time_ns(), time.time_ns() + 1_000_000))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    rewrite(path, bytes(data))


def cut(path: Path) -> None:
    rewrite(path, path.read_bytes()[:-2])


def remove(path: Path) -> None:
    path.unlink()


NAMES = [f"{split}.{part}" for split in ("train", "val") for part in ("bin", "offsets.npy", "counts.npy")]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("damage", "reason"), [(flip, "checksum is wrong"), (cut, "were written"), (remove, "No such file")])
def test_damage_is_named_with_the_mend(
    source: Source, tokenizer: Tokenizer, tmp_path: Path, name: str, damage: Any, reason: str
) -> None:
    store = open_or_build(source, tokenizer, tmp_path / "cache", quiet)
    damage(store.directory / name)
    with pytest.raises(BadInput) as caught:
        open_or_build(source, tokenizer, tmp_path / "cache", quiet)
    message = str(caught.value)
    assert str(store.directory / name) in message and reason in message
    assert f"delete {store.directory}, it will be rebuilt" in message and "\n" not in message


def test_deleting_as_told_mends_it(source: Source, tokenizer: Tokenizer, tmp_path: Path) -> None:
    store = open_or_build(source, tokenizer, tmp_path / "cache", quiet)
    good = (store.directory / "train.bin").read_bytes()
    for file in store.directory.iterdir():
        file.unlink()
    store.directory.rmdir()
    assert (open_or_build(source, tokenizer, tmp_path / "cache", quiet).directory / "train.bin").read_bytes() == good


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"format": 1', b'{"format": "token shards 1", "files": {}}'])
def test_damaged_json_is_named(source: Source, tokenizer: Tokenizer, tmp_path: Path, data: bytes) -> None:
    store = open_or_build(source, tokenizer, tmp_path / "cache", quiet)
    (store.directory / "shards.json").write_bytes(data)
    with pytest.raises(BadInput, match=r"shards\.json is damaged.*delete .* it will be rebuilt"):
        open_or_build(source, tokenizer, tmp_path / "cache", quiet)


def test_sizes_are_checked_without_checksums(source: Source, tokenizer: Tokenizer, tmp_path: Path) -> None:
    store = open_or_build(source, tokenizer, tmp_path / "cache", quiet)
    cut(store.directory / "val.bin")
    with pytest.raises(BadInput, match=r"val\.bin is damaged"):
        TokenStore(store.directory)


def test_a_killed_builders_remains_are_replaced(source: Source, tokenizer: Tokenizer, tmp_path: Path) -> None:
    directory = open_or_build(source, tokenizer, tmp_path / "a", quiet).directory
    remains = tmp_path / "b" / f"{directory.name}.tmp"
    remains.mkdir(parents=True)
    (remains / "train.bin").write_bytes(b"half")
    open_or_build(source, tokenizer, tmp_path / "b", quiet)
    assert not remains.exists()


def test_full_disk_is_one_line_and_leaves_nothing(
    source: Source, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = durable.write

    def full(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
        if path.name == "val.bin":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, chunks)

    monkeypatch.setattr(durable, "write", full)
    with pytest.raises(BadInput, match=r"cannot write token shards \(No space left on device\): free space"):
        open_or_build(source, tokenizer, tmp_path / "cache", quiet)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_unreadable_data_leaves_no_shards(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"txt": "c"}\n')
    with pytest.raises(BadInput, match=r"a\.jsonl:3: no 'text'"):
        open_or_build(resolve(str(tmp_path / "a.jsonl")), tokenizer, tmp_path / "cache", quiet)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_cache_that_is_a_file_is_named(source: Source, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(BadInput, match=r"cannot write token shards .*NANOCHAT_BASE_DIR"):
        open_or_build(source, tokenizer, tmp_path / "cache", quiet)


def test_unigram_bits_per_byte_by_hand(source: Source, tokenizer: Tokenizer, tmp_path: Path) -> None:
    store = open_or_build(source, tokenizer, tmp_path / "cache", quiet)
    train = [t for text in source.documents("train") for t in tokenizer.encode(text, bos=False)]
    val = list(source.documents("val"))
    text_ids = tokenizer.vocab_size - 9
    bits = 0.0
    for token in (t for text in val for t in tokenizer.encode(text, bos=False)):
        bits -= math.log2((train.count(token) + 1) / (len(train) + text_ids))
    expected = bits / sum(len(text.encode()) for text in val)
    assert unigram_bits_per_byte(store, tokenizer.token_bytes()) == pytest.approx(expected, rel=1e-12)


def _rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    said: list[str] = []
    good = open_or_build(resolve(str(folder / "data.jsonl")), Tokenizer.load(folder), folder / "cache", said.append)
    try:
        open_or_build(resolve(str(folder / "bad.jsonl")), Tokenizer.load(folder), folder / "cache", said.append)
        problem = ""
    except (BadInput, SystemExit) as error:
        problem = str(error)
    result = {"said": len(said), "tokens": int(good.split("train").lengths.sum()), "problem": problem}
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def test_rank_0_builds_and_all_ranks_end_on_what_is_wrong(source: Source, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{')
    ranks = [multiprocessing.get_context("spawn").Process(target=_rank, args=(rank, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first["said"] == 4 and second["said"] == 0
    assert first["tokens"] == second["tokens"] > 0
    assert "bad.jsonl:2" in first["problem"] and second["problem"] == "2"  # the status with which it exits


def test_unigram_without_validation_text_bytes_is_infinite(source: Source, tokenizer: Tokenizer, tmp_path: Path) -> None:
    store = open_or_build(source, tokenizer, tmp_path / "cache", quiet)
    sizes = tokenizer.token_bytes()
    sizes[np.flatnonzero(store.counts("val"))] = 0
    assert unigram_bits_per_byte(store, torch.as_tensor(sizes)) == math.inf
