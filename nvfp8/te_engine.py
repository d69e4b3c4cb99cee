"""A module of Transformer Engine around parameters that layers of ours hold, and the scaling state it adds.

What holds parameters and what computes with them are two things. A layer holds its weights under nanochat's names, on any device,
meta included. Transformer Engine's module is built around those very Parameters at the first forward pass. It is no
submodule, so neither its gamma nor its `_extra_state`, a pickle, enters the state_dict.

A weight is cast to FP8 when it has changed, which its version counter says: once a step rather than once a micro-batch.

Delayed scaling begins with scale 1, which is no scale: gradients of 1e-8 are all zero in E5M2, and weights that start at zero
outgrow each scale before it is used. So gradients begin with a scale that follows from the loss's (`nvfp8/scaling.py`), and a
weight takes the scale of its own amax whenever it is cast; activations and later gradients have their history. It rolls with
every micro-batch, as Transformer Engine does it: 16 entries are two steps of 8 micro-batches.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nvfp8 import scaling
from nvfp8.recipe import Recipe
from nvfp8.te import engine, te_recipe

# Rows of a module's scaling state that belong to its weights (`transformer_engine.pytorch.constants.FP8FwdTensorIdx`).
_WEIGHT_ROWS = (1, 4)
STATE = ("scale_fwd", "amax_history_fwd", "scale_bwd", "amax_history_bwd")


@contextlib.contextmanager
def autocast(recipe: Recipe, loss_scale: float) -> Iterator[None]:
    """Run engines in FP8; around forward and loss, backward outside. Amaxes are reduced over all ranks.

    Args:
        recipe: of all of them.
        loss_scale: gradient of a single token's loss, such as 1 / (tokens · accumulation steps).
    """
    with scaling.autocast(loss_scale), engine().autocast(enabled=True, recipe=te_recipe(recipe)):
        yield


class Engine:
    """Builds and runs one module; `nvfp8.te_layers` says which."""

    def __init__(
        self, recipe: Recipe, make: Callable[..., Any], weights: Mapping[str, tuple[Any, ...]],
        fp8_weights: bool, norm: Any = None,
    ):  # fmt: skip
        """Build nothing yet.

        Args:
            recipe: of its GEMMs.
            make: takes Transformer Engine and a device, returns the module.
            weights: the module's name of a weight -> the layers whose `.weight` it is; several are stacked.
            fp8_weights: the module holds its weights in FP8 only, quantized from the layers' whenever those change.
            norm: holds `norm_weight`, the norm's learnable scale, or None in its place.
        """
        self.recipe, self.make, self.weights, self.fp8_weights, self.norm = recipe, make, weights, fp8_weights, norm
        self.module: Any = None
        self._built_around: list[tuple[int, int]] = []
        self._cast_from: list[int] = []
        self._loaded: dict[str, Tensor] = {}
        self._without_history = False

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, x: Tensor) -> Any:
        """Run the module: in FP8 inside `autocast`, otherwise in bf16, which leaves the history as it is.

        FP8 weights are quantized anew where they have changed, also outside of `autocast`, which then computes with them in bf16.
        """
        parameters = self._parameters()
        # Others than before after load_state_dict(assign=True), elsewhere after .to(device) or .data = …
        if [(id(p), p.data_ptr()) for p in parameters] != self._built_around:
            self._build(parameters)
        loss_scale = scaling.active()
        if loss_scale is None and not self.fp8_weights:
            return self.module(x)
        if loss_scale is not None and self._without_history:
            self.module.fp8_meta["scaling_bwd"].scale.fill_(scaling.FIRST_GRADIENT / loss_scale)
            self._without_history = False
        versions = [parameter._version for parameter in parameters]
        changed = versions != self._cast_from
        if changed:
            self._rescale_weights()
        with self._dequantized() if loss_scale is None else contextlib.nullcontext():
            out = self.module(x, is_first_microbatch=None if self.fp8_weights else changed)
        self._cast_from = versions
        return out

    @contextlib.contextmanager
    def _dequantized(self) -> Iterator[None]:
        """The module with bf16 weights in the place of FP8 ones: LayerNormMLP (2.20) would multiply block-scaled ones by bf16."""
        held = {name: self.module._parameters[name] for name in self.weights}
        self.module._parameters.update({name: weight.dequantize() for name, weight in held.items()})
        try:
            yield
        finally:
            self.module._parameters.update(held)

    def _parameters(self) -> list[Tensor]:
        return [holder.weight for holders in self.weights.values() for holder in holders]

    @torch.inference_mode(False)  # what is built while generating must be trainable later
    @torch.no_grad()
    def _build(self, parameters: list[Tensor]) -> None:
        te, device = engine(), parameters[0].device
        history = {name: tensor.clone() for name, tensor in self.scaling_state().items()}
        if self.fp8_weights:
            with te.quantized_model_init(enabled=True, recipe=te_recipe(self.recipe)):
                module = self.make(te, device)
        else:
            module = self.make(te, "meta")
        for name, holders in self.weights.items():
            if self.fp8_weights:
                getattr(module, name).register_post_accumulate_grad_hook(_hand_over(holders))
            elif len(holders) == 1:
                module.register_parameter(name, holders[0].weight)
            else:
                _share_one_buffer(holders)
                for part, holder in zip(module.weight_names, holders, strict=True):
                    module.register_parameter(part, holder.weight)
        if self.norm is not None:
            gamma = self.norm.norm_weight
            if gamma is None:
                ones = torch.ones(module.layer_norm_weight.shape, dtype=torch.bfloat16, device=device)
                gamma = nn.Parameter(ones, requires_grad=False)
            module.register_parameter("layer_norm_weight", gamma)
        with te.autocast(enabled=True, recipe=te_recipe(self.recipe)):
            module.init_fp8_metadata(num_gemms=len(self.weights))
        self.module = module
        self._built_around, self._cast_from = [(id(p), p.data_ptr()) for p in parameters], []
        for name, value in history.items():
            self.scaling_state()[name].copy_(value)
        self._loaded = {}
        self._note_history()

    def _note_history(self) -> None:
        # Evaluation builds modules too: only an amax that was seen is a history.
        state = self.scaling_state()
        self._without_history = bool(state) and not bool(state["amax_history_bwd"].any())

    @property
    def _delayed(self) -> bool:
        return self.recipe.fprop.left.scaling == "delayed"

    @torch.no_grad()
    def _rescale_weights(self) -> None:
        """Give every changed weight the scale of its own amax, and quantize it where the module holds no other copy."""
        for row, (name, holders) in zip(_WEIGHT_ROWS, self.weights.items(), strict=False):
            parts = [holder.weight.detach() for holder in holders]
            if self._delayed:
                amax = torch.stack(torch._foreach_norm(parts, float("inf"))).max().float()
                scale = self.module.fp8_meta["scaling_fwd"].scale[row]
                largest = self.module.fp8_meta["fp8_max_fwd"] / 2**self.recipe.margin
                scale.copy_(torch.where(amax > 0, largest / amax, scale))
            if self.fp8_weights:
                getattr(self.module, name).quantize_(torch.cat(parts).bfloat16())

    def scaling_state(self) -> dict[str, Tensor]:
        """Scale and amax history of delayed scaling, forward and backward, not copies; empty for other recipes.

        fp32: scales (3 or 6,) and (2 or 4,), histories (amax_history_len, as many).
        """
        if not self._delayed:
            return {}
        if self.module is None:
            return self._loaded
        forward, backward = self.module.fp8_meta["scaling_fwd"], self.module.fp8_meta["scaling_bwd"]
        return dict(zip(STATE, (forward.scale, forward.amax_history, backward.scale, backward.amax_history), strict=True))

    def load_scaling_state(self, saved: Mapping[str, Tensor]) -> None:
        """Take over what `scaling_state` returned elsewhere; for recipes without a history, do nothing.

        Raises:
            ValueError: a tensor is missing or has another shape than this recipe needs.
        """
        if not self._delayed:
            return
        gemms, length = len(self.weights), self.recipe.amax_history_len
        shapes = dict(zip(STATE, ((3 * gemms,), (length, 3 * gemms), (2 * gemms,), (length, 2 * gemms)), strict=True))
        for name, shape in shapes.items():
            if name not in saved or saved[name].shape != shape:
                found = "is missing" if name not in saved else f"is {tuple(saved[name].shape)}"
                raise ValueError(f"{name} {found}, {shape} is needed (the number of amaxes remembered, by tensors)")
        if self.module is None:
            self._loaded = {name: saved[name] for name in STATE}
            return
        for name, tensor in self.scaling_state().items():
            tensor.copy_(saved[name])
        self._note_history()

    @torch.no_grad()
    def forget_nonfinite(self) -> None:
        """Drop amaxes that are not finite from the history: while one is there, Transformer Engine leaves the scale as it is."""
        for name, tensor in self.scaling_state().items():
            if name.startswith("amax"):
                tensor.nan_to_num_(nan=0.0, posinf=0.0)


def _share_one_buffer(holders: tuple[Any, ...]) -> None:
    """Make the holders' weights views of one buffer, so that stacking them is a view as well."""
    buffer = torch.cat([holder.weight.detach() for holder in holders])
    for holder, part in zip(holders, buffer.split([len(holder.weight) for holder in holders]), strict=True):
        holder.weight.data = part


def _hand_over(holders: tuple[Any, ...]) -> Callable[[Tensor], None]:
    """A hook that moves the gradient of an FP8 weight to the weights it was quantized from."""
    for holder in holders:
        holder.weight.grad_dtype = torch.bfloat16  # fp32 weights, gradients as the GEMM wrote them

    def hook(weight: Tensor) -> None:
        assert weight.grad is not None
        parts = weight.grad.split([len(holder.weight) for holder in holders])
        weight.grad = None
        for holder, part in zip(holders, parts, strict=True):
            holder.weight.grad = part if holder.weight.grad is None else holder.weight.grad.add_(part)

    return hook


class EngineScaling:
    """The scaling state of all engines of a model, by the names of their layers."""

    def __init__(self, model: nn.Module):
        """Look at the layers of `model` whenever asked."""
        self._model = model

    def _engines(self) -> dict[str, Engine]:
        return {name: m.engine for name, m in self._model.named_modules() if isinstance(getattr(m, "engine", None), Engine)}

    def state(self) -> dict[str, Tensor]:
        """`<layer>.<what>` -> tensor, not copies; empty for recipes without a history."""
        engines = self._engines()
        return {f"{name}.{what}": value for name, it in engines.items() for what, value in it.scaling_state().items()}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned, of the same precision.

        Raises:
            ValueError: it is of another precision; the message says what differs.
        """
        engines = self._engines()
        by_layer: dict[str, dict[str, Tensor]] = {name: {} for name in engines}
        for key, value in saved.items():
            name, _, what = key.rpartition(".")
            if name not in engines:
                raise ValueError(f"the scaling state is of a layer {name} that this precision has not")
            by_layer[name][what] = value
        for name, it in engines.items():
            try:
                if saved:
                    it.load_scaling_state(by_layer[name])
            except ValueError as error:
                raise ValueError(f"the scaling state of {name}: {error}") from error

    def update(self) -> list[str]:
        """Nothing: modules renew their scales with every micro-batch, and the optimizer's check finds what is not finite."""
        return []

    def forget(self) -> None:
        """Drop what was not finite from the histories."""
        for it in self._engines().values():
            it.forget_nonfinite()

    def fixed(self) -> object | None:
        """Nothing can be said of what Transformer Engine's modules decide by."""
        return None
