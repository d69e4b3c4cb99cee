"""AdamW and Muon as `torch.optim.Optimizer` classes for any model, their state and weights in the formats of `nvfp8.state`.

    optimizer = AdamW(model.named_parameters(), lr=3e-4, exp_avg_dtype="e4m3", exp_avg_sq_dtype="e4m3", master_weights="bf16+8")

Formats are options of a group, as rates are. `UpdateEarly` applies each update in the middle of backward and frees the gradient.
"""

from nvfp8.optim.adamw import AdamW
from nvfp8.optim.early import UpdateEarly
from nvfp8.optim.muon import Muon

__all__ = ["AdamW", "Muon", "UpdateEarly"]
