"""Muon for every matrix of the blocks: `nvfp8.optim.Muon` over nanochat's group.

All its state is in the formats asked for: there are no tables here, and a matrix that is bf16 has what `master` keeps beside it.
"""

from typing import Any

import torch

from nanochat.optimizer import StoredByName
from nvfp8 import optim


class Muon(StoredByName, optim.Muon):
    """Muon over groups that each hold lr, momentum, beta2 and weight_decay."""

    kind = "muon"

    def __init__(
        self, groups: list[dict[str, Any]], compute_dtype: torch.dtype, workspace: int = 2**29, state: str = "fp32",
        master: str = "fp32", seed: int = 0,
    ) -> None:  # fmt: skip
        """Allocate the state of every matrix, as zeros.

        Args:
            groups: `params` (contiguous matrices), parallel `param_names`, lr, momentum, beta2, weight_decay.
            compute_dtype: of Polar Express: bf16 where the run's precision computes in bf16 or lower, else fp32.
            workspace: bytes that a chunk of matrices may take on top of the state; one matrix is always taken.
            state: how the momentum is stored, a key of `nvfp8.state.STATE_DTYPES`.
            master: what is kept beside matrices stored as bf16, a key of `nvfp8.state.MASTERS`; fp32 ones are their own.
            seed: of stochastic rounding; with the step and a matrix's name it says how an element is rounded, on any rank.

        Raises:
            ValueError: names do not match parameters, a parameter is not a matrix, or no format is called so.
        """
        optim.Muon.__init__(
            self, groups, momentum_dtype=state, master_weights=master, compute_dtype=compute_dtype, workspace=workspace, seed=seed
        )
