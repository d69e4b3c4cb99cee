"""One step of some parameters, taken apart: what the host does each time, and launches that are the same every time.

Launches depend on addresses, dtypes and formats, all known beforehand (`StoredOptimizer.fixed`). What changes from step to step,
rates and keys of rounding, lies in a table of eight numbers a parameter, which kernels read from memory:

    find       looks up the FP8 copies of weights that can be written
    upload     the step's numbers, by the rates and the counts of steps there are
    begin      says that those copies are about to be written
    renew      launches: scales of those copies
    launch     launches: all updates
    finish     counts the step, and raises version counters, by which layers and graphs of autograd see that weights have changed

An optimizer's own step makes an `Update`, and runs through it once. `Replayed` keeps those of several optimizers: their launches
are captured in a CUDA graph, and a step is `find`, `upload`, `begin`, one launch of the graph, and `finish`. AdamW is bound by
memory, Muon by its products, so in the graph they run beside each other: Muon on the stream of the capture, which should have
priority, for it is the longer, and AdamW in what that leaves.

`find` and `upload`, and the look at whether the graph still fits, are most of what the host does, and the GPU waits for it once the
gradients have been looked at. So they can be done ahead (`Replayed.prepare`), while it is still busy with them. They change nothing
that a step which is then not made would leave behind: the next one's numbers are written over this one's.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nvfp8 import copies, rounding
from nvfp8.optim.shards import placed

if TYPE_CHECKING:
    from nvfp8.optim.stored import StoredOptimizer

NUMBERS = 8  # fp32 words of a parameter: 32 bytes, so that every row is aligned like the first
_READABLE = (torch.float32, torch.bfloat16)  # gradients that kernels take as they are


class Update:
    """One step of some of an optimizer's parameters, to be made once or again and again.

    Attributes:
        optimizer: whose they are.
        found: FP8 copies that are written, with their parameters; they are their layers', so none is kept beyond a step.
        on_gpu: whether any parameter is.
    """

    def __init__(self, optimizer: "StoredOptimizer", given: Sequence[tuple[Tensor, Tensor]]):
        """Find out what has to be launched, and upload what launches need of it.

        Args:
            optimizer: whose parameters they are.
            given: at least one parameter with its local gradient.
        """
        given = optimizer._ordered(given)
        self.optimizer, self._parameters = optimizer, [p for p, _ in given]
        self._entries = [optimizer.state[p] for p in self._parameters]
        self._groups = [optimizer._group_of[p] for p in self._parameters]
        self._hashes = torch.tensor([rounding.spread(optimizer._hashes[p]) for p in self._parameters], device="cpu")
        # Parameters of one kind in one group have one set of rates: of each set the first, and which set is whose.
        sets: dict[Any, int] = {}
        self._sets = [
            sets.setdefault((id(group), optimizer._kind(p)), len(sets))
            for p, group in zip(self._parameters, self._groups, strict=True)
        ]
        self._firsts = [(self._parameters[row], self._groups[row]) for row in map(self._sets.index, range(len(sets)))]
        self.found = self.find()
        devices = {p.device for p in self._parameters}
        self.on_gpu = any(device.type == "cuda" for device in devices)
        self._numbers = {device: torch.empty(len(given), NUMBERS, dtype=torch.float32, device=device) for device in devices}
        written = {p: held.part(p) for p, held in self.found}
        self.launch: Callable[[], None] = optimizer._prepared(given, written, self._numbers)
        self._rounds: list[copies.Held] = []

    def find(self) -> copies.Found:
        """Look up the FP8 copies that can be written."""
        optimizer = self.optimizer
        return copies.writable((p for p in self._parameters if optimizer._writes_copies(p)), optimizer._names)

    def upload(self) -> None:
        """Upload the step's numbers."""
        numbers = self._of_this_step()
        if self.on_gpu:
            numbers = numbers.pin_memory()  # the host does not wait, and torch keeps the buffer until the copy is done
        for place in self._numbers.values():
            place.copy_(numbers, non_blocking=True)

    def _of_this_step(self) -> Tensor:
        """(n, NUMBERS) fp32 on the CPU: bits of an int32 key for each of the optimizer's purposes, then rates."""
        steps = [int(entries["step"]) + 1 for entries in self._entries]
        purposes, seeds = self.optimizer.purposes, [group["seed"] for group in self._groups]
        numbers = torch.zeros(len(steps), NUMBERS, dtype=torch.float32, device="cpu")
        numbers.view(torch.int32)[:, : len(purposes)] = rounding.keys(seeds, steps, self._hashes, purposes)
        known: dict[tuple[int, int], int] = {}
        rows = [known.setdefault(each, len(known)) for each in zip(self._sets, steps, strict=True)]
        rates = torch.tensor([self.optimizer._rates(*self._firsts[which], n) for which, n in known], device="cpu")
        numbers[:, len(purposes) : len(purposes) + rates.size(1)] = rates[torch.tensor(rows, device="cpu")]
        return numbers

    def begin(self, found: copies.Found) -> None:
        """Expect the copies that were `found` for this step to be written: those of the launches."""
        self.found, self._rounds = found, copies.begin(found)

    def renew(self) -> None:
        """Launch what gives the copies their scales."""
        copies.renew(self._rounds)

    def finish(self) -> None:
        """Count the step, and let parameters and their copies be seen as changed, which kernels do not."""
        torch._foreach_add_([entries["step"] for entries in self._entries], 1)
        torch.autograd.graph.increment_version(self._parameters)
        copies.finish(self.found)
        self.found, self._rounds = [], []


def repeatable(optimizers: Sequence["StoredOptimizer"]) -> bool:
    """Whether the launches of a step of all parameters may serve for others as well.

    Not where a parameter has no gradient, or one that is converted before it is read; nor on several devices, where DTensors are
    updated, or half of what shares FP8 copies.
    """
    given = [(p, p.grad) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    return (
        len({p.device for p, _ in given}) == 1
        and all(g is not None and g.is_contiguous() and g.dtype in _READABLE and not placed(p) for p, g in given)
        and len({(p.dtype, g.dtype) for p, g in given if g is not None}) == len({p.dtype for p, _ in given})
    )


class Replayed:
    """A step of several optimizers, captured once and replayed as long as it would launch the same."""

    def __init__(self, optimizers: Sequence["StoredOptimizer"]):
        """Prepare the updates of all parameters, of optimizers that are `repeatable`."""
        self._updates = []
        for optimizer in optimizers:
            given = [(p, g) for group in optimizer.param_groups for p in group["params"] if (g := p.grad) is not None]
            if given:
                self._updates.append(Update(optimizer, given))
        self._optimizers, self._replay = optimizers, None
        # What is told apart by ids must live as long as this does.
        self._known = [(p.grad, *entries.values()) for update in self._updates for p, entries in update.optimizer.state.items()]
        self._fixed = self._now([update.found for update in self._updates])
        self._beside = [torch.cuda.Stream(priority=0) if update.on_gpu else None for update in self._updates[:-1]]  # the lowest

    _replay: Callable[[], None] | None

    def _now(self, found: Sequence[copies.Found]) -> object:
        """What the launches go by, with the copies that were `found` for each update."""
        return [optimizer.fixed() for optimizer in self._optimizers], [copies.fixed(each) for each in found]

    @torch.no_grad()
    def prepare(self) -> list[copies.Found] | None:
        """Do what of the next step can be done before it is known whether it is made.

        It is called behind the launches that make the gradients, on their stream; rates are set. Until the step none of that may
        change, nor parameters and state. Scales may (`Scaling.update`): they are read by launches, and copies that get their first
        one then are left to their layer.

        Returns:
            The copies found for each update, which `step` takes; None where something has changed by which launches go, or copies
            are half written.
        """
        found = [update.find() for update in self._updates]
        if self._now(found) != self._fixed or any(held.within for each in found for _, held in each):
            return None
        for update in self._updates:
            update.upload()
        return found

    @torch.no_grad()
    def step(self, capture: Callable[[Callable[[], None]], Callable[[], None]], prepared: list[copies.Found] | None = None) -> bool:
        """Make a step, unless `prepare` refuses it.

        Args:
            capture: captures what the function that it is given launches, without running it, and returns what replays it. It is
                asked the first time.
            prepared: what `prepare` returned for this very step. Without, it is asked now.

        Returns:
            Whether it was made.
        """
        found = self.prepare() if prepared is None else prepared
        if found is None:
            return False
        for update, its in zip(self._updates, found, strict=True):
            update.begin(its)
        if self._replay is None:
            self._replay = capture(self._launch)
        self._replay()
        for update in self._updates:
            update.finish()
        return True

    def _launch(self) -> None:
        """Launch everything, all but the last optimizer's updates on streams beside the current one."""
        for update in self._updates:
            update.renew()
        *others, last = self._updates
        for update, stream in zip(others, self._beside, strict=True):
            if stream is None:
                update.launch()
                continue
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                update.launch()
        last.launch()
        for stream in self._beside:
            if stream is not None:
                torch.cuda.current_stream().wait_stream(stream)
