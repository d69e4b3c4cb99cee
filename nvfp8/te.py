"""Transformer Engine: whether it can be used here, with which recipes, and how a `Recipe` of ours is said in its words.

It is imported only where it is asked for: importing it takes seconds and needs a CUDA build of torch. Its own functions say what
a chip offers, so where it is installed they are believed rather than our table.
"""

import importlib.metadata
import importlib.util
import os
import re
import sys
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from nvfp8.hardware import missing
from nvfp8.recipe import RECIPES, Recipe

# Written against this release; earlier ones lack `te.autocast` and the srelu activation.
MINIMUM = (2, 20)
# Transformer Engine takes defaults of its recipes from these, so what runs would not be what was asked for and printed.
_OVERRIDES = (
    "NVTE_BACKWARD_OVERRIDE", "NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES", "NVTE_FP8_BLOCK_SCALING_FP32_SCALES",
    "NVTE_NVFP4_DISABLE_RHT", "NVTE_NVFP4_DISABLE_STOCHASTIC_ROUNDING", "NVTE_NVFP4_DISABLE_2D_QUANTIZATION",
    "NVTE_NVFP4_ROW_SCALED_ACTIVATION", "NVTE_NVFP4_4OVER6",
)  # fmt: skip
_NONDETERMINISTIC = "NVTE_ALLOW_NONDETERMINISTIC_ALGO"
INSTALL = "pip install -c constraints.txt -e '.[te]' on a machine with CUDA"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def unavailable() -> str | None:
    """Why Transformer Engine cannot be used here, with what to do about it; None where it can."""
    if importlib.util.find_spec("transformer_engine") is None:
        return f"transformer-engine is not installed: {INSTALL}"
    version = next(filter(None, map(_version, ("transformer-engine", "transformer-engine-torch"))), "of unknown version")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or tuple(map(int, numbers.groups())) < MINIMUM:
        return f"transformer-engine is {version}, {MINIMUM[0]}.{MINIMUM[1]} or later is needed: {INSTALL}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    reason = missing("fp8", torch.cuda.get_device_capability())
    if reason is None:
        try:
            importlib.import_module("transformer_engine.pytorch")
        except (ImportError, OSError, RuntimeError) as error:
            return f"transformer-engine is installed but cannot be imported ({error}): {INSTALL}"
    return reason


def engine() -> Any:
    """The module `transformer_engine.pytorch`.

    Raises:
        RuntimeError: it cannot be used here.
    """
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(reason)
    if torch.are_deterministic_algorithms_enabled():
        os.environ[_NONDETERMINISTIC] = "0"  # read where an algorithm is chosen
    import transformer_engine.pytorch as te

    return te


def reset() -> None:
    """Forget all modules: Transformer Engine updates the histories of every one that ever ran, and reduces them over ranks."""
    os.environ.pop(_NONDETERMINISTIC, None)
    if "transformer_engine.pytorch" in sys.modules:
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        FP8GlobalStateManager.reset()


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


def as_run(recipe: Recipe) -> Recipe:
    """What Transformer Engine makes of a recipe: it promotes dgrad's sums whatever is asked (`delayed` offers no choice)."""
    return replace(recipe, dgrad=replace(recipe.dgrad, fast_accumulation=False))


def _kind(recipe: Recipe) -> str:
    """Which named recipe's GEMMs these are, among those Transformer Engine has.

    Raises:
        ValueError: none, the message names the GEMM that differs from the nearest; or a variable would change what it runs.
    """
    overridden = next((name for name in _OVERRIDES if name in os.environ), None)
    if overridden is not None:
        _refuse(f"{overridden} is set and would change the recipe behind its name: unset it")
    if recipe.bf16:
        _refuse(f"it leaves no layer in bf16 (bf16={'+'.join(recipe.bf16)}): --precision fp8 does")
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
        ValueError: Transformer Engine has no such combination, or a variable of its own would change it; the message names it.
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
