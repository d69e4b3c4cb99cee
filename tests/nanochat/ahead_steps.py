"""Steps with and without compilation ahead of them, in a process that has compiled nothing: python ahead_steps.py <mode> …

    keys                     on a CPU, what a miniature and deeper models ask Triton for; nothing is compiled
    compile                  on a CPU, for an H100 that is not there: what is left to compile after a miniature's steps
    gpu fp8|bf16 yes|no      three steps on a GPU, with compilation ahead of them or without

Prints JSON. Without a GPU kernels are a GPU's all the same, of tensors in the CPU's memory; what is launched computes nothing.
"""

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import triton
from pretended import Pretended
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver

import nvfp8.ops

if sys.argv[1] != "gpu":  # before anyone imports the function
    from nvfp8 import kernels

    nvfp8.ops.ops = lambda x: kernels

from nanochat import ahead
from nanochat.build import build_model, build_optimizers
from nanochat.gpt import GPT, GPTConfig
from nanochat.micro_batches import MicroBatches
from nanochat.param_groups import groups, ownership
from nanochat.process import make_deterministic
from nanochat.state_formats import NANOCHAT, SMALL, StateFormats
from nvfp8 import fp8_head, polar_express, quantize
from nvfp8.optim import muon
from nvfp8.precision import Precision, bf16, fp8
from nvfp8.recipe import RECIPES
from nvfp8.scaling import Scaling

FORMATS = {"nanochat": NANOCHAT, "e4m3": SMALL}
made_in: list[str] = []  # threads that have made launchers


class Launcher:
    def __init__(self, source: Any, metadata: Any):
        made_in.append(threading.current_thread().name)

    def __call__(self, *arguments: Any) -> None:
        pass


class Loader:
    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}


class Launchable(Pretended):
    """A GPU on which kernels are launched too, in vain."""

    utils, launcher_cls = Loader(), Launcher


class WithoutProducts(TorchDispatchMode):
    """No matrix product is computed: a CPU would take minutes."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        left, right = args[-2:] if len(args) > 1 else (None, None)
        match str(function):
            case "aten.mm.default" | "aten.bmm.default":
                return left.new_empty(*left.shape[:-1], right.shape[-1])
            case "aten.addmm_.default":
                return args[0]
        return function(*args, **(kwargs or {}))


def pretend() -> None:
    """A Hopper's kernels and ways of Muon, on CPU tensors."""
    driver.set_active(Launchable(90))
    products = muon.fastest_products
    muon.fastest_products = lambda rows, columns, dtype, capability: products(rows, columns, dtype, (9, 0))
    for module in (quantize, fp8_head):
        module.fp8_matmul = lambda a, b, ai, bi, dtype, fast, **options: torch.empty(len(a), len(b), dtype=dtype)
    polar_express._product = lambda *arguments: None
    WithoutProducts().__enter__()


def model_of(depth: int, precision: Precision, pattern: str = "L", device: str = "cpu") -> GPT:
    return build_model(GPTConfig(64, 512, depth, 6, 6, 768, pattern), precision, torch.device(device))


def steps(model: GPT, formats: StateFormats, count: int, renew: Callable[[int], object]) -> Iterator[list[float]]:
    """A loop's steps, as benchmarks/step.py makes them; `renew` does what follows a step's gradients."""
    every = groups(model, model.config, weight_decay=0.1)
    optimizers = build_optimizers(every, ownership(every, 1), 0, model.precision.compute_dtype, "own", formats)
    micro_batches = MicroBatches(model, None)
    ids = torch.arange(2 * 65, device=model.cos.device).view(2, 65) * 7 % 512
    for step in range(count):
        micro_batches.begin()
        losses = [micro_batches.run(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), 0.5).clone() for _ in range(2)]
        renew(step)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        yield torch.stack(losses).tolist()


def pretended_steps(model: GPT, formats: StateFormats) -> None:
    """Two steps, in which amaxes, which nobody computes, are said to be there."""

    def renew(step: int) -> None:
        if isinstance(model.scaling, Scaling):
            model.scaling.seen = ahead.seen_after_first_step(model) if step == 0 else [True] * len(model.scaling.sites)

    assert len(list(steps(model, formats, 2, renew))) == 2


@contextmanager
def asked() -> Iterator[set[str]]:
    """What is asked for inside, by kernel and what it is specialized to; nobody gets it."""
    keys: set[str] = set()
    triton.knobs.runtime.jit_cache_hook = lambda *, key, fn, **others: keys.add(f"{fn.name} {key}") or True
    yield keys
    triton.knobs.runtime.jit_cache_hook = None


def state_of(model: GPT) -> tuple[Any, ...]:
    scaling = model.scaling.seen if isinstance(model.scaling, Scaling) else None
    versions = [(p._version, p.grad is None) for p in model.parameters()]
    return torch.get_rng_state().tolist(), versions, scaling and list(scaling)


def compare_keys() -> dict[str, Any]:
    pretend()
    result = {}
    recipes = {"delayed": fp8(RECIPES["delayed"]), "recompute": fp8(RECIPES["delayed"], recompute=True), "bf16": bf16()}
    cases = [("delayed", "nanochat", 12), ("bf16", "e4m3", 10), ("recompute", "e4m3", 9)]
    for name, formats, depth in cases:
        stored = FORMATS[formats].stored_by(replace(recipes[name]), "cpu")
        model = model_of(depth, stored)
        before = state_of(model)
        with asked() as small, ahead._Compilers(1) as compilers:
            ahead.request_kernels(model, 2, "own", FORMATS[formats], compilers)
        untouched = state_of(model) == before
        with asked() as whole:
            pretended_steps(model, FORMATS[formats])
        missing = sorted(key.split()[0] for key in whole - small)
        result[f"{name} {formats} {depth}"] = {"asked": len(whole), "missing": missing, "untouched": untouched}
    ahead.layers_enough = lambda layers: 4
    model = model_of(12, recipes["delayed"])
    with asked() as small, ahead._Compilers(1) as compilers:
        ahead.request_kernels(model, 2, "own", NANOCHAT, compilers)
    with asked() as whole:
        pretended_steps(model, NANOCHAT)
    result["four layers"] = {"missing": sorted(key.split()[0] for key in whole - small)}
    return result


def compile_for_another() -> dict[str, Any]:
    pretend()
    compiled: list[str] = []
    triton.knobs.compilation.listener = lambda *, src, cache_hit, **others: compiled.append(src.fn.__name__)
    model = model_of(4, bf16())
    with ahead._Compilers(2, thread_name_prefix="compiler") as compilers:
        ahead.request_kernels(model, 2, "own", NANOCHAT, compilers)
    before = len(compiled)
    pretended_steps(model, NANOCHAT)
    return {"before": before, "after": len(compiled) - before, "launchers": sorted({name.split("_")[0] for name in made_in})}


def on_a_gpu(name: str, first: bool) -> dict[str, Any]:
    make_deterministic()
    missed: list[str] = []
    triton.knobs.compilation.listener = lambda *, src, cache_hit, **others: None if cache_hit else missed.append(src.fn.__name__)
    model = model_of(6, {"fp8": fp8(RECIPES["delayed"]), "bf16": bf16()}[name], "SL", "cuda")
    held, state = torch.cuda.memory_allocated(), torch.cuda.get_rng_state().tolist()
    if first:
        ahead.compile_kernels(model, 2)
    kept = torch.cuda.memory_allocated() - held
    before, losses, each = len(missed), [], []
    untouched = torch.cuda.get_rng_state().tolist() == state
    for losses_of_step in steps(model, NANOCHAT, 4, lambda step: model.scaling.update()):
        losses += losses_of_step
        each.append(missed[before:])
        before = len(missed)
    return {"ahead": len(missed) - sum(map(len, each)), "steps": each, "losses": losses, "kept": kept, "untouched": untouched}


if __name__ == "__main__":
    mode, *rest = sys.argv[1:]
    modes: dict[str, Callable[[], object]] = {
        "keys": compare_keys, "compile": compile_for_another, "gpu": lambda: on_a_gpu(rest[0], rest[1] == "yes"),
    }  # fmt: skip
    print(json.dumps(modes[mode]()))
