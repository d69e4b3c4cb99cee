"""An update as soon as its gradient is complete, in the middle of backward; the gradient is freed then.

Gradients of all parameters never exist together: 2 or 4 bytes a parameter less wherever they, and not activations, make the peak.
The price is that a step has one backward pass, and that it can no longer be taken back: by the time a gradient turns out not to be
finite, what backward reached before it is updated. So before each update all gradients that are complete by then are looked at,
and from the first that is not finite on nothing more is updated. What is not finite spreads the way backward goes, so a bad loss
or head stops a step before it has begun; the caller should look at the loss even before that. Each look makes the host wait.

A gradient is complete when autograd has accumulated it, which is after the last use of its parameter in backward: nothing will
read the weight again in this step. Where an optimizer updates several at once (`parts`), the last to be complete starts it.
"""

import math
from collections.abc import Mapping, Sequence

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
        self._completed: set[Tensor] = set()
        self._unseen: dict[str, Tensor] = {}  # norms of gradients by name
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
        if self.bad is not None and not self.updated:  # a step that was not made does not count
            for group in (group for optimizer in self._optimizers for group in optimizer.param_groups):
                group["steps"] -= 1
        return math.hypot(*self._norms)

    def _complete(self, parameter: Tensor) -> None:
        if not self._begun:
            return
        self._completed.add(parameter)
        if parameter.grad is not None:
            with torch.no_grad():
                self._unseen[self._names[parameter]] = torch.linalg.vector_norm(local(parameter.grad), dtype=torch.float32)
        optimizer, part = self._parts[parameter]
        if any(p not in self._completed for p in part):
            return
        self._look()
        if self.bad is None:
            optimizer.update(part)
            self.updated += len(part)
        for p in part:
            p.grad = None

    def _look(self) -> None:
        """Look at all gradients that backward has completed since the last look, in that order: one wait for the GPU."""
        norms = torch.stack(list(self._unseen.values())).tolist() if self._unseen else []
        self._norms += norms
        if self.bad is None:
            self.bad = next((name for name, norm in zip(self._unseen, norms, strict=True) if not math.isfinite(norm)), None)
        self._unseen.clear()
