"""Transformer Engine: whether it can be used here, with which recipes, and how a `Recipe` of ours is said in its words.

It is imported only where it is asked for: importing it takes seconds and needs a CUDA build of torch. Its own functions say what
a chip offers, so where it is installed they are believed rather than our table.
"""

import importlib.metadata
import importlib.util
import os
import re
from functools import cache
from typing import Any

import torch

from nvfp8.hardware import missing
from nvfp8.recipe import RECIPES, Recipe

# Written against this release; earlier ones lack `te.autocast` and the srelu activation.
MINIMUM = (2, 20)
INSTALL = "pip install -c constraints.txt -e '.[te]' on a machine with CUDA"


@cache
def unavailable() -> str | None:
    """Why Transformer Engine cannot be used here, with what to do about it; None where it can."""
    if importlib.util.find_spec("transformer_engine") is None:
        return f"transformer-engine is not installed: {INSTALL}"
    try:
        version = importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        version = importlib.metadata.version("transformer-engine-torch")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or tuple(map(int, numbers.groups())) < MINIMUM:
        return f"transformer-engine is {version}, {MINIMUM[0]}.{MINIMUM[1]} or later is needed: {INSTALL}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return missing("fp8", torch.cuda.get_device_capability())


def engine() -> Any:
    """The module `transformer_engine.pytorch`.

    Raises:
        RuntimeError: it cannot be used here.
    """
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(reason)
    if torch.are_deterministic_algorithms_enabled():
        os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"  # read where an algorithm is chosen
    import transformer_engine.pytorch as te

    return te


def unsupported(recipe: Recipe) -> str | None:
    """Why this device cannot run `recipe` in Transformer Engine, in its own words where it has some, or None where it can.

    Raises:
        RuntimeError: Transformer Engine itself is unavailable.
    """
    te = engine()
    try:
        _kind(recipe)
    except ValueError as error:
        return str(error)
    checks = {
        "fp8": te.is_fp8_available,
        "fp8_block": te.is_fp8_block_scaling_available,
        "mxfp8": te.is_mxfp8_available,
        "nvfp4": te.is_nvfp4_available,
    }
    for feature in recipe.features:
        offered, why = checks[feature](return_reason=True)
        if not offered:
            return str(why)
    return None


def _kind(recipe: Recipe) -> str:
    """Which named recipe's GEMMs these are, among those Transformer Engine has.

    Raises:
        ValueError: none; the message names the GEMM that differs from the nearest.
    """
    gemms = ("fprop", "dgrad", "wgrad")
    offered = [known for known in RECIPES.values() if known.name != "rowwise"]
    for known in offered:
        if all(getattr(recipe, gemm) == getattr(known, gemm) for gemm in gemms):
            return known.name
    if recipe.fprop.left.scaling == "row":
        return _refuse("it has no row-wise scaling: use current, or delayed")
    near = next((known for known in offered if known.fprop.left == recipe.fprop.left), offered[0])
    differs = next(gemm for gemm in gemms if getattr(recipe, gemm) != getattr(near, gemm))
    return _refuse(f"recipe {recipe.name!r} asks for another {differs} than its {near.name}: {recipe.describe()}")


def _refuse(why: str) -> str:
    raise ValueError(f"Transformer Engine cannot run this: {why}")


@cache
def te_recipe(recipe: Recipe) -> Any:
    """`recipe` as an object of `transformer_engine.common.recipe`, one and the same for equal recipes.

    NVFP4's random Hadamard transform and stochastic rounding are left out from compute capability 12.0 on, which lacks them.

    Raises:
        ValueError: Transformer Engine has no such combination; the message names the field.
        RuntimeError: it cannot be used here.
    """
    engine()
    from transformer_engine.common import recipe as te

    kind = _kind(recipe)
    if kind in ("delayed", "e4m3"):
        return te.DelayedScaling(
            margin=recipe.margin,
            fp8_format=te.Format.HYBRID if kind == "delayed" else te.Format.E4M3,
            amax_history_len=recipe.amax_history_len,
            amax_compute_algo=recipe.amax_compute_algo,
        )
    if kind == "current":
        return te.Float8CurrentScaling(fp8_format=te.Format.HYBRID)
    if kind == "blockwise":
        return te.Float8BlockScaling(fp8_format=te.Format.E4M3)
    if kind == "mxfp8":
        return te.MXFP8BlockScaling(fp8_format=te.Format.E4M3)
    lacking = torch.cuda.get_device_capability() >= (12, 0)
    return te.NVFP4BlockScaling(disable_rht=lacking, disable_stochastic_rounding=lacking)
