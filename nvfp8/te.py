"""Transformer Engine: whether it can be used here, and with which recipes.

It is imported only where it is asked for: importing it takes seconds and needs a CUDA build of torch. Its own functions say what
a chip offers, so where it is installed they are believed rather than our table.
"""

import importlib.metadata
import importlib.util
import re
from functools import cache

import torch

from nvfp8.hardware import missing
from nvfp8.recipe import Recipe

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


def unsupported(recipe: Recipe) -> str | None:
    """Transformer Engine's own reason why this device cannot run `recipe`, or None where it can.

    Raises:
        RuntimeError: Transformer Engine itself is unavailable.
    """
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(reason)
    import transformer_engine.pytorch as te

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
