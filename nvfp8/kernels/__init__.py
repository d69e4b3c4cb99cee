"""Triton kernels, one file a family; no autograd here. Names and arguments are those of the twins in `nvfp8.reference`."""

from nvfp8.kernels.adamw import adamw_
from nvfp8.kernels.cross_entropy import scale_, softcap_cross_entropy_
from nvfp8.kernels.embedding import add_rows_
from nvfp8.kernels.heads import heads_backward, heads_forward
from nvfp8.kernels.muon import muon_descend_, muon_nesterov_
from nvfp8.kernels.norm import (
    add,
    add_norm_forward,
    mix_backward,
    mix_forward,
    mix_norm_backward,
    norm_backward,
    norm_forward,
)
from nvfp8.kernels.relu_squared import relu_squared_, relu_squared_backward_
from nvfp8.kernels.symmetric import symmetric_product_

__all__ = [
    "adamw_",
    "add",
    "add_norm_forward",
    "add_rows_",
    "heads_backward",
    "heads_forward",
    "mix_backward",
    "mix_forward",
    "mix_norm_backward",
    "muon_descend_",
    "muon_nesterov_",
    "norm_backward",
    "norm_forward",
    "relu_squared_",
    "relu_squared_backward_",
    "scale_",
    "softcap_cross_entropy_",
    "symmetric_product_",
]
