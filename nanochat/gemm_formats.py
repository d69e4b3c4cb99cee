"""Which GEMMs of a model run in FP8: what FLOPs, peaks and copies of weights are counted from.

Every matrix takes part in three GEMMs of 2 FLOPs a parameter and token: y = x·wᵀ, dx = dy·w, dw = dyᵀ·x. A recipe may leave a whole
layer in bf16, or a single GEMM of it, and how lm_head is computed is a choice of its own; gates are always bf16.
"""

from nanochat.gpt import GPT
from nvfp8.precision import FP8Precision, Precision, TEPrecision
from nvfp8.recipe import GEMMS

_FLOPS = 2  # a parameter, token and GEMM


def in_fp8(precision: Precision, name: str) -> frozenset[str]:
    """Which of GEMMS run in FP8 (in FP4 where the recipe does) with the parameter called `name`."""
    every, none = frozenset(GEMMS), frozenset[str]()
    if isinstance(precision, TEPrecision):
        return every if in_blocks(name) or (precision.te_head and name == "lm_head.weight") else none
    if not isinstance(precision, FP8Precision):
        return none
    if name == "lm_head.weight":
        return every - precision.head_in_bf16
    return every - precision.recipe.gemms_in_bf16(_layer(name)) if in_blocks(name) else none


def in_blocks(name: str) -> bool:
    """Whether a parameter is a matrix of the blocks' projections: no gate, and no norm's scale."""
    return name.startswith("transformer.h.") and "ve_gate" not in name and not name.endswith("norm_weight")


def _layer(name: str) -> str:
    """What a recipe calls the layer of a block's matrix: c_q, c_k and c_v are one."""
    layer = name.removeprefix("transformer.").removesuffix(".weight")
    block, _, projection = layer.rpartition(".")
    return f"{block}.qkv" if projection in ("c_q", "c_k", "c_v") else layer


def copies(precision: Precision, name: str) -> int:
    """How many FP8 copies of the parameter `name` there are: as it lies for y, transposed for dx; dw reads no weight."""
    return len({"fprop", "dgrad"} & in_fp8(precision, name))


def flops_in_fp8(model: GPT) -> int:
    """FLOPs of one token in FP8 GEMMs, of those that `GPT.flop_counts` counts."""
    return sum(_FLOPS * p.numel() * len(in_fp8(model.precision, name)) for name, p in model.named_parameters())


def made_again(model: GPT) -> int:
    """How many layers make relu² again in backward (`--recompute-mlp`): all, for a recipe that leaves some in bf16 is refused."""
    precision = model.precision
    return model.config.n_layer if isinstance(precision, FP8Precision) and precision.recompute else 0
