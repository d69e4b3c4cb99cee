"""A Precision makes the layers of a model: the one seam through which formats enter.

A model asks it for embeddings, norms, projections, an MLP and a head, and names no dtype itself. Whatever the precision,
the parameters have the same names and shapes, so a checkpoint of one loads in any other. Whatever is Transformer Engine's is
imported when a model first runs, so shapes can be planned anywhere.
"""

import contextlib
from dataclasses import dataclass, field, replace
from typing import Literal, Self, cast

import torch
from torch import nn

from nvfp8 import scaling, te_engine, te_layers, versions
from nvfp8.fp8_fine_layers import FineLinear, FineMLP, FineNormLinear
from nvfp8.fp8_head import FP8LinearCrossEntropy
from nvfp8.fp8_layers import FP8Linear, FP8NormLinear, FP8ReluSquaredMLP
from nvfp8.head import LinearCrossEntropy
from nvfp8.layers import Linear, NormLinear, ReluSquaredMLP, RMSNorm
from nvfp8.recipe import GEMMS, RECIPES, Recipe, covers
from nvfp8.reference_math import FUSED_HEADS
from nvfp8.te import as_run

versions.follow_optimizers()
Projection = Linear | te_layers.TELinear
JoinedProjections = NormLinear | te_layers.TENormLinear | te_layers.SeparateNormLinear
MLP = ReluSquaredMLP | te_layers.TEMLP | te_layers.SeparateMLP


@dataclass(frozen=True)
class Precision:
    """Layers that compute in `compute_dtype` from matrices stored in `matrix_dtype`.

    Attributes:
        name: what flags and printouts call it.
        compute_dtype: of the residual stream, and of embedding tables, which feed it and are their own masters.
        matrix_dtype: of all other matrices; where it is lower than fp32, the optimizer keeps fp32 masters.
    """

    name: str
    compute_dtype: torch.dtype
    matrix_dtype: torch.dtype = torch.float32

    def at(self, name: str) -> Self:
        """This precision for the part `name` of the model, or of the part it is for already: recipes may except parts by name."""
        return self

    def embedding(self, rows: int, width: int) -> nn.Embedding:
        """A lookup table (rows, width)."""
        return nn.Embedding(rows, width, dtype=self.compute_dtype)

    def norm(self, width: int) -> nn.Module:
        """RMSNorm over the last axis, of `width` channels."""
        return RMSNorm()

    def linear(self, in_features: int, out_features: int) -> Projection:
        """A projection that can add into the residual stream."""
        return Linear(in_features, out_features, self.matrix_dtype)

    def gate(self, in_features: int, out_features: int) -> Linear:
        """A projection of a few channels, never in a format that needs multiples of 16."""
        return Linear(in_features, out_features, self.matrix_dtype)

    def norm_linear(self, *projections: Projection, head_size: int = 0) -> JoinedProjections:
        """Residual mix and norm in front of `projections`, which run as one GEMM.

        Args:
            projections: made by this precision.
            head_size: channels of a head, where they are q, k and v and `nvfp8.attention.project_heads` alone reads their result: a
                layer may then leave its GEMM to that.
        """
        return NormLinear(*cast(tuple[Linear, ...], projections))

    def mlp(self, width: int, hidden: int) -> MLP:
        """The whole MLP branch, norm and residual included."""
        return ReluSquaredMLP(width, hidden, self.matrix_dtype)

    def head(self, width: int, vocab: int, padded_vocab: int, softcap: float) -> LinearCrossEntropy:
        """lm_head with its loss."""
        return LinearCrossEntropy(width, vocab, padded_vocab, softcap, self.matrix_dtype)

    def scaling(self, model: nn.Module) -> scaling.ScalingState:
        """What keeps the scales of `model`, all of whose layers this precision made; asked for once, when it is whole."""
        return scaling.NoScaling()

    def autocast(self, loss_scale: float) -> contextlib.AbstractContextManager[None]:
        """What forward and loss of training run in; evaluation and generation run outside of it, in the compute dtype.

        Args:
            loss_scale: gradient of a single token's loss, such as 1 / (tokens · accumulation steps).
        """
        return contextlib.nullcontext()

    def refuses(self, tokens: int, width: int) -> str | None:
        """Why micro-batches of `tokens` tokens of `width` channels cannot be trained, or None where they can."""
        return None

    def describe(self) -> dict[str, str]:
        """What each part of the model runs in, for the line printed at start and the run's record."""
        kind = _name(self.compute_dtype)
        return {"GEMMs": f"{kind} operands, fp32 accumulation", **self._storage()}

    def _storage(self) -> dict[str, str]:
        kind = _name(self.compute_dtype)
        return {"residual stream": kind, "matrices": _name(self.matrix_dtype), "embeddings": kind}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def fp32() -> Precision:
    """Everything in fp32: the reference, and what a CPU trains in."""
    return Precision("fp32", torch.float32)


def bf16() -> Precision:
    """bf16 stream and GEMM operands, fp32 matrices: nanochat's own way."""
    return Precision("bf16", torch.bfloat16)


def _not_divisible(recipe: Recipe, tokens: int, width: int, of_tokens: int, of_width: int) -> str | None:
    for count, multiple, what in ((tokens, of_tokens, "tokens a micro-batch"), (width, of_width, "channels")):
        if count % multiple:
            return f"recipe {recipe.name} needs a multiple of {multiple} {what}, not {count:,}"
    return None


@dataclass(frozen=True)
class TEPrecision(Precision):
    """Transformer Engine's modules in FP8 or FP4; what cannot be FP8, and all evaluation, is bf16.

    Attributes:
        recipe: how the GEMMs run.
        layers: "fused" takes LayerNormLinear and LayerNormMLP, "separate" one te.Linear for each Linear, for comparison.
        te_head: lm_head by te.Linear with whole logits rather than our chunks in bf16.
        weights: "bf16", or "fp8": modules hold FP8 only (`quantized_model_init`), quantized from fp32 matrices, which are
            what the optimizer updates.
        norm_weight: the norms have learnable scales, which other precisions and nanochat lack.
    """

    recipe: Recipe = RECIPES["delayed"]
    layers: Literal["fused", "separate"] = "fused"
    te_head: bool = False
    weights: Literal["bf16", "fp8"] = "bf16"
    norm_weight: bool = False

    def norm(self, width: int) -> nn.Module:
        """`te.RMSNorm`, of `width` channels."""
        return te_layers.TERMSNorm(width, self.norm_weight)

    def linear(self, in_features: int, out_features: int) -> Projection:
        """`te.Linear`."""
        return te_layers.TELinear(in_features, out_features, self.recipe, self.matrix_dtype, self.weights == "fp8")

    def norm_linear(self, *projections: Projection, head_size: int = 0) -> JoinedProjections:
        """`te.LayerNormLinear` behind the residual mix, or each projection by itself."""
        given = cast(tuple[te_layers.TELinear, ...], projections)
        if self.layers == "separate":
            return te_layers.SeparateNormLinear(*given)
        return te_layers.TENormLinear(*given, recipe=self.recipe, fp8_weights=self.weights == "fp8", norm_weight=self.norm_weight)

    def mlp(self, width: int, hidden: int) -> MLP:
        """`te.LayerNormMLP` with srelu, or two te.Linear."""
        fp8 = self.weights == "fp8"
        c_fc, c_proj = (
            te_layers.TELinear(*shape, self.recipe, self.matrix_dtype, fp8) for shape in ((width, hidden), (hidden, width))
        )
        if self.layers == "separate":
            return te_layers.SeparateMLP(c_fc, c_proj)
        return te_layers.TEMLP(c_fc, c_proj, self.recipe, fp8, self.norm_weight)

    def head(self, width: int, vocab: int, padded_vocab: int, softcap: float) -> LinearCrossEntropy:
        """Our chunked head in bf16, or `te.Linear`."""
        if not self.te_head:
            return super().head(width, vocab, padded_vocab, softcap)
        return te_layers.TEHead(width, vocab, padded_vocab, softcap, self.recipe, self.matrix_dtype)

    def scaling(self, model: nn.Module) -> scaling.ScalingState:
        """Of Transformer Engine's modules, which renew their scales themselves."""
        return te_engine.EngineScaling(model)

    def autocast(self, loss_scale: float) -> contextlib.AbstractContextManager[None]:
        """Transformer Engine's autocast with this recipe."""
        return te_engine.autocast(self.recipe, loss_scale)

    def refuses(self, tokens: int, width: int) -> str | None:
        """FP8 GEMMs want multiples of 16, scalings by block of 128, in every dimension."""
        multiple = 16 if self.recipe.fprop.left.scaling in ("delayed", "current") else 128
        return _not_divisible(self.recipe, tokens, width, multiple, multiple)

    def describe(self) -> dict[str, str]:
        """What each part of the model runs in."""
        fused = self.layers == "fused"
        return {
            "q, k, v": "te.LayerNormLinear, one GEMM" if fused else "te.Linear each",
            "attention output": "te.Linear",
            "MLP": "te.LayerNormMLP, srelu" if fused else "te.Linear each",
            "recipe": f"{self.recipe.name}: {as_run(self.recipe).describe()}",
            "head": "te.Linear, whole logits" if self.te_head else "bf16 operands in chunks",
            "gates": "bf16",
            "evaluation": "bf16 on FP8 weights" if self.weights == "fp8" else "bf16",
            "weights in FP8": "only, of fp32 matrices" if self.weights == "fp8" else "copies, made once a step",
            "gradients of matrices": "bf16, summed over micro-batches in bf16",
            "norm scales": "learned" if self.norm_weight else "none",
            **self._storage(),
        }


def te(
    recipe: Recipe, *, layers: Literal["fused", "separate"] = "fused", te_head: bool = False,
    weights: Literal["bf16", "fp8"] = "bf16", norm_weight: bool = False,
) -> TEPrecision:  # fmt: skip
    """Transformer Engine with `recipe`; arguments as in `TEPrecision`.

    Raises:
        ValueError: a combination that is not made; the message names it.
    """
    if layers == "separate" and norm_weight:
        raise ValueError("learned norm scales come with fused layers only")
    if weights == "fp8" and te_head:
        raise ValueError("FP8 weights are for the blocks: the head by te.Linear keeps bf16 weights")
    matrix_dtype = torch.float32 if weights == "fp8" else torch.bfloat16
    return TEPrecision("te", torch.bfloat16, matrix_dtype, recipe, layers, te_head, weights, norm_weight)


@dataclass(frozen=True)
class FP8Precision(Precision):
    """Our own FP8 layers; what the recipe excepts, gates and all evaluation are bf16, and so is the head beside fine scales.

    Attributes:
        recipe: how the GEMMs run, and what stays in bf16.
        emulated: the same numerics by plain PyTorch, on any device.
        path: dotted name of the part of the model that this makes layers for.
        made: names of all layers made so far, three GEMMs each, shared by the precisions of all parts.
        recompute: backward makes relu² again instead of keeping it.
    """

    recipe: Recipe = RECIPES["delayed"]
    emulated: bool = False
    recompute: bool = False
    path: str = ""
    made: set[str] = field(default_factory=set, compare=False, repr=False)

    def at(self, name: str) -> Self:
        """This precision for a part called `name` of this part."""
        return replace(self, path=f"{self.path}.{name}" if self.path else name)

    def _in_bf16(self) -> frozenset[str]:
        self.made.add(self.path)
        return self.recipe.gemms_in_bf16(self.path)

    @property
    def _fine(self) -> bool:
        """Whether scales are finer than one a tensor."""
        return self.recipe.fprop.left.scaling not in ("delayed", "current")

    def linear(self, in_features: int, out_features: int) -> FP8Linear | FineLinear:
        """A projection in FP8."""
        return self._linear(in_features, out_features, normed=False)

    def _linear(self, in_features: int, out_features: int, normed: bool) -> FP8Linear | FineLinear:
        in_bf16 = self._in_bf16()
        if self._fine:
            return FineLinear(in_features, out_features, self.recipe, self.matrix_dtype, self.emulated, in_bf16)
        return FP8Linear(in_features, out_features, self.recipe, self.matrix_dtype, self.emulated, in_bf16, normed)

    def norm_linear(self, *projections: Projection, head_size: int = 0) -> JoinedProjections:
        """Residual mix, norm and projections in one GEMM; with one scale a tensor and a `head_size` that fits, the heads too."""
        given = cast(tuple[Linear, ...], projections)
        if self._fine:
            return FineNormLinear(*given, recipe=self.recipe, emulated=self.emulated, in_bf16=self._in_bf16())
        return FP8NormLinear(*given, recipe=self.recipe, emulated=self.emulated, in_bf16=self._in_bf16(), head_size=head_size)

    def mlp(self, width: int, hidden: int) -> MLP:
        """The MLP; with one scale a tensor relu² is inside its GEMMs."""
        c_fc, c_proj = self.at("c_fc")._linear(width, hidden, normed=True), self.at("c_proj").linear(hidden, width)
        if isinstance(c_fc, FineLinear) and isinstance(c_proj, FineLinear):
            return FineMLP(c_fc, c_proj)
        assert isinstance(c_fc, FP8Linear) and isinstance(c_proj, FP8Linear)
        return FP8ReluSquaredMLP(c_fc, c_proj, self.recipe, self.emulated, self.recompute)

    def head(self, width: int, vocab: int, padded_vocab: int, softcap: float) -> LinearCrossEntropy:
        """lm_head with its loss, in FP8 but for the GEMMs that the recipe excepts."""
        if not self._fine:
            self.made.add("lm_head")
        if len(self.head_in_bf16) == len(GEMMS):
            return super().head(width, vocab, padded_vocab, softcap)
        numbers = self.recipe, self.matrix_dtype, self.emulated, self.head_in_bf16
        return FP8LinearCrossEntropy(width, vocab, padded_vocab, softcap, *numbers)

    @property
    def head_in_bf16(self) -> frozenset[str]:
        """Which of lm_head's GEMMs stay in bf16: all of them where scales are finer than one a tensor."""
        return frozenset(GEMMS) if self._fine else self.recipe.gemms_in_bf16("lm_head")

    def _head_line(self) -> str:
        if len(self.head_in_bf16) == len(GEMMS):
            return "bf16 operands in chunks"
        excepted = "".join(f", {gemm} in bf16" for gemm in sorted(self.head_in_bf16))
        return f"FP8 GEMMs in chunks, logits' gradient in E5M2{excepted}"

    def scaling(self, model: nn.Module) -> scaling.ScalingState:
        """Of all casts in `model`.

        Raises:
            ValueError: the recipe excepts something that the model has not.
        """
        for pattern in self.recipe.bf16:
            if not any(covers(pattern, name) for name in self.made):
                names = ", ".join(sorted(self.made)[:4])
                raise ValueError(f"recipe {self.recipe.name}: bf16={pattern} is no part of this model, whose layers are {names}, …")
        kinds = (FP8Linear, FP8NormLinear, FP8ReluSquaredMLP, FP8LinearCrossEntropy)
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds) and layer.projections}
        for name, layer in model.named_modules():
            if self.recompute and isinstance(layer, FP8ReluSquaredMLP) and not layer.projections:
                raise ValueError(
                    f"relu² is made again where an MLP is in FP8 as a whole: {self.recipe.name} leaves some of {name} in bf16"
                )
        sites = {name: [site for part in layer.projections for site in part.sites] for name, layer in layers.items()}
        return scaling.Scaling(sites, self.recipe)

    def autocast(self, loss_scale: float) -> contextlib.AbstractContextManager[None]:
        """Compute in FP8."""
        return scaling.autocast(loss_scale)

    def refuses(self, tokens: int, width: int) -> str | None:
        """FP8 GEMMs want multiples of 16 in every dimension, cuBLAS's scales of 128×128 blocks come in fours."""
        multiples = (128, 512) if self.recipe.fprop.left.scaling == "block1x128" else (16, 16)
        return _not_divisible(self.recipe, tokens, width, *multiples)

    def describe(self) -> dict[str, str]:
        """What each part of the model runs in."""
        excepted = [gemms for name in self.made if (gemms := self.recipe.gemms_in_bf16(name))]
        mixed = sum(0 < len(self.recipe.gemms_in_bf16(name)) < len(GEMMS) for name in self.made - {"lm_head"})
        fused = {
            "q, k, v": "norm and cast in one kernel, one FP8 GEMM, with rotary and QK norm in its epilogue if heads have "
            + " or ".join(map(str, FUSED_HEADS)),
            "attention output": "FP8 GEMM, added to the stream by the MLP's norm",
            "MLP": "FP8 GEMMs, relu² and its derivative in their epilogues; added to the stream by the next block's mix"
            + (", relu² made again in backward" if self.recompute else ""),
        }
        apart = {part: "FP8 GEMM, each operand cast by itself" for part in fused}
        count = f"{sum(map(len, excepted))} of {len(GEMMS) * len(self.made)} GEMMs"
        count += f"; {mixed} layers with some of theirs in FP8 are not fused" if mixed else ""
        kept = f"{', '.join(self.recipe.bf16)} ({count})" if self.recipe.bf16 else "none"
        return {
            **(apart if self._fine else fused),
            "recipe": f"{self.recipe.name}: {self.recipe.describe()}",
            "FP8": "emulated in fp32" if self.emulated else "tensor cores",
            "GEMMs left in bf16": kept,
            "head": self._head_line(),
            "gates": "bf16",
            "evaluation": "bf16",
            "weights in FP8": "copies with their transposes, made once a step",
            "gradients of matrices": "bf16, summed over micro-batches in bf16",
            **self._storage(),
        }


def fp8(recipe: Recipe, *, emulated: bool = False, recompute: bool = False) -> FP8Precision:
    """Our own FP8 layers with `recipe`.

    Args:
        recipe: in FP8; scaled by tensor it is fast, by row or block it is there for comparison.
        emulated: the same numerics by plain PyTorch, on any device.
        recompute: backward makes relu² again instead of keeping it.

    Raises:
        ValueError: a recipe that these layers have not; the message says what they have.
    """
    x, w, dy = recipe.fprop.left, recipe.fprop.right, recipe.dgrad.left
    if not {operand.format for operand in recipe.operands} <= {"e4m3", "e5m2"} or "mx32" in (x.scaling, w.scaling, dy.scaling):
        raise ValueError(f"recipe {recipe.name}: our own FP8 layers have delayed, current, e4m3, rowwise and blockwise")
    if (recipe.dgrad.right, recipe.wgrad.left, recipe.wgrad.right) != (w, dy, x):
        raise ValueError(f"recipe {recipe.name}: our own FP8 layers cast a tensor once for all GEMMs: {recipe.describe()}")
    made = FP8Precision("fp8-emulated" if emulated else "fp8", torch.bfloat16, torch.bfloat16, recipe, emulated, recompute)
    if recompute and made._fine:
        raise ValueError(f"recipe {recipe.name} keeps relu² in bf16: it is made again with one scale a tensor only")
    return made
