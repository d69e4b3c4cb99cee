"""Triton kernels, one file a family; no autograd here. Names and arguments are those of the twins in `nvfp8.reference`."""

from nvfp8.kernels.adamw import adamw_, adamw_prepared
from nvfp8.kernels.cross_entropy import scale_, softcap_cross_entropy_
from nvfp8.kernels.cross_entropy_fp8 import scale_rows_, softcap_cross_entropy_quantize
from nvfp8.kernels.embedding import add_rows_
from nvfp8.kernels.gates import smear_backward, smear_forward, value_gate_backward, value_gate_forward
from nvfp8.kernels.gemm_fp8 import gemm_relu_squared, gemm_relu_squared_backward
from nvfp8.kernels.gemm_heads_fp8 import gemm_heads
from nvfp8.kernels.heads import heads_backward, heads_forward
from nvfp8.kernels.heads_fp8 import heads_backward_quantize
from nvfp8.kernels.muon import addressed, muon_descend_, muon_nesterov_
from nvfp8.kernels.muon_norms import equilibrating_scale, normuon_scale
from nvfp8.kernels.norm import (
    add_norm_forward,
    mix_backward,
    mix_forward,
    mix_norm_backward,
    norm_backward,
    norm_forward,
)
from nvfp8.kernels.norm_fp8 import (
    add_norm_quantize,
    mix_norm_backward_quantize,
    mix_norm_quantize,
    norm_backward_quantize,
    norm_quantize,
)
from nvfp8.kernels.polar_express import polar_express_
from nvfp8.kernels.quantize_fp8 import amax_, quantize, relu_squared_backward_quantize, relu_squared_quantize
from nvfp8.kernels.quantize_rows_fp8 import quantize_rows
from nvfp8.kernels.relu_squared import relu_squared_, relu_squared_backward_
from nvfp8.kernels.symmetric import symmetric_product_

__all__ = [
    "adamw_",
    "adamw_prepared",
    "add_norm_forward",
    "add_norm_quantize",
    "add_rows_",
    "addressed",
    "amax_",
    "equilibrating_scale",
    "gemm_heads",
    "gemm_relu_squared",
    "gemm_relu_squared_backward",
    "heads_backward",
    "heads_backward_quantize",
    "heads_forward",
    "mix_backward",
    "mix_forward",
    "mix_norm_backward",
    "mix_norm_backward_quantize",
    "mix_norm_quantize",
    "muon_descend_",
    "muon_nesterov_",
    "norm_backward",
    "norm_backward_quantize",
    "norm_forward",
    "norm_quantize",
    "normuon_scale",
    "polar_express_",
    "quantize",
    "quantize_rows",
    "relu_squared_",
    "relu_squared_backward_",
    "relu_squared_backward_quantize",
    "relu_squared_quantize",
    "scale_",
    "scale_rows_",
    "smear_backward",
    "smear_forward",
    "softcap_cross_entropy_",
    "softcap_cross_entropy_quantize",
    "symmetric_product_",
    "value_gate_backward",
    "value_gate_forward",
]
