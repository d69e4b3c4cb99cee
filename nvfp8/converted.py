"""`nn.Linear` in FP8 behind its own name: the layer that `nvfp8.convert` leaves in the place of each one it converts.

    y = x·Wᵀ + b       x (…, K), W (N, K), both cast to E4M3; dx = dy·W and dW = dyᵀ·x from the recipe's format of dy

It is fast where the GEMMs are large: they run at up to twice the rate of bf16 and read half the bytes. What that costs: x is read
once and written twice, as it lies for y and transposed for dW (2 + 1 + 1 bytes an element), dy likewise, and W once an optimizer
step. Backward keeps xᵀ in FP8, half of the bf16 that `nn.Linear` keeps. Nothing is fused with its neighbours: a model whose
layers are made by `nvfp8/precision.py` saves those passes too.

**One opaque operator each way.** The compiler sees `nvfp8::linear` and `nvfp8::linear_backward`: no graph break, and eager and
compiled runs launch the same kernels. What changes from step to step (scales, the FP8 weight, whether it is stale) is looked up in
Python when the operator runs, by a handle that is a *tensor*: a number would be a constant, for which the compiler would compile
every block again. A CUDA graph replays no Python, so the operators are marked as unsafe for it and refuse to be captured by hand.

**When is a step over?** There is no hook in the training loop. So a forward looks whether its weight has another version, and how
often any `torch.optim` optimizer has stepped (a global hook counts). One alone would not do: fused optimizers, and whatever writes
`weight.data`, leave the version as it was; a loop without an optimizer calls no hook. Then the weight is cast anew, and the first
layer of a step that notices enters the amaxes of the last one in the history, for all layers.

**Each rank has its own scales.** A scale is divided out of the product again, so ranks need not agree on it, and a collective in a
forward would stop a model whose ranks run different layers. Gradients are averaged as ever.

**What is not finite stays visible.** A cast saturates, which would hide an infinity. So a tensor that is not finite gets
1/scale = NaN, and y, dx or dW are NaN, as from any other layer; its amax never enters the history.
"""

import contextlib
import math
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from nvfp8 import fp8_fine_layers as fine
from nvfp8.hardware import missing
from nvfp8.matmul import fp8_matmul
from nvfp8.quantize import Quantized
from nvfp8.recipe import Recipe
from nvfp8.scaling import Scaling, Site, scale_of

MULTIPLE = 16  # of both dimensions of a weight, and of the tokens that a weight's gradient is summed over
_steps = 0  # of all optimizers


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


def lacks_fp8(device: torch.device, recipe: Recipe) -> str | None:
    """Why `recipe` does not run on `device`, or None where it does; one clause."""
    if device.type != "cuda":
        return f"{device.type} devices have no FP8 units"
    capability = torch.cuda.get_device_capability(device)
    return next(filter(None, (missing(feature, capability) for feature in recipe.features)), None)


class Shared:
    """What the layers of one conversion share: scales, and which step they are in.

    Attributes:
        scaling: of all their casts; without sites for `rowwise`, whose scales are measured.
        turn: counts the model's steps.
        steps: of all optimizers, when the turn began.
        device: on which layers have run in this turn, or None.
    """

    def __init__(self, sites: dict[str, list[Site]], recipe: Recipe):
        """Hold `sites` by the name of their layer."""
        self.scaling, self.turn, self.steps = Scaling(sites, recipe), 0, _steps
        self.device: torch.device | None = None

    def begin(self, device: torch.device) -> None:
        """Before a layer casts on `device`.

        Raises:
            RuntimeError: others of this turn ran elsewhere.
        """
        if self.device not in (None, device):
            raise RuntimeError(
                f"layers of one conversion run on {self.device} and {device}: convert what is on each device by itself"
            )
        if self.device is None:
            self.device = device
            if self.scaling.sites:
                self.scaling.begin(device, 1.0)  # no site takes its scale from the loss's

    def next_turn(self) -> None:
        """Enter the amaxes of the last step in the history."""
        self.scaling.enter()
        self.begin_anew()

    def begin_anew(self) -> None:
        """A turn begins with the next forward, whatever has changed since the last."""
        self.turn, self.device = self.turn + 1, None


class Casts:
    """How one layer computes: its casts, and the FP8 copies of its weight."""

    def __init__(self, recipe: Recipe, emulated: bool):
        """Cast nothing yet, and share nothing until `shared` and `name` are set."""
        self.recipe, self.emulated, self.by_row = recipe, emulated, recipe.fprop.left.scaling == "row"
        self.x = Site("the input of {}", "activation", recipe.fprop.left, emulated)
        self.w = Site("the weight of {}", "weight", recipe.fprop.right, emulated)
        # Measured until there is a history: of a model of any kind nobody knows the loss's scale.
        self.dy = Site("the gradient that reaches {}", "activation", recipe.dgrad.left, emulated)
        self.name = ""
        self.shared: Shared | None = None
        self._turn, self._version = -1, 0
        self._copies: tuple[Quantized, Quantized] | tuple[fine.FineFP8, fine.FineFP8] | None = None
        self._cast_from: tuple[int, ...] = ()

    @property
    def sites(self) -> list[Site]:
        """All three; none where scales go by row."""
        return [] if self.by_row else [self.x, self.w, self.dy]

    def begin(self, weight: Tensor) -> None:
        """Before a forward: in the first of a step the history rolls, once for all layers."""
        shared = self.end(weight)
        shared.steps, self._version, self._turn = _steps, weight._version, shared.turn
        shared.begin(weight.device)

    def end(self, weight: Tensor | None) -> Shared:
        """Enter the step's amaxes in the history if it is over: as optimizers say, and the layer's weight if it is given."""
        shared = self.shared
        assert shared is not None
        # By hand, each layer sees its own weight change: only one that was there when the turn began ends it.
        by_hand = weight is not None and weight._version != self._version and self._turn == shared.turn
        if shared.device is not None and (shared.steps != _steps or by_hand):
            shared.next_turn()
        return shared

    def weight(self, weight: Tensor, cached: bool, transposed: bool) -> Any:
        """W (N, K), or for backward Wᵀ (K, N), in FP8; both are made at once and kept until W changes, where it may be `cached`."""
        w = weight.detach()
        if not cached:
            return self._cast_weight(w, not transposed, transposed)[transposed]
        cast_from: tuple[int, ...] = (_steps, weight._version, weight.data_ptr())
        # Backward reads what forward cast, whoever has stepped since: optimizers that step within backward, each for one parameter,
        # would have all other weights cast again. A change of this one autograd itself refuses by the version.
        compared = slice(1 if transposed else 0, None)
        if self._copies is None or cast_from[compared] != self._cast_from[compared]:
            self._copies = None  # its memory is taken again
            self._copies, self._cast_from = self._cast_weight(w, True, True), cast_from
        return self._copies[transposed]

    def _cast_weight(self, w: Tensor, rows: bool, columns: bool) -> Any:
        if not self.by_row:
            return (cast(w, self.w, rows, columns),) * 2
        return tuple(
            fine.cast(x, operand, self.emulated) if wanted else None
            for x, operand, wanted in ((w, self.recipe.fprop.right, rows), (w.t(), self.recipe.dgrad.right, columns))
        )

    def forget_copies(self) -> None:
        """Free the FP8 copies of the weight."""
        self._copies = None


def cast(x: Tensor, site: Site, rows: bool, columns: bool) -> Quantized:
    """Cast x (M, N) to FP8 at `site`, as it lies and transposed; its inverse scale is NaN where x is not finite.

    The scale is the history's, or measured where there is none. Unlike `quantize.quantize` this looks at the amax of x alone: one
    that is not finite must not spoil the next tensor, for nobody is asked to `update` between them.
    """
    kernels, amax = site.kernels(x), torch.zeros_like(site.amax)
    x = x.contiguous()
    if site.ready:
        scale, inverse = site.scale, site.inverse
        q, t = kernels.quantize(x, scale, site.dtype, amax, rows=rows, columns=columns)
    else:
        kernels.amax_(x, amax)
        site.measured = True
        scale = scale_of(amax, site.largest, torch.ones_like(amax))
        inverse = scale.reciprocal()
        q, t = kernels.quantize(x, scale, site.dtype, None, rows=rows, columns=columns)
    torch.maximum(site.amax, amax, out=site.amax)
    return Quantized(q, t, scale, inverse.add(amax, alpha=0))  # 0 · inf and 0 · NaN are NaN


_CASTS: "weakref.WeakValueDictionary[int, Casts]" = weakref.WeakValueDictionary()
_handles = 0


class ConvertedLinear(nn.Linear):
    """`nn.Linear` in FP8 while it trains; in evaluation it is the layer it was, in its parameters' precision.

    Its parameters, their names and its hooks are those of the layer it was.
    """

    casts: Casts
    handle: Tensor  # 0-D int64 on the CPU, no buffer: it is neither saved nor moved
    sharded: bool

    def __setattr__(self, name: str, value: Any) -> None:
        """Notice when FSDP2 shards the weight: what it gathers has no version counter of its own, and is not to be kept."""
        if name == "weight" and isinstance(value, DTensor):
            self.sharded = True
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or what was pickled, is a layer of its own."""
        super().__setstate__(state)
        self.enlist()

    def enlist(self) -> None:
        """Give the layer the handle by which operators find it."""
        global _handles
        _handles += 1
        self.handle = torch.tensor(_handles, device="cpu")
        _CASTS[_handles] = self.casts
        self.casts.forget_copies()

    def extra_repr(self) -> str:
        """As that of `nn.Linear`, with the recipe."""
        return f"{super().extra_repr()}, fp8={self.casts.recipe.name}{', emulated' if self.casts.emulated else ''}"

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> (..., N), in input's dtype or autocast's.

        Raises:
            RuntimeError: input and weight have different dtypes outside autocast, or the weight is a DTensor.
        """
        weight, bias, x = self.weight, self.bias, input
        if not self.training:
            return F.linear(x, weight, bias)
        if isinstance(weight, DTensor):
            raise RuntimeError("an FP8 Linear takes whole weights or those that FSDP2 gathers, not tensor-parallel DTensors")
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        elif x.dtype != weight.dtype:
            raise RuntimeError(f"the input is {x.dtype}, the weight {weight.dtype}: use torch.autocast, or one dtype for both")
        keep = torch.is_grad_enabled() and weight.requires_grad
        cached = not self.sharded and isinstance(weight, nn.Parameter)
        y = torch.ops.nvfp8.linear(x, weight, self.handle, keep, cached, self.casts.by_row)[0]
        return y if bias is None else y + bias.to(y.dtype)


def _padded(tokens: Any) -> Any:
    return (tokens + MULTIPLE - 1) // MULTIPLE * MULTIPLE


def _to_multiple(x: Tensor) -> Tensor:
    """Give x (M, N) rows of zeros up to a multiple of 16: they add nothing to a weight's gradient."""
    more = _padded(len(x)) - len(x)
    return F.pad(x, (0, 0, 0, more)) if more else x


def _shaped(flat: Tensor, like: Tensor) -> Tensor:
    """A result (M, N) as (…, N); no view for autograd, which would forbid to change it in place."""
    return torch.ops.aten._unsafe_view(flat, [*like.shape[:-1], flat.shape[1]])


def _running(handle: Tensor, x: Tensor) -> Casts:
    casts = _CASTS[int(handle)]
    if not casts.emulated and (why := lacks_fp8(x.device, casts.recipe)):
        raise RuntimeError(f"{casts.name} cannot compute in FP8, {why}: convert with emulate=True for the same numbers, slowly")
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a CUDA graph would replay stale FP8 weights and scales: leave converted layers out of it")
    return casts


@contextlib.contextmanager
def _plainly(x: Tensor) -> Iterator[None]:
    """No autograd, no autocast of what emulation multiplies, and kernels go where x is."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        yield


def _linear(x: Tensor, weight: Tensor, handle: Tensor, keep: bool, cached: bool, by_row: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Forward: y (…, N) in x's dtype and, if `keep`, for dW: xᵀ (K, M up to a multiple of 16) in E4M3 and its inverse scale."""
    casts, flat = _running(handle, x), x.reshape(-1, x.shape[-1])
    if not len(flat):
        return _fake_linear(x, weight, handle, keep, cached, by_row)
    kept, kept_inverse = x.new_empty(0, dtype=torch.float8_e4m3fn), x.new_empty(0, dtype=torch.float32)
    with _plainly(x):
        casts.begin(weight)
        fprop, padded, w = casts.recipe.fprop, _to_multiple(flat), casts.weight(weight, cached, False)
        if by_row:
            product = fine.product(
                fine.cast(padded, fprop.left, casts.emulated), w, x.dtype, fprop.fast_accumulation, casts.emulated
            )
            if keep:
                kept, kept_inverse = fine.cast(padded.t(), casts.recipe.wgrad.right, casts.emulated)
        else:
            x_q = cast(padded, casts.x, True, keep)
            assert x_q.q is not None
            product = fp8_matmul(x_q.q, w.q, x_q.inverse, w.inverse, x.dtype, fprop.fast_accumulation, emulated=casts.emulated)
            if keep:
                assert x_q.t is not None
                kept, kept_inverse = x_q.t, x_q.inverse
    return _shaped(product[: len(flat)], x), kept, kept_inverse


def _linear_backward(
    dy: Tensor, weight: Tensor, x_t: Tensor, x_inverse: Tensor, handle: Tensor, to_x: bool, to_w: bool, cached: bool, by_row: bool
) -> tuple[Tensor, Tensor]:
    """Backward: dx (…, K) in dy's dtype and dW (N, K) in the weight's, each empty where it is not wanted."""
    casts, flat = _running(handle, dy), dy.reshape(-1, dy.shape[-1])
    if not len(flat):
        dx, dw = _fake_backward(dy, weight, x_t, x_inverse, handle, to_x, to_w, cached, by_row)
        return dx, dw.zero_()
    dx, dw = dy.new_empty(0), weight.new_empty(0)
    dgrad, wgrad, emulated = casts.recipe.dgrad, casts.recipe.wgrad, casts.emulated
    with _plainly(dy):
        padded = _to_multiple(flat)
        w: Any = casts.weight(weight, cached, True) if to_x else None
        if by_row:
            if to_x:
                dx = fine.product(fine.cast(padded, dgrad.left, emulated), w, dy.dtype, dgrad.fast_accumulation, emulated)
            if to_w:
                dy_t, kept = fine.cast(padded.t(), wgrad.left, emulated), fine.FineFP8(x_t, x_inverse)
                dw = fine.product(dy_t, kept, weight.dtype, wgrad.fast_accumulation, emulated)
        else:
            dy_q = cast(padded, casts.dy, to_x, to_w)
            if to_x:
                assert dy_q.q is not None
                dx = fp8_matmul(dy_q.q, w.t, dy_q.inverse, w.inverse, dy.dtype, dgrad.fast_accumulation, emulated=emulated)
            if to_w:
                assert dy_q.t is not None
                dw = fp8_matmul(dy_q.t, x_t, dy_q.inverse, x_inverse, weight.dtype, wgrad.fast_accumulation, emulated=emulated)
    return _shaped(dx[: len(flat)], dy) if to_x else dx, dw


def _fake_linear(
    x: Tensor, weight: Tensor, handle: Tensor, keep: bool, cached: bool, by_row: bool
) -> tuple[Tensor, Tensor, Tensor]:
    kept = (x.shape[-1], _padded(math.prod(x.shape[:-1]))) if keep else (0,)
    scales = () if not by_row else (x.shape[-1], 1)
    return (
        x.new_empty(*x.shape[:-1], weight.shape[0]),
        x.new_empty(kept, dtype=torch.float8_e4m3fn),
        x.new_empty(scales if keep else (0,), dtype=torch.float32),
    )


def _fake_backward(
    dy: Tensor, weight: Tensor, x_t: Tensor, x_inverse: Tensor, handle: Tensor, to_x: bool, to_w: bool, cached: bool, by_row: bool
) -> tuple[Tensor, Tensor]:
    dx = dy.new_empty((*dy.shape[:-1], weight.shape[1]) if to_x else (0,))
    return dx, weight.new_empty(weight.shape if to_w else (0,))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weight, handle, _, ctx.cached, ctx.by_row = inputs
    if type(handle) is Tensor:  # no compiler's stand-in
        ctx.casts = _CASTS[int(handle)]  # there for backward, even if the layer is not
    ctx.save_for_backward(weight, handle, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None, None, None, None
    weight, handle, x_t, x_inverse = ctx.saved_tensors
    to_x, to_w = ctx.needs_input_grad[:2]
    dx, dw = torch.ops.nvfp8.linear_backward(dy, weight, x_t, x_inverse, handle, to_x, to_w, ctx.cached, ctx.by_row)
    return dx if to_x else None, dw if to_w else None, None, None, None, None


# `Library` rather than `custom_op`, whose wrapper takes the host longer a call (pytorch/pytorch issue 139500).
_OPERATORS = torch.library.Library("nvfp8", "DEF")
_FORWARD = "linear(Tensor x, Tensor weight, Tensor handle, bool keep, bool cached, bool by_row) -> (Tensor, Tensor, Tensor)"
_BACKWARD = (
    "linear_backward(Tensor dy, Tensor weight, Tensor x_t, Tensor x_inverse, Tensor handle, "
    "bool to_x, bool to_w, bool cached, bool by_row) -> (Tensor, Tensor)"
)
for _schema, _run, _fake in ((_FORWARD, _linear, _fake_linear), (_BACKWARD, _linear_backward, _fake_backward)):
    _name = _schema.partition("(")[0]
    _OPERATORS.define(_schema, tags=(torch.Tag.cudagraph_unsafe,))
    _OPERATORS.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nvfp8::{_name}", _fake, lib=_OPERATORS)
torch.library.register_autograd("nvfp8::linear", _backward, setup_context=_setup, lib=_OPERATORS)
