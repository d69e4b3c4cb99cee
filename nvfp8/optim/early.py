"""An update as soon as its gradient is complete, in the middle of backward; the gradient is freed then.

Gradients of all parameters never exist together: 2 or 4 bytes a parameter less wherever they, and not activations, make the peak.
The price is that a step has one backward pass, and that it can no longer be taken back: by the time a gradient turns out not to be
finite, what backward reached before it is updated. So every gradient is looked at before its own update, and from the first that
is not finite on nothing more is updated. What is not finite spreads the way backward goes, so a bad loss or head stops a step
before it has begun; the caller should look at the loss even before that. Each look makes the host wait for the GPU.

A gradient is complete when autograd has accumulated it, which is after the last use of its parameter in backward: nothing will
read the weight again in this step. Where an optimizer updates several at once (`parts`), the last to be complete starts it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nvfp8.optim.stored import StoredOptimizer, local


class UpdateEarly:
    """Hooks on all parameters of some optimizers; each backward between `begin` and `finish` is a step.

    Attributes:
        bad: name of the first parameter in this step whose gradient was not finite; None if there was none.
        updated: how many parameters this step has updated.
    """

    def __init__(self, optimizers: Sequence[StoredOptimizer], names: Mapping[str, Tensor]) -> None:
        """Install the hooks.

        Args:
            optimizers: whose parameters, groups and rates count.
            names: parameters by name, for `bad`.
        """
        self._optimizers = optimizers
        self._names = {p: name for name, p in names.items()}
        self._parts = {p: (optimizer, part) for optimizer in optimizers for part in optimizer.parts() for p in part}
        self._handles = [p.register_post_accumulate_grad_hook(self._complete) for p in self._parts]
        self._begun = False

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def begin(self) -> None:
        """Begin a step: rates are set, gradients are None, backward comes next."""
        for optimizer in self._optimizers:
            optimizer.begin()
        self._completed: dict[Tensor, None] = {}  # in the order in which backward reached them
        self._norms: list[float] = []
        self.bad: str | None = None
        self.updated, self._begun = 0, True

    def finish(self) -> float:
        """Update what no hook has seen, which has no gradient or had it written past autograd, and end the step.

        Returns:
            L2 norm of all gradients together; not finite if `bad` is set.
        """
        for p in self._parts:
            if p not in self._completed:
                self._complete(p)
        self._begun = False
        return math.hypot(*self._norms)

    def _complete(self, parameter: Tensor) -> None:
        if not self._begun:
            return
        self._completed[parameter] = None
        optimizer, part = self._parts[parameter]
        if any(p not in self._completed for p in part):
            return
        if self.bad is None:
            self._look(part)
        if self.bad is None:
            optimizer.update(part)
            self.updated += len(part)
        for p in part:
            p.grad = None

    def _look(self, part: list[Tensor]) -> None:
        part_of = set(part)
        with torch.no_grad():
            having: list[Any] = [p for p in self._completed if p.grad is not None and p in part_of]
            if not having:
                return
            norms = torch.stack([torch.linalg.vector_norm(local(p.grad), dtype=torch.float32) for p in having]).tolist()
        self._norms += norms
        self.bad = next((self._names[p] for p, norm in zip(having, norms, strict=True) if not math.isfinite(norm)), None)
