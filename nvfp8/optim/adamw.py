"""AdamW: fp32 math, each state stored as its codec says, all tensors of a step in one pass over memory.

    m ← m + (1 - β₁)(g - m),   v ← v + (1 - β₂)(g² - v)
    p ← p·(1 - lr·wd) - lr / (1 - β₁ᵗ) · m / (√(v / (1 - β₂ᵗ)) + eps)

Decoupled weight decay (arXiv 1711.05101), eps outside the root. What is read is widened to fp32, what is written is rounded once.
Where m is FP8, √v counts as no less than m's smallest code (`nvfp8/reference_optim.py` says why). In FP8 what is not finite
spreads over the 128 elements that share its scale, and stays: look at gradients before a step.

On a GPU that is one launch for each combination of storage (`nvfp8/kernels/adamw.py`), which reads g and reads and writes the
rest once: 14 bytes a parameter where all are bf16, 28 where all are fp32, 12.1 for a bf16+8 weight with both moments in FP8 and
its gradient in bf16.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nvfp8.ops import ops
from nvfp8.optim.shards import local
from nvfp8.optim.stored import StoredOptimizer
from nvfp8.reference_optim import AdamWTensor, Copies
from nvfp8.rounding import BLOCK
from nvfp8.state import Master


class AdamW(StoredOptimizer):
    """AdamW for fp32 and bf16 parameters, DTensors included."""

    coded = ("exp_avg", "exp_avg_sq")

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.01,
        *, exp_avg_dtype: str = "fp32", exp_avg_sq_dtype: str = "fp32", master_weights: str = "fp32", stochastic: bool = True,
        seed: int = 0,
    ) -> None:  # fmt: skip
        """Allocate both moments of every parameter, as zeros, and what is kept beside bf16 ones.

        Args:
            params: as for any torch optimizer.
            lr: learning rate.
            betas: β₁, β₂.
            eps: added to the root.
            weight_decay: wd.
            exp_avg_dtype: how m is stored, a key of `nvfp8.state.STATE_DTYPES`.
            exp_avg_sq_dtype: how v is stored; in FP8 its root.
            master_weights: what is kept beside bf16 parameters, a key of `nvfp8.state.MASTERS`; fp32 ones are whole.
            stochastic: round bf16, of parameters that nothing completes and of moments, stochastically, or to nearest, which loses
                small updates and freezes a v whose β₂ is over 0.996. FP8 is always rounded stochastically.
            seed: of stochastic rounding.

        Raises:
            ValueError: no format is called so, a parameter is neither fp32 nor bf16, or not contiguous, or a rate cannot be.
        """
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "exp_avg_dtype": exp_avg_dtype,
            "exp_avg_sq_dtype": exp_avg_sq_dtype, "master_weights": master_weights, "stochastic": stochastic, "seed": seed,
        }  # fmt: skip
        super().__init__(params, defaults)

    def _index(self) -> None:
        super()._index()
        self._plans: dict[Any, Tensor] = {}  # the kernel's

    def _allocate(self, group: dict[str, Any], kept: Master) -> None:
        for p in group["params"]:
            part = local(p)
            moments = {what: self._codec(group, what).allocate(part.shape, part.device) for what in self.coded}
            self._keep(p, moments, kept.allocate(part))

    def _writes_copies(self, parameter: Tensor) -> bool:
        # A tile of a transpose must be whole blocks of elements that share a scale.
        return super()._writes_copies(parameter) and parameter.ndim == 2 and parameter.shape[1] % BLOCK == 0

    def _rates(self, parameter: Tensor, group: dict[str, Any], steps: int) -> tuple[float, ...]:
        beta1, beta2 = (float(beta) for beta in group["betas"])
        lr, unbias2 = float(group["lr"]), 1 / (1 - beta2**steps)
        keep = 1 - lr * float(group["weight_decay"])
        return 1 - beta1, 1 - beta2, lr / (1 - beta1**steps), unbias2, float(group["eps"]), keep, math.sqrt(unbias2)

    def _prepared(
        self, given: Sequence[tuple[Tensor, Tensor]], written: Mapping[Tensor, Copies], numbers: Mapping[torch.device, Tensor]
    ) -> Callable[[], None]:
        by_device: dict[torch.device, list[AdamWTensor]] = {}
        rows = {device: table.unbind() for device, table in numbers.items()}
        for row, (p, gradient) in enumerate(given):
            first, second = (self._stored(p, what) for what in self.coded)
            kept, stochastic = self._kept(p), self._group_of[p]["stochastic"]
            tensor = AdamWTensor(local(p), gradient, first, second, kept, rows[p.device][row], stochastic, written.get(p))
            by_device.setdefault(p.device, []).append(tensor)
        launches = [ops(tensors[0].parameter).adamw_prepared(tensors, self._plans) for tensors in by_device.values()]

        def launch() -> None:
            for each in launches:
                each()

        return launch
