"""Kernels compiled before a run's first step, on all cores: a miniature makes two steps in which Triton launches nothing.

Triton compiles a kernel when it is first launched, one after another in one thread: 58 of d24 in FP8 took 26 s of a warm-up of 44
(H200's machine, Triton 3.6), and Triton 3.6 has a C compiler build every kernel's launcher besides, 0.3 to 0.5 s each. Only a
tenth of compiling is Python, which takes turns, so threads share the rest: 60 kernels took two of them 13.5 s, one 25.6 (two cores
of a machine without a GPU, Triton 3.6, without launchers).

Nobody lists which kernels a run needs: such a list would be out of date with the next change. But a model of the same width,
vocabulary and precision with fewer layers launches the same ones, for micro-batches of the same size: what a kernel is compiled
for are dtypes, constants, and which numbers and addresses 16 divides. So it makes two steps as the loop does, in which a launch
only asks for its kernel (`warmup`, in Triton's words) and goes on while it is compiled. What that kernel would have written is
whatever memory held, and it does not matter: nothing on the host looks at it. PyTorch's own operators do run on it, which loads
cuBLAS's and cuDNN's kernels meanwhile, and builds the very graphs of attention that the run will use (`nvfp8/cudnn_attention.py`).

What the host decides by is set by hand (`Scaling.seen`): in the first step no cast has a history, and after it all have one but the
copies of weights that start at zero, which an optimizer writes from the second step on.

The run is not touched: the miniature has weights, optimizers and scales of its own, draws nothing from a generator that others
use, and gives back its memory, less than the run takes later. A kernel that it does not meet is compiled when launched, as ever.
"""

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from nanochat.build import build_model, build_optimizers
from nanochat.gpt import GPT
from nanochat.param_groups import groups, ownership
from nanochat.state_formats import NANOCHAT, StateFormats
from nvfp8 import cublaslt
from nvfp8.precision import FP8Precision, TEPrecision
from nvfp8.scaling import Scaling

MOST_THREADS = 32  # by then the largest kernel alone, and what needs Python, take as long as all together


def compile_kernels(model: GPT, batch: int, adamw: str = "own", formats: StateFormats = NANOCHAT) -> None:
    """Have every Triton kernel of `model`'s first two training steps, and of their updates, compiled and loaded.

    Does nothing where kernels are not ours or not run: without CUDA, for Transformer Engine's layers and for emulation. Memory
    statistics of the device begin anew.

    Args:
        model: on its device; only its shape, precision and choice of attention are read.
        batch: rows of a micro-batch, each as long as the context.
        adamw: one of `te_adam.CHOICES`.
        formats: how state and weights are stored.
    """
    precision = model.precision
    emulated = isinstance(precision, FP8Precision) and precision.emulated
    if not model.cos.is_cuda or isinstance(precision, TEPrecision) or emulated:
        return
    threads = min(MOST_THREADS, len(os.sched_getaffinity(0)))
    # A thread starts on device 0.
    with _Compilers(threads, initializer=torch.cuda.set_device, initargs=(torch.cuda.current_device(),)) as compilers:
        request_kernels(model, batch, adamw, formats, compilers)
    gc.collect()  # layers and sites refer to each other
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def request_kernels(model: GPT, batch: int, adamw: str, formats: StateFormats, compilers: Executor) -> None:
    """Make a miniature's two steps and wait until `compilers` have compiled what they launch; the rest as in `compile_kernels`."""
    config, device = replace(model.config, n_layer=layers_enough(model.config.n_layer)), model.cos.device
    small = build_model(config, model.precision, device, model.attention)
    every = groups(small, config, weight_decay=0.1)
    optimizers = build_optimizers(every, ownership(every, 1), 0, small.precision.compute_dtype, adamw, formats)
    ids = torch.arange(batch * config.sequence_len, device=device).view(batch, -1) % config.vocab_size
    scaling = small.scaling if isinstance(small.scaling, Scaling) else None
    after_each = [] if scaling is None else [seen_after_first_step(small), [True] * len(scaling.sites)]
    with _launching_nothing(compilers):
        for step in range(2):
            for _ in range(2):  # a further micro-batch adds to gradients that are there
                small(ids, ids, 0.5).backward()
            if scaling is not None:
                scaling.seen = after_each[step]
            for optimizer in optimizers:
                optimizer.step()
            small.zero_grad(set_to_none=True)


def layers_enough(layers: int) -> int:
    """How many layers meet every case that `layers` do: at most 8, and the same modulo 4.

    What differs between layers is whether they have a value embedding (every second one), are the first, the last, or the one
    behind the middle, where the stream is whole, and which has a value embedding or not by the depth modulo 4.
    """
    return layers if layers <= 8 else 5 + (layers - 5) % 4


def seen_after_first_step(model: GPT) -> list[bool]:
    """`Scaling.seen` as the optimizers find it in the first step: of weights that start at zero, no copy has an amax."""
    assert isinstance(model.scaling, Scaling)
    zero = tuple(name.removesuffix(".weight") for name, weight in model.named_parameters() if weight.ndim == 2 and not weight.any())
    pairs = zip(model.scaling.sites, model.scaling.names, strict=True)
    return [not (site.kind == "copies" and name.endswith(zero)) for site, name in pairs]


class _Compilers(ThreadPoolExecutor):
    """Compiles kernels, and makes them ready to be launched: Triton leaves launcher and loading to the first launch."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        def ready() -> Any:
            kernel = fn(*args, **kwargs)
            _ = kernel.run
            return kernel

        return super().submit(ready)


@contextlib.contextmanager
def _launching_nothing(compilers: Executor) -> Iterator[None]:
    """Inside, a launch of a Triton kernel only hands it to `compilers`; they are waited for at the end."""
    from triton.runtime._async_compile import AsyncCompileMode, active_mode
    from triton.runtime.jit import JITFunction

    launch, mode = JITFunction.run, AsyncCompileMode(compilers)

    def request(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        token = active_mode.set(mode)  # autograd's threads have contexts of their own
        try:
            return launch(kernel, *arguments, grid=grid, warmup=True, **options)
        finally:
            active_mode.reset(token)

    with mode, cublaslt.untimed():  # of products: on operands that nobody wrote, beside threads that compile
        JITFunction.run = request
        try:
            yield
        finally:
            JITFunction.run = launch
