"""Flags of FP8 layers, Transformer Engine's and our own, for the programs that train with them."""

import argparse

from nanochat.build import EngineOptions


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add a group of flags, all with `EngineOptions`' defaults."""
    group = parser.add_argument_group("FP8 (--recipe with --precision te or fp8, the others with te)")
    default = EngineOptions()
    group.add_argument(
        "--recipe", default=default.recipe,
        help="auto, delayed, e4m3 (delayed, gradients in E4M3 too), current or blockwise; with te also mxfp8 or nvfp4, with fp8 "
        "rowwise; delayed takes settings, as in delayed:margin=1,amax_history_len=32,amax_compute_algo=most_recent; "
        "--precision fp8 leaves what is named in bf16, as in delayed:bf16=h.0+h.11.mlp+h.*.attn.c_proj (parts: attn.qkv, "
        "attn.c_proj, mlp.c_fc, mlp.c_proj; * is any part of a name), or single GEMMs of it, as in h.*.mlp.c_proj:wgrad+*:dgrad "
        "(default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--te-layers", choices=("fused", "separate"), default=default.layers,
        help="LayerNormLinear and LayerNormMLP, or one te.Linear for each Linear, for comparison (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--te-head", choices=("auto", "chunked", "te"), default=default.head,
        help="lm_head in bf16 chunks, which takes less memory, or by te.Linear with whole logits, which is faster and what auto "
        "means where weights are bf16 (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--te-weights", choices=("bf16", "fp8"), default=default.weights,
        help="bf16 weights with FP8 copies, or FP8 only beside fp32 matrices (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--norm-weight", action="store_true", help="learnable scales in the norms (nanochat has none)")
    group.add_argument(
        "--recompute-mlp", action="store_true",
        help="with --precision fp8: backward computes relu² again instead of keeping it, a quarter less of what blocks keep",
    )  # fmt: skip


def engine_options(args: argparse.Namespace) -> EngineOptions:
    """What the flags of `add_engine_flags` said."""
    return EngineOptions(args.recipe, args.te_layers, args.te_head, args.te_weights, args.norm_weight, args.recompute_mlp)
