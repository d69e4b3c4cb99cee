"""AdamW for embeddings, the head and the scalars: fp32 math, each state stored as its codec says.

    m ← m + (1 - β₁)(g - m),   v ← v + (1 - β₂)(g² - v)
    p ← p·(1 - lr·wd) - lr / (1 - β₁ᵗ) · m / (√(v / (1 - β₂ᵗ)) + eps)

Decoupled weight decay (arXiv 1711.05101), eps outside the root. Embedding tables are bf16 and so are their moments:
what is read is widened to fp32, what is written is rounded once.

On a GPU this is one compiled pass per parameter: p, m, v read and written, g read. That is 14 bytes a parameter where
all are bf16 and 28 where all are fp32: at d24 10.6 GB, 2.5 ms at 4.2 TB/s. Two graphs are compiled (bf16 and fp32).
Tensors are passed flat, so that no shape makes a third.
"""

from typing import Any

import torch
from torch import Tensor

from nanochat.optimizer import NamedOptimizer, fused, gradient, scalar
from nvfp8.state import Codec, codec_of


def _update(
    parameter: Tensor,  # (n,) any float
    master: Tensor | None,  # (n,) fp32, of which the parameter is the rounded copy
    grad: Tensor,  # (n,) any float
    exp_avg: Tensor,  # (n,) stored
    exp_avg_sq: Tensor,  # (n,) stored
    codec: Codec,
    take1: Tensor,  # () 1 - β₁
    take2: Tensor,  # () 1 - β₂
    step_size: Tensor,  # () lr / (1 - β₁ᵗ)
    unbias2: Tensor,  # () 1 / (1 - β₂ᵗ)
    eps: Tensor,  # ()
    keep: Tensor,  # () 1 - lr·wd
) -> None:
    """One AdamW step of one tensor, in place. The differences of betas from 1 come ready made, exact to fp32."""
    g = grad.float()
    m = codec.decode(exp_avg)
    m = m + take1 * (g - m)
    v = codec.decode(exp_avg_sq)
    v = v + take2 * (g * g - v)
    value = parameter.float() if master is None else master
    value = value * keep - step_size * (m / ((v * unbias2).sqrt() + eps))
    if master is not None:
        master.copy_(value)
    parameter.copy_(value)
    codec.encode_(exp_avg, m)
    codec.encode_(exp_avg_sq, v)


class AdamW(NamedOptimizer):
    """AdamW over groups that each hold lr, betas, eps, weight_decay and master."""

    kind = "adamw"

    def __init__(self, groups: list[dict[str, Any]], codec: Codec | None = None) -> None:
        """Allocate both moments of every parameter, as zeros, and the masters.

        Args:
            groups: `params` (contiguous), parallel `names`, lr, betas (β₁, β₂), eps, weight_decay; `master`: False for
                tables that are their own master, whose moments have their dtype.
            codec: how all moments are stored; None is fp32, or a table's own dtype.

        Raises:
            ValueError: names do not match parameters, or a dtype has no codec.
        """
        super().__init__(groups)
        for group in self.param_groups:
            for p in group["params"]:
                c = codec or codec_of(torch.float32 if group["master"] else p.dtype)
                self.state[p] = {"codec": c, **{k: c.allocate(p.shape, p.device) for k in ("exp_avg", "exp_avg_sq")}}
                if group["master"] and p.dtype != torch.float32:
                    self.state[p]["master"] = p.detach().float()

    def named_state(self) -> dict[str, Tensor]:
        """Return `<name>.exp_avg`, `.exp_avg_sq` and, where there is one, `.master` of every parameter, as stored."""
        return {
            f"{name}.{key}": self.state[p][key]
            for name, p in self.named_parameters()
            for key in ("exp_avg", "exp_avg_sq", "master")
            if key in self.state[p]
        }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no line search here
        """Update every parameter from its gradient."""
        self.steps += 1
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            hyper = (
                scalar(1 - beta1),
                scalar(1 - beta2),
                scalar(group["lr"] / (1 - beta1**self.steps)),
                scalar(1 / (1 - beta2**self.steps)),
                scalar(group["eps"]),
                scalar(1 - group["lr"] * group["weight_decay"]),
            )
            for p in group["params"]:
                s = self.state[p]
                master = s["master"].view(-1) if "master" in s else None
                flat = (p.view(-1), master, gradient(p).reshape(-1), s["exp_avg"].view(-1), s["exp_avg_sq"].view(-1))
                fused(_update, p)(*flat, s["codec"], *hyper)
        self.mark_changed()
