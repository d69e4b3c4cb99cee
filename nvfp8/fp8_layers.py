"""Linear layers in FP8 of our own, with the parameters and the calls of `nvfp8/layers.py`.

Between two GEMMs stands one kernel that reads bf16 and writes FP8, in the layouts the next GEMMs need:

    forward     mix + norm + cast → QKV GEMM with rotary and QK norm → (attention in bf16) → cast o → output GEMM
                → add + norm + cast → fc GEMM with relu² and cast, a and aᵀ → projection GEMM → added by the next block's mix
    backward    each gradient leaves its kernel in FP8, dy for dgrad and dyᵀ for wgrad, made for the layer before (`quantize.py`)

What backward keeps of a block, in bytes a token and channel: the mixed stream (2), q, k, v, o (8, attention's), the stream before
the MLP (2), aᵀ in FP8 (4), 1/rms twice: 16, where bf16 keeps 20 and a compiled block 37. All else is made again where it is
read anyway: x̂ᵀ inside the norm's backward, oᵀ by casting o again, relu's derivative 2√a from aᵀ. Where memory is short, aᵀ can
be made again too, at the price of a GEMM.

Outside `scaling.autocast` everything is bf16 from the weights as they are: evaluation and decoding take any number of tokens. The
same path serves a layer that a recipe leaves in bf16. Of a layer it may also leave single GEMMs. Such a GEMM must not see what was
rounded to FP8 for another, or it would not show what that rounding costs: so the layer is fused with nothing, keeps x in bf16, gets
its gradient in bf16, and casts for its other GEMMs by itself (`_Linear`).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nvfp8 import scaling
from nvfp8.hardware import missing
from nvfp8.layers import Linear, NormLinear, Pending, ReluSquaredMLP, RMSNorm, mix, settled, stacked
from nvfp8.matmul import matmul, weight_gradient
from nvfp8.quantize import Deferred, Projection, Quantized, ask, asked, defer, gradient, hand, measured, quantize, stand_in
from nvfp8.recipe import GEMMS, Recipe
from nvfp8.reference_math import FUSED_HEADS
from nvfp8.scaling import Site


def _in_fp8(projection: Projection | None, x: Tensor) -> bool:
    """Whether a layer computes in FP8 now; its model's scaling is then ready."""
    loss_scale = scaling.active()
    if projection is None or loss_scale is None:
        return False
    scaling.owner(projection.x).begin(x.device, loss_scale)
    return True


def _hand_dx(dx: Tensor, site: Site | None, q: Tensor, t: Tensor) -> Tensor:
    return dx if site is None else hand(dx, site, q, t)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, projection: Projection, *weights: Tensor) -> Tensor:
        left = projection.in_bf16
        ctx.projection = projection
        w = None if left >= {"fprop", "dgrad"} else projection.weight()
        # Saved as tensors, not on ctx: an old graph somebody still holds must not keep an old step's copies.
        kept = (*((None, None) if w is None else (w.t, w.inverse)), *(weights if "dgrad" in left else ()))
        if "fprop" in left:
            ctx.save_for_backward(x, None, None, *kept)
            return matmul(x, stacked(weights, x.dtype).t())
        cast = quantize(x.flatten(0, -2), projection.x, columns=False)
        assert cast.q is not None and w is not None
        ctx.save_for_backward(x, cast.scale, cast.inverse, *kept)
        return projection.fprop(cast.q, cast.inverse, w, x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, inverse, w_t, w_inverse, *weights = ctx.saved_tensors
        projection: Projection = ctx.projection
        dgrad, wgrad = (gemm not in projection.in_bf16 for gemm in ("dgrad", "wgrad"))  # in FP8?
        if not (dgrad and wgrad):
            d_out = d_out.contiguous()
        if dgrad or wgrad:
            dy = gradient(d_out, projection.dy, rows=dgrad, columns=wgrad)
        dx = projection.dgrad(dy, w_t, w_inverse, x.dtype).view(x.shape) if dgrad else matmul(d_out, stacked(weights, x.dtype))
        if not wgrad:
            dw = weight_gradient(d_out, x, projection.weights[0].dtype)
            return dx, None, *dw.split([len(weight) for weight in projection.weights])
        flat, site = x.flatten(0, -2), projection.x
        if scale is None:  # forward was in bf16
            cast = quantize(flat, site, rows=False)
        else:
            _, x_t = site.kernels(x).quantize(flat, scale, site.dtype, None, rows=False, columns=True)
            cast = Quantized(None, x_t, scale, inverse)
        assert cast.t is not None
        return dx, None, *projection.wgrad(dy, cast.t, cast.inverse)


def _project(x: Tensor, projection: Projection) -> Tensor:
    out = _Linear.apply(x.contiguous(), projection, *projection.weights)
    # Where a GEMM of backward is in bf16, the gradient must not arrive in FP8 alone.
    return ask(out, projection.dy) if projection.in_bf16 <= {"fprop"} else out


def _projections(
    layers: tuple[Linear, ...], recipe: Recipe, emulated: bool, in_bf16: frozenset[str], normed: bool = False
) -> tuple[Projection, ...]:
    """One, or none where all GEMMs are in bf16."""
    return () if in_bf16 >= set(GEMMS) else (Projection(layers, recipe, emulated, normed=normed, in_bf16=in_bf16),)


class FP8Linear(Linear):
    """x·Wᵀ without bias; the input is kept in bf16 and cast twice, because attention keeps it in bf16 anyway."""

    def __init__(
        self, in_features: int, out_features: int, recipe: Recipe, dtype: torch.dtype, emulated: bool, in_bf16: frozenset[str],
        normed: bool = False,
    ):  # fmt: skip
        """Allocate the weight (out_features, in_features), both multiples of 16.

        `in_bf16`, of GEMMS, stay in bf16; where the input is `normed`, by RMSNorm, its scale is known.
        """
        super().__init__(in_features, out_features, dtype)
        self.projections = _projections((self,), recipe, emulated, in_bf16, normed)
        self.joined = False

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) bf16 -> (..., out_features)."""
        projection = self.projections[0] if self.projections else None
        if not _in_fp8(projection, x):
            return super().forward(x)
        assert projection is not None and not self.joined
        return _project(x, projection)


def _join(*layers: Linear) -> None:
    """From now on `layers` compute where they are joined, and have no casts of their own."""
    for layer in layers:
        assert isinstance(layer, FP8Linear)
        layer.projections, layer.joined = (), True


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, pending: Tensor | None, x0: Tensor, lambdas: Tensor, width: int, projection: Projection,
        deferring: bool, *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Deferred | None]:  # fmt: skip
        ctx.projection, w, site = projection, projection.weight(), projection.x
        stream, normed, head, rstd = site.kernels(x).mix_norm_quantize(
            x, pending, x0, lambdas, width, site.scale, site.dtype, site.amax
        )
        ctx.save_for_backward(stream, x0, lambdas, rstd, w.t, w.inverse)
        ctx.pending, ctx.before = pending is not None, asked(pending)
        ctx.set_materialize_grads(False)
        if deferring:
            assert w.q is not None
            product = Deferred(normed, w.q, site.inverse, w.inverse, site, projection.recipe.fprop.fast_accumulation)
            return stream, x0, head, stand_in(torch.Size((*x.shape[:-1], len(w.q))), x.dtype, x.device), product
        out = projection.fprop(normed, site.inverse, w, x.dtype)
        return stream, x0, head, out.view(*x.shape[:-1], -1), None

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_stream: Tensor | None, d_x0: Tensor | None, d_head: Tensor | None, d_out: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        stream, x0, lambdas, rstd, w_t, w_inverse = ctx.saved_tensors
        projection: Projection = ctx.projection
        d_stream = torch.zeros_like(stream) if d_stream is None else d_stream.contiguous()
        if d_out is None:
            d_out = stream.new_zeros(*stream.shape[:-1], sum(len(weight) for weight in projection.weights))
        dy, site = gradient(d_out, projection.dy), projection.x
        d_normed = projection.dgrad(dy, w_t, w_inverse, stream.dtype).view(stream.shape)
        # Where nobody asked for dx in FP8, as before the first block, its copies are written for nothing.
        to, amax = (site, None) if ctx.before is None else (ctx.before, ctx.before.amax)
        dx, d_x0, d_lambdas, normed_t, q, t = site.kernels(stream).mix_norm_backward_quantize(
            d_stream, d_normed, None if d_head is None else d_head.contiguous(), stream, x0, lambdas, rstd,
            None if d_x0 is None else d_x0.contiguous(), site.scale, site.dtype, to.scale, to.dtype, amax, along=dy.along,
        )  # fmt: skip
        dx = _hand_dx(dx, ctx.before, q, t)
        weights = projection.wgrad(dy, normed_t, site.inverse)
        return dx, dx if ctx.pending else None, d_x0, d_lambdas, None, None, None, *weights


class FP8NormLinear(NormLinear):
    """Residual mix, RMSNorm and several projections in one GEMM: one kernel in front of it, one behind it in backward."""

    def __init__(self, *projections: Linear, recipe: Recipe, emulated: bool, in_bf16: frozenset[str], head_size: int):
        """Join `projections`, all with the same in_features; their sizes together a multiple of 16.

        With a `head_size` that fits, the GEMM is left to `attention.project_heads`, which must be the only one to read its result.
        """
        super().__init__(*projections)
        self.head_size = head_size
        _join(*projections)
        self.projections = _projections(projections, recipe, emulated, in_bf16, normed=True)

    def forward(self, x: Tensor | Pending, x0: Tensor, lambdas: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `NormLinear`; nobody may add to the stream in place."""
        stream, pending = x if isinstance(x, Pending) else (x, None)
        projection = self.projections[0] if self.projections else None
        if not _in_fp8(projection, stream):
            return super().forward(x, x0, lambdas, width)
        assert projection is not None
        if projection.in_bf16:
            stream, branch, x0, head = mix(x, x0, lambdas, width)
            return stream, x0, head, _project(RMSNorm()(branch), projection)
        deferring = self.head_size in FUSED_HEADS and _has_epilogues(projection.x, stream)
        mixed, x0, head, out, product = _NormLinear.apply(
            stream, pending, x0, lambdas, width, projection, deferring, *projection.weights
        )
        return mixed, x0, head, ask(out if product is None else defer(out, product), projection.dy)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, stream: Tensor, branch: Tensor | None, fc: Projection, proj: Projection, recompute: bool, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.fc, ctx.proj, w_fc_q, w_proj_q = fc, proj, fc.weight(), proj.weight()
        kernels, site = fc.x.kernels(stream), fc.x
        added = torch.zeros_like(stream) if branch is None else branch
        x, normed, rstd = kernels.add_norm_quantize(stream, added, site.scale, site.dtype, site.amax)
        a = _activate(normed, fc, w_fc_q, proj.x, x.dtype, columns=not recompute)
        assert a.q is not None
        kept, w = (None, w_fc_q.q) if recompute else (a.t, None)
        ctx.save_for_backward(x, rstd, kept, a.scale, a.inverse, w, w_fc_q.t, w_fc_q.inverse, w_proj_q.t, w_proj_q.inverse)
        ctx.branch, ctx.before = branch is not None, asked(branch)
        return x, proj.fprop(a.q, a.inverse, w_proj_q, x.dtype).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_x: Tensor, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, rstd, a_t, a_scale, a_inverse, w_fc, w_fc_t, w_fc_inverse, w_proj_t, w_proj_inverse = ctx.saved_tensors
        fc: Projection = ctx.fc
        proj: Projection = ctx.proj
        dy, site = gradient(d_out, proj.dy), fc.x
        if a_t is None:
            normed = site.kernels(x).norm_quantize(x, site.scale, site.dtype)
            again = Quantized(w_fc, None, w_fc_inverse, w_fc_inverse)
            a_t = _activate(normed, fc, again, proj.x, x.dtype, rows=False, scale=a_scale).t
            del normed
        d_w_proj = proj.wgrad(dy, a_t, a_inverse)
        dh = _activate_backward(dy, proj, w_proj_t, w_proj_inverse, a_t, a_scale, fc.dy, x.dtype)
        del a_t
        del dy  # 2 bytes a token and channel
        d_normed = fc.dgrad(dh, w_fc_t, w_fc_inverse, x.dtype).view(x.shape)
        to, amax = (site, None) if ctx.before is None else (ctx.before, ctx.before.amax)
        dx, normed_t, q, t = site.kernels(x).norm_backward_quantize(
            d_normed, x, rstd, d_x.contiguous(), site.scale, site.dtype, to.scale, to.dtype, amax, along=dh.along
        )
        dx = _hand_dx(dx, ctx.before, q, t)
        d_w_fc = fc.wgrad(dh, normed_t, site.inverse)
        return dx, dx if ctx.branch else None, None, None, None, *d_w_fc, *d_w_proj


def _has_epilogues(site: Site, x: Tensor) -> bool:
    """Whether GEMMs of ours run here: they move tiles by TMA. Ada's are cuBLAS's, each with a pass behind it."""
    return site.emulated or not x.is_cuda or missing("tma", torch.cuda.get_device_capability(x.device)) is None


def _activate(
    normed: Tensor, fc: Projection, w: Quantized, site: Site, dtype: torch.dtype, *, rows: bool = True, columns: bool = True,
    scale: Tensor | None = None,
) -> Quantized:  # fmt: skip
    """Cast relu(x̂·Wᵀ)²; in the GEMM's epilogue where the scale is known before, and then in the layouts that are wanted.

    `scale` is what it was cast by, where this is the second time: the same codes, and nothing is measured.
    """
    kernels = site.kernels(normed)
    known, amax = (site.scale, site.amax) if scale is None else (scale, None)
    if site.ready and _has_epilogues(site, normed):
        fast = fc.recipe.fprop.fast_accumulation
        a, a_t = kernels.gemm_relu_squared(
            normed, w.q, fc.x.inverse, w.inverse, known, site.dtype, fast, amax, rows=rows, columns=columns
        )
        return Quantized(a, a_t, known, site.inverse)
    h = fc.fprop(normed, fc.x.inverse, w, dtype)
    if scale is not None:
        a, a_t = kernels.relu_squared_quantize(h, scale, site.dtype, None)
        return Quantized(a, a_t, scale, site.inverse)
    return measured(site, lambda scale, amax: kernels.relu_squared_quantize(h, scale, site.dtype, amax))


def _activate_backward(
    dy: Quantized, proj: Projection, w_t: Tensor, w_inverse: Tensor, a_t: Tensor, a_scale: Tensor, site: Site, dtype: torch.dtype
) -> Quantized:
    """Gradient before relu², (dy·W)·2√a, both ways; in the GEMM's epilogue where the scale is known before."""
    kernels = site.kernels(a_t)
    if site.ready and _has_epilogues(site, a_t):
        dh, dh_t, along = kernels.gemm_relu_squared_backward(
            dy.q, w_t, dy.inverse, w_inverse, a_t, a_scale, site.scale, site.dtype, proj.recipe.dgrad.fast_accumulation, site.amax
        )
        return Quantized(dh, dh_t, site.scale, site.inverse, along)
    d_a = proj.dgrad(dy, w_t, w_inverse, dtype)
    return measured(site, lambda scale, amax: kernels.relu_squared_backward_quantize(d_a, a_t, a_scale, scale, site.dtype, amax))


class FP8ReluSquaredMLP(ReluSquaredMLP):
    """x + c_proj(relu(c_fc(norm(x)))²): two GEMMs each way for dx, two for dW; keeps its input and aᵀ in FP8."""

    def __init__(self, c_fc: FP8Linear, c_proj: FP8Linear, recipe: Recipe, emulated: bool, recompute: bool = False):
        """Join c_fc (hidden, width) and c_proj (width, hidden). Where a GEMM of theirs, not all, is in bf16, nothing is fused.

        With `recompute` backward makes aᵀ again, from the input: one more GEMM, and of 16 bytes a block keeps four less.
        """
        torch.nn.Module.__init__(self)
        self.c_fc, self.c_proj, self.recompute = c_fc, c_proj, recompute
        self.projections: tuple[Projection, ...] = ()
        fused = all(layer.projections and not layer.projections[0].in_bf16 for layer in (c_fc, c_proj))
        self.separate = not fused and bool(c_fc.projections or c_proj.projections)
        if fused:
            _join(c_fc, c_proj)
            self.projections = (
                Projection((c_fc,), recipe, emulated, "{}.c_fc", normed=True),
                Projection((c_proj,), recipe, emulated, "{}.c_proj"),
            )

    def forward(self, x: Tensor | Pending, settle: bool = True) -> Tensor | Pending:
        """(..., D) -> (..., D): the stream with attention's and the MLP's branch added, or the latter to be added later."""
        stream, branch = x if isinstance(x, Pending) else (x, None)
        if self.separate:
            stream = settled(x)
            pending = Pending(stream, self.c_proj(self.c_fc(RMSNorm()(stream)).relu().square()))
        elif _in_fp8(self.projections[0] if self.projections else None, stream):
            fc, proj = self.projections
            stream, out = _MLP.apply(stream, branch, fc, proj, self.recompute, self.c_fc.weight, self.c_proj.weight)
            pending = Pending(stream, ask(out, proj.dy))
        else:
            return super().forward(x, settle)
        return settled(pending) if settle else pending
