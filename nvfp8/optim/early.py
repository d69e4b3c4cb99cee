"""An update as soon as its gradient is complete, in the middle of backward; the gradient is freed then.

Gradients of all parameters never exist together: 2 or 4 bytes a parameter less wherever they, and not activations, make the peak.
The price is that a step has one backward pass, and that it can no longer be taken back: by the time a gradient turns out not to be
finite, what backward reached before it is updated. So before each update all gradients that are complete by then are looked at,
and from the first that is not finite on nothing more is updated. What is not finite spreads the way backward goes, so a bad loss
or head stops a step before it has begun; the caller should look at the loss even before that. Each look makes the host wait.

What would need all gradients at once does not exist here: no clipping by their norm, no accumulation, no sum over processes, so
one process with whole tensors. Nor is `optimizer.step` called, so its hooks are not, and schedulers may say that they miss it.

A gradient is complete when autograd has accumulated it, which is after the last use of its parameter in backward: nothing will
read the weight again in this step. Where an optimizer updates several at once (`parts`), the last to be complete starts it.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from nvfp8.optim.shards import placed
from nvfp8.optim.stored import StoredOptimizer


class UpdateEarly:
    """Hooks on all parameters of some optimizers; each backward between `begin` and `finish` is a step.

    Attributes:
        bad: name of the first parameter in this step whose gradient was not finite; None if there was none. A caller who sees
            a loss that is not finite says so here instead of calling backward.
        updated: how many parameters this step has updated.
    """

    def __init__(self, optimizers: Sequence[StoredOptimizer]) -> None:
        """Install the hooks.

        Args:
            optimizers: whose parameters, names, groups and rates count.

        Raises:
            ValueError: there are several processes, or a parameter is a DTensor.
        """
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(f"updates in backward are for one process, here are {dist.get_world_size()}: gradients are not summed")
        self._optimizers = optimizers
        self._names = {p: optimizer.name_of(p) for optimizer in optimizers for part in optimizer.parts() for p in part}
        for p, name in self._names.items():
            if placed(p):
                raise ValueError(f"{name} is a DTensor: updates in backward are for whole tensors")
        self._parts = {p: (optimizer, part) for optimizer in optimizers for part in optimizer.parts() for p in part}
        self._handles = [p.register_post_accumulate_grad_hook(self._complete) for p in self._parts]
        self._begun = False

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def begin(self) -> None:
        """Begin a step: rates are set, gradients are None, one backward comes next.

        Raises:
            ValueError: a gradient is left from before, or an optimizer has got parameters since this was made.
        """
        if {p for optimizer in self._optimizers for part in optimizer.parts() for p in part} != self._parts.keys():
            raise ValueError("an optimizer has got parameters since UpdateEarly was made: remove it and make another")
        for p, name in self._names.items():
            if p.grad is not None:
                raise ValueError(f"{name} has a gradient before its step's backward: updates in backward accumulate nothing")
        self._completed: set[Tensor] = set()
        self._unseen: dict[Tensor, Tensor] = {}  # norms of gradients by parameter
        self._norms: list[float] = []
        self.bad: str | None = None
        self.updated, self._begun = 0, True

    def finish(self) -> float:
        """Update what no hook has seen, which has no gradient or had it written past autograd, and end the step.

        What is left is looked at together: all of it is updated, or none.

        Returns:
            L2 norm of all gradients together; not finite if `bad` is set.
        """
        self._begun = False
        left = [p for p in self._parts if p not in self._completed]
        for p in left:
            self._note(p)
        self._look()
        for optimizer, part in {id(self._parts[p][1]): self._parts[p] for p in left}.values():
            self._update(optimizer, part)
        norm = math.hypot(*self._norms)
        return norm if self.bad is None or not math.isfinite(norm) else math.nan

    def _complete(self, parameter: Tensor) -> None:
        if not self._begun:
            return
        if parameter in self._completed:
            raise RuntimeError(
                f"{self._names[parameter]} got a gradient twice in one step: between begin and finish is one backward pass, "
                "without checkpoints that call backward again (use_reentrant=False)"
            )
        self._note(parameter)
        optimizer, part = self._parts[parameter]
        if all(p in self._completed for p in part):
            self._look()
            self._update(optimizer, part)

    def _note(self, parameter: Tensor) -> None:
        self._completed.add(parameter)
        if parameter.grad is not None:
            with torch.no_grad():
                self._unseen[parameter] = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)

    def _look(self) -> None:
        """Look at all gradients that were completed since the last look, in that order: one wait for the GPU."""
        if not self._unseen:
            return
        device = next(iter(self._unseen)).device
        norms = torch.stack([norm.to(device) for norm in self._unseen.values()]).tolist()
        self._norms += norms
        if self.bad is None:
            bad = (p for p, norm in zip(self._unseen, norms, strict=True) if not math.isfinite(norm))
            self.bad = next((self._names[p] for p in bad), None)
        self._unseen.clear()

    def _update(self, optimizer: StoredOptimizer, part: list[Tensor]) -> None:
        if self.bad is None:
            self.updated += optimizer.update(part)
        for p in part:
            p.grad = None
