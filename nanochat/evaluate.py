"""Bits per byte: a loss that does not depend on the tokenizer.

Σ nats / (ln 2 · Σ bytes of the target tokens). A tokenizer with longer tokens has a higher loss per token but must predict
fewer of them; dividing by the bytes they stand for makes runs comparable. Specials stand for no bytes and count in neither
sum, nor do ignored targets.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nanochat import parallel
from nanochat.gpt import GPT


@torch.no_grad()
def bits_per_byte(
    model: GPT,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    token_bytes: Tensor,
    stop: Callable[[], bool] = lambda: False,
) -> float | None:
    """Evaluate `steps` micro-batches on every rank.

    Args:
        model: the model; evaluation leaves it as it is.
        batches: yields (inputs, targets), (B, T) int64 each.
        steps: how many to take, at least 1.
        token_bytes: (V,) bytes each token stands for, 0 for specials, on the model's device.
        stop: asked before each micro-batch; true, on all ranks at once, abandons the evaluation.

    Returns:
        Bits per byte over all ranks, infinite if no target stands for any byte; None if abandoned.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=token_bytes.device)  # nats, bytes
    for _ in range(steps):
        if stop():
            return None
        inputs, targets = next(batches)
        size = torch.where(targets >= 0, token_bytes[targets.clamp_min(0)], 0)
        losses = model.token_losses(inputs, targets)
        sums += torch.stack(((losses * (size > 0)).sum(dtype=torch.float64), size.sum().double()))
    nats, size_total = parallel.total(sums).tolist()
    return nats / (math.log(2) * size_total) if size_total else math.inf
