"""What AdamW and Muon share: state in chosen formats, taken over from any other, and updates that may come in parts.

`optimizer.state[parameter]` is a flat dict of plain tensors, as stored: `<what>` and in FP8 `<what>.scale`, and beside a bf16
weight its `master` (fp32) or `remainder` (int8, int16). So a state_dict holds tensors and numbers only, FP8 as FP8, and whatever
formats it was saved in, it is decoded and encoded into this optimizer's; in the same ones it comes back bit for bit.

All state is allocated with its group: memory does not grow at the first step, and a checkpoint has a place to be loaded into.

What is rounded stochastically draws its bits from (seed, step, parameter's name, element): neither the order of parameters nor
their distribution over processes changes a run. Parameters without names are called by their place, "<group>.<position>".

Parameters of FSDP2 are DTensors: each process updates its own shard and its state holds that shard's, for each shard is a tensor
of its own. Save and load it process by process, in the same sharding.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar
from zlib import crc32

import torch
from torch import Tensor

from nvfp8 import hardware, rounding
from nvfp8.state import STATE_DTYPES, Codec, Master, Stored, codec, codec_of, master, read_weight, write_weight

# What a key is for: a step's update, or from here on the conversion of each coded state and of the weight.
_UPDATE, _CONVERSION = 0, 1


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies in this process: of a DTensor its shard, of any other itself."""
    whole = tensor.detach()
    return whole.to_local() if hasattr(whole, "to_local") else whole


def _local_gradient(parameter: Any, gradient: Any) -> Tensor:
    """The gradient of what `local(parameter)` is. A DTensor's may come summed over nobody yet, or cut otherwise."""
    if hasattr(parameter, "placements") and gradient.placements != parameter.placements:
        gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)
    return local(gradient)


def _shard(parameter: Any) -> str:
    """Which shard `local` is; the same on all processes that hold the same one."""
    if not hasattr(parameter, "placements"):
        return ""
    coordinate = parameter.device_mesh.get_coordinate() or ()
    return "".join(f"@{c}" for c, placed in zip(coordinate, parameter.placements, strict=True) if not placed.is_replicate())


def _fitting(saved: Mapping[str, Tensor], what: str, shape: Sequence[int]) -> Tensor:
    """Return `saved[what]`, of `shape`."""
    if what not in saved:
        raise KeyError(what)
    value = saved[what]
    if value.shape != torch.Size(shape):
        raise ValueError(f"{what} is {value.dtype} {tuple(value.shape)}, {tuple(shape)} is needed")
    return value


class StoredOptimizer(torch.optim.Optimizer):
    """Base of both. A subclass says how its state is allocated and how some of its parameters are updated.

    Attributes:
        coded: the state that has a codec; a group's option `<what>_dtype` names it.
        seed: of stochastic rounding.
    """

    coded: ClassVar[tuple[str, ...]]

    def __init__(self, params: Any, defaults: dict[str, Any], seed: int) -> None:
        """Allocate all state.

        Args:
            params: as for any torch optimizer: tensors, (name, tensor) pairs, or dicts of options with them.
            defaults: options of groups that do not give them.
            seed: of stochastic rounding.

        Raises:
            ValueError: a parameter or a format that cannot be; names that do not match parameters or come twice.
        """
        self.seed = seed
        self._names: dict[Tensor, str] = {}
        self._group_of: dict[Tensor, dict[str, Any]] = {}
        super().__init__(params, {**defaults, "steps": 0})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch's optimizers do, and allocate its state; its own steps count from 0."""
        super().add_param_group(param_group)
        group, place = self.param_groups[-1], len(self.param_groups) - 1
        names = group.get("param_names") or [f"{place}.{i}" for i in range(len(group["params"]))]
        check_names([group])
        for name, p in zip(names, group["params"], strict=True):
            if name in self._names.values():
                raise ValueError(f"two parameters are called {name!r}")
            part = local(p)
            if part.dtype not in (torch.float32, torch.bfloat16):
                raise ValueError(f"{name} is {part.dtype}: weights must be fp32 or bf16")
            if not part.is_contiguous():
                raise ValueError(f"{name} is not contiguous: the update is written in memory order")
            self._names[p], self._group_of[p] = name, group
        for what in self.coded:
            stored = codec(group[f"{what}_dtype"])
            for device in {p.device for p in group["params"] if p.is_cuda}:
                reason = hardware.unstorable(stored.name, torch.cuda.get_device_capability(device))
                if reason is not None:
                    raise ValueError(f"{what}_dtype {stored.name}: {reason}")
        self._allocate(group, master(group["master_weights"]))

    def _allocate(self, group: dict[str, Any], kept: Master) -> None:
        """Fill `self.state` for a group's parameters."""
        raise NotImplementedError

    def _codec(self, group: dict[str, Any], what: str) -> Codec:
        return codec(group[f"{what}_dtype"], second_moment=what == "exp_avg_sq")

    def _keep(self, parameter: Tensor, stored: Mapping[str, Stored], kept: Tensor | None) -> None:
        """Put a parameter's state where torch looks for it."""
        entries = self.state[parameter] = {}
        for what, (data, scale) in stored.items():
            entries |= {what: data} if scale is None else {what: data, f"{what}.scale": scale}
        if kept is not None:
            entries["master" if kept.dtype == torch.float32 else "remainder"] = kept

    def _stored(self, parameter: Tensor, what: str) -> Stored:
        return Stored(self.state[parameter][what], self.state[parameter].get(f"{what}.scale"))

    def _kept(self, parameter: Tensor) -> Tensor | None:
        entries = self.state[parameter]
        return entries.get("master", entries.get("remainder"))

    def _key(self, parameter: Tensor, purpose: int = _UPDATE) -> int:
        name = self._names[parameter] + _shard(parameter)
        return rounding.key(self.seed, self._group_of[parameter]["steps"], crc32(name.encode()), purpose)

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """The gradient that an update takes; a parameter without one is left as it is."""
        return parameter.grad

    # Steps

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss again, as for any torch optimizer.

        Returns:
            What `closure` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.begin()
        self.update(p for group in self.param_groups for p in group["params"])
        return loss

    def begin(self) -> None:
        """Begin a step whose updates come in parts."""
        for group in self.param_groups:
            group["steps"] += 1

    def parts(self) -> list[list[Tensor]]:
        """All parameters, in lists of those that are updated together; updated list by list, a step has the same result."""
        return [[p] for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor]) -> None:
        """Update some parameters in the step that `begin` began; raises their version counters, which kernels do not."""
        given = [(p, _local_gradient(p, g)) for p in parameters if (g := self.gradient(p)) is not None]
        self._update(given)
        torch.autograd.graph.increment_version([p for p, _ in given])

    def _update(self, given: list[tuple[Tensor, Tensor]]) -> None:
        """Update parameters, each with its local gradient."""
        raise NotImplementedError

    # From one format to another

    @torch.no_grad()
    def restore(self, parameter: Tensor, saved: Mapping[str, Tensor], weight: Tensor) -> None:
        """Take over one parameter's state, and its weight where more of it was saved than the parameter holds.

        Args:
            parameter: one of this optimizer's; holds the saved weight already, in its own dtype.
            saved: what `self.state` of it held, in any formats. Each tensor is read once.
            weight: the parameter as it was saved.

        Raises:
            KeyError: of the name of a state that `saved` lacks.
            ValueError: a state is of another shape, or in a form that no codec here reads.
        """
        entries = self.state[parameter]
        for what in (key for key in entries if not key.endswith(".scale") and key not in ("master", "remainder")):
            if what in self.coded:
                codec_of_ours = self._codec(self._group_of[parameter], what)
                purpose = _CONVERSION + self.coded.index(what)
                self._restore_coded(codec_of_ours, self._stored(parameter, what), saved, what, self._key(parameter, purpose))
            else:
                entries[what].copy_(_fitting(saved, what, entries[what].shape))
        self._restore_weight(parameter, saved, weight)

    def _restore_coded(self, ours: Codec, place: Stored, saved: Mapping[str, Tensor], what: str, key: int) -> None:
        data = _fitting(saved, what, place.data.shape)
        if data.dtype not in STATE_DTYPES.values():
            raise ValueError(f"{what} is {data.dtype}, which no format here is")
        theirs = codec_of(data.dtype, second_moment=what == "exp_avg_sq")
        scale = _fitting(saved, f"{what}.scale", (math.ceil(data.numel() / rounding.BLOCK),)) if theirs.blocked else None
        if data.dtype == place.data.dtype:
            place.data.copy_(data)
            if place.scale is not None and scale is not None:
                place.scale.copy_(scale)
            return
        value = theirs.decode(Stored(data, scale)).to(place.data.device)
        ours.encode_(place, value, rounding.draw(value, key))

    def _restore_weight(self, parameter: Tensor, saved: Mapping[str, Tensor], weight: Tensor) -> None:
        kept, part, weight = self._kept(parameter), local(parameter), local(weight)
        beside = next((what for what in ("master", "remainder") if what in saved), None)
        if beside is None and kept is None:
            return  # the parameter is all there is
        rest = None if beside is None else _fitting(saved, beside, part.shape)
        if rest is not None and kept is not None and rest.dtype == kept.dtype and weight.dtype == part.dtype:
            part.copy_(weight)
            kept.copy_(rest)
            return
        value = read_weight(weight, rest if rest is None else rest.to(weight.device)).to(part.device)
        write_weight(part, kept, value, rounding.draw(value, self._key(parameter, _CONVERSION + len(self.coded))))

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, in whatever formats; load the model's weights before.

        Formats stay this optimizer's own: torch would take the saved ones' dtypes for the parameters'.

        Raises:
            ValueError: groups of other sizes, or state that does not fit.
        """
        theirs = state_dict["param_groups"]
        if [len(group["params"]) for group in theirs] != [len(group["params"]) for group in self.param_groups]:
            raise ValueError("the state is of parameter groups of other numbers or sizes")
        own = {"params", "param_names", "master_weights", *(f"{what}_dtype" for what in self.coded)}
        for group, saved in zip(self.param_groups, theirs, strict=True):
            group.update({key: value for key, value in saved.items() if key not in own})
            for p, index in zip(group["params"], saved["params"], strict=True):
                try:
                    self.restore(p, state_dict["state"].get(index, {}), p)
                except KeyError as error:
                    raise ValueError(f"the state of {self._names[p]} lacks {error.args[0]}") from error
                except ValueError as error:
                    raise ValueError(f"the state of {self._names[p]} does not fit: {error}") from error


def check_names(groups: Iterable[dict[str, Any]]) -> None:
    """Refuse groups whose `param_names` do not run parallel to their `params`, or in which a name comes twice.

    Raises:
        ValueError: says which.
    """
    seen: set[str] = set()
    for group in groups:
        names = group.get("param_names")
        if names is not None and len(names) != len(group["params"]):
            raise ValueError(f"{len(group['params'])} parameters but {len(names)} names in a group")
        for name in names or ():
            if name in seen:
                raise ValueError(f"two parameters are called {name!r}")
            seen.add(name)
