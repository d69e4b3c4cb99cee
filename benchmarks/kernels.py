"""Every kernel that stands between a block's GEMMs: bytes, milliseconds, share of the copy rate. A Markdown table on stdout.

    python -m benchmarks.kernels                                   # 32,768 × 1,536 and 65,536 × 768
    python -m benchmarks.kernels --tokens 65536 --width 768 --only quantize

A kernel that only moves bytes can be no faster than a copy of as many. `must` counts each tensor that is read or written once, as
large as it is (of a lookup table the rows that are looked up); `moves` adds what one kernel tells another (sums along rows), once,
though every tile of channels reads it from the L2. `of copy` is the rate of `must`, divided by that of a device-to-device copy
measured in the same process. Milliseconds are medians of the GPU alone, with nothing of the tensors in its caches beforehand and
amax at 0, so that raising it is in them.

GEMMs have TFLOP/s instead, beside cuBLAS with a bf16 result (`torch._scaled_mm`), and beside cuBLAS followed by the pass over its
result that the fused kernel replaces. Two ways to do one thing are two lines.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import copy_bandwidth, gpu_milliseconds
from nanochat.errors import BadInput, Parser, run
from nvfp8.ops import ops

SIZES = ((32768, 1536), (65536, 768))  # tokens, width
HEAD, GATE, LENGTH = 128, 12, 2048  # head dimension, channels that gates read, tokens of a row
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@dataclass(frozen=True)
class Case:
    """One call of a kernel.

    Attributes:
        name: the kernel, and which way of it.
        read: what it must read: tensors, or bytes.
        call: runs it and returns what it wrote.
        flops: operations of a GEMM, 0 for a pass over memory.
        peer: the same GEMM by cuBLAS, bf16 result.
        after: name of the case that must follow cuBLAS to give the same.
        more: bytes that it moves beyond those that it must.
    """

    name: str
    read: Sequence[Tensor | int | None]
    call: Callable[[], Any]
    flops: int = 0
    peer: Callable[[], Tensor] | None = None
    after: str = ""
    more: int = 0

    def must(self) -> int:
        """Bytes it must read and write."""
        written = self.call()
        tensors = [*self.read, *(written if isinstance(written, tuple) else (written,))]
        return sum(t if isinstance(t, int) else t.nbytes for t in tensors if t is not None)


def cases(m: int, d: int, amax: Tensor) -> Iterator[Case]:
    """All kernels for `m` tokens of width `d`, in training's dtypes, on the device of `amax`; on a CPU their twins."""
    device = amax.device.type

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=device)

    def fp8(x: Tensor, dtype: torch.dtype = E4M3) -> Tensor:
        return (x.float() * 8).clamp(-448, 448).to(dtype)

    length = min(LENGTH, m)
    shape, hidden, heads = (m // length, length), 4 * d, d // HEAD
    x, x0, branch, d_stream, d_x0 = (random(*shape, d) for _ in range(5))
    kernels = ops(x)
    flat, scale, lambdas = x.view(m, d), torch.tensor(8.0, device=device), torch.tensor([1.0, 0.1], device=device)
    rstd, d_head = torch.ones(*shape, device=device), random(*shape, GATE)

    yield Case("norm_forward", (x,), lambda: kernels.norm_forward(x))
    yield Case("mix_forward", (x, branch, x0), lambda: kernels.mix_forward(x, branch, x0, lambdas, d))
    yield Case("norm_backward", (branch, x, rstd, d_stream), lambda: kernels.norm_backward(branch, x, rstd, d_stream))
    arguments = d_stream, d_x0, x, branch, x0, lambdas, rstd, d_x0
    yield Case("mix_norm_backward", arguments, lambda: kernels.mix_norm_backward(*arguments))

    for which, rows, columns in (("both", True, True), ("rows", True, False), ("columns", False, True)):
        yield Case(f"quantize, {which}", (flat,), partial(kernels.quantize, flat, scale, E5M2, amax, rows=rows, columns=columns))
    for which, runs in (("a row", flat), ("128", flat.view(-1, 128)), ("a column", flat.t().contiguous())):
        yield Case(f"quantize_rows, {which}", (runs,), partial(kernels.quantize_rows, runs, E5M2))
    yield Case("amax_", (flat,), lambda: kernels.amax_(flat, amax))
    yield Case(
        "mix_norm_quantize", (x, branch, x0),
        lambda: kernels.mix_norm_quantize(x, branch, x0, lambdas, GATE, scale, E4M3, amax),
    )  # fmt: skip
    yield Case("add_norm_quantize", (x, branch), lambda: kernels.add_norm_quantize(x, branch, scale, E4M3, amax))
    # As the MLP's gradient GEMM knows it, a part for each 256 of its columns, and the heads, a part for each of theirs.
    of_mlp, of_heads = (random(parts, m).float() for parts in (max(1, hidden // 256), 3 * heads))
    yield Case(
        "norm_backward_quantize", (branch, x, rstd, d_stream),
        lambda: kernels.norm_backward_quantize(branch, x, rstd, d_stream, scale, E4M3, scale, E5M2, amax, along=of_mlp),
        more=of_mlp.nbytes,
    )  # fmt: skip
    yield Case(
        "mix_norm_backward_quantize", (d_stream, branch, d_head, x, x0, rstd, d_x0),
        lambda: kernels.mix_norm_backward_quantize(
            d_stream, branch, d_head, x, x0, lambdas, rstd, d_x0, scale, E4M3, scale, E5M2, amax, along=of_heads
        ), more=of_heads.nbytes,
    )  # fmt: skip

    qkv, cos, sin = random(*shape, 3 * d), random(length, HEAD // 2), random(length, HEAD // 2)
    table, ids = random(32768 if device == "cuda" else 64, d), torch.randint(64, shape, device=device)
    gate = random(*shape, heads)
    q, k, v, of_norms = kernels.heads_forward(qkv, cos, sin, (heads, heads), gate, table, ids)
    values = gate, table, ids
    looked_up = gate, ids, m * d * table.element_size()
    yield Case("heads_forward", (qkv, *looked_up), lambda: kernels.heads_forward(qkv, cos, sin, (heads, heads), *values))
    backward = v, q, k, q, k, of_norms, cos, sin
    # The gate's own values are not needed on the way back.
    yield Case("heads_backward", (*backward[:6], *looked_up[1:]), lambda: kernels.heads_backward(*backward, *values))
    yield Case(
        "heads_backward_quantize", (*backward[:5], v, of_norms, *looked_up),
        lambda: kernels.heads_backward_quantize(*backward[:5], v, *backward[5:], *values, scale, E5M2, amax),
    )  # fmt: skip

    wide, a_t = random(m, hidden), fp8(random(hidden, m).abs())
    yield Case("relu_squared_quantize", (wide,), lambda: kernels.relu_squared_quantize(wide, scale, E4M3, amax))
    yield Case(
        "relu_squared_backward_quantize", (wide, a_t),
        lambda: kernels.relu_squared_backward_quantize(wide, a_t, scale, scale, E5M2, amax),
    )  # fmt: skip
    yield Case("relu_squared_", (wide,), lambda: kernels.relu_squared_(wide))  # last: it writes over what it reads

    x_q, w_q, dy_q = fp8(flat), fp8(random(hidden, d)), fp8(flat, E5M2)
    inverses = torch.tensor(1 / 64, device=device), torch.ones((), device=device)

    def cublas(left: Tensor, right: Tensor, fast: bool) -> Callable[[], Tensor]:
        more: dict[str, Any] = {"scale_a": inverses[0], "scale_b": inverses[1], "out_dtype": torch.bfloat16}
        return lambda: torch._scaled_mm(left, right.t(), **more, use_fast_accum=fast)

    of_qkv, angles = fp8(random(3 * d, d)), (cos, sin, (heads, heads))
    product = partial(kernels.gemm_heads, x_q, of_qkv, *inverses, *angles, *values, shape, torch.bfloat16, True)
    yield Case(
        "gemm_heads", (x_q, of_qkv, *looked_up), product, flops=6 * m * d * d, peer=cublas(x_q, of_qkv, True), after="heads_forward"
    )
    flops = 2 * m * d * hidden
    for fast in (True, False) if device == "cuda" else (True,):
        named = "" if fast else ", promoted"
        yield Case(
            "gemm_relu_squared" + named, (x_q, w_q),
            partial(kernels.gemm_relu_squared, x_q, w_q, *inverses, scale, E4M3, fast, amax),
            flops=flops, peer=cublas(x_q, w_q, fast), after="relu_squared_quantize",
        )  # fmt: skip
        yield Case(
            "gemm_relu_squared_backward" + named, (dy_q, w_q, a_t),
            partial(kernels.gemm_relu_squared_backward, dy_q, w_q, *inverses, a_t, scale, scale, E5M2, fast, amax),
            flops=flops, peer=cublas(dy_q, w_q, fast), after="relu_squared_backward_quantize",
        )  # fmt: skip


def measure(m: int, d: int, only: str, repeats: int, copy: float) -> None:
    """Print the table of one size."""
    print(f"\n{m:,} tokens × {d:,}\n")
    print("| kernel | moves, MB | must, MB | ms | of copy | TFLOP/s | cuBLAS ms | TFLOP/s | cuBLAS and pass, ms |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    passes: dict[str, float] = {}
    amax = torch.zeros((), device="cuda")
    for case in cases(m, d, amax):
        if only not in case.name:
            continue
        must = case.must()
        milliseconds = passes[case.name] = gpu_milliseconds(case.call, repeats, amax.zero_)
        line = [case.name, f"{(must + case.more) / 1e6:,.0f}", f"{must / 1e6:,.0f}", f"{milliseconds:.3f}"]
        if case.peer is None:
            line += [f"{must / (1e-3 * milliseconds) / copy:.2f}", "", "", "", ""]
        else:
            peer = gpu_milliseconds(case.peer, repeats)
            rates = [f"{1e-9 * case.flops / ms:,.0f}" for ms in (milliseconds, peer)]
            together = f"{peer + passes[case.after]:.3f}" if case.after in passes else ""
            line += ["", rates[0], f"{peer:.3f}", rates[1], together]
        print("| " + " | ".join(line) + " |", flush=True)


def main() -> None:
    """Parse flags, run, print."""
    parser = Parser("kernels", description="bytes and milliseconds of every kernel")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--only", default="", help="a part of a kernel's name")
    parser.add_argument("--repeats", type=int, default=20)
    args: argparse.Namespace = parser.parse_args()
    if not torch.cuda.is_available():
        raise BadInput("kernels are timed on a GPU, and torch finds no CUDA device")
    if (args.tokens is None) != (args.width is None):
        raise BadInput("--tokens and --width go together")
    sizes = SIZES if args.tokens is None else ((args.tokens, args.width),)
    if any(m % min(LENGTH, m) or m % 16 or d % HEAD for m, d in sizes):
        raise BadInput(f"--tokens must be a multiple of {LENGTH} (below that, of 16), --width of {HEAD}")
    copy = copy_bandwidth(args.repeats)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {copy / 1e9:,.0f} GB/s (read and written)")
    for m, d in sizes:
        measure(m, d, args.only, args.repeats, copy)


if __name__ == "__main__":
    run(main)
