"""Batches of packed documents, the same for any number of processes, resumable to the token.

A row is T+1 tokens, so that inputs and targets are the same row shifted by one. It always starts at the start of a
document and is packed by best fit: out of 1,000 waiting documents take the longest that still fits, again and again;
when none fits, the shortest is cropped to fill the row. No padding, and no token whose document's beginning is out of
sight; the price is the cropped ends.

Packing needs only lengths. So every process plays the same packing for all rows of all processes, a few microseconds
each, and copies the tokens of its own rows alone: the rows of a step do not depend on how many processes share them,
and the whole state is an epoch, a position in that epoch's permutation, and the ids of the waiting documents.

One background thread packs two batches ahead into pinned memory, and the copy to the GPU does not wait.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import numpy as np
import torch

from nanochat.errors import BadInput
from nanochat.shards import Documents, Ints

BUFFER_DOCUMENTS = 1000
_AHEAD = 2  # batches packed before they are asked for


class Packer:
    """An endless sequence of rows, each a list of document pieces; it never sees a token.

    Among documents of one length the one that has waited longest goes first.

    Epoch e (from 1) visits the documents in a permutation drawn from (seed, e). Documents still waiting at its end are
    used in the next. With fewer documents than the buffer holds it is made that small: else it would start with many
    copies of each.
    """

    def __init__(self, lengths: Ints, capacity: int, seed: int, state: Mapping[str, Any] | None = None) -> None:
        """Start at the beginning, or at `state`.

        Args:
            lengths: tokens per document, int64 (documents,).
            capacity: tokens per row, T+1.
            seed: of the permutations.
            state: what `state()` returned.

        Raises:
            BadInput: `state` comes from other documents or another seed.
        """
        self._lengths = lengths
        self._capacity = capacity
        self._identity = {"seed": seed, "documents": len(lengths), "tokens": int(lengths.sum())}
        self.epoch, self._position = 1, 0
        # Sorted by (length, −arrival, document): what fits lies left of a bisection, among equals the oldest rightmost.
        self._waiting: list[tuple[int, int, int]] = []
        self._arrivals = 0
        if state is not None:
            for name, value in self._identity.items():
                if state[name] != value:
                    raise BadInput(f"cannot resume on other data: its {name} was {state[name]}, now it is {value}")
            self.epoch, self._position = state["epoch"], state["position"]
            for document in state["waiting"]:
                self._add(document)
        self._order = self._permutation()

    def state(self) -> dict[str, Any]:
        """What is needed to go on with the next row, ready for JSON; `waiting` in the order of arrival."""
        waiting = [document for _, _, document in sorted(self._waiting, key=lambda entry: -entry[1])]
        return {**self._identity, "epoch": self.epoch, "position": self._position, "waiting": waiting}

    def row(self) -> list[tuple[int, int]]:
        """The next row as (document, tokens from its start), which add up to the capacity."""
        pieces = []
        room = self._capacity
        while room:
            self._refill()
            end = bisect_left(self._waiting, (room + 1,))
            if not end:  # none fits: the shortest is cropped
                end = bisect_left(self._waiting, (self._waiting[0][0] + 1,))
            length, _, document = self._waiting.pop(end - 1)
            pieces.append((document, min(length, room)))
            room -= pieces[-1][1]
        return pieces

    def _refill(self) -> None:
        while len(self._waiting) < min(BUFFER_DOCUMENTS, len(self._lengths)):
            if self._position == len(self._order):
                self.epoch, self._position = self.epoch + 1, 0
                self._order = self._permutation()
            self._add(int(self._order[self._position]))
            self._position += 1

    def _add(self, document: int) -> None:
        insort(self._waiting, (int(self._lengths[document]), -self._arrivals, document))
        self._arrivals += 1

    def _permutation(self) -> Ints:
        return np.random.default_rng((self._identity["seed"], self.epoch)).permutation(len(self._lengths))


class BatchLoader:
    """Iterator of (inputs, targets), each (batch_size, sequence_len) int64 on `device`; it never ends.

    A micro-batch of all processes is world_size × batch_size consecutive rows of one `Packer`; rank r takes the r-th
    share. So two processes with B rows and one with 2·B see the same rows in the same step.
    """

    def __init__(
        self,
        documents: Documents,
        batch_size: int,
        sequence_len: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        seed: int = 42,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Start packing in the background.

        Args:
            documents: one split of a TokenStore.
            batch_size: rows of this process per micro-batch.
            sequence_len: T, tokens per row as the model sees it.
            rank: of this process, 0 … world_size − 1.
            world_size: number of processes.
            device: where batches go.
            seed: of the order of the documents.
            state: `state_dict()` of a loader of the same documents; batch size and processes may differ.

        Raises:
            BadInput: `state` comes from other documents or another seed.
        """
        self._documents = documents
        self._shape = (batch_size, sequence_len)
        self._rank, self._world_size = rank, world_size
        self._device = torch.empty(0, device=device).device  # "cuda" becomes the GPU that this means here
        self._packer = Packer(documents.lengths, sequence_len + 1, seed, state)
        self._state = self._packer.state()
        self._worker = ThreadPoolExecutor(1, "batches", _choose_gpu, (self._device,))
        self._ahead: deque[Future[tuple[torch.Tensor, dict[str, Any]]]] = deque()
        for _ in range(_AHEAD):
            self._ahead.append(self._worker.submit(self._pack))

    def __iter__(self) -> Self:
        """This object."""
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next micro-batch of this process; what went wrong while it was packed is raised here."""
        try:
            batch, self._state = self._ahead.popleft().result()
        except Exception:
            self.close()
            raise
        self._ahead.append(self._worker.submit(self._pack))
        inputs, targets = batch.to(self._device, non_blocking=True)
        return inputs, targets

    @property
    def epoch(self) -> int:
        """The pass over the data, from 1, that the last batch handed out has reached."""
        return int(self._state["epoch"])

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch, the one not yet handed out, begins; ready for JSON, about 6 kB."""
        return self._state

    def close(self) -> None:
        """End the background thread; there are no more batches."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _pack(self) -> tuple[torch.Tensor, dict[str, Any]]:
        """One micro-batch as (2, B, T) int64 in (pinned) CPU memory, and the state after it; runs in the thread."""
        batch_size, sequence_len = self._shape
        rows = [self._packer.row() for _ in range(self._world_size * batch_size)]
        mine = rows[self._rank * batch_size : (self._rank + 1) * batch_size]
        tokens = np.empty((batch_size, sequence_len + 1), np.int64)
        for line, pieces in zip(tokens, mine, strict=True):
            at = 0
            for document, taken in pieces:
                line[at : at + taken] = self._documents.tokens(document)[:taken]
                at += taken
        # A new tensor each time: the allocator gives its memory out again only when the copy to the GPU is done.
        batch = torch.empty((2, batch_size, sequence_len), dtype=torch.int64, pin_memory=self._device.type == "cuda")
        batch.numpy()[:] = tokens[:, :-1], tokens[:, 1:]
        return batch, self._packer.state()


def _choose_gpu(device: torch.device) -> None:
    """For the thread: pinning memory without a chosen GPU would take half a gigabyte of GPU 0 for a context there."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
