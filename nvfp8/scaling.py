"""From amax to scale: what every FP8 cast of a model multiplies by, as one flat state that one small update a step renews.

A cast computes clamp(x · scale), with scale = largest / amax, so that the largest magnitude meets the format's largest number.
Measuring amax first is a pass over memory of its own (`current`). `delayed` scaling (arXiv 2209.05433) takes it from the
steps before: then the scale is known before the tensor exists, and the kernel that makes the tensor writes FP8 at once.

A `Site` is one place where a tensor is cast. All sites of a model lie in three tensors, amax (n,), history (L, n) and scale (n,):
kernels raise 0-D views of the first and read 0-D views of the last, and the update is a handful of launches for the whole model.

The history rolls once a step, not once a micro-batch as in Transformer Engine. Weights change once a step, and magnitudes with
them; a step's amax is the same however it is cut into micro-batches; 16 entries are 16 steps; ranks meet once; and the scale that
an activation was cast with in forward is still there in backward.

What is known without any history:
* |x̂| ≤ √D after RMSNorm, so the scale 448/√D never saturates. E4M3's 3 bits of mantissa are the same over 2⁻⁶ … 448, so only what
  falls below matters: at D = 1,536 numbers under 0.0014, a thousandth of a normal distribution, and those err by 9e-5 at most.
* A weight is cast once a step, so it can be measured: its scale is exact. Where an optimizer writes its FP8 copies (`copies.py`),
  the scale must be known before. So it comes from the history, with room for a weight to grow fourfold in a step, as those that
  start from zero do at first. That costs 2 of the 15 powers of two that E4M3's normal numbers span: what is below 1.4e-4 of amax
  loses bits, and nothing else does. Its amax is that of the copies, and stays until they are written again: every step enters it.
* |softmax − onehot| ≤ 1, so the gradient of logits has a scale whatever the batch: 2⁸ (`nvfp8/fp8_head.py`).
* The first gradients follow from the loss: a token's loss has a gradient of at most `loss_scale`, which is brought to 64, amid
  E5M2's 2⁻¹⁶ … 2¹⁵. (With scale 1 a gradient of 1/(32,768 · 8) is zero.) Activations, and gradients in E4M3, are measured until
  they have a history.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import ModuleType
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from nvfp8 import reference
from nvfp8.ops import ops
from nvfp8.recipe import Operand, Recipe
from nvfp8.rounding import FORMATS

# A weight's "copies" may be written by an optimizer, a "weight" is always cast by its layer.
Kind = Literal["normed", "activation", "weight", "copies", "gradient", "logits"]
DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
FIRST_GRADIENT = 64
# How much of the format's range copies of weights leave free: a weight that starts from zero doubles or trebles in a step.
ROOM = 4.0
# Of gradients of logits, which are at most 1, in rows that may be up to 224 times as large (`nvfp8/fp8_head.py`).
OF_LOGITS = 2.0**8
# A scale this large still has a reciprocal that is no denormal number, which a GPU takes for 0.
_MOST = 2.0**126
_loss_scale: ContextVar[float | None] = ContextVar("loss_scale", default=None)


@contextlib.contextmanager
def autocast(loss_scale: float) -> Iterator[None]:
    """FP8 layers compute in FP8 inside, in bf16 outside; around forward and loss, backward may be anywhere.

    Args:
        loss_scale: gradient of a single token's loss, such as 1 / (tokens · accumulation steps).
    """
    token = _loss_scale.set(loss_scale)
    try:
        yield
    finally:
        _loss_scale.reset(token)


def active() -> float | None:
    """The loss scale inside `autocast`, None outside."""
    return _loss_scale.get()


class ScalingState(Protocol):
    """What a model asks of whoever keeps its scales; every `Precision` has one."""

    def state(self) -> dict[str, Tensor]:
        """Tensors to save, `<layer>.<what>`, not copies."""

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned; ValueError if it does not fit."""

    def update(self) -> list[str]:
        """After a step's gradients: renew scales. Names of what was not finite, and then nothing is renewed."""

    def forget(self) -> None:
        """After a step that is not applied: its magnitudes are none to go by."""

    def fixed(self) -> object | None:
        """What the host decides by in a forward and backward: while it is equal, they launch the same kernels on the same memory.

        None where they may not.
        """


class NoScaling:
    """Of precisions that cast nothing."""

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Take nothing."""

    def update(self) -> list[str]:
        """Nothing was cast."""
        return []

    def forget(self) -> None:
        """Nothing to forget."""

    def fixed(self) -> object | None:
        """Nothing that could change."""
        return ()


class Site:
    """One place where a tensor is cast to FP8, step after step.

    Attributes:
        what: which tensor, with {} for the layer's name: "the input of {}".
        kind: decides where the scale comes from before there is a history.
        dtype: torch.float8_e4m3fn or torch.float8_e5m2.
        delayed: whether the scale comes from the steps before.
        scale: 0-D fp32 view of the model's state; multiplies.
        inverse: 0-D fp32 view, 1 / scale.
        amax: 0-D fp32 view, raised by whoever casts.
        in_use: of a weight, what the next forward will read: scale, its reciprocal, and the copies; None where it will cast anew.
        loaded: of copies, what `in_use` was where the state was saved, until the next cast; it may be older than `scale`.
        measured: on the host, that a tensor was measured since `Scaling.enter` last looked; set by those who rely on it.
    """

    scale: Tensor
    inverse: Tensor
    amax: Tensor

    def __init__(self, what: str, kind: Kind, operand: Operand, emulated: bool, width: int = 0):
        """Belong to no model yet; `width` channels where `kind` is "normed"."""
        self.what, self.kind, self.width, self.emulated = what, kind, width, emulated
        self.dtype, self.delayed = DTYPES[operand.format], operand.scaling == "delayed"
        self.owner: Scaling | None = None
        self.in_use: Callable[[], tuple[Tensor, ...] | None] | None = None
        self.loaded: float | None = None
        self.index, self.measured = 0, False

    @property
    def largest(self) -> float:
        """The format's largest number."""
        return FORMATS[self.dtype][2]

    @property
    def first(self) -> float | None:
        """The scale that is known whatever the tensor, None where there is none."""
        if self.kind == "normed":
            return self.largest / math.sqrt(self.width)
        return OF_LOGITS if self.kind == "logits" else None

    @property
    def remembers(self) -> bool:
        """Whether the scale is renewed from a history."""
        return self.delayed and self.kind in ("activation", "gradient", "copies")

    @property
    def ready(self) -> bool:
        """Whether `scale` can be used before the tensor has been looked at."""
        if self.first is not None or self.from_loss:
            return True
        return self.remembers and self.owner is not None and self.owner.seen[self.index]

    @property
    def from_loss(self) -> bool:
        """Whether the loss gives a scale where there is no history: E4M3's range is too short to guess in."""
        return self.kind == "gradient" and self.delayed and self.dtype == torch.float8_e5m2

    def kernels(self, x: Tensor) -> ModuleType:
        """What casts x: Triton kernels or, emulated, their twins on whatever device."""
        return reference if self.emulated else ops(x)

    def scales(self, amax: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and its reciprocal for a tensor whose `amax`, 0-D fp32, was just measured; it is remembered too."""
        self.amax.copy_(torch.maximum(self.amax, amax))
        scale = scale_of(amax, self.largest, torch.ones_like(amax))
        return scale, scale.reciprocal()


def scale_of(amax: Tensor, largest: Tensor | float, otherwise: Tensor) -> Tensor:
    """What brings `amax`, fp32 of any shape, to `largest`; `otherwise` where it is 0 or not finite."""
    usable = (amax > 0) & (amax < torch.inf)
    return torch.where(usable, (largest / amax).clamp(max=_MOST), otherwise)


def _spaced(x: Tensor) -> Tensor:
    """A copy of x (n,), 16 bytes from one element to the next: Triton compiles a kernel again for a pointer aligned otherwise."""
    return torch.stack((x, x, x, x), 1)[:, 0]


class Scaling:
    """Scales and amaxes of all sites of a model.

    Attributes:
        amax: (n,) fp32, of the step that is being made; None before the first tensor is cast.
        history: (L, n) fp32, newest first.
        scale: (n,) fp32.
        inverse: (n,) fp32.
        seen: on the host, whether each site ever had an amax above 0.
        layers: which sites are whose, of layers with a history.
    """

    def __init__(self, sites: Mapping[str, Sequence[Site]], recipe: Recipe):
        """Take `sites`, by the name of their layer."""
        self.recipe = recipe
        self.sites = [site for each in sites.values() for site in each]
        self.names = [site.what.format(layer) for layer, each in sites.items() for site in each]
        self.layers: dict[str, slice] = {}
        end = 0
        for layer, each in sites.items():
            part = slice(end, end := end + len(each))
            if any(site.remembers for site in each):
                self.layers[layer] = part
        for index, site in enumerate(self.sites):
            site.owner, site.index = self, index
        self.seen = [False] * len(self.sites)
        self.delayed = any(site.delayed for site in self.sites)
        self.amax: Tensor | None = None
        # On the CPU until a tensor is cast, whatever device a model is being made on.
        self.scale = torch.tensor([site.first or 1.0 for site in self.sites], device="cpu")
        self.history = torch.zeros(recipe.amax_history_len if self.delayed else 0, len(self.sites), device="cpu")
        rooms = [2.0**recipe.margin * (ROOM if site.kind == "copies" else 1) for site in self.sites]
        self._largest = torch.tensor([site.largest / room for site, room in zip(self.sites, rooms, strict=True)], device="cpu")
        self._copies = torch.tensor([site.kind == "copies" for site in self.sites], dtype=torch.bool, device="cpu")
        self._renewed = torch.tensor([site.remembers for site in self.sites], dtype=torch.bool, device="cpu")
        self._loss_scale: float | None = None

    def begin(self, device: torch.device, loss_scale: float) -> None:
        """Before a forward: the state is on `device`, and gradients without a history have the scale of the loss."""
        if self.amax is None or self.amax.device != device:
            self._allocate(device)
        if loss_scale != self._loss_scale:
            fresh = [site.from_loss and not self.seen[site.index] for site in self.sites]
            with torch.no_grad():
                self.scale.masked_fill_(torch.tensor(fresh, device=device), FIRST_GRADIENT / loss_scale)
                self.inverse.copy_(self.scale.reciprocal())
            self._loss_scale = loss_scale

    @torch.inference_mode(False)  # what is made while generating must be there for training
    @torch.no_grad()
    def _allocate(self, device: torch.device) -> None:
        self.amax = _spaced(torch.zeros(len(self.sites), device=device))
        # New tensors: views of the former must not change under a graph that still has them.
        self.history, self.scale = self.history.to(device, copy=True), _spaced(self.scale.to(device))
        self.inverse = _spaced(self.scale.reciprocal())
        self._largest, self._renewed, self._copies = (x.to(device) for x in (self._largest, self._renewed, self._copies))
        for index, site in enumerate(self.sites):
            site.amax, site.scale, site.inverse = self.amax[index], self.scale[index], self.inverse[index]

    @torch.no_grad()
    def update(self) -> list[str]:
        """Enter the step's amaxes, the largest of all ranks, in the history, and renew the scales; every rank calls this.

        One transfer to the host, which comes to know what was not finite and which sites have a history.

        Returns:
            Names of what was cast and was not finite. Then nothing enters, and the scales stay as they are.
        """
        if self.amax is None:
            return []
        # A maximum over ranks may lose a NaN, not an infinity.
        latest = self.amax.nan_to_num(nan=torch.inf, posinf=torch.inf).contiguous()
        if dist.is_initialized():
            dist.all_reduce(latest, dist.ReduceOp.MAX)
        amaxes = latest.tolist()
        bad = [name for name, amax in zip(self.names, amaxes, strict=True) if not math.isfinite(amax)]
        if not bad and self.delayed:
            self._renew(latest)
            self.seen = [before or amax > 0 for before, amax in zip(self.seen, amaxes, strict=True)]
        self.forget()
        return bad

    @torch.no_grad()
    def enter(self) -> None:
        """Enter the amaxes since the last time in the history, of this process alone; one that is not finite counts as 0, as none.

        For models whose training loop knows nothing of scales (`nvfp8/converted.py`): no collective, which in the middle of a
        forward would need every rank to run the same layers. It waits for the device only where a site without a history was
        measured, to learn whether it has one now: places that no tensor comes by (the gradient of a frozen first layer, an expert
        nobody asks) are not waited for, and one that is first used late gets its history then.
        """
        if self.amax is None:
            return
        if self.delayed:
            latest = self.amax.nan_to_num(nan=0.0, posinf=0.0)
            self._renew(latest)
            if any(site.measured and site.remembers and not self.seen[site.index] for site in self.sites):
                self.seen = [before or amax > 0 for before, amax in zip(self.seen, latest.tolist(), strict=True)]
            for site in self.sites:
                site.measured = False
        self.amax.zero_()

    def _renew(self, latest: Tensor) -> None:
        self.history.copy_(self.history.roll(1, 0))
        self.history[0].copy_(latest)
        expected = self.history[0] if self.recipe.amax_compute_algo == "most_recent" else self.history.amax(0)
        self.scale.copy_(torch.where(self._renewed, scale_of(expected, self._largest, self.scale), self.scale))
        self.inverse.copy_(self.scale.reciprocal())

    def scales_of_copies(self) -> Tensor:
        """(n,) fp32, by which an optimizer's next copies are made: the history's, or less where the amax now is above it.

        It is where the history has not seen the weights as they are: an update within backward comes before the step's entry.
        """
        assert self.amax is not None
        return torch.minimum(self.scale, scale_of(self.amax, self._largest, self.scale))

    @torch.no_grad()
    def forget(self) -> None:
        """Drop the amaxes since the last update; those of weights' copies, which are still there, stay."""
        if self.amax is not None:
            self.amax.masked_fill_(~self._copies, 0.0)

    def fixed(self) -> object | None:
        """See `ScalingState`: which sites have a history, and where the weights' copies lie."""
        weights = [site.in_use() for site in self.sites if site.in_use is not None]
        if self.amax is None or None in weights:
            return None
        return tuple(self.seen), self._loss_scale, tuple(x.data_ptr() for held in weights if held is not None for x in held)

    def state(self) -> dict[str, Tensor]:
        """Of delayed scaling, for each layer `scale` (k,) and `amax_history` (L, k) fp32; a scale of 0 stands for none yet.

        Of a weight it is the scale by which the next forward computes.
        """
        if not self.delayed:
            return {}
        # What is not renewed from a history is no state: it is known anyway.
        kept = [site.remembers and self.seen[site.index] for site in self.sites]
        scale = self.scale * torch.tensor(kept, device=self.scale.device)
        for site in self.sites:
            in_use = None if site.in_use is None else site.in_use()
            if kept[site.index] and in_use is not None:
                scale[site.index] = in_use[0]
        parts: dict[str, Tensor] = {}
        for layer, part in self.layers.items():
            parts[f"{layer}.scale"] = scale[part]
            parts[f"{layer}.amax_history"] = self.history[:, part].contiguous()
        return parts

    @torch.no_grad()
    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned elsewhere; without a history of its own, and from other precisions', do nothing.

        Amaxes are taken over, and scales made of them as this recipe says: another one, with other formats or another margin, has
        made others. In the same recipe they come out as they were, bit for bit. Of a layer where nothing but copies of weights is
        remembered (a head) there may be none: earlier versions measured them.

        Raises:
            ValueError: it is of a model with other layers, or of another amax_history_len; the message says which.
        """
        if not self.delayed or not any(key.endswith(".amax_history") for key in saved):
            return
        was, history = torch.zeros_like(self.scale), torch.zeros_like(self.history)
        for layer, part in self.layers.items():
            alone = all(site.kind == "copies" or not site.remembers for site in self.sites[part])
            if alone and f"{layer}.scale" not in saved and f"{layer}.amax_history" not in saved:
                continue
            shapes = {"scale": (part.stop - part.start,), "amax_history": (len(history), part.stop - part.start)}
            for what, shape in shapes.items():
                found = saved.get(f"{layer}.{what}")
                if found is None or found.shape != shape:
                    is_now = "is missing" if found is None else f"is {tuple(found.shape)}"
                    raise ValueError(f"the scaling state of {layer}: {what} {is_now}, {shape} is needed (amaxes remembered, casts)")
            was[part], history[:, part] = saved[f"{layer}.scale"], saved[f"{layer}.amax_history"]
        seen, known, scale = (was > 0) & self._renewed, history.amax(0) > 0, was
        # The newest that is not 0 counts, as it did when it came.
        for amax in history.flip(0) if self.recipe.amax_compute_algo == "most_recent" else history.amax(0, keepdim=True):
            scale = scale_of(amax, self._largest, scale)
        # Where a whole history is zeros, a scale of the steps before is left, which only the recipe that made it can use; it was
        # another one if any scale does not follow from its amaxes.
        if bool((seen & known & (scale != was) & ~self._copies).any()):  # copies may be older than their history
            seen = seen & known
        self.seen = seen.tolist()
        for site, each in zip(self.sites, was.tolist(), strict=True):
            site.loaded = each if site.kind == "copies" and self.seen[site.index] else None
        self.scale, self.history, self._loss_scale = torch.where(seen, scale, self.scale), history, None
        if self.amax is not None:
            self._allocate(self.amax.device)


UNBOUND = "an FP8 layer belongs to no model's scaling: keep what precision.scaling(model) returns, and call its update() every step"


def owner(site: Site) -> Scaling:
    """The model's scaling that a site belongs to.

    Raises:
        RuntimeError: to none.
    """
    if site.owner is None:
        raise RuntimeError(UNBOUND)
    return site.owner
