"""AdamW of several libraries on the same tensors: milliseconds on the GPU, bytes of state, rate. One JSON line each.

    python -m benchmarks.optimizer_peers [--rows 32768] [--width 1536] [--tensors 14] [--repeats 20] [--only ours]

The defaults are d24's lm_head and tables: 705 M parameters in bf16, with bf16 gradients; "fp32" rows have fp32 parameters and
gradients. Every optimizer gets the same values and rates. A library that is not installed is a line that says so.

`ms` is the GPU's time alone (`benchmarks/timing.py`), of all kernels that a step launches. `state_bytes` is per parameter, what the
allocator holds after two steps and did not before: state, masters, scales. `GB_s` is what a step must move, the gradient once and
weight and state twice (a weight beside its fp32 master once), over `ms`; `of_copy` is its share of the copy rate beside it.
A library that reads more shows a lower rate, not more bytes.
"""

import argparse
import gc
import importlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import copy_bandwidth, gpu_milliseconds
from nanochat.errors import BadInput, Parser, run
from nvfp8.optim import AdamW

HYPER: dict[str, Any] = {"lr": 1e-3, "betas": (0.8, 0.995), "eps": 1e-10, "weight_decay": 0.01}


def imported(module: str) -> Any:
    """The module, or BadInput with the reason why there is none."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BadInput(f"{module.split('.')[0]} cannot be imported: {error}") from error


def ours(state: str, master: str) -> Callable[[list[Tensor]], Any]:
    """Our kernel with both moments in one format."""
    return lambda params: AdamW(params, **HYPER, exp_avg_dtype=state, exp_avg_sq_dtype=state, master_weights=master)


def engine(dtype: torch.dtype, **options: Any) -> Callable[[list[Tensor]], Any]:
    """Transformer Engine's FusedAdam; uint8 is its FP8."""

    def build(params: list[Tensor]) -> Any:
        fused = imported("transformer_engine.pytorch.optimizers").FusedAdam
        return fused(params, **HYPER, exp_avg_dtype=dtype, exp_avg_sq_dtype=dtype, **options)

    return build


def torchao(params: list[Tensor]) -> Any:
    """Both moments in E4M3 with a scale for every 256 elements; compiled by itself."""
    return imported("torchao.optim").AdamWFp8(params, **HYPER)


def bitsandbytes(params: list[Tensor]) -> Any:
    """Both moments in 8-bit codes by blocks."""
    return imported("bitsandbytes").optim.AdamW8bit(params, **HYPER)


BF16, FP32 = torch.bfloat16, torch.float32
# dtype of parameters and gradients, and how the optimizer is built
PEERS: dict[str, tuple[torch.dtype, Callable[[list[Tensor]], Any]]] = {
    "ours e4m3, bf16+8": (BF16, ours("e4m3", "bf16+8")),
    "ours e4m3, bf16+16": (BF16, ours("e4m3", "bf16+16")),
    "ours e4m3, bf16": (BF16, ours("e4m3", "bf16")),
    "ours e4m3, fp32 masters": (BF16, ours("e4m3", "fp32")),
    "ours e5m2, bf16+8": (BF16, ours("e5m2", "bf16+8")),
    "ours bf16, bf16": (BF16, ours("bf16", "bf16")),
    "ours fp32": (FP32, ours("fp32", "fp32")),
    "torch fused, bf16": (BF16, lambda params: torch.optim.AdamW(params, **HYPER, fused=True)),
    "torch fused, fp32": (FP32, lambda params: torch.optim.AdamW(params, **HYPER, fused=True)),
    "TE FusedAdam fp32 states, fp32 masters": (BF16, engine(FP32, master_weights=True)),
    "TE FusedAdam fp32 states, remainders": (BF16, engine(FP32, master_weights=True, store_param_remainders=True)),
    "TE FusedAdam FP8 states, fp32 masters": (BF16, engine(torch.uint8, master_weights=True)),
    "torchao AdamWFp8": (BF16, torchao),
    "bitsandbytes AdamW8bit": (BF16, bitsandbytes),
}


def arguments() -> argparse.Namespace:
    """Parse flags and refuse what cannot be measured."""
    parser = Parser("optimizer_peers", description="AdamW of several libraries on the same tensors")
    parser.add_argument("--rows", type=int, default=32768)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--tensors", type=int, default=14)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", default="", help="measure those whose name contains this")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise BadInput("optimizers are timed on a GPU, and torch finds no CUDA device")
    if min(args.rows, args.width, args.tensors, args.repeats) < 1:
        raise BadInput("--rows, --width, --tensors and --repeats must be at least 1")
    return args


def bytes_moved(name: str, params: Sequence[Tensor], state: int) -> int:
    """What a step must move; a weight beside an fp32 master need not be read. Gradients are of the weights' dtype."""
    return (2 if "fp32 masters" in name else 3) * sum(p.nbytes for p in params) + 2 * state


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Build one optimizer and time its step."""
    dtype, build = PEERS[name]
    torch.manual_seed(0)
    shape = args.rows, args.width
    params: list[Tensor] = [torch.nn.Parameter(torch.randn(shape, device="cuda", dtype=dtype)) for _ in range(args.tensors)]
    for p in params:
        p.grad = torch.randn_like(p)
    before = torch.cuda.memory_allocated()
    optimizer = build(params)
    for _ in range(2):
        optimizer.step()
    torch.cuda.synchronize()
    state = torch.cuda.memory_allocated() - before
    milliseconds = gpu_milliseconds(optimizer.step, args.repeats)
    moved = bytes_moved(name, params, state)
    count = sum(p.numel() for p in params)
    return {"ms": round(milliseconds, 3), "state_bytes": round(state / count, 3), "GB_s": round(moved / milliseconds / 1e6)}


def main() -> None:
    """Parse flags, run, print."""
    args = arguments()
    copy = round(copy_bandwidth() / 1e9)
    for name in PEERS:
        if args.only not in name:
            continue
        try:
            result: dict[str, Any] = measure(name, args)
            result["of_copy"] = round(result["GB_s"] / copy, 3)
        except BadInput as error:
            result = {"missing": str(error)}
        except Exception as error:  # a peer that fails is a result too
            result = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        gc.collect()
        torch.cuda.empty_cache()
        print(json.dumps({"adamw": name, **result, "copy_GB_s": copy, "gpu": torch.cuda.get_device_name()}), flush=True)


if __name__ == "__main__":
    run(main)
