"""lm_head with its loss, forward and backward, in bf16 and FP8: milliseconds, memory, and the floor. One JSON line a row.

    python -m benchmarks.head [--depths 12 24] [--head bf16 fp8] [--chunk-mib 256] [--repeats 10]

65,536 tokens of width 768 (d12) or 32,768 of 1,536 (d24), 32,768 entries, weights cast before, as they are once a step; in a CUDA
graph, as training does it: launched one by one, d12's are bound by the host. `--head`
also takes fp8-but-fprop, fp8-but-dgrad and fp8-but-wgrad, which leave that GEMM in bf16; `--chunk-mib` sets `CHUNK_BYTES` of
`nvfp8/head.py`. `peak_MiB` is what the head takes beside x and its weight: dx, dW, a chunk and its GEMMs' results.

The floor is the three FP8 GEMMs, each alone on a chunk's rows, and the bytes that no head goes below but by a loss in a GEMM's
epilogue, at the rate of a copy: logits read once, their gradient written in two layouts; and of each chunk but one the dW that its
GEMM reads, in fp32, to add to it. `loss_ms_0_again` is the loss's kernels in a graph where no row's codes are made a second time,
the next ones where 2 and 20 rows of every part of a chunk are (`nvfp8/kernels/cross_entropy_fp8.py`).
"""

import argparse
import json
import os
from functools import partial

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import check_fp8, copy_bandwidth, gpu_milliseconds
from nanochat.errors import BadInput, Parser, run
from nvfp8 import head as head_module
from nvfp8.fp8_head import PARTS
from nvfp8.head import LinearCrossEntropy, chunk_rows
from nvfp8.matmul import fp8_matmul
from nvfp8.ops import ops
from nvfp8.precision import fp8
from nvfp8.recipe import GEMMS, parse_recipe
from nvfp8.scaling import OF_LOGITS

VOCAB, SOFTCAP = 32768, 15.0
SHAPES = {12: (65536, 768), 24: (32768, 1536)}  # tokens of a micro-batch, width
HEADS = {"bf16": "delayed:bf16=lm_head", "fp8": "delayed"} | {f"fp8-but-{g}": f"delayed:bf16=lm_head:{g}" for g in GEMMS}


def arguments() -> argparse.Namespace:
    """Parse flags and refuse what cannot be measured."""
    parser = Parser("head", description="lm_head with its loss, forward and backward")
    parser.add_argument("--depths", type=int, nargs="+", default=[12, 24], choices=sorted(SHAPES))
    parser.add_argument("--head", nargs="+", default=["bf16", "fp8"], choices=list(HEADS))
    parser.add_argument("--chunk-mib", type=int, default=head_module.CHUNK_BYTES // 2**20)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    if min(args.chunk_mib, args.repeats) < 1:
        raise BadInput("--chunk-mib and --repeats must be at least 1")
    check_fp8()
    return args


def inputs(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """A normalized stream (tokens, width) in bf16, and targets."""
    x = F.rms_norm(torch.randn(tokens, width, device="cuda"), (width,)).bfloat16().requires_grad_()
    return x, torch.randint(VOCAB, (tokens,), device="cuda")


def measure(name: str, tokens: int, width: int, repeats: int) -> dict[str, float]:
    """Time of forward and backward, and the memory that both take beside x, its gradient's predecessor and the weight."""
    precision = fp8(parse_recipe(HEADS[name]))
    model = nn.ModuleDict({"lm_head": precision.head(width, VOCAB, VOCAB, SOFTCAP)}).to("cuda")
    head, scaling = model["lm_head"], precision.scaling(model)
    assert isinstance(head, LinearCrossEntropy)
    nn.init.normal_(head.weight, std=width**-0.5)
    x, targets = inputs(tokens, width)

    def both() -> None:
        x.grad = head.weight.grad = None
        with precision.autocast(1 / tokens):
            loss = head.loss(x, targets, 1.0)
        loss.backward()

    both()
    assert scaling.update() == []
    x.grad = head.weight.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    peak = torch.cuda.max_memory_allocated() - before
    graph = torch.cuda.CUDAGraph()
    x.grad = head.weight.grad = None
    with torch.cuda.graph(graph):
        both()
    return {"ms": round(gpu_milliseconds(graph.replay, repeats), 3), "peak_MiB": round(peak / 2**20)}


def floor(tokens: int, width: int, repeats: int, copy: float) -> dict[str, float]:
    """Milliseconds of the three GEMMs, of the loss's kernels, and of the bytes they move at the rate of a copy."""

    def operand(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randn(shape, device="cuda").to(dtype)

    rows, one = min(tokens, chunk_rows(VOCAB, torch.float8_e5m2)), torch.ones((), device="cuda")
    part = rows // PARTS
    x, w = operand(torch.float8_e4m3fn, rows, width), operand(torch.float8_e4m3fn, VOCAB, width)
    x_t, w_t = x.t().contiguous(), w.t().contiguous()
    q = operand(torch.float8_e5m2, rows, VOCAB)
    q_t = q.t().contiguous()
    times = {}
    for name, a, b, dtype, fast in (
        ("fprop", x[:part], w, torch.bfloat16, True), ("dgrad", q, w_t, torch.bfloat16, False),
        ("wgrad", q_t, x_t, torch.float32, False),
    ):  # fmt: skip
        times[name] = gpu_milliseconds(partial(fp8_matmul, a, b, one, one, dtype, fast), repeats) * tokens / a.shape[0]
    times["wgrad"] *= VOCAB / rows  # its rows are the vocabulary's: once a chunk
    logits, targets = operand(torch.bfloat16, part, VOCAB), torch.randint(VOCAB, (part,), device="cuda")
    scale, of_rows = torch.tensor(OF_LOGITS, device="cuda"), torch.empty(2, part, device="cuda")
    loss = partial(
        ops(logits).softcap_cross_entropy_quantize, logits, targets, of_rows[0], of_rows[1], VOCAB, SOFTCAP, scale, q[:part],
        q_t[:, :part],
    )  # fmt: skip
    loss()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss()
    loss_ms = {}
    for again in (0, 2, 20):
        logits[:again, VOCAB // 2] = 60.0  # all of the row's probability on an entry that is not known early
        loss_ms[f"loss_ms_{again}_again"] = round(gpu_milliseconds(graph.replay, repeats) * tokens / part, 3)
    bytes_ms = 1e3 * (4 * tokens * VOCAB + 4 * (tokens / rows - 1) * VOCAB * width) / copy
    gemms = sum(times.values())
    return {
        **{f"{name}_ms": round(ms, 3) for name, ms in times.items()},
        "GEMMs_TFLOP_s": round(6 * tokens * VOCAB * width / gemms / 1e9),
        **loss_ms, "bytes_ms": round(bytes_ms, 3),
        "floor_ms": round(gemms + bytes_ms, 3), "copy_GB_s": round(copy / 1e9),
    }  # fmt: skip


def main() -> None:
    """Parse flags, run, print."""
    args = arguments()
    head_module.CHUNK_BYTES = args.chunk_mib * 2**20
    gpu = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    copy = copy_bandwidth()
    for depth in args.depths:
        tokens, width = SHAPES[depth]
        shape = {"depth": depth, "tokens": tokens, "width": width, "chunk_MiB": args.chunk_mib}
        print(json.dumps({**shape, "head": "floor", **floor(tokens, width, args.repeats, copy), **gpu}), flush=True)
        for name in args.head:
            print(json.dumps({**shape, "head": name, **measure(name, tokens, width, args.repeats), **gpu}), flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    run(main)
