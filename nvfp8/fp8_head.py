"""The output head in FP8: three GEMMs at twice bf16's rate, and a gradient of the logits that is never wider than a byte.

`nvfp8/head.py` says why the loss is taken chunk by chunk. In FP8 a chunk has two buffers of CHUNK_BYTES, the gradient of its logits
as it lies (for dx) and transposed (for dW), and half a one for logits in bf16: they exist only between a GEMM and the kernel behind
it, so a quarter of the rows at a time is enough. With a vocabulary of 32,768 a chunk is 8,192 rows. Fewer would be slower: every
chunk but the first reads dW in fp32 and writes it, 8 bytes a weight; and dx of 2,048 rows and 768 channels is 96 tiles of 128 × 128
for 132 multiprocessors. More would make the head the step's peak by more.

    x̂ (E4M3) · W (E4M3) → logits in bf16 → loss, and (softmax − onehot)·(1 − tanh²) in E5M2 → dx, dW

* **No amax pass.** x̂ comes from a norm, so |x̂| ≤ √D; a weight is measured when it is cast, once a step; and no element of that
  gradient is above 1, whatever the batch. 1 / valid tokens and the accumulation's factor are left to the GEMM's scale, so they
  never meet the format.
* **Logits are read once**, for codes over the part of a softmax's sum that is known early; `factors` multiply the row of dx behind
  the GEMM, and the row of x̂ that meets the codes' transpose (`nvfp8/kernels/cross_entropy_fp8.py`). The scale splits E5M2's range:
  with 2⁸ the sum may be 57,344 / 2⁸ = 224 times the known part (where all logits are equal it is 32 times), and where it is not
  larger, probabilities below 2⁻²² lose bits, and from 2⁻²⁵ on all (the mean one is 2⁻¹⁵ in a vocabulary of 32,768). E4M3 spans half
  as many powers of two. Of a row of x̂ more falls among E4M3's subnormal numbers so, 3.5 % of a normal distribution at 1/32 where
  it was 0.1 % (D = 1,536): nothing to be seen in dW.
* **Logits are bf16, softcap and softmax fp32** in the kernel's registers: the FP8 operands err by 2⁻⁴ each way, bf16 by 2⁻⁹ of the
  sum of D of their products; but a softmax of bf16 exponentials would not sum to 1.
* **Each GEMM may stay in bf16**: `bf16=lm_head` in a recipe leaves all (this file is not used then), `bf16=lm_head:dgrad` one.

Outside `scaling.autocast` everything is bf16 from the weight as it is, as in other FP8 layers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nvfp8 import scaling
from nvfp8.head import LinearCrossEntropy, chunk_rows, counted, scaled_gradients
from nvfp8.matmul import add_matmul_, fp8_matmul, matmul
from nvfp8.quantize import Projection
from nvfp8.recipe import GEMMS, Recipe

PARTS = 4  # of a chunk, whose logits exist one after the other


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, head: "FP8LinearCrossEntropy", scale: float, with_gradient: bool
    ) -> Tensor:
        factor, of_logits = counted(targets, scale), head.projections[0].dy
        inverse = of_logits.inverse * factor
        needs_gradient = with_gradient and any(ctx.needs_input_grad)
        tokens = x.shape[0]
        if tokens % 16:  # they are what dW sums over
            x, targets = F.pad(x, (0, 0, 0, -tokens % 16)), F.pad(targets, (0, -tokens % 16), value=-1)
        losses = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
        dx, dw, left, w = torch.empty_like(x) if needs_gradient else None, None, head.projections[0].in_bf16, weight.detach()
        if "fprop" in left or ("dgrad" in left and needs_gradient):
            w = w.to(x.dtype)
        for start in range(0, x.shape[0], rows := chunk_rows(weight.shape[0], torch.float8_e5m2)):
            chunk = slice(start, start + rows)
            out = None if dx is None else dx[chunk]
            dw = head.chunk(x[chunk], w, targets[chunk], losses[chunk], factor, inverse, out, dw)
        ctx.save_for_backward(None if dx is None else dx[:tokens], dw)
        ctx.used, ctx.weight_dtype = False, weight.dtype
        return losses.sum() * factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        return *scaled_gradients(ctx, d_loss), None, None, None, None


class FP8LinearCrossEntropy(LinearCrossEntropy):
    """lm_head with softcap and loss, its GEMMs in FP8; x must come from a norm without learned scales."""

    def __init__(
        self, width: int, vocab: int, padded_vocab: int, softcap: float, recipe: Recipe, dtype: torch.dtype, emulated: bool,
        in_bf16: frozenset[str] = frozenset(),
    ):  # fmt: skip
        """Allocate the weight (padded_vocab, width), both multiples of 16; `in_bf16` are the GEMMs left in bf16, not all three."""
        super().__init__(width, vocab, padded_vocab, softcap, dtype)
        self.projections = (Projection((self,), recipe, emulated, normed=True, in_bf16=in_bf16, of_logits=True),)

    def loss(self, x: Tensor, targets: Tensor, scale: float) -> Tensor:
        """As `LinearCrossEntropy.loss`, of x (N, D) bf16 with |x| ≤ √D; elsewhere it saturates."""
        loss_scale = scaling.active()
        if loss_scale is None:
            return super().loss(x, targets, scale)
        scaling.owner(self.projections[0].x).begin(x.device, loss_scale)
        loss: Tensor = _Loss.apply(x, self.weight, targets, self, scale, torch.is_grad_enabled())
        return loss

    def chunk(
        self, x: Tensor, weight: Tensor, targets: Tensor, losses: Tensor, factor: Tensor, inverse: Tensor, dx: Tensor | None,
        dw: Tensor | None,
    ) -> Tensor | None:  # fmt: skip
        """Losses of a chunk of rows, and their gradients.

        Args:
            x: (R, D) bf16, R a multiple of 16.
            weight: (V', D), of x's dtype where a GEMM in bf16 reads it.
            targets: (R,) int64.
            losses: (R,) fp32, written.
            factor: 0-D fp32, gradient of every valid token's loss.
            inverse: 0-D fp32, `factor` over the scale of the logits' gradient in FP8.
            dx: (R, D) bf16, written; None where no gradient is wanted.
            dw: (V', D) fp32, sum over the chunks before, added to in place; None before the first.

        Returns:
            dw, or None where no gradient is wanted.
        """
        projection, w = self.projections[0], self.projections[0].weight()
        site, dy, recipe = projection.x, projection.dy, projection.recipe
        in_fp8 = {gemm: gemm not in projection.in_bf16 for gemm in GEMMS}
        kernels, shape = site.kernels(x), (len(x), len(weight))
        x_q = q = q_t = factors = None
        if in_fp8["fprop"]:
            x_q, _ = kernels.quantize(x, site.scale, site.dtype, site.amax, rows=True, columns=False)
        if dx is not None and in_fp8["dgrad"]:
            q = torch.empty(shape, dtype=dy.dtype, device=x.device)
        if dx is not None and in_fp8["wgrad"]:
            q_t = torch.empty(shape[::-1], dtype=dy.dtype, device=x.device)
        if q is not None and q_t is not None:
            factors = torch.empty(len(x), dtype=torch.float32, device=x.device)
        for start in range(0, len(x), rows := chunk_rows(len(weight), dy.dtype) // PARTS):
            part = slice(start, start + rows)
            logits = matmul(x[part], weight.t()) if x_q is None else projection.fprop(x_q[part], site.inverse, w, x.dtype)
            if dx is None:
                losses[part] = kernels.softcap_cross_entropy_(logits, targets[part], self.vocab, self.softcap, None)
            elif factors is not None:
                assert q is not None and q_t is not None
                kernels.softcap_cross_entropy_quantize(
                    logits, targets[part], losses[part], factors[part], self.vocab, self.softcap, dy.scale, q[part], q_t[:, part]
                )
            else:  # the gradient in bf16 over the logits; of it, codes for the GEMM that is in FP8
                losses[part] = kernels.softcap_cross_entropy_(logits, targets[part], self.vocab, self.softcap, factor)
                if q is not None:
                    q[part], _ = kernels.quantize(logits, dy.scale / factor, dy.dtype, None, rows=True, columns=False)
                else:
                    matmul(logits, weight, dx[part])
                if q_t is not None:
                    _, q_t[:, part] = kernels.quantize(logits, dy.scale / factor, dy.dtype, None, rows=False, columns=True)
                else:
                    dw = torch.zeros_like(weight, dtype=torch.float32) if dw is None else dw
                    add_matmul_(dw, logits.t(), x[part])
            del logits  # before the next part's are made
        if dx is not None and q is not None:
            assert w.t is not None
            # Promoted to fp32 whatever the recipe says of dgrad: this one sums over the vocabulary.
            fp8_matmul(q, w.t, inverse, w.inverse, dx.dtype, False, emulated=projection.emulated, out=dx)
            if factors is not None:
                kernels.scale_rows_(dx, factors)
        if q_t is not None:
            amax = site.amax if x_q is None else None  # else x was measured
            _, x_t = kernels.quantize(x, site.scale, site.dtype, amax, rows=False, columns=True, factors=factors)
            dw = fp8_matmul(
                q_t, x_t, inverse, site.inverse, torch.float32, recipe.wgrad.fast_accumulation, emulated=projection.emulated,
                out=dw, add=dw is not None,
            )  # fmt: skip
        return dw
