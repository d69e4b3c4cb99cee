"""What nanochat's optimizers share: state that is saved by parameter name, in whatever formats, and taken into any others.

State goes into a checkpoint as a flat mapping `<parameter name>.<what>` -> tensor, never as a pickle, so that another
number of processes, each owning other parameters, can pick out what it owns. The formats, and how one becomes another, are
`nvfp8.optim`'s; names, ownership and what a checkpoint may lack are matters of this application.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nanochat.errors import BadInput
from nvfp8.optim.stored import StoredOptimizer


def gradient(parameter: Tensor) -> Tensor:
    """Return the parameter's gradient; zeros where it got none, as `parallel.reduce_gradients` counts it."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


class NamedOptimizer(torch.optim.Optimizer):
    """An optimizer over groups `{"params": [...], "param_names": [...], **hyperparameters}` whose state is saved by name.

    A group may be empty: a process then owns none of its parameters. Hyperparameters are read from the groups at every
    step, so setting `group["lr"]` is all a schedule has to do. Subclasses set `kind`.

    Attributes:
        kind: "adamw" or "muon".
    """

    kind: str

    @property
    def steps(self) -> int:
        """Updates made so far; a step the caller skips does not count."""
        return int(self.param_groups[0]["steps"])

    @steps.setter
    def steps(self, value: int) -> None:
        for group in self.param_groups:
            group["steps"] = value

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        """Return (name, parameter) of all groups."""
        return [pair for group in self.param_groups for pair in zip(group["param_names"], group["params"], strict=True)]

    def named_state(self) -> dict[str, Tensor]:
        """Return the stored state itself, not copies: `<parameter name>.<what>` -> tensor."""
        return {f"{name}.{what}": value for name, p in self.named_parameters() for what, value in self.state[p].items()}

    def state_tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold: the named state, and `<kind>.steps`, 0-D int64 on the CPU."""
        return {**self.named_state(), f"{self.kind}.steps": torch.tensor(self.steps, dtype=torch.int64, device="cpu")}

    def load_state_tensors(self, saved: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Take over `saved`. It may hold more keys than this process owns; those are left alone.

        Each key is read once, one at a time, so that a mapping that reads from disk needs no room for all of them.

        Args:
            saved: as `state_tensors` gave it, from any number of processes.
            weights: the model's weights as they were saved with it. The model has loaded them.

        Raises:
            BadInput: a key is missing, or has another shape or a form that this run cannot read.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Refuse torch's own form, which knows neither names nor ownership."""
        raise NotImplementedError("use state_tensors() and load_state_tensors()")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse torch's own form, which knows neither names nor ownership."""
        raise NotImplementedError("use state_tensors() and load_state_tensors()")


class _Of(Mapping[str, Tensor]):
    """The entries of `saved` that belong to one parameter, without its name; nothing is read before it is asked for.

    Here all parameters of an optimizer have made the same steps, and a checkpoint says once how many.
    """

    def __init__(self, saved: Mapping[str, Tensor], name: str, kind: str) -> None:
        self._saved, self._name, self._steps = saved, name, f"{kind}.steps"

    def _key(self, what: object) -> str:
        return self._steps if what == "step" else f"{self._name}.{what}"

    def __getitem__(self, what: str) -> Tensor:
        return self._saved[self._key(what)]

    def __contains__(self, what: object) -> bool:
        return self._key(what) in self._saved

    def __iter__(self) -> Iterator[str]:
        start = f"{self._name}."
        yield "step"
        yield from (key.removeprefix(start) for key in self._saved if key.startswith(start))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class StoredByName(NamedOptimizer, StoredOptimizer):
    """nanochat's side of `nvfp8.optim`: no gradient counts as zeros, and a checkpoint of any formats is taken over.

    Masters go with the weights' dtype, which the precision chooses: where this run keeps more of a weight than was saved, it
    begins with the weight; where more was saved than this run keeps, that becomes the weight.
    """

    @property
    def steps(self) -> int:
        """Updates made so far; one that was made in part counts, one that was skipped does not."""
        return max((int(state["step"]) for state in self.state.values()), default=0)

    @steps.setter
    def steps(self, value: int) -> None:
        for state in self.state.values():
            state["step"].fill_(value)

    def named_state(self) -> dict[str, Tensor]:
        """Return the stored state itself, not copies: `<parameter name>.<what>` -> tensor; steps are counted once for all."""
        return {name: value for name, value in super().named_state().items() if not name.endswith(".step")}

    def state_tensors(self) -> dict[str, Tensor]:
        """See `NamedOptimizer`; a process that owns nothing has not counted steps."""
        return super().state_tensors() if self.state else {}

    def gradient(self, parameter: Tensor) -> Tensor:
        """The gradient that an update takes."""
        return gradient(parameter)

    def load_state_tensors(self, saved: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """See `NamedOptimizer`; bit for bit where formats are the same."""
        depends = ("scale", "master", "remainder")  # on the formats it was saved in
        if not self.state:
            return
        wanted = [f"{self.kind}.steps", *(key for key in self.named_state() if key.rpartition(".")[2] not in depends)]
        missing = [key for key in wanted if key not in saved]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise BadInput(f"the checkpoint lacks the optimizer state {missing[0]}{more}; resume with its own settings")
        for name, p in self.named_parameters():
            try:
                self.restore(p, _Of(saved, name, self.kind), weights.get(name, p.detach()))
            except KeyError as error:
                raise BadInput(f"the checkpoint lacks the optimizer state {name}.{error.args[0]}") from error
            except ValueError as error:
                state = f"the checkpoint's optimizer state {name}.{error}"
                raise BadInput(f"{state}; resume with the settings it was saved with") from error
