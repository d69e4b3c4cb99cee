"""Transformer Engine's fused modules as layers of a `Precision`, with the parameters every other precision has.

What makes this faster than swapping `nn.Linear` for `te.Linear`:

* norm, quantization, GEMM and relu² are Transformer Engine's fused modules; the residual mix in front of them is one kernel
  each way that keeps only what those modules keep anyway, and rotary, QK norm and value embedding are another
  (`nvfp8.attention.project_heads`);
* c_q, c_k and c_v are views of one buffer, so three projections are one GEMM and nothing is concatenated;
* the MLP's branch is added to the stream by the next block's mix, which reads both anyway;
* weights are cast once a step (`nvfp8/te_engine.py`).

`Separate…` are the same layers with nothing fused: what swapping each Linear amounts to, for comparison.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nvfp8.head import LinearCrossEntropy
from nvfp8.layers import Pending, RMSNorm, mix, settled
from nvfp8.ops import ops
from nvfp8.recipe import Recipe
from nvfp8.reference import NORM_EPS
from nvfp8.te import engine
from nvfp8.te_engine import Engine


class TELinear(nn.Module):
    """x·Wᵀ by `te.Linear`, without bias."""

    def __init__(self, in_features: int, out_features: int, recipe: Recipe, dtype: torch.dtype, fp8_weights: bool):
        """Allocate the weight (out_features, in_features), both multiples of 16."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype))

        def make(te: Any, device: Any) -> Any:
            return te.Linear(in_features, out_features, bias=False, params_dtype=torch.bfloat16, device=device)

        self.engine: Engine | None = Engine(recipe, make, {"weight": (self,)}, fp8_weights)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) bf16 -> (..., out_features); not for a projection that was joined."""
        assert self.engine is not None, "joined with others: they compute together"
        out: Tensor = self.engine(x)
        return out


class TENormLinear(nn.Module):
    """Residual mix, then norm and several projections in one `te.LayerNormLinear`; the projections stay their owner's."""

    norm_weight: Tensor | None

    def __init__(self, *projections: TELinear, recipe: Recipe, fp8_weights: bool, norm_weight: bool):
        """Join `projections`, all with the same in_features. From now on they compute here only: their own engines go."""
        super().__init__()
        for projection in projections:
            projection.engine = None
        width = projections[0].weight.shape[1]
        sizes = {f"part{i}": len(projection.weight) for i, projection in enumerate(projections)}
        _register_norm_weight(self, width if norm_weight else None)

        def make(te: Any, device: Any) -> Any:
            return te.LayerNormLinear(
                width, sum(sizes.values()), eps=NORM_EPS, bias=False, normalization="RMSNorm", params_dtype=torch.bfloat16,
                parameters_split=None if fp8_weights or len(sizes) == 1 else sizes, device=device,
            )  # fmt: skip

        self.engine = Engine(recipe, make, {"weight": projections}, fp8_weights, self)

    def forward(self, x: Tensor | Pending, x0: Tensor, lambdas: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `nvfp8.layers.NormLinear`; x̂[..., :width] is without the norm's learnable scale."""
        stream, branch, x0, head = mix(x, x0, lambdas, width)
        return stream, x0, head, self.engine(branch)


class TEMLP(nn.Module):
    """x + c_proj(relu(c_fc(norm(x)))²) by one `te.LayerNormMLP`."""

    norm_weight: Tensor | None

    def __init__(self, c_fc: TELinear, c_proj: TELinear, recipe: Recipe, fp8_weights: bool, norm_weight: bool):
        """Join c_fc (hidden, width) and c_proj (width, hidden), which from now on compute here only."""
        super().__init__()
        self.c_fc, self.c_proj = c_fc, c_proj
        c_fc.engine = c_proj.engine = None
        hidden, width = c_fc.weight.shape
        _register_norm_weight(self, width if norm_weight else None)

        def make(te: Any, device: Any) -> Any:
            return te.LayerNormMLP(
                width, hidden, eps=NORM_EPS, bias=False, normalization="RMSNorm", activation="srelu",
                params_dtype=torch.bfloat16, device=device,
            )  # fmt: skip

        self.engine = Engine(recipe, make, {"fc1_weight": (c_fc,), "fc2_weight": (c_proj,)}, fp8_weights, self)

    def forward(self, x: Tensor | Pending, settle: bool = True) -> Tensor | Pending:
        """(..., D), or the two parts of it -> (..., D): the stream with the MLP's branch added, or, to be settled later, both."""
        x = settled(x)
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
        held = self._module[0].weight if self._module else None
        if held is None or held.device != x.device or (self.norm_weight is not None and held is not self.norm_weight):
            with torch.inference_mode(False):  # what is built while generating must be trainable later
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

    def forward(self, x: Tensor | Pending, settle: bool = True) -> Tensor:
        """(..., D), or the two parts of it -> (..., D), settled in any case."""
        x = settled(x)
        return settled(Pending(x, self.c_proj(self.c_fc(self.norm(x)).relu().square())))


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

        self.engine = Engine(recipe, make, {"weight": (self,)}, fp8_weights=False)

    def loss(self, x: Tensor, targets: Tensor, scale: float) -> Tensor:
        """As `LinearCrossEntropy.loss`; without gradients it is computed from chunks, in bf16."""
        if not torch.is_grad_enabled():
            return super().loss(x, targets, scale)
        loss: Tensor = _LogitsLoss.apply(self.engine(x), targets, self.vocab, self.softcap, scale)
        return loss
