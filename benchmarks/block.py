"""Transformer blocks, forward and backward: milliseconds, MiB kept for backward, and the floor beside them. One JSON line a row.

    python -m benchmarks.block [--widths 1536 768] [--precisions bf16 te fp8] [--recipe delayed] [--window 2048] [--repeats 20]

The protocol is that of the project's shared `blocks.py` (nanochat, torchao, Transformer Engine's own modules): 32,768 tokens at
width 1,536, 65,536 at 768, T = 2,048, heads of 128, weights of standard deviation 0.02, casts of weights made before. Our block
also mixes x0 into the stream and, every second one, adds a value embedding. Two figures each:

* `one`: a single block, whose result is added to the stream and whose gradient comes in bf16, as there.
* `further`: what each of two more blocks adds. Blocks hand each other Pending branches and FP8 gradients, so this is what a
  block costs in a model.

The floor is what no block can go below without other GEMMs: FP8 GEMMs (fast accumulation in fprop only) and attention alone.
Medians; a weight's gradient is written, not added to an earlier micro-batch's.
"""

import argparse
import json
import os
from functools import partial

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
from torch import Tensor

from benchmarks.timing import gpu_milliseconds
from nanochat.build import EngineOptions, build_model, choose_precision
from nanochat.gpt import GPT, GPTConfig
from nvfp8.attention import causal_attention, choose_backend
from nvfp8.embedding import token_order
from nvfp8.layers import settled
from nvfp8.matmul import fp8_matmul

LENGTH, HEAD = 2048, 128
ROWS = {768: 32, 1536: 16}  # of a micro-batch


class Stack:
    """A few blocks with their inputs on the GPU."""

    def __init__(self, width: int, rows: int, layers: int, precision_name: str, recipe: str, window: int):
        """Build them, and run them until delayed scaling has a history."""
        options = EngineOptions(recipe) if precision_name in ("te", "fp8") else None
        self.precision, _ = choose_precision(precision_name, "cuda", options)
        heads = width // HEAD
        config = GPTConfig(LENGTH, 32768, layers, heads, heads, width, "L")
        self.model: GPT = build_model(config, self.precision, torch.device("cuda"))
        for block in self.model.blocks:
            block.attn.window = window
            for parameter in block.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
        generator = torch.Generator("cuda").manual_seed(0)
        self.x, self.x0, self.d_out = (
            torch.randn(rows, LENGTH, width, device="cuda", generator=generator).to(self.precision.compute_dtype) for _ in range(3)
        )
        self.d_out /= self.x.shape[0] * LENGTH
        self.ids = torch.randint(32768, (rows, LENGTH), device="cuda", generator=generator)
        self.order = token_order(self.ids)
        self.leaves = [self.x.requires_grad_(), self.x0.requires_grad_()]
        for _ in range(3):
            self.both()
            assert self.model.scaling.update() == []

    def forward(self) -> Tensor:
        """Through all blocks; the last branch is added to the stream."""
        model, lambdas = self.model, torch.stack((self.model.resid_lambdas, self.model.x0_lambdas), 1).unbind()
        with self.precision.autocast(1 / self.ids.numel()):
            x, x0 = self.leaves[0], self.leaves[1]
            for layer, block in enumerate(model.blocks):
                name = str(layer)
                table = model.value_embeds[name].weight if name in model.value_embeds else None
                rotary = (model.cos, model.sin)
                x, x0 = block.attn(x, x0, lambdas[layer], rotary, self.ids, table, self.order, model.attention_backend, None, layer)
                x = block.mlp(x, settle=False)
            return settled(x)

    def both(self) -> None:
        """Forward and backward."""
        self.forward().backward(self.d_out)
        # Tables keep theirs: it is added to row by row, and made once a step only.
        for tensor in (*self.leaves, *self.model.transformer["h"].parameters()):
            tensor.grad = None

    def kept_mib(self) -> float:
        """Memory that forward leaves behind: what backward needs, and the result."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = self.forward()
        torch.cuda.synchronize()
        kept = torch.cuda.memory_allocated() - before
        del out
        return kept / 2**20


def floor(width: int, tokens: int, rows: int, window: int, repeats: int) -> dict[str, float]:
    """Milliseconds of a block's FP8 GEMMs by kind, and of its attention, each alone."""

    def operand(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda").to(torch.float8_e4m3fn)

    one = torch.ones((), device="cuda")
    times = dict.fromkeys(("fprop", "dgrad", "wgrad"), 0.0)
    for out, inner in ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width)):
        x, w, dy = operand(tokens, inner), operand(out, inner), operand(tokens, out).to(torch.bfloat16).to(torch.float8_e5m2)
        x_t, w_t, dy_t = (t.t().contiguous() for t in (x, w, dy))
        for kind, a, b in (("fprop", x, w), ("dgrad", dy, w_t), ("wgrad", dy_t, x_t)):
            times[kind] += gpu_milliseconds(partial(fp8_matmul, a, b, one, one, torch.bfloat16, kind == "fprop"), repeats)
    heads = width // HEAD
    q, k, v = (torch.randn(rows, LENGTH, heads, HEAD, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    d_out = torch.randn_like(q)
    backend = choose_backend("cuda", torch.bfloat16, HEAD, LENGTH)

    def attention() -> None:
        torch.autograd.grad(causal_attention(q, k, v, window, backend), (q, k, v), d_out)

    times["attention"] = gpu_milliseconds(attention, repeats)
    return {**{name: round(ms, 3) for name, ms in times.items()}, "sum": round(sum(times.values()), 3)}


def main() -> None:
    """Parse flags, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[1536, 768], choices=sorted(ROWS))
    parser.add_argument("--precisions", nargs="+", default=["bf16", "te", "fp8"], choices=("bf16", "te", "fp8"))
    parser.add_argument("--recipe", default="delayed")
    parser.add_argument("--window", type=int, default=LENGTH, help="earlier positions seen; the default sees all")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    gpu = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    for width in args.widths:
        rows = ROWS[width]
        shape = {"width": width, "tokens": rows * LENGTH, "window": args.window}
        print(json.dumps({**shape, "floor_ms": floor(width, rows * LENGTH, rows, args.window, args.repeats), **gpu}), flush=True)
        for name in args.precisions:
            ms, kept = [], []
            for layers in (1, 3):
                stack = Stack(width, rows, layers, name, args.recipe, args.window)
                ms.append(gpu_milliseconds(stack.both, args.repeats))
                kept.append(stack.kept_mib())
                attention = stack.model.attention_backend
                del stack
                torch.cuda.empty_cache()
            row = {
                "precision": name, "recipe": args.recipe if name != "bf16" else None, "attention": attention,
                "one_ms": round(ms[0], 3), "further_ms": round((ms[1] - ms[0]) / 2, 3),
                "one_MiB": round(kept[0]), "further_MiB": round((kept[1] - kept[0]) / 2),
            }  # fmt: skip
            print(json.dumps({**shape, **row, **gpu}), flush=True)


if __name__ == "__main__":
    main()
