"""FP8 layers with finer scales than one a tensor: `rowwise`, a scale a row, and `blockwise`, one for 1×128 or 128×128 elements.

A GEMM can take scales that differ along what it does not sum over, and cuBLAS on Hopper also scales that change every 128 along
the sum (arXiv 2412.19437). An outlier then costs its own row or block only. The price: every layout of a tensor has scales of its
own, x by row for fprop and xᵀ by row for wgrad, each measured before it is cast. So no kernel here casts what it computes, no
history helps, and gradients are cast by the layer that reads them. Nothing is fused but norm, mix and relu²: these recipes are
for comparing what a model learns, not for speed.

Kept for backward: xᵀ in FP8 of each projection (x where its wgrad is left in bf16), the norms' inputs, relu(h)² in bf16.
What is not finite becomes NaN (its scale is 0), in the loss or a gradient, where a run looks.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nvfp8 import reference, scaling
from nvfp8.layers import Linear, NormLinear, Pending, ReluSquaredMLP, RMSNorm, mix, settled, stacked
from nvfp8.matmul import matmul, weight_gradient
from nvfp8.ops import ops
from nvfp8.recipe import GEMMS, Operand, Recipe

BLOCK = 128


class FineFP8(NamedTuple):
    """A matrix (R, K) in FP8: x ≈ data · inverse, repeated to the shape.

    Attributes:
        data: (R, K), to be summed over K.
        inverse: fp32, (R, 1), (R, K/128) with R contiguous, or (R/128, K/128): layouts that cuBLAS takes.
    """

    data: Tensor
    inverse: Tensor


def cast(x: Tensor, operand: Operand, emulated: bool = False) -> FineFP8:
    """Quantize x (R, K), of any strides, with scales measured along K, as `operand` says; blocks want multiples of 128."""
    rows, columns = {"row": (1, x.shape[1]), "block1x128": (1, BLOCK), "block128x128": (BLOCK, BLOCK)}[operand.scaling]
    # (R/rows, K/columns, rows, columns): what shares a scale lies side by side, then, and becomes a row.
    blocks = x.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2)
    quantize_rows = (reference if emulated else ops(x)).quantize_rows
    data, inverse = quantize_rows(blocks.reshape(-1, rows * columns), scaling.DTYPES[operand.format])
    data, inverse = data.view(blocks.shape).transpose(1, 2).reshape(x.shape), inverse.view(blocks.shape[:2])
    # One scale a row and 128 columns lies with rows contiguous, the others as they are.
    return FineFP8(data, inverse.t().contiguous().t() if operand.scaling == "block1x128" else inverse)


def _decoded(x: FineFP8) -> Tensor:
    rows, columns = (size // blocks for size, blocks in zip(x.data.shape, x.inverse.shape, strict=True))
    return x.data.float() * x.inverse.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def product(a: FineFP8, b: FineFP8, out_dtype: torch.dtype, fast: bool, emulated: bool) -> Tensor:
    """The product a (M, K) · b (N, K)ᵀ -> (M, N).

    Raises:
        ValueError: E5M2 times E5M2, an operand that is not contiguous along K, or a width that cuBLAS would read other scales for;
            refused on every device.
    """
    if a.data.dtype == b.data.dtype == torch.float8_e5m2:
        raise ValueError("e5m2 times e5m2 is not a product that tensor cores offer")
    if not (a.data.is_contiguous() and b.data.is_contiguous()):
        raise ValueError("both operands must be contiguous along the summed axis")
    # cuBLAS takes rows of such scales padded to fours; PyTorch hands on what it is given and, in 2.11, no padding.
    if any(len(x.inverse) < len(x.data) and x.inverse.shape[1] % 4 for x in (a, b)):
        raise ValueError(f"scales of 128×128 elements come in fours: {a.data.shape[1]} summed must be a multiple of 512")
    if a.data.is_cuda and not emulated:
        return torch._scaled_mm(
            a.data, b.data.t(), scale_a=a.inverse, scale_b=b.inverse.t(), out_dtype=out_dtype, use_fast_accum=fast
        )
    return (_decoded(a) @ _decoded(b).t()).to(out_dtype)


class _FineLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "FineProjection", *weights: Tensor) -> Tensor:
        recipe, flat, left = layer.recipe, x.flatten(0, -2), layer.in_bf16
        ctx.layer, (w, w_t) = layer, layer.copies()
        kept = (flat, None) if "wgrad" in left else cast(flat.t(), recipe.wgrad.right, layer.emulated)
        # Saved as tensors, not on ctx: an old graph somebody still holds must not keep an old step's copies.
        ctx.save_for_backward(*kept, *((None, None, *weights) if w_t is None else w_t))
        if w is None:
            return matmul(x, stacked(weights, x.dtype).t())
        out = product(cast(flat, recipe.fprop.left, layer.emulated), w, x.dtype, recipe.fprop.fast_accumulation, layer.emulated)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        layer: FineProjection = ctx.layer
        recipe, flat = layer.recipe, d_out.flatten(0, -2)
        x, inverse, w_t, w_inverse, *weights = ctx.saved_tensors
        dgrad, wgrad = recipe.dgrad, recipe.wgrad
        if w_t is None:
            dx = matmul(flat, stacked(weights, d_out.dtype))
        else:
            dy, w = cast(flat, dgrad.left, layer.emulated), FineFP8(w_t, w_inverse)
            dx = product(dy, w, d_out.dtype, dgrad.fast_accumulation, layer.emulated)
        dtype = layer.layers[0].weight.dtype
        if inverse is None:
            dw = weight_gradient(flat, x, dtype)
        else:
            dw = product(
                cast(flat.t(), wgrad.left, layer.emulated), FineFP8(x, inverse), dtype, wgrad.fast_accumulation, layer.emulated
            )
        return dx.view(*d_out.shape[:-1], -1), None, *dw.split([len(part.weight) for part in layer.layers])


class FineProjection:
    """One weight, or several stacked, and its two FP8 copies, cast when a parameter has changed."""

    def __init__(self, layers: tuple[Linear, ...], recipe: Recipe, emulated: bool, in_bf16: frozenset[str]):
        """Cast nothing yet; `in_bf16` are those of GEMMS that stay in bf16, not all."""
        self.layers, self.recipe, self.emulated, self.in_bf16 = layers, recipe, emulated, in_bf16
        self._cast_from: list[tuple[int, int, int]] = []
        self._copies: tuple[FineFP8 | None, FineFP8 | None] | None = None

    @torch.no_grad()
    def copies(self) -> tuple[FineFP8 | None, FineFP8 | None]:
        """W (N, K) for fprop and Wᵀ (K, N) for dgrad, None for what is in bf16."""
        cast_from = [(id(part.weight), part.weight.data_ptr(), part.weight._version) for part in self.layers]
        if self._copies is None or cast_from != self._cast_from:
            w = torch.cat([part.weight.detach() for part in self.layers])
            self._copies = (
                None if "fprop" in self.in_bf16 else cast(w, self.recipe.fprop.right, self.emulated),
                None if "dgrad" in self.in_bf16 else cast(w.t(), self.recipe.dgrad.right, self.emulated),
            )
            self._cast_from = cast_from
        return self._copies

    def __call__(self, x: Tensor) -> Tensor:
        """(..., K) bf16 -> (..., N)."""
        out: Tensor = _FineLinear.apply(x, self, *[part.weight for part in self.layers])
        return out


class FineLinear(Linear):
    """x·Wᵀ without bias."""

    def __init__(
        self, in_features: int, out_features: int, recipe: Recipe, dtype: torch.dtype, emulated: bool, in_bf16: frozenset[str]
    ):
        """Allocate the weight (out_features, in_features); `in_bf16`, of GEMMS, stay in bf16."""
        super().__init__(in_features, out_features, dtype)
        self.projection = None if in_bf16 >= set(GEMMS) else FineProjection((self,), recipe, emulated, in_bf16)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) bf16 -> (..., out_features)."""
        if self.projection is None or scaling.active() is None:
            return super().forward(x)
        return self.projection(x)


class FineNormLinear(NormLinear):
    """Residual mix, RMSNorm and several projections in one GEMM."""

    def __init__(self, *projections: Linear, recipe: Recipe, emulated: bool, in_bf16: frozenset[str]):
        """Join `projections`, all with the same in_features."""
        super().__init__(*projections)
        self.projection = None if in_bf16 >= set(GEMMS) else FineProjection(projections, recipe, emulated, in_bf16)

    def forward(self, x: Tensor | Pending, x0: Tensor, lambdas: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `NormLinear`."""
        if self.projection is None or scaling.active() is None:
            return super().forward(x, x0, lambdas, width)
        stream, branch, x0, head = mix(x, x0, lambdas, width)
        return stream, x0, head, self.projection(RMSNorm()(branch))


class _ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        activated = ops(h).relu_squared_(h.detach())  # over h, which nobody keeps
        ctx.save_for_backward(activated)
        return activated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_activated: Tensor) -> Tensor:
        (activated,) = ctx.saved_tensors
        return ops(activated).relu_squared_backward_(d_activated.contiguous(), activated)


class FineMLP(ReluSquaredMLP):
    """x + c_proj(relu(c_fc(norm(x)))²)."""

    def __init__(self, c_fc: FineLinear, c_proj: FineLinear):
        """Join c_fc (hidden, width) and c_proj (width, hidden)."""
        nn.Module.__init__(self)
        self.c_fc, self.c_proj = c_fc, c_proj

    def forward(self, x: Tensor | Pending, settle: bool = True) -> Tensor | Pending:
        """As `ReluSquaredMLP`."""
        if scaling.active() is None:
            return super().forward(x, settle)
        stream = settled(x)
        pending = Pending(stream, self.c_proj(_ReluSquared.apply(self.c_fc(RMSNorm()(stream)))))
        return settled(pending) if settle else pending
