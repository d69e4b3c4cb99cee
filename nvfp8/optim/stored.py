"""What AdamW and Muon share: state in chosen formats, taken over from any other, and updates that may come in parts.

`optimizer.state[parameter]` is a flat dict of tensors, as stored: `step` (how often this parameter was updated, fp32 on the CPU as
torch's optimizers have it), `<what>` and in FP8 `<what>.scale`, and beside a bf16 weight its `master` (fp32) or `remainder` (int8,
int16). So a state_dict holds tensors and numbers only, FP8 as FP8, and whatever formats it was saved in, it is decoded and encoded
into this optimizer's; in the same ones it comes back bit for bit. State of torch's AdamW is taken over too. What is saved with
names is matched by them.

All state is allocated with its group: memory does not grow at the first step, and a checkpoint has a place to be loaded into.
Formats are those of that time: a group's format options cannot be edited, its rates can.

Weights may be edited or loaded between steps. An fp32 master counts where the bf16 weight is its rounding, and where it is not,
someone wrote the weight, and that counts. A remainder stays what it is: it moves an edited weight by less than half of bf16's step.

What is rounded stochastically draws its bits from (seed, step, parameter's name, element): neither the order of parameters nor
their distribution over processes changes a run. Parameters without names are called by their place, "<group>.<position>". The seed
is an option of a group and saved with it.

Layers in FP8 read copies of their weights, which an update writes too where it may (`nvfp8/copies.py`).

Parameters of FSDP2 are DTensors: each process updates its own shard, and state is DTensors too (`nvfp8/optim/shards.py`), which
torch.distributed.checkpoint saves, loads and reshards.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar
from zlib import crc32

import torch
from torch import Tensor

from nvfp8 import hardware, rounding
from nvfp8.optim.shards import beside, local, local_gradient, local_scales, placed, scales_beside, which
from nvfp8.optim.update import Update
from nvfp8.reference_optim import Copies
from nvfp8.state import STATE_DTYPES, Codec, Master, Stored, codec, codec_of, master, read_weight, write_weight

# What a key is for: a step's update, or from here on the conversion of each coded state and of the weight.
_UPDATE, _CONVERSION = 0, 1


def _fitting(saved: Mapping[str, Tensor], what: str, place: Tensor) -> Tensor:
    """Return this process's part of `saved[what]`, which must be of the shape, and cut in the way, of its place here."""
    if what not in saved:
        raise KeyError(what)
    value: Any = saved[what]
    if value.shape != place.shape or (placed(value) and getattr(place, "placements", None) != value.placements):
        raise ValueError(f"{what} is {value.dtype} {tuple(value.shape)}, {tuple(place.shape)} is needed")
    if placed(place) and not placed(value):
        raise ValueError(f"{what} is whole, here are shards: torch.distributed.checkpoint.state_dict cuts it")
    return local(value)


class StoredOptimizer(torch.optim.Optimizer):
    """Base of both. A subclass says how its state is allocated and how some of its parameters are updated.

    Attributes:
        coded: the state that has a codec; a group's option `<what>_dtype` names it.
        purposes: what an update draws keys for.
    """

    coded: ClassVar[tuple[str, ...]]
    purposes: ClassVar[tuple[int, ...]] = (_UPDATE,)

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        """Allocate all state.

        Args:
            params: as for any torch optimizer: tensors, (name, tensor) pairs, or dicts of options with them.
            defaults: options of groups that do not give them.

        Raises:
            ValueError: a parameter, a format or a rate that cannot be; names that do not match parameters or come twice.
        """
        self._index()
        super().__init__(params, defaults)

    def _index(self) -> None:
        self._names: dict[Tensor, str] = {}
        self._group_of: dict[Tensor, dict[str, Any]] = {}
        self._hashes: dict[Tensor, int] = {}  # of names, for keys of rounding
        self._formats: list[dict[str, Any]] = []  # of each group, as its state was made

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become what was copied or pickled."""
        super().__setstate__(state)
        self._index()
        for place, group in enumerate(self.param_groups):
            self._enter(group, place)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch's optimizers do, and allocate its state; one that is refused leaves nothing behind."""
        super().add_param_group(param_group)
        group, place = self.param_groups[-1], len(self.param_groups) - 1
        try:
            check_names(self.param_groups)
            _check_rates(group)
            kept = master(group["master_weights"])
            self._check_codecs(group)
            self._enter(group, place)
            for p in group["params"]:
                part = local(p)
                if part.dtype not in (torch.float32, torch.bfloat16):
                    raise ValueError(f"{self._names[p]} is {part.dtype}: weights must be fp32 or bf16")
                if not part.is_contiguous():
                    raise ValueError(f"{self._names[p]} is not contiguous: the update is written in memory order")
            self._allocate(group, kept)
        except BaseException:
            self.param_groups.pop()
            del self._formats[place:]
            for p in group["params"]:
                for kind in (self._names, self._group_of, self._hashes, self.state):
                    kind.pop(p, None)
            raise

    def _enter(self, group: dict[str, Any], place: int) -> None:
        names = group.get("param_names") or [f"{place}.{i}" for i in range(len(group["params"]))]
        self._names |= dict(zip(group["params"], names, strict=True))
        self._group_of |= dict.fromkeys(group["params"], group)
        self._hashes |= {p: crc32((self._names[p] + which(p)).encode()) for p in group["params"]}
        self._formats.append({key: group[key] for key in self._format_options()})

    def _format_options(self) -> list[str]:
        return ["master_weights", *(f"{what}_dtype" for what in self.coded)]

    def _check_codecs(self, group: dict[str, Any]) -> None:
        for what in self.coded:
            stored = codec(group[f"{what}_dtype"])
            for device in {p.device for p in group["params"] if p.is_cuda}:
                reason = hardware.unstorable(stored.name, torch.cuda.get_device_capability(device))
                if reason is not None:
                    raise ValueError(f"{what}_dtype {stored.name}: {reason}")

    def _check_formats(self) -> None:
        for group, formats in zip(self.param_groups, self._formats, strict=True):
            for key, value in formats.items():
                if group[key] != value:
                    raise ValueError(f"{key} of a group was {value!r} when its state was made: it cannot become {group[key]!r}")

    def name_of(self, parameter: Tensor) -> str:
        """What a parameter is called, or its place where it was given without a name."""
        return self._names[parameter]

    def _allocate(self, group: dict[str, Any], kept: Master) -> None:
        """Fill `self.state` for a group's parameters."""
        raise NotImplementedError

    def _codec(self, group: dict[str, Any], what: str) -> Codec:
        return codec(group[f"{what}_dtype"], second_moment=what == "exp_avg_sq")

    def _keep(self, parameter: Tensor, stored: Mapping[str, Stored], kept: Tensor | None) -> None:
        """Put a parameter's state where torch looks for it."""
        entries = self.state[parameter] = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
        for what, (data, scale) in stored.items():
            entries[what] = beside(parameter, data)
            if scale is not None:
                entries[f"{what}.scale"] = scales_beside(parameter, scale)
        if kept is not None:
            entries["master" if kept.dtype == torch.float32 else "remainder"] = beside(parameter, kept)

    def _stored(self, parameter: Tensor, what: str) -> Stored:
        entries = self.state[parameter]
        data, scale = local(entries[what]), entries.get(f"{what}.scale")
        return Stored(data, None if scale is None else local_scales(scale, data))

    def _kept(self, parameter: Tensor) -> Tensor | None:
        entries = self.state[parameter]
        kept = entries.get("master", entries.get("remainder"))
        return None if kept is None else local(kept)

    def _steps(self, parameter: Tensor) -> int:
        return int(self.state[parameter]["step"])

    def _key(self, parameter: Tensor, purpose: int = _UPDATE) -> int:
        return rounding.key(self._group_of[parameter]["seed"], self._steps(parameter), self._hashes[parameter], purpose)

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
        self.update(p for group in self.param_groups for p in group["params"])
        return loss

    def parts(self) -> list[list[Tensor]]:
        """All parameters, in lists of those that are updated together; updated list by list, a step has the same result."""
        return [[p] for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor]) -> int:
        """Make one step of some parameters; raises their version counters, which kernels do not.

        Returns:
            How many had a gradient.
        """
        self._check_formats()
        given = [(p, local_gradient(p, g)) for p in parameters if (g := self.gradient(p)) is not None]
        if given:
            step = Update(self, given)
            step.upload()
            step.begin(step.found)
            step.renew()
            step.launch()
            step.finish()
        return len(given)

    def fixed(self) -> object:
        """What the launches of a step of all parameters go by, rates and FP8 copies not among it (`nvfp8/optim/update.py`).

        Where a gradient or a state lies is told by its id: whoever compares later answers keeps the tensors.
        """
        self._check_formats()
        groups = [(len(group["params"]), group.get("stochastic")) for group in self.param_groups]
        gradients = [(p.data_ptr(), id(g := p.grad), 0 if g is None else g.data_ptr()) for p in self.state]
        return groups, gradients, [[*map(id, entries.values())] for entries in self.state.values()]

    def _writes_copies(self, parameter: Tensor) -> bool:
        """Whether an update can write a layer's FP8 copies of the parameter."""
        return not placed(parameter)

    def _ordered(self, given: Sequence[tuple[Tensor, Tensor]]) -> Sequence[tuple[Tensor, Tensor]]:
        """Parameters with their gradients, in the order in which `_prepared` wants their numbers."""
        return given

    def _kind(self, parameter: Tensor) -> object:
        """What of a parameter itself its rates depend on."""
        return None

    def _rates(self, parameter: Tensor, group: dict[str, Any], steps: int) -> tuple[float, ...]:
        """A parameter's rates in the update after which it will have made so many steps."""
        raise NotImplementedError

    def _prepared(
        self, given: Sequence[tuple[Tensor, Tensor]], written: Mapping[Tensor, Copies], numbers: Mapping[torch.device, Tensor]
    ) -> Callable[[], None]:
        """What launches an update of parameters, each with its local gradient, and of the FP8 copies of some.

        It may be called again as long as `fixed` says so.

        Args:
            given: in the order of `_ordered`.
            written: by parameter.
            numbers: on each device a row for each parameter: (n, NUMBERS) fp32, whose bits are an int32 key for each of `purposes`;
                then rates.
        """
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
        for write in list(self._writes(parameter, saved, weight)):
            write()

    def _writes(self, parameter: Tensor, saved: Mapping[str, Tensor], weight: Tensor) -> Iterator[Callable[[], object]]:
        """What `restore` has to do, in this order, once all of it is known to be possible; nothing is written before."""
        entries = self.state[parameter]
        step = _fitting(saved, "step", entries["step"])
        yield lambda: entries["step"].copy_(step)  # first, for it is part of the keys of rounding
        for what in (key for key in entries if not key.endswith(".scale") and key not in ("step", "master", "remainder")):
            if what in self.coded:
                yield self._restored(parameter, saved, what)
            else:
                yield self._copied(entries[what], _fitting(saved, what, entries[what]))
        yield from self._restored_weight(parameter, saved, weight)

    @staticmethod
    def _copied(place: Tensor, value: Tensor) -> Callable[[], object]:
        return lambda: local(place).copy_(value)

    def _restored(self, parameter: Tensor, saved: Mapping[str, Tensor], what: str) -> Callable[[], object]:
        ours, place = self._codec(self._group_of[parameter], what), self._stored(parameter, what)
        data = _fitting(saved, what, self.state[parameter][what])
        if data.dtype not in STATE_DTYPES.values():
            raise ValueError(f"{what} is {data.dtype}, which no format here is")
        theirs, scale = codec_of(data.dtype, second_moment=what == "exp_avg_sq"), None
        if theirs.blocked:
            if f"{what}.scale" not in saved:
                raise KeyError(f"{what}.scale")
            scale = local_scales(saved[f"{what}.scale"], data)
            if len(scale) != math.ceil(data.numel() / rounding.BLOCK):
                raise ValueError(f"{what}.scale has {len(scale)} blocks, {math.ceil(data.numel() / rounding.BLOCK)} are needed")

        def write() -> None:
            if data.dtype == place.data.dtype:
                place.data.copy_(data)
                if place.scale is not None and scale is not None:
                    place.scale.copy_(scale)
                return
            value = theirs.decode(Stored(data, scale)).to(place.data.device)
            bits = rounding.draw(value, self._key(parameter, _CONVERSION + self.coded.index(what))) if ours.blocked else None
            ours.encode_(place, value, bits)  # once to nearest, bf16 loses least

        return write

    def _restored_weight(self, parameter: Tensor, saved: Mapping[str, Tensor], weight: Tensor) -> Iterator[Callable[[], object]]:
        kept, part, weight = self._kept(parameter), local(parameter), local(weight)
        what = next((what for what in ("master", "remainder") if what in saved), None)
        if what is None and kept is None:
            return  # the parameter is all there is
        rest = None if what is None else _fitting(saved, what, parameter)
        if rest is not None and weight.dtype != torch.bfloat16:  # an fp32 parameter that has loaded a bf16 weight
            if not torch.equal(weight, weight.bfloat16().to(weight.dtype)):
                raise ValueError(f"{what} completes bf16 weights, and the parameter holds another: load the model's before")
            weight = weight.bfloat16()

        def write() -> None:
            if rest is not None and kept is not None and rest.dtype == kept.dtype and weight.dtype == part.dtype:
                part.copy_(weight)
                kept.copy_(rest)
                return
            value = read_weight(weight, rest if rest is None else rest.to(weight.device)).to(part.device)
            write_weight(part, kept, value, rounding.draw(value, self._key(parameter, _CONVERSION + len(self.coded))))

        yield write

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, in whatever formats; load the model's weights before. All of it is, or nothing.

        Formats stay this optimizer's own: torch would take the saved ones' dtypes for the parameters'. Where both have names,
        parameters are found by them.

        Raises:
            ValueError: groups of other sizes or names, or state that does not fit.
        """
        self._check_formats()
        theirs = state_dict["param_groups"]
        if [len(group["params"]) for group in theirs] != [len(group["params"]) for group in self.param_groups]:
            raise ValueError("the state is of parameter groups of other numbers or sizes")
        writes: list[Callable[[], object]] = []
        for group, saved in zip(self.param_groups, theirs, strict=True):
            for p, index in zip(group["params"], self._found(group, saved), strict=True):
                try:
                    writes += self._writes(p, state_dict["state"].get(index, {}), p)
                except KeyError as error:
                    raise ValueError(f"the state of {self._names[p]} lacks {error.args[0]}") from error
                except ValueError as error:
                    raise ValueError(f"the state of {self._names[p]} does not fit: {error}") from error
        own = {"params", "param_names", "stochastic", *self._format_options()}
        for group, saved in zip(self.param_groups, theirs, strict=True):
            group.update({key: value for key, value in saved.items() if key not in own})
        for write in writes:
            write()

    @staticmethod
    def _found(group: dict[str, Any], saved: dict[str, Any]) -> list[Any]:
        """Where the saved state of a group's parameters is."""
        for flag in ("amsgrad", "maximize"):
            if saved.get(flag):
                raise ValueError(f"the state was saved with {flag}, which does not exist here")
        if not group.get("param_names") or not saved.get("param_names"):
            return list(saved["params"])
        index = dict(zip(saved["param_names"], saved["params"], strict=True))
        missing = [name for name in group["param_names"] if name not in index]
        if missing:
            raise ValueError(f"the state is of other parameters: this group of it has none called {missing[0]}")
        return [index[name] for name in group["param_names"]]


def _check_rates(group: dict[str, Any]) -> None:
    for what in ("lr", "eps", "weight_decay"):
        if what in group and not 0 <= group[what] < math.inf:
            raise ValueError(f"{what} is {group[what]}: it must be a finite number from 0 on")
    for what in ("betas", "momentum", "beta2"):
        if what in group and not all(0 <= value < 1 for value in torch.atleast_1d(torch.as_tensor(group[what])).tolist()):
            raise ValueError(f"{what} is {group[what]}: it must be from 0 on and below 1")


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
