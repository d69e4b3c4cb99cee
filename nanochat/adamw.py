"""AdamW for embeddings, the head and the scalars: `nvfp8.optim.AdamW` over nanochat's groups.

Embedding tables feed a bf16 stream, so they are bf16, and they are their own masters (`master` False in their group), as nanochat
has them: a byte of remainder for each would be 0.6 GiB at d24. How they are rounded follows what is asked of the others:

    masters fp32            to nearest, nanochat's way, and so are their moments in bf16: β₂ is 0.995 at most there
    bf16, bf16+8, bf16+16   stochastically: it costs no byte, and what bf16 cannot hold adds up on average
"""

from typing import Any

import torch

from nanochat.optimizer import StoredByName
from nvfp8 import optim


class AdamW(StoredByName, optim.AdamW):
    """AdamW over groups that each hold lr, betas, eps, weight_decay and master."""

    kind = "adamw"

    def __init__(
        self, groups: list[dict[str, Any]], *, exp_avg: str | None = None, exp_avg_sq: str | None = None, master: str = "fp32",
        seed: int = 0,
    ) -> None:  # fmt: skip
        """Allocate both moments of every parameter, as zeros, and what is kept beside bf16 weights.

        Args:
            groups: `params` (contiguous), parallel `param_names`, lr, betas (β₁, β₂), eps, weight_decay; `master`: False for
                tables that are their own master.
            exp_avg: how the first moment is stored, a key of `nvfp8.state.STATE_DTYPES`; None is fp32, of bf16 tables bf16.
            exp_avg_sq: the same of the second.
            master: what is kept beside bf16 weights, a key of `nvfp8.state.MASTERS`.
            seed: of stochastic rounding.

        Raises:
            ValueError: names do not match parameters, or no format is called so.
        """
        for group in groups:
            table = not group["master"]
            own = "bf16" if table and all(p.dtype == torch.bfloat16 for p in group["params"]) else "fp32"
            group["exp_avg_dtype"], group["exp_avg_sq_dtype"] = exp_avg or own, exp_avg_sq or own
            group["master_weights"] = "bf16" if table else master
            group["stochastic"] = not table or master != "fp32"
        optim.AdamW.__init__(self, groups, seed=seed)
