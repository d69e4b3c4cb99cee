"""What this machine can do, as a table: the first thing to look at before a run, and the first thing to send with a question."""

import importlib.metadata
import os
import platform
from dataclasses import dataclass

import torch

from nanochat.build import EngineOptions, choose_precision
from nanochat.gpt import GPTConfig
from nvfp8 import te
from nvfp8.attention import BACKENDS, why_not
from nvfp8.hardware import FEATURES, best_recipe, missing, peaks
from nvfp8.recipe import RECIPES


@dataclass(frozen=True)
class Row:
    """One fact: what it is about, whether it can be used (None for plain facts), and the detail or the reason."""

    what: str
    usable: bool | None
    detail: str


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _can(what: str, reason: str | None, detail: str = "yes") -> Row:
    return Row(what, reason is None, detail if reason is None else reason)


def check() -> list[Row]:
    """Look at this machine: versions, device, formats, recipes, attention, and what `auto` would take."""
    cuda = torch.cuda.is_available()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, Triton {_version('triton')}"
    rows = [Row("software", None, versions)]
    if not cuda:
        rows.append(Row("device", None, f"CPU, {os.cpu_count()} cores; torch sees no CUDA device"))
    else:
        properties = torch.cuda.get_device_properties(0)
        capability = (properties.major, properties.minor)
        memory = f"{properties.total_memory / 2**30:.1f} GiB"
        chip = f"compute capability {capability[0]}.{capability[1]}"
        rows.append(Row("device", None, f"{torch.cuda.device_count()} x {properties.name}, {memory}, {chip}"))
        known = peaks(properties.name)
        if known is None:
            rows.append(Row("peaks", None, "not known for this name: MFU is shown as -"))
        else:
            fp8 = "no FP8" if known.fp8 is None else f"{known.fp8 / 1e12:.0f} TFLOP/s FP8"
            rows.append(Row("peaks", None, f"{known.bf16 / 1e12:.0f} TFLOP/s bf16, {fp8}, {known.bandwidth / 1e12:.2f} TB/s"))
        rows += [_can(feature, missing(feature, capability)) for feature in FEATURES]
    te_reason = te.unavailable()
    rows.append(_can("Transformer Engine", te_reason, _version("transformer-engine")))
    if te_reason is None:
        rows += [_can(f"  recipe {name}", te.unsupported(it), it.describe()) for name, it in RECIPES.items() if name != "rowwise"]
        rows.append(Row("  recipe auto", None, best_recipe(torch.cuda.get_device_capability())))
    reason = missing("fp8", capability) if cuda else "no CUDA device; --precision fp8-emulated has the same numerics anywhere"
    rows.append(_can("FP8 layers of our own", reason, "yes, with --precision fp8"))
    kind = "cuda" if cuda else "cpu"
    precision, why = choose_precision("auto", kind, EngineOptions())
    shape = GPTConfig()  # the default model's heads and context
    for backend in BACKENDS:
        reason = why_not(backend, kind, precision.compute_dtype, shape.head_dim, shape.sequence_len)
        rows.append(_can(f"attention {backend}", reason))
    rows.append(Row("--precision auto", None, f"{precision.name}: {why}"))
    return rows
