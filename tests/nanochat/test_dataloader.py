"""Packing against a plain list search, equal rows for any number of processes, exact resumption, the thread."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from nanochat.dataloader import BUFFER_DOCUMENTS, BatchLoader, Packer
from nanochat.errors import BadInput
from nanochat.shards import Documents

BOS = 60_000


def make_documents(count: int, seed: int = 0, longest: int = 300) -> Documents:
    """Documents of 2 to `longest` tokens: BOS, then tokens that name the document and the place."""
    lengths = np.random.default_rng(seed).integers(2, longest + 1, count)
    parts = [np.concatenate([[BOS], (i * 37 + np.arange(1, n)) % BOS]) for i, n in enumerate(lengths)]
    return Documents(np.concatenate(parts).astype(np.uint16), np.concatenate([[0], np.cumsum(lengths)]))


@contextmanager
def loading(*args: Any, **kwargs: Any) -> Iterator[BatchLoader]:
    loader = BatchLoader(*args, **kwargs)
    try:
        yield loader
    finally:
        loader.close()


def take(loader: BatchLoader, count: int) -> torch.Tensor:
    """`count` batches as (count, 2, B, T)."""
    return torch.stack([torch.stack(next(loader)) for _ in range(count)])


def plain_rows(lengths: list[int], capacity: int, seed: int, count: int) -> list[list[tuple[int, int]]]:
    """The rule as it is told, on a list in the order of arrival: `max` and `min` take the first among equals."""
    stream = (int(i) for epoch in range(1, 10**6) for i in np.random.default_rng((seed, epoch)).permutation(len(lengths)))
    waiting: list[int] = []
    rows = []
    for _ in range(count):
        row, room = [], capacity
        while room:
            while len(waiting) < min(BUFFER_DOCUMENTS, len(lengths)):
                waiting.append(next(stream))
            fitting = [d for d in waiting if lengths[d] <= room]
            pick = max(fitting, key=lengths.__getitem__) if fitting else min(waiting, key=lengths.__getitem__)
            waiting.remove(pick)
            row.append((pick, min(lengths[pick], room)))
            room -= row[-1][1]
        rows.append(row)
    return rows


@pytest.mark.parametrize(("count", "longest"), [(1200, 300), (1200, 2000), (60, 300), (3, 1000), (1, 5)])
def test_packing_is_the_plain_rule(count: int, longest: int) -> None:
    lengths = make_documents(count, longest=longest).lengths
    packer = Packer(lengths, 257, seed=7)
    assert [packer.row() for _ in range(40)] == plain_rows(lengths.tolist(), 257, 7, 40)


def test_rows_are_full_and_start_with_the_start_of_a_document() -> None:
    documents = make_documents(1500)
    with loading(documents, 16, 256) as loader:
        for _ in range(20):
            inputs, targets = next(loader)
            assert inputs.shape == targets.shape == (16, 256)
            assert inputs.dtype == targets.dtype == torch.int64
            assert inputs.is_contiguous() and targets.is_contiguous()
            assert (inputs[:, 0] == BOS).all()
            assert (inputs[:, 1:] == targets[:, :-1]).all()


def test_rows_hold_the_tokens_of_the_packed_pieces() -> None:
    documents = make_documents(1500)
    packer = Packer(documents.lengths, 257, seed=42)
    with loading(documents, 8, 256) as loader:
        inputs, targets = next(loader)
    for line, last in zip(inputs, targets[:, -1], strict=True):
        expected = np.concatenate([documents.tokens(d)[:n] for d, n in packer.row()])
        assert [*line.tolist(), int(last)] == expected.tolist()


def test_every_document_comes_once_an_epoch() -> None:
    packer = Packer(make_documents(2500).lengths, 257, seed=1)
    drawn = Counter(document for _ in range(6000) for document, _ in packer.row())
    state = packer.state()
    assert state["epoch"] == packer.epoch > 3
    begun = Counter(packer._permutation()[: state["position"]].tolist())
    assert drawn + Counter(state["waiting"]) == begun + Counter(list(range(2500)) * (packer.epoch - 1))


def test_documents_of_one_length_take_turns() -> None:
    packer = Packer(np.full(2500, 50), 50, seed=1)
    order = packer._permutation().tolist()
    assert [packer.row() for _ in range(2500)] == [[(document, 50)] for document in order]


def test_seed_and_epoch_change_the_order() -> None:
    lengths = np.arange(100, 600)
    first, again, other = (Packer(lengths, 257, seed=seed) for seed in (1, 1, 2))
    rows = [first.row() for _ in range(500)]
    assert rows == [again.row() for _ in range(500)]
    assert rows != [other.row() for _ in range(500)]
    assert first._permutation().tolist() != Packer(lengths, 257, seed=1)._permutation().tolist()


def test_two_processes_see_the_rows_of_one() -> None:
    documents = make_documents(1300)
    with loading(documents, 8, 128) as one, loading(documents, 4, 128) as accumulating:
        whole = take(one, 6)
        halves = take(accumulating, 12)
    assert torch.equal(halves.view(6, 2, 2, 4, 128).transpose(1, 2).reshape(6, 2, 8, 128), whole)
    ranks = []
    for rank in range(2):
        with loading(documents, 4, 128, rank=rank, world_size=2) as loader:
            ranks.append(take(loader, 6))
    assert torch.equal(torch.cat(ranks, dim=2), whole)


@pytest.mark.parametrize("taken", [0, 1, 7, 40])
def test_resumes_with_the_batch_that_would_have_come(taken: int) -> None:
    documents = make_documents(1100)
    with loading(documents, 8, 128, seed=3) as loader:
        for _ in range(taken):
            next(loader)
        state = json.loads(json.dumps(loader.state_dict()))
        epoch = loader.epoch
        expected = take(loader, 5)
    with loading(make_documents(1100), 8, 128, seed=3, state=state) as resumed:
        assert resumed.state_dict() == state and resumed.epoch == epoch
        assert torch.equal(take(resumed, 5), expected)


def test_resumes_with_another_number_of_processes() -> None:
    documents = make_documents(1100)
    with loading(documents, 8, 128) as loader:
        take(loader, 3)
        state = loader.state_dict()
        expected = take(loader, 2)
    ranks = []
    for rank in range(2):
        with loading(documents, 4, 128, rank=rank, world_size=2, state=state) as loader:
            ranks.append(take(loader, 2))
    assert torch.equal(torch.cat(ranks, dim=2), expected)


def test_epoch_counts_from_one_and_goes_on() -> None:
    with loading(make_documents(50), 8, 128) as loader:
        assert loader.epoch == 1
        take(loader, 30)
        reached = loader.epoch
        assert reached > 1 and loader.state_dict()["epoch"] == reached


def test_batches_handed_out_are_not_written_again() -> None:
    with loading(make_documents(1100), 4, 64) as loader:
        inputs, targets = next(loader)
        before = inputs.clone(), targets.clone()
        take(loader, 5)
        assert torch.equal(inputs, before[0]) and torch.equal(targets, before[1])


def test_other_data_or_seed_cannot_be_resumed() -> None:
    with loading(make_documents(1100), 4, 64) as loader:
        state = loader.state_dict()
    for documents, seed, name in (
        (make_documents(1101), 42, "documents was 1100, now it is 1101"),
        (make_documents(1100, seed=1), 42, "tokens was"),
        (make_documents(1100), 43, "seed was 42, now it is 43"),
    ):
        with pytest.raises(BadInput, match=f"cannot resume on other data: its {name}"):
            BatchLoader(documents, 4, 64, seed=seed, state=state)


class Broken(Documents):
    """Documents whose file turns out to be unreadable."""

    def tokens(self, index: int) -> Any:
        raise OSError("the disk is gone")


def test_errors_in_the_thread_surface_and_end_it() -> None:
    good = make_documents(20)
    broken = Broken(good._tokens, good._offsets)
    before = threading.active_count()
    loader = BatchLoader(broken, 4, 64)
    with pytest.raises(OSError, match="the disk is gone"):
        next(loader)
    assert threading.active_count() == before


def test_close_ends_the_thread() -> None:
    before = threading.active_count()
    loader = BatchLoader(make_documents(20), 4, 64)
    next(loader)
    assert threading.active_count() == before + 1
    loader.close()
    loader.close()
    assert threading.active_count() == before


@pytest.mark.gpu
def test_batches_on_the_gpu_are_those_on_the_cpu() -> None:
    documents = make_documents(1100)
    with loading(documents, 32, 512) as here, loading(documents, 32, 512, device="cuda") as there:
        expected, got = take(here, 50), take(there, 50)
    assert got.device.type == "cuda"
    assert torch.equal(got.cpu(), expected)
