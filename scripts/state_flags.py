"""Flags of what an optimizer stores, for the programs that have one."""

import argparse

from nanochat.state_formats import StateFormats, default_formats, parse_formats
from nvfp8.precision import Precision
from nvfp8.state import MASTERS


def add_state_flags(parser: argparse.ArgumentParser) -> None:
    """Add a group of flags."""
    group = parser.add_argument_group("optimizer state")
    group.add_argument(
        "--state-dtype", default="auto",
        help="auto (e4m3 for our own FP8 layers, else nanochat), nanochat (fp32, of bf16 tables bf16), fp32, bf16, e4m3 or e5m2; "
        "or by state, as in exp_avg=bf16,exp_avg_sq=e4m3,momentum=e4m3 (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--master-weights", choices=("auto", *MASTERS), default="auto",
        help="what completes bf16 matrices: fp32, nothing, a byte, or 16 bits, which is fp32 exactly; auto is a byte for our own "
        "FP8 layers, else fp32 (default: %(default)s)",
    )  # fmt: skip


def state_formats(args: argparse.Namespace, precision: Precision, adamw: str = "own") -> StateFormats:
    """What the flags of `add_state_flags` come to.

    Args:
        args: with the flags.
        precision: what is computed in.
        adamw: one of `te_adam.CHOICES`.

    Raises:
        BadInput: a format that does not exist.
    """
    return parse_formats(args.state_dtype, args.master_weights, default_formats(precision, adamw))
