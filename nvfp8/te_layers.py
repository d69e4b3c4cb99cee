"""Transformer Engine's fused modules as layers of a `Precision`, with the parameters every other precision has.

What holds parameters and what computes with them are two things here. A layer holds its weights under nanochat's names, in bf16,
on any device, meta included. Transformer Engine's module is built around those very Parameters at the first forward pass. It
is no submodule, so neither its gamma nor its `_extra_state`, a pickle, enters the state_dict.

What makes this faster than swapping `nn.Linear` for `te.Linear`:

* norm, quantization, GEMM and relu² are Transformer Engine's fused modules; the residual mix in front of them is one kernel
  each way that keeps nothing, and rotary, QK norm and value embedding are another (`nvfp8.attention.project_heads`);
* c_q, c_k and c_v are views of one buffer, so three projections are one GEMM and nothing is concatenated;
* a weight is cast to FP8 when it has changed (its version counter says so), once a step rather than once a micro-batch.

Delayed scaling begins with scale 1, which is no scale: gradients of 1e-8 are all zero in E5M2, and weights that start at zero
outgrow each scale before it is used. So gradients begin with a scale that follows from the loss's, and a weight takes the
scale of its own amax whenever it is cast; activations and later gradients have their history.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nvfp8.head import LinearCrossEntropy
from nvfp8.layers import Pending, RMSNorm, settled
from nvfp8.ops import ops
from nvfp8.recipe import Recipe
from nvfp8.reference import NORM_EPS
from nvfp8.te import engine, te_recipe

# One token's loss has a gradient of at most `loss_scale`: 64 of them are put at 1, amid E5M2's range of 2^-16 … 2^15.
_GRADIENTS_AT_ONE = 64
_loss_scale: ContextVar[float | None] = ContextVar("loss_scale", default=None)
# Rows of a module's scaling state that belong to its weights (`transformer_engine.pytorch.constants.FP8FwdTensorIdx`).
_WEIGHT_ROWS = (1, 4)
STATE = ("scale_fwd", "amax_history_fwd", "scale_bwd", "amax_history_bwd")


@contextlib.contextmanager
def autocast(recipe: Recipe, loss_scale: float) -> Iterator[None]:
    """Run layers of this file in FP8; around forward and loss, backward outside. Amaxes are reduced over all ranks.

    Args:
        recipe: of all of them.
        loss_scale: gradient of a single token's loss, such as 1 / (tokens · accumulation steps).
    """
    token = _loss_scale.set(loss_scale)
    try:
        with engine().autocast(enabled=True, recipe=te_recipe(recipe)):
            yield
    finally:
        _loss_scale.reset(token)


class _Engine:
    """A module of Transformer Engine around weights that layers of ours hold, and the scaling state it adds."""

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
        self._built_around: list[Tensor] = []
        self._versions: list[int] = []
        self._restored: dict[str, Tensor] = {}
        self._without_history = False

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, x: Tensor) -> Any:
        """Run the module: in FP8 inside `autocast`, otherwise in bf16, which leaves the scaling state as it is."""
        parameters = self._parameters()
        if list(map(id, parameters)) != list(map(id, self._built_around)):
            self._build(parameters)
        loss_scale = _loss_scale.get()
        if loss_scale is None and not self.fp8_weights:
            return self.module(x)
        if loss_scale is not None and self._without_history:
            self.module.fp8_meta["scaling_bwd"].scale.fill_(_GRADIENTS_AT_ONE / loss_scale)
            self._without_history = False
        versions = [parameter._version for parameter in parameters]
        changed, self._versions = versions != self._versions, versions
        if changed:
            self._rescale_weights()
        return self.module(x, is_first_microbatch=None if self.fp8_weights else changed)

    def _parameters(self) -> list[Tensor]:
        return [holder.weight for holders in self.weights.values() for holder in holders]

    @torch.no_grad()
    def _build(self, parameters: list[Tensor]) -> None:
        te, device = engine(), parameters[0].device
        # Parameters may be others than before, such as after load_state_dict(assign=True): the history goes on.
        history = self.scaling_state()
        quantized = te.quantized_model_init(enabled=True, recipe=te_recipe(self.recipe))
        with quantized if self.fp8_weights else contextlib.nullcontext():
            self.module = module = self.make(te, device if self.fp8_weights else "meta")
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
        self._built_around, self._versions = parameters, []
        with te.autocast(enabled=True, recipe=te_recipe(self.recipe)):
            module.init_fp8_metadata(num_gemms=len(self.weights))
        self._without_history = self._delayed and not history
        for name, value in history.items():
            self.scaling_state()[name].copy_(value)

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
            return self._restored
        forward, backward = self.module.fp8_meta["scaling_fwd"], self.module.fp8_meta["scaling_bwd"]
        return dict(zip(STATE, (forward.scale, forward.amax_history, backward.scale, backward.amax_history), strict=True))

    def load_scaling_state(self, saved: Mapping[str, Tensor]) -> None:
        """Take over what `scaling_state` returned elsewhere.

        Raises:
            ValueError: a tensor is missing or has another shape than this recipe needs.
        """
        if not self._delayed or not saved:
            return
        missing = [name for name in STATE if name not in saved]
        if missing:
            raise ValueError(f"the scaling state lacks {missing[0]}")
        length = saved["amax_history_fwd"].shape[0]
        if length != self.recipe.amax_history_len:
            raise ValueError(f"the scaling state remembers {length} amaxes, the recipe {self.recipe.amax_history_len}")
        self._restored = {name: saved[name] for name in STATE}
        if self.module is not None:
            for name, tensor in self.scaling_state().items():
                tensor.copy_(saved[name])
            self._without_history = False


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


class TELinear(nn.Module):
    """x·Wᵀ by `te.Linear`, without bias."""

    def __init__(self, in_features: int, out_features: int, recipe: Recipe, dtype: torch.dtype, fp8_weights: bool):
        """Allocate the weight (out_features, in_features), both multiples of 16."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype))

        def make(te: Any, device: Any) -> Any:
            return te.Linear(in_features, out_features, bias=False, params_dtype=torch.bfloat16, device=device)

        self.engine = _Engine(recipe, make, {"weight": (self,)}, fp8_weights)

    def forward(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        """(..., in_features) bf16 -> (..., out_features), plus `add_to` where given."""
        out: Tensor = self.engine(x)
        return out if add_to is None else add_to + out


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, pending: Tensor | None, x0: Tensor, lambdas: Tensor, width: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        stream, head, rstd = ops(x).mix_forward(x, pending, x0, lambdas, width)
        ctx.save_for_backward(stream, x0, lambdas, rstd)
        ctx.pending = pending is not None
        ctx.set_materialize_grads(False)
        # The stream leaves twice, once for the residual path and once for the branch: backward then gets two gradients and
        # adds them in its own pass.
        return stream, stream.view_as(stream), x0, head

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_stream: Tensor | None, d_branch: Tensor | None, d_x0: Tensor | None, d_head: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        stream, x0, lambdas, rstd = ctx.saved_tensors
        d_stream, d_branch = (torch.zeros_like(stream) if d is None else d.contiguous() for d in (d_stream, d_branch))
        d_head = None if d_head is None else d_head.contiguous()
        dx, d_x0, d_lambdas = ops(stream).mix_backward(d_stream, d_branch, d_head, stream, x0, lambdas, rstd, d_x0)
        return dx, dx if ctx.pending else None, d_x0, d_lambdas, None


class TENormLinear(nn.Module):
    """Residual mix, then norm and several projections in one `te.LayerNormLinear`; the projections stay their owner's."""

    norm_weight: Tensor | None

    def __init__(self, *projections: TELinear, recipe: Recipe, fp8_weights: bool, norm_weight: bool):
        """Join `projections`, all with the same in_features."""
        super().__init__()
        width = projections[0].weight.shape[1]
        sizes = {f"part{i}": len(projection.weight) for i, projection in enumerate(projections)}
        _register_norm_weight(self, width if norm_weight else None)

        def make(te: Any, device: Any) -> Any:
            return te.LayerNormLinear(
                width, sum(sizes.values()), eps=NORM_EPS, bias=False, normalization="RMSNorm", params_dtype=torch.bfloat16,
                parameters_split=None if fp8_weights or len(sizes) == 1 else sizes, device=device,
            )  # fmt: skip

        self.engine = _Engine(recipe, make, {"weight": projections}, fp8_weights, self)

    def forward(self, x: Tensor | Pending, x0: Tensor, lambdas: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `nvfp8.layers.NormLinear`; x̂[..., :width] is without the norm's learnable scale."""
        before, pending = x if isinstance(x, Pending) else (x, None)
        stream, branch, x0, head = _Mix.apply(before, pending, x0, lambdas, width)
        return stream, x0, head, self.engine(branch)


class TEMLP(nn.Module):
    """x + c_proj(relu(c_fc(norm(x)))²) by one `te.LayerNormMLP`."""

    norm_weight: Tensor | None

    def __init__(self, c_fc: TELinear, c_proj: TELinear, recipe: Recipe, fp8_weights: bool, norm_weight: bool):
        """Join c_fc (hidden, width) and c_proj (width, hidden)."""
        super().__init__()
        self.c_fc, self.c_proj = c_fc, c_proj
        hidden, width = c_fc.weight.shape
        _register_norm_weight(self, width if norm_weight else None)

        def make(te: Any, device: Any) -> Any:
            return te.LayerNormMLP(
                width, hidden, eps=NORM_EPS, bias=False, normalization="RMSNorm", activation="srelu",
                params_dtype=torch.bfloat16, device=device,
            )  # fmt: skip

        self.engine = _Engine(recipe, make, {"fc1_weight": (c_fc,), "fc2_weight": (c_proj,)}, fp8_weights, self)

    def forward(self, x: Tensor, settle: bool = True) -> Tensor | Pending:
        """(..., D) -> (..., D): the stream with the MLP's branch added, or, to be settled later, both."""
        pending = Pending(x, self.engine(x))
        return settled(pending) if settle else pending


def _register_norm_weight(module: nn.Module, width: int | None) -> None:
    weight = None if width is None else nn.Parameter(torch.empty(width, dtype=torch.bfloat16))
    module.register_parameter("norm_weight", weight)


class TERMSNorm(nn.Module):
    """RMSNorm by `te.RMSNorm`, with a learnable scale or with ones."""

    norm_weight: Tensor | None

    def __init__(self, width: int, norm_weight: bool):
        """Norm over the last axis, of `width` channels."""
        super().__init__()
        self.width = width
        self._module: list[Any] = []  # in a list, so that it is no submodule
        _register_norm_weight(self, width if norm_weight else None)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) bf16 -> (..., D)."""
        if not self._module or (self.norm_weight is not None and self._module[0].weight is not self.norm_weight):
            module = engine().RMSNorm(self.width, eps=NORM_EPS, dtype=torch.bfloat16, device=x.device)
            if self.norm_weight is None:
                module.weight.requires_grad_(False)
            else:
                module.register_parameter("weight", self.norm_weight)
            self._module = [module]
        out: Tensor = self._module[0](x)
        return out


class SeparateNormLinear(nn.Module):
    """Residual mix, norm and each projection by itself, nothing fused: what swapping every Linear amounts to."""

    def __init__(self, *projections: TELinear):
        """Refer to `projections`; they stay their owner's."""
        super().__init__()
        self._projections = projections

    def forward(self, x: Tensor, x0: Tensor, lambdas: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `nvfp8.layers.NormLinear`."""
        resid_lambda, x0_lambda = lambdas.to(x.dtype)
        stream = resid_lambda * x + x0_lambda * x0
        normed = F.rms_norm(stream, (stream.shape[-1],), eps=NORM_EPS)
        return stream, x0, normed[..., :width], torch.cat([projection(normed) for projection in self._projections], -1)


class SeparateMLP(nn.Module):
    """x + c_proj(relu(c_fc(norm(x)))²), nothing fused."""

    def __init__(self, c_fc: TELinear, c_proj: TELinear):
        """Join c_fc (hidden, width) and c_proj (width, hidden)."""
        super().__init__()
        self.norm, self.c_fc, self.c_proj = RMSNorm(), c_fc, c_proj

    def forward(self, x: Tensor, settle: bool = True) -> Tensor:
        """(..., D) -> (..., D), settled in any case."""
        out: Tensor = self.c_proj(self.c_fc(self.norm(x)).relu().square(), add_to=x)
        return out


class _LogitsLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, vocab: int, softcap: float, scale: float) -> Tensor:
        factor = scale / (targets >= 0).sum().clamp_min(1).float()
        # Another autograd node made the logits and keeps no copy: their gradient is written over them.
        losses = ops(logits).softcap_cross_entropy_(logits, targets, vocab, softcap, factor)
        ctx.d_logits = logits
        return losses.sum() * factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.d_logits is None:
            raise RuntimeError("the loss's backward may run once: it scales the gradient it holds in place")
        d_logits, ctx.d_logits = ctx.d_logits, None
        return ops(d_logits).scale_(d_logits, d_loss), None, None, None, None


class TEHead(LinearCrossEntropy):
    """lm_head by `te.Linear` with whole logits (2 bytes x tokens x vocabulary); evaluation stays in bf16 chunks."""

    def __init__(self, width: int, vocab: int, padded_vocab: int, softcap: float, recipe: Recipe, dtype: torch.dtype):
        """Allocate the weight (padded_vocab, width)."""
        super().__init__(width, vocab, padded_vocab, softcap, dtype)

        def make(te: Any, device: Any) -> Any:
            return te.Linear(width, padded_vocab, bias=False, params_dtype=torch.bfloat16, device=device)

        self.engine = _Engine(recipe, make, {"weight": (self,)}, fp8_weights=False)

    def loss(self, x: Tensor, targets: Tensor, scale: float) -> Tensor:
        """As `LinearCrossEntropy.loss`; without gradients it is computed from chunks, in bf16."""
        if not torch.is_grad_enabled():
            return super().loss(x, targets, scale)
        loss: Tensor = _LogitsLoss.apply(self.engine(x), targets, self.vocab, self.softcap, scale)
        return loss
