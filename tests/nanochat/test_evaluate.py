"""Bits per byte by hand, and what counts in neither sum."""

import math

import pytest
import torch

from nanochat.evaluate import bits_per_byte
from nanochat.gpt import GPT


class Fixed:
    """A model whose token losses are given."""

    def __init__(self, losses: list[list[float]]) -> None:
        self.losses = torch.tensor(losses)

    def token_losses(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.where(targets >= 0, self.losses, 0.0)


def evaluate(losses: list[list[float]], targets: list[list[int]], steps: int = 1) -> float | None:
    batch = (torch.zeros(1, 3, dtype=torch.long), torch.tensor(targets))
    model: GPT = Fixed(losses)  # type: ignore[assignment]
    return bits_per_byte(model, iter([batch] * steps), steps, torch.tensor([1, 2, 4, 0]))


def test_by_hand() -> None:
    # 1 + 2 + 3 nats on 1 + 2 + 4 bytes
    assert evaluate([[1.0, 2.0, 3.0]], [[0, 1, 2]]) == pytest.approx(6 / 7 / math.log(2))


def test_specials_and_ignored_targets_count_in_neither_sum() -> None:
    assert evaluate([[1.0, 50.0, 3.0]], [[0, 3, -1]]) == pytest.approx(1 / math.log(2))


def test_more_steps_of_the_same_batch_change_nothing() -> None:
    one, three = (evaluate([[1.0, 2.0, 3.0]], [[2, 1, 0]], steps) for steps in (1, 3))
    assert one == pytest.approx(three)


def test_it_can_be_abandoned_between_batches() -> None:
    batch = (torch.zeros(1, 3, dtype=torch.long), torch.tensor([[2, 1, 0]]))
    batches, asked = iter([batch] * 5), iter([False, False, True])
    model: GPT = Fixed([[1.0, 2.0, 3.0]])  # type: ignore[assignment]
    assert bits_per_byte(model, batches, 5, torch.tensor([1, 2, 4, 0]), lambda: next(asked)) is None
    assert len(list(batches)) == 3


def test_nothing_but_specials_is_infinite() -> None:
    assert evaluate([[1.0, 2.0, 3.0]], [[3, 3, -1]]) == math.inf
