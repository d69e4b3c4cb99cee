"""Flags of what an optimizer stores, for the programs that have one."""

import argparse

from nanochat.state_formats import StateFormats, parse_formats
from nvfp8.state import MASTERS


def add_state_flags(parser: argparse.ArgumentParser) -> None:
    """Add a group of flags."""
    group = parser.add_argument_group("optimizer state")
    group.add_argument(
        "--state-dtype", default="auto",
        help="auto (fp32, of bf16 tables bf16), fp32, bf16, e4m3 or e5m2; or by state, as in "
        "exp_avg=bf16,exp_avg_sq=e4m3,momentum=e4m3 (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--master-weights", choices=("auto", *MASTERS), default="auto",
        help="what completes bf16 matrices: fp32 (auto), nothing, a byte, or 16 bits, which is fp32 exactly (default: %(default)s)",
    )  # fmt: skip


def state_formats(args: argparse.Namespace) -> StateFormats:
    """What the flags of `add_state_flags` said.

    Raises:
        BadInput: a format that does not exist.
    """
    return parse_formats(args.state_dtype, args.master_weights)
