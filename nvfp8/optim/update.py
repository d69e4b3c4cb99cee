"""One step of some parameters, taken apart: what the host does each time, and launches that are the same every time.

Launches depend on addresses, dtypes and formats, all known beforehand (`StoredOptimizer.fixed`). What changes from step to step,
rates and keys of rounding, lies in a table of eight numbers a parameter, which kernels read from memory:

    begin      counts the step, uploads its numbers, says which FP8 copies of weights are about to be written
    renew      launches: scales of those copies
    launch     launches: all updates
    finish     raises version counters, by which layers and graphs of autograd see that weights have changed

An optimizer's own step makes an `Update`, and runs through it once. `Replayed` keeps those of several optimizers: their launches
are captured in a CUDA graph, and a step is `begin`, one launch of the graph, and `finish`. AdamW is bound by memory, Muon by its
products, so in the graph they run beside each other: Muon on the stream of the capture, which should have priority, for it is the
longer, and AdamW in what that leaves.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nvfp8 import copies

if TYPE_CHECKING:
    from nvfp8.optim.stored import StoredOptimizer

NUMBERS = 8  # fp32 words of a parameter: 32 bytes, so that every row is aligned like the first


class Update:
    """One step of some of an optimizer's parameters, to be made once or again and again.

    Attributes:
        found: FP8 copies that it writes, by parameter.
        on_gpu: whether any parameter is.
    """

    def __init__(self, optimizer: "StoredOptimizer", given: Sequence[tuple[Tensor, Tensor]]):
        """Find out what has to be launched, and upload what launches need of it.

        Args:
            optimizer: whose parameters they are.
            given: at least one parameter with its local gradient.
        """
        given = optimizer._ordered(given)
        self._optimizer, self._parameters = optimizer, [p for p, _ in given]
        self.find()
        devices = {p.device for p in self._parameters}
        self.on_gpu = any(device.type == "cuda" for device in devices)
        self._numbers = {device: torch.empty(len(given), NUMBERS, dtype=torch.float32, device=device) for device in devices}
        self.launch: Callable[[], None] = optimizer._prepared(
            given, {p: held.part(p) for p, held in self.found.items()}, self._numbers
        )
        self._rounds: list[copies.Held] = []

    def find(self) -> None:
        """Look up the FP8 copies to be written. They are their layers', so none is kept beyond a step."""
        own = (p for p in self._parameters if self._optimizer._writes_copies(p))
        self.found = copies.writable(own, self._optimizer._names)

    def begin(self) -> None:
        """Count the step and upload its numbers."""
        torch._foreach_add_([self._optimizer.state[p]["step"] for p in self._parameters], 1)
        self._rounds = copies.begin(self.found)
        numbers = self._optimizer._numbers(self._parameters)
        if self.on_gpu:
            numbers = numbers.pin_memory()  # the host does not wait, and torch keeps the buffer until the copy is done
        for place in self._numbers.values():
            place.copy_(numbers, non_blocking=True)

    def renew(self) -> None:
        """Launch what gives the copies their scales."""
        copies.renew(self._rounds)

    def finish(self) -> None:
        """Let the parameters and their copies be seen as changed, which kernels do not."""
        torch.autograd.graph.increment_version(self._parameters)
        copies.finish(self.found)
        self.found, self._rounds = {}, []


class Replayed:
    """A step of several optimizers, captured once and replayed. It is good as long as `fixed` says so."""

    def __init__(self, optimizers: Sequence["StoredOptimizer"]):
        """Prepare the updates of all parameters.

        Args:
            optimizers: whose parameters all have gradients and lie on one device; `fixed(optimizers)` is not None.
        """
        self._optimizers, self._fixed = optimizers, fixed(optimizers)
        every = ([(p, g) for group in o.param_groups for p in group["params"] if (g := p.grad) is not None] for o in optimizers)
        self._updates = [Update(o, given) for o, given in zip(optimizers, every, strict=True) if given]
        self._replay: Callable[[], None] | None = None

    def fits(self) -> bool:
        """Whether a step now would launch what was captured."""
        return fixed(self._optimizers) == self._fixed

    @torch.no_grad()
    def step(self, capture: Callable[[Callable[[], None]], Callable[[], None]]) -> None:
        """Make a step.

        Args:
            capture: captures what the function that it is given launches, without running it, and returns what replays it. It is
                asked the first time.
        """
        for update in self._updates:
            update.find()
            update.begin()
        if self._replay is None:
            self._replay = capture(self._launch)
        self._replay()
        for update in self._updates:
            update.finish()

    def _launch(self) -> None:
        """Launch everything, all but the last optimizer's updates on streams beside the current one."""
        for update in self._updates:
            update.renew()
        beside = []
        for update in self._updates:
            if update is self._updates[-1] or not update.on_gpu:
                update.launch()
                continue
            beside.append(torch.cuda.Stream(priority=0))  # the lowest
            beside[-1].wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside[-1]):
                update.launch()
        for stream in beside:
            torch.cuda.current_stream().wait_stream(stream)


def fixed(optimizers: Sequence["StoredOptimizer"]) -> object | None:
    """What the launches of a step of all parameters go by; None where they cannot be the same again."""
    each = [optimizer.fixed() for optimizer in optimizers]
    return None if None in each else each
