"""Tensors in FP8 between GEMMs: cast once for all GEMMs that read them, and handed from one layer's backward to the next.

Tensor cores of Hopper, Ada and the DGX Spark multiply FP8 only with both operands contiguous along the summed axis. A gradient dy
is summed over channels for dx and over tokens for dW, so it is needed as it lies and transposed. Whoever computes it has it in
registers and can write both, if only it knows whom for. So:

* a layer marks its output with the site that will cast its gradient (`ask`);
* the layer that reads this output writes the gradient in FP8 beside bf16, or instead of it, and attaches that to the
  gradient tensor it returns to autograd (`hand`);
* the first layer finds it there (`gradient`), and where it is missing casts by itself.

Forward, the projections leave their GEMM to `attention.project_heads` by such a mark (`defer`): its epilogue does the heads.

Autograd passes a gradient on as the very same tensor unless it adds others to it or casts it. A sum is a new tensor, or the old one
with a higher version: so it is not possible to mistake part of a gradient for all of it. That is why the attachment is on the
tensor rather than in a table or a second output with a gradient of its own, which autograd would deliver whatever was added
elsewhere. And unlike one autograd Function for a whole block, it leaves attention and each layer on their own.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nvfp8.copies import Held
from nvfp8.head import LinearCrossEntropy
from nvfp8.layers import Linear
from nvfp8.matmul import fp8_matmul
from nvfp8.recipe import Operand, Recipe
from nvfp8.scaling import Site, scale_of

_ASKED, _HANDED, _DEFERRED = "fp8_asked", "fp8_handed", "fp8_deferred"


class Quantized(NamedTuple):
    """A tensor in FP8: x ≈ q · inverse.

    Attributes:
        q: (M, N), or None where nobody asked for it.
        t: (N, M), or None.
        scale: 0-D fp32 it was multiplied by.
        inverse: 0-D fp32, 1 / scale.
        along: of a gradient dy of y, where who wrote it knew y: (P, M) fp32, P parts of Σ dy·y for every row.
    """

    q: Tensor | None
    t: Tensor | None
    scale: Tensor
    inverse: Tensor
    along: Tensor | None = None


def quantize(x: Tensor, site: Site, *, rows: bool = True, columns: bool = True) -> Quantized:
    """Cast x at `site`, with the scale it has there, or measured where there is none.

    Args:
        x: (M, N) bf16 or fp32, contiguous.
        site: says in which format and by which scale.
        rows: whether q is wanted.
        columns: whether t is wanted.
    """
    scale, inverse = site.scale, site.inverse
    if not site.ready:
        amax = torch.zeros_like(site.amax)
        site.kernels(x).amax_(x, amax)
        scale, inverse = site.scales(amax)
    q, t = site.kernels(x).quantize(x, scale, site.dtype, site.amax, rows=rows, columns=columns)
    return Quantized(q, t, scale, inverse)


def measured(site: Site, cast: Callable[[Tensor, Tensor | None], tuple[Tensor, ...]]) -> Quantized:
    """Run a kernel that casts its own result: with the scale there is, or twice, for its amax and with the scale that follows.

    Args:
        site: says by which scale.
        cast: takes scale and amax, 0-D fp32 (amax may be None), returns q (M, N), t (N, M), and of a gradient `along`.
    """
    if site.ready:
        q, t, *along = cast(site.scale, site.amax)
        return Quantized(q, t, site.scale, site.inverse, *along)
    amax = torch.zeros_like(site.amax)
    cast(torch.ones_like(amax), amax)
    scale, inverse = site.scales(amax)
    q, t, *along = cast(scale, None)
    return Quantized(q, t, scale, inverse, *along)


class Deferred(NamedTuple):
    """A product x·wᵀ of FP8 tensors that whoever reads it computes, with its own work in the GEMM's epilogue.

    Attributes:
        x: (M, K) FP8.
        w: (N, K) FP8.
        x_inverse: 0-D fp32, 1 / scale of x.
        w_inverse: 0-D fp32, 1 / scale of w.
        site: where x was cast.
        fast: whether it sums in the tensor core's own 14 bits or so.
    """

    x: Tensor
    w: Tensor
    x_inverse: Tensor
    w_inverse: Tensor
    site: Site
    fast: bool


@cache
@torch.inference_mode(False)  # autograd passes it on, whoever asked first
def _nan(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), torch.nan, dtype=dtype, device=device)


def stand_in(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor for autograd to pass on where the numbers are elsewhere: one NaN, stretched, so to use it is an error to see.

    All of a device share it: it is no kernel to launch, and nobody can write to a tensor whose elements are one in memory.
    """
    return _nan(dtype, device).expand(shape)


def defer(x: Tensor, product: Deferred) -> Tensor:
    """Attach a product to the `stand_in` for it."""
    setattr(x, _DEFERRED, product)
    return x


def deferred(x: Tensor) -> Deferred | None:
    """The product that x stands in for, or None where x is what it seems. It is taken off, so that nothing lives on with x.

    Raises:
        RuntimeError: it was taken before, or x is a view of what stands in for it.
    """
    product: Deferred | None = getattr(x, _DEFERRED, None)
    if product is not None:
        delattr(x, _DEFERRED)
    elif x.numel() > 1 and not any(x.stride()):
        raise RuntimeError("a deferred product can be read once, from the very tensor that a layer returned, not from a view of it")
    return product


def ask(x: Tensor, site: Site) -> Tensor:
    """Mark x: its gradient will be cast at `site`, so whoever computes it may do that too. Nothing without a scale beforehand."""
    if site.ready:
        setattr(x, _ASKED, site)
    return x


def asked(x: Tensor | None) -> Site | None:
    """The site that x was marked with; a view, or a sum, carries no mark."""
    return getattr(x, _ASKED, None)


def hand(gradient: Tensor, site: Site, q: Tensor, t: Tensor, along: Tensor | None = None) -> Tensor:
    """Attach a gradient's FP8 copies, cast with `site`'s scale, to the tensor that autograd passes on."""
    setattr(gradient, _HANDED, (Quantized(q, t, site.scale, site.inverse, along), site, gradient._version))
    return gradient


def hand_only(shape: torch.Size, dtype: torch.dtype, site: Site, q: Tensor, t: Tensor, along: Tensor | None = None) -> Tensor:
    """A gradient that exists in FP8 only: autograd gets what stands in for it."""
    return hand(stand_in(shape, dtype, q.device), site, q, t, along)


def gradient(dy: Tensor, site: Site, *, rows: bool = True, columns: bool = True) -> Quantized:
    """A gradient (..., N) in both layouts, as it was handed over, or cast here in those that are wanted.

    What was handed over is taken off the tensor, which may live on as the gradient of the residual stream.
    """
    quantized, of, version = getattr(dy, _HANDED, (None, None, 0))
    if quantized is not None and of is site and dy._version == version:
        delattr(dy, _HANDED)
        return quantized
    return quantize(dy.contiguous().flatten(0, -2), site, rows=rows, columns=columns)


class Projection:
    """The three GEMMs of one weight, or of several stacked: where their operands are cast, and the weight's FP8 copies.

    Attributes:
        layers: those whose weights these are.
        x: site of the input.
        w: site of the weight.
        dy: site of the output's gradient.
        in_bf16: those of the three that stay in bf16, not all; only `fp8_layers._Linear` and the head compute such.
        adding: whether backward adds dW to the gradients there are, in its GEMM, rather than hand it to autograd. Then tensor hooks
            and `torch.autograd.grad` do not see it: it is for a loop that sums micro-batches.
    """

    def __init__(
        self, layers: tuple[Linear | LinearCrossEntropy, ...], recipe: Recipe, emulated: bool, label: str = "{}",
        normed: bool = False, in_bf16: frozenset[str] = frozenset(), of_logits: bool = False,
    ):  # fmt: skip
        """Cast nothing yet.

        Args:
            layers: all with one in_features.
            recipe: formats and accumulation.
            emulated: compute by the twins.
            label: the layer's name in messages, {} being the module's.
            normed: the input comes from RMSNorm.
            in_bf16: "fprop", "dgrad", "wgrad".
            of_logits: the output's gradient is a loss's, in E5M2 whatever the recipe says of gradients.
        """
        self.layers, self.recipe, self.emulated, self.in_bf16 = layers, recipe, emulated, in_bf16
        width = layers[0].weight.shape[1]
        kind = "normed" if normed else "activation"
        self.x = Site(f"the input of {label}", kind, recipe.fprop.left, emulated, width)  # type: ignore[arg-type]
        both, w = not in_bf16 & {"fprop", "dgrad"}, recipe.fprop.right
        self.w = Site(f"the weight of {label}", "copies" if both and w.scaling == "delayed" else "weight", w, emulated)
        self.w.in_use = self._in_use
        what = f"the gradient that reaches {label}"
        of_loss = Operand("e5m2", "current")  # measured by nobody: the site knows its scale
        self.dy = Site(what, "logits", of_loss, emulated) if of_logits else Site(what, "gradient", recipe.dgrad.left, emulated)
        self._held: Held | None = None
        self.adding = False

    @property
    def sites(self) -> tuple[Site, ...]:
        """All three."""
        return self.x, self.w, self.dy

    @property
    def weights(self) -> list[Tensor]:
        """The parameters, in order."""
        return [layer.weight for layer in self.layers]

    @torch.no_grad()
    def weight(self) -> Quantized:
        """W (N, K) and Wᵀ (K, N) in FP8, cast when a parameter has changed: once a step, however many micro-batches it has.

        Not even then if an optimizer has written them (`copies.py`). Only the layouts that a GEMM in FP8 reads.
        """
        if self._held is None or self.w.loaded is not None or not self._held.are_of(self.weights):
            self._held = None  # its memory is taken again
            self._held = self._cast()
        held = self._held
        return Quantized(held.q, held.t, held.scale, held.inverse)

    @torch.inference_mode(False)  # they are written in place later
    def _cast(self) -> Held:
        parts, site, left = [weight.detach() for weight in self.weights], self.w, self.in_bf16
        w = torch.cat(parts) if len(parts) > 1 else parts[0]
        if site.kind == "weight":
            # Its own amax, as a site without history; no margin, for nothing changes between measuring and casting.
            cast = quantize(w, site, rows="fprop" not in left, columns="dgrad" not in left)
            return Held(self.weights, site, cast.q, cast.t, cast.scale, cast.inverse)
        # By the scale with which an optimizer would have written them, where it fits: a run that was resumed computes the same.
        known, site.loaded = site.scale if site.loaded is None else site.loaded, None
        site.kernels(w).amax_(w, site.amax.zero_())
        scale = scale_of(site.amax, site.largest, torch.ones_like(site.amax))
        if site.ready:
            scale = torch.where(site.amax * known <= site.largest, known, scale)
        q, t = site.kernels(w).quantize(w, scale, site.dtype, None, rows=True, columns=True)
        return Held(self.weights, site, q, t, scale, scale.reciprocal())

    def _in_use(self) -> tuple[Tensor, ...] | None:
        held = self._held
        if held is None or self.w.loaded is not None or not held.are_of(self.weights):
            return None
        return held.scale, held.inverse, *(x for x in (held.q, held.t) if x is not None)

    def fprop(self, x: Tensor, inverse: Tensor, w: Quantized, dtype: torch.dtype) -> Tensor:
        """X (M, K) FP8 · Wᵀ -> (M, N)."""
        assert w.q is not None
        return self._matmul(x, w.q, inverse, w.inverse, dtype, self.recipe.fprop.fast_accumulation)

    def dgrad(self, dy: Quantized, w_t: Tensor, w_inverse: Tensor, dtype: torch.dtype) -> Tensor:
        """Gradient of the input, dy (M, N) · W -> (M, K), from Wᵀ (K, N)."""
        assert dy.q is not None
        return self._matmul(dy.q, w_t, dy.inverse, w_inverse, dtype, self.recipe.dgrad.fast_accumulation)

    def wgrad(self, dy: Quantized, x_t: Tensor, inverse: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the weights, dyᵀ · x in their dtype, from xᵀ (K, M); None where they were added to those there are."""
        assert dy.t is not None
        dtype, there = self.layers[0].weight.dtype, self.sums() if self.adding else None
        product = self._matmul(
            dy.t, x_t, dy.inverse, inverse, dtype, self.recipe.wgrad.fast_accumulation, out=there, add=there is not None
        )
        return product.split([len(weight) for weight in self.weights]) if there is None else (None,) * len(self.layers)

    def sums(self) -> Tensor | None:
        """The gradients there are as one matrix (N, K), as `wgrad` made them; None where they lie apart, or dW is made in bf16."""
        gradients = [weight.grad for weight in self.weights]
        first, end = gradients[0], 0
        if first is None or "wgrad" in self.in_bf16:
            return None
        storage, start = first.untyped_storage().data_ptr(), first.data_ptr()
        for gradient, weight in zip(gradients, self.weights, strict=True):
            if gradient is None or not gradient.is_contiguous() or gradient.dtype != weight.dtype:
                return None
            if gradient.untyped_storage().data_ptr() != storage or gradient.data_ptr() != start + end:
                return None
            end += gradient.nbytes
        return first.as_strided((sum(len(weight) for weight in self.weights), first.shape[1]), (first.shape[1], 1))

    def _matmul(self, a: Tensor, b: Tensor, *more: Any, out: Tensor | None = None, add: bool = False) -> Tensor:
        return fp8_matmul(a, b, *more, emulated=self.emulated, out=out, add=add)
