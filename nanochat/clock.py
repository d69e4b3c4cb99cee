"""Time spent training, a step at a time, though the host does not wait for the end of one.

A step ends for the host where its gradients have been looked at. Its update is still to come, and runs while the host records the
step and begins the next: it counts to that one. Behind a stop no update is left to count, so such a step is shorter by one, and
that before the stop never counts it.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Runs from its beginning on."""

    def __init__(self, device: torch.device):
        """Count what is trained on `device`."""
        self._device = device
        self._warm = time.perf_counter()
        self.restart()

    def restart(self) -> None:
        """Forget what has passed since the last lap."""
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap, without those in which it was stopped."""
        before, self._since = self._since, time.perf_counter()
        return self._since - before

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What is done in the block is no training: it begins when the device has done all that was, and does not count."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        passed = time.perf_counter() - self._since
        yield
        self._since = time.perf_counter() - passed

    def estimate(self, done: int, left: int) -> float | None:
        """Seconds that `left` more steps will take with all that is due between them.

        Args:
            done: steps so far, without those of warm-up: below 1 until they are over.
            left: steps.

        Returns:
            None as long as `done` is no basis.
        """
        if done < 1:
            self._warm = time.perf_counter()
            return None
        return (time.perf_counter() - self._warm) / done * left
