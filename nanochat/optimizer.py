"""What AdamW and Muon share: state that is saved by name; and how AdamW's elementwise math is compiled on a GPU.

State goes into a checkpoint as a flat mapping `<parameter name>.<what>` -> tensor, never as a pickle, so that another
number of processes, each owning other parameters, can pick out what it owns. All of it is allocated when the optimizer
is built: memory does not grow at the first step, and a checkpoint has a place to be loaded into.

A parameter stored below fp32 has an fp32 master here, unless its group says that it is its own (`master` False, embedding
tables): math reads and writes the master, the parameter is the master rounded.

Hyperparameters reach compiled functions as 0-D CPU tensors: their values are kernel arguments, not constants, so that a
learning rate that changes every step never recompiles. Nothing here makes the host wait for the GPU.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from nanochat.errors import BadInput

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Below this many elements eager kernels cost less than another compiled variant (a size of 1 always makes one).
_WORTH_COMPILING = 4096


def scalar(value: float) -> Tensor:
    """Return `value` as a 0-D fp32 CPU tensor, an argument of a compiled function."""
    return torch.tensor(value, dtype=torch.float32, device="cpu")


@functools.cache
def compiled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return `function` under torch.compile with symbolic sizes: one graph for all shapes of the same dtypes."""
    return torch.compile(function, dynamic=True, fullgraph=True)


def fused(function: Callable[_P, _R], tensor: Tensor) -> Callable[_P, _R]:
    """Return `function` compiled if `tensor`, its main operand, is large and on a GPU; else `function` itself.

    A CPU runs it eagerly: there, torch.compile would ask for a C++ compiler.
    """
    return compiled(function) if tensor.is_cuda and tensor.numel() >= _WORTH_COMPILING else function


def gradient(parameter: Tensor) -> Tensor:
    """Return the parameter's gradient; zeros where it got none, as `parallel.reduce_gradients` counts it."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


class NamedOptimizer(torch.optim.Optimizer):
    """An optimizer over groups `{"params": [...], "names": [...], **hyperparameters}` whose state is saved by name.

    A group may be empty: a process then owns none of its parameters. Hyperparameters are read from the groups at every
    step, so setting `group["lr"]` is all a schedule has to do. Subclasses set `kind` and give `named_state` and `step`.

    Attributes:
        kind: "adamw" or "muon".
        steps: updates made so far; a step the caller skips does not count.
    """

    kind: str

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        """Take the groups; `names` runs parallel to `params`.

        Raises:
            ValueError: a group's names do not match its parameters, or a name comes twice.
        """
        super().__init__(groups, defaults={})
        self.steps = 0
        seen: set[str] = set()
        for group in self.param_groups:
            if len(group["names"]) != len(group["params"]):
                raise ValueError(f"{len(group['params'])} parameters but {len(group['names'])} names in a group")
            for name in group["names"]:
                if name in seen:
                    raise ValueError(f"two parameters are called {name!r}")
                seen.add(name)

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        """Return (name, parameter) of all groups."""
        return [pair for group in self.param_groups for pair in zip(group["names"], group["params"], strict=True)]

    def mark_changed(self) -> None:
        """Raise the version counter of every parameter, as kernels do not: FP8 copies are renewed by it."""
        torch.autograd.graph.increment_version([parameter for _, parameter in self.named_parameters()])

    def named_state(self) -> dict[str, Tensor]:
        """Return the stored state itself, not copies: `<parameter name>.<what>` -> tensor."""
        raise NotImplementedError

    def state_tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold: the named state, and `<kind>.steps`, 0-D int64 on the CPU."""
        return {**self.named_state(), f"{self.kind}.steps": torch.tensor(self.steps, dtype=torch.int64, device="cpu")}

    def load_state_tensors(self, saved: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Copy `saved` into the state. It may hold more keys than this process owns; those are left alone.

        Each key is read once, one at a time, so that a mapping that reads from disk needs no room for all of them.
        Masters go with the weights' dtype, which the precision chooses: where this run keeps one and `saved` does not, it
        comes from `weights`; where only `saved` has one, it becomes the weight.

        Args:
            saved: as `state_tensors` gave it, from any number of processes.
            weights: the model's weights as they were saved with it.

        Raises:
            BadInput: a key is missing, or has another shape or dtype than this run needs.
        """
        wanted = self.state_tensors()
        for name, parameter in self.named_parameters():
            key = f"{name}.master"
            if key in wanted and f"{name}.remainder" in saved:
                raise BadInput(f"the checkpoint completes {name} by {name}.remainder; resume with --adamw te-remainders")
            if key in wanted and key not in saved:
                wanted.pop(key).copy_(weights[name])
            elif key in saved and key not in wanted:
                parameter.detach().copy_(saved[key])
        missing = [key for key in wanted if key not in saved]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise BadInput(f"the checkpoint lacks the optimizer state {missing[0]}{more}; resume with its own settings")
        for key, place in wanted.items():
            value = saved[key]
            if value.shape != place.shape or value.dtype != place.dtype:
                raise BadInput(
                    f"the checkpoint's optimizer state {key} is {value.dtype} {tuple(value.shape)}, this run needs "
                    f"{place.dtype} {tuple(place.shape)}; resume with the settings it was saved with"
                )
            place.copy_(value)
        self.steps = int(wanted[f"{self.kind}.steps"])

    def state_dict(self) -> dict[str, Any]:
        """Refuse torch's own form, which knows neither names nor ownership."""
        raise NotImplementedError("use state_tensors() and load_state_tensors()")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse torch's own form, which knows neither names nor ownership."""
        raise NotImplementedError("use state_tensors() and load_state_tensors()")
