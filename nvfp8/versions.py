"""Whoever updates a weight, it has another version then: by that FP8 layers see that their copies are stale.

In-place operations raise a tensor's version counter. torch's fused optimizers, whose one kernel writes all weights, do not (AdamW
and SGD with `fused=True`, torch 2.13), and layers would go on with the first step's FP8 weights. So a hook behind the step of every
optimizer of torch's kind raises the counters of what it holds. Our own do so themselves, before they write copies for that version.
"""

from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from nvfp8.optim.stored import StoredOptimizer


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _raise_versions(optimizer: Optimizer, *_: Any) -> None:
    if not isinstance(optimizer, StoredOptimizer):
        changed = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch.autograd.graph.increment_version(changed)


def follow_optimizers() -> None:
    """Raise versions from here on; called once, by whatever module makes layers."""
    register_optimizer_step_post_hook(_raise_versions)
