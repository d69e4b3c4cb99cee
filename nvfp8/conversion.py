"""FP8 for any PyTorch model: its `nn.Linear` layers become `nvfp8.converted.ConvertedLinear`, in place, and a table says which.

    report = nvfp8.convert(model, "delayed", skip=("lm_head",))
    print(report)

A layer changes its class and nothing else. Its parameters are the same objects under the same names, so an optimizer made before
goes on, hooks stay, and the state_dict is that of the unconverted model, either way. What FP8 adds, scales and their history, is
therefore not in it: `scaling_state` is saved beside. (Buffers would break strict loading, `model.bfloat16()` would cast them, and
every forward of DDP would overwrite them with rank 0's.) A run that goes on without it measures its first step again, no more.

Nothing is left out in silence. A layer that cannot be FP8 keeps its precision, and the report says why; so does every other matrix
of the model. What would be wrong rather than slow is refused: tied weights, a device without FP8 units, a name that fits nothing.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedParameter

from nvfp8.converted import MULTIPLE, Casts, ConvertedLinear, Shared, lacks_fp8
from nvfp8.recipe import Recipe, covers, parse_recipe

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SCALINGS = ("delayed", "current", "row")


@dataclass(frozen=True)
class Row:
    """One matrix of the model.

    Attributes:
        name: of the layer, or of a parameter that belongs to no `nn.Linear`.
        shape: of the weight.
        runs_in: "FP8", or the dtype it keeps.
        why: it is not FP8; empty where it is.
    """

    name: str
    shape: tuple[int, ...]
    runs_in: str
    why: str = ""


@dataclass(frozen=True)
class Report:
    """What `convert` has done. `str(report)` is a table; layers that differ in numbers only are one line of it."""

    recipe: Recipe
    emulated: bool
    rows: tuple[Row, ...]

    @property
    def converted(self) -> list[str]:
        """Names of the layers in FP8."""
        return [row.name for row in self.rows if row.runs_in == "FP8"]

    @property
    def left(self) -> dict[str, str]:
        """Names of all other matrices, with the reason."""
        return {row.name: row.why for row in self.rows if row.runs_in != "FP8"}

    def __str__(self) -> str:
        """The recipe, a line for each kind of layer, and how much of the model's matrices is FP8."""
        kinds = Counter((re.sub(r"(?<![^.])\d+(?![^.])", "*", row.name), row.shape, row.runs_in, row.why) for row in self.rows)
        lines = [
            (f"{name} ×{count}" if count > 1 else name, "×".join(map(str, shape)), runs_in, why)
            for (name, shape, runs_in, why), count in kinds.items()
        ]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
        sizes = {True: 0, False: 0}
        for row in self.rows:
            sizes[row.runs_in == "FP8"] += torch.Size(row.shape).numel()
        total = sum(sizes.values())
        return "\n".join((
            f"{self.recipe.name}{', emulated' if self.emulated else ''}: {self.recipe.describe()}",
            *table,
            f"{len(self.converted)} layers in FP8: {sizes[True]:,} of {total:,} parameters in matrices, {sizes[True] / total:.0%}",
        ))  # fmt: skip


def convert(model: nn.Module, recipe: str | Recipe = "delayed", *, skip: str | Sequence[str] = (), emulate: bool = False) -> Report:
    """Let the `nn.Linear` layers of a model train in FP8, in place; evaluation (`model.eval()`) stays what it was.

    Call it before `torch.compile`, DDP and FSDP2 wrap the model. The training loop stays as it is: scales are renewed and weights
    are cast by the first forward after an optimizer's step.

    Args:
        model: any module; a layer that two modules share is one layer.
        recipe: "delayed", "current", "e4m3" or "rowwise", also with fields ("delayed:margin=1"), or a Recipe like these. Parts
            that its `bf16` names are skipped, all three GEMMs of them.
        skip: dotted names of layers, or of parts of the model, to leave alone: "lm_head", "layers.0", "layers.*.mlp.down_proj".
        emulate: compute the same numbers in plain PyTorch, slowly, on any device. Nothing does so unasked.

    Returns:
        What became FP8, and what did not and why.

    Raises:
        ValueError: tied weights, no FP8 units, a recipe that these layers have not, a name to skip that the model has not or that
            has a GEMM behind it, or no layer to convert. Then the model is as it was.
    """
    recipe = _supported(parse_recipe(recipe) if isinstance(recipe, str) else recipe)
    patterns = ((skip,) if isinstance(skip, str) else tuple(skip)) + recipe.bf16
    _check_patterns(model, patterns)
    rows, layers = _sorted_out(model, patterns)
    if not layers:
        reasons = "; ".join(f"{row.name}: {row.why}" for row in rows[:4]) or "it has no matrices"
        raise ValueError(f"no layer of this {type(model).__name__} can be converted: {reasons}")
    _refuse_tied(model, layers)
    if not emulate:
        for device in {layer.weight.device for layer in layers.values()}:
            _refuse_device(device, recipe)
    casts = {name: Casts(recipe, emulate) for name in layers}
    shared = Shared({name: it.sites for name, it in casts.items()}, recipe)
    for name, layer in layers.items():
        layer.__class__ = ConvertedLinear
        assert isinstance(layer, ConvertedLinear)
        layer.casts, layer.sharded = casts[name], isinstance(layer.weight, DTensor)
        layer.casts.name, layer.casts.shared = name or type(model).__name__, shared
        layer.enlist()
    return Report(recipe, emulate, tuple(rows))


def _supported(recipe: Recipe) -> Recipe:
    x, w, dy = recipe.fprop.left, recipe.fprop.right, recipe.dgrad.left
    if {operand.scaling for operand in recipe.operands} - {*_SCALINGS} or x.format != "e4m3":
        raise ValueError(f"recipe {recipe.name}: convert has delayed, current, e4m3 and rowwise")
    if (recipe.dgrad.right, recipe.wgrad.left, recipe.wgrad.right) != (w, dy, x):
        raise ValueError(f"recipe {recipe.name}: convert casts a tensor once for all GEMMs: {recipe.describe()}")
    return recipe


def _check_patterns(model: nn.Module, patterns: Sequence[str]) -> None:
    names = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        name, colon, gemm = pattern.partition(":")
        if colon:
            raise ValueError(
                f"{pattern!r}: convert leaves whole layers, not single GEMMs such as {gemm}: leave {name!r} or nothing"
            )
        if not any(covers(pattern, name) for name in names):
            some = ", ".join(name for name, module in model.named_modules() if isinstance(module, nn.Linear))[:200]
            raise ValueError(f"skip={pattern!r} is no part of this model, whose linear layers are {some}")


def _sorted_out(model: nn.Module, patterns: Sequence[str]) -> tuple[list[Row], dict[str, nn.Linear]]:
    """A row for every matrix of the model, and the layers that are to be converted."""
    rows, layers = [], {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            owner = model.get_submodule(name.rpartition(".")[0]) if "." in name else model
            why = _stays(module, owner) or next((f"skipped ({it})" for it in patterns if covers(it, name)), "")
            runs_in = _name(module.weight.dtype) if why else "FP8"
            shape = () if isinstance(module.weight, UninitializedParameter) else tuple(module.weight.shape)
            rows.append(Row(name, shape, runs_in, why))
            if not why:
                layers[name] = module
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if not isinstance(parameter, UninitializedParameter) and parameter.ndim >= 2:
                why, full = f"{type(module).__name__}, no nn.Linear", f"{name}.{key}" if name else key
                rows.append(Row(full, tuple(parameter.shape), _name(parameter.dtype), why))
    return rows, layers


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _stays(layer: nn.Linear, owner: nn.Module) -> str:
    """Why a layer cannot be converted, or nothing."""
    if isinstance(layer, ConvertedLinear):
        return "is FP8 already, by an earlier call"
    if isinstance(owner, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weight without calling it"
    if type(layer) is not nn.Linear:
        return f"{type(layer).__name__}, which computes in its own way"
    if layer.weight.dtype not in _DTYPES:
        return f"{_name(layer.weight.dtype)} weights"
    for what, size in (("in_features", layer.in_features), ("out_features", layer.out_features)):
        if size % MULTIPLE:
            return f"{what} {size} is no multiple of {MULTIPLE}"
    return ""


def _refuse_tied(model: nn.Module, layers: Mapping[str, nn.Linear]) -> None:
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(f"{name}.{key}")
    for name, layer in layers.items():
        if len(names := holders[id(layer.weight)]) > 1:
            raise ValueError(
                f"{' and '.join(names)} are one parameter: in FP8 it would no longer be one matrix for both. "
                f"Leave it as it is with skip=({name!r},), or untie them first"
            )


def _refuse_device(device: torch.device, recipe: Recipe) -> None:
    # What is on the CPU or nowhere yet is converted for the GPU it will be moved to; its first forward looks again.
    if device.type in ("cpu", "meta") and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    if why := lacks_fp8(device, recipe):
        raise ValueError(f"recipe {recipe.name} does not run on {device}, {why}: emulate=True computes the same numbers, slowly")


def _scalings(model: nn.Module) -> list[Shared]:
    found = {id(it.casts.shared): it.casts.shared for it in model.modules() if isinstance(it, ConvertedLinear)}
    if not found:
        raise ValueError(f"no layer of this {type(model).__name__} is converted")
    return [shared for shared in found.values() if shared is not None]


def scaling_state(model: nn.Module) -> dict[str, Tensor]:
    """Scales and amax histories of a converted model, to save beside its state_dict; empty for recipes without a history.

    Names are those that layers had when they were converted, whatever wraps the model now. Each rank has its own; any one's will
    do for all. To be saved between an optimizer's step and the next forward, whose amaxes are then in it; of micro-batches before a
    step nothing is.

    Returns:
        For each layer `<name>.scale` (3,) and `<name>.amax_history` (amax_history_len, 3), fp32.

    Raises:
        ValueError: nothing is converted, or parts of the model were, under the same names.
    """
    for layer in model.modules():
        if isinstance(layer, ConvertedLinear):  # a shard has another version than what is gathered
            layer.casts.end(None if layer.sharded else layer.weight)
    state: dict[str, Tensor] = {}
    for shared in _scalings(model):
        part = shared.scaling.state()
        if both := state.keys() & part.keys():
            raise ValueError(f"{min(both)} names layers of two conversions: convert the whole model at once")
        state |= part
    return state


def load_scaling_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Take over what `scaling_state` returned, of the same model; in another recipe scales are made anew of its amaxes.

    Raises:
        ValueError: it is of other layers, or of another amax_history_len; the message names the layer.
    """
    for shared in _scalings(model):
        shared.scaling.load(state)
        shared.begin_anew()
