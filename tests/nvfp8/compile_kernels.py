"""Compile every Triton kernel for a GPU that need not be there: python compile_kernels.py <compute capability, such as 90>.

The wrappers of `nvfp8.kernels` run on CPU tensors of training's shapes and dtypes, and a launch stops after the compiler: what it
refuses shows here rather than on a rented machine. Prints the kernels' names and shared memory as JSON.

Every variant is compiled for 9.0, of the dearest those that meet every pair of options. For others one width and bf16 will do, and
of the dearest a few that meet every option.
"""

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from pretended import Pretended
from triton.runtime import driver
from triton.runtime.jit import JITFunction

CAPABILITY = int(sys.argv[1])
EVERY = CAPABILITY == 90
WIDTHS = (768, 1536) if EVERY else (1536,)
compiled: dict[str, int] = {}


def main() -> None:
    driver.set_active(Pretended(CAPABILITY))
    launch = JITFunction.run

    def stop_after_compiling(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *arguments, grid=grid, warmup=True, **options)
        compiled[self.__name__] = max(kernel.metadata.shared, compiled.get(self.__name__, 0))
        # nvfp8/kernels/fp8.py relies on the cast to clamp.
        casts = re.findall(r"cvt\.[\w.]*e[45]m[23]x2\.f32", kernel.asm["ptx"])
        assert all("rn.satfinite" in cast for cast in casts), (self.__name__, set(casts))
        assert casts or not self.__name__.endswith("_quantize"), (self.__name__, "rounds to FP8 by itself")
        # Of a sum of products over three axes Triton makes a matrix product in TF32, though nobody asked for one.
        module = Path(sys.modules[self.fn.__module__].__file__)
        asked = module.name.startswith("gemm_") or "tl.dot(" in module.read_text()
        assert asked or "tt.dot" not in kernel.asm["ttir"], (self.__name__, "multiplies matrices in TF32")
        return kernel

    JITFunction.run = stop_after_compiling
    call_everything()
    print(json.dumps(compiled))


def call_everything() -> None:
    from nvfp8 import kernels
    from nvfp8.embedding import token_order
    from nvfp8.state import MASTERS, STATE_DTYPES, codec

    for dtype in (torch.bfloat16, torch.float32)[: 1 + EVERY]:
        for width in WIDTHS:
            x, x0 = (torch.zeros(2, 64, width, dtype=dtype) for _ in range(2))
            lambdas, rstd = torch.ones(2), torch.ones(2, 64)
            kernels.norm_forward(x)
            kernels.norm_backward(x, x, rstd, None, again=False), kernels.norm_backward(x, x, rstd, x)
            kernels.add_norm_forward(x, x)
            for previous, d_x0 in ((x[:, :1], x), (None, None)):
                kernels.smear_forward(x, previous, x[0, :1, :24], lambdas[:1])
                kernels.smear_backward(x, d_x0, x, x[0, :1, :24], lambdas[:1])
            for heads in (6, 12):
                gate = kernels.value_gate_forward(x[..., :12], x[0, :heads, :12].contiguous())
                kernels.value_gate_backward(gate, x[..., :12], x[0, :heads, :12].contiguous())
            kernels.mix_norm_backward(x, x, x, None, x0, lambdas, rstd, None)
            kernels.mix_norm_backward(x, x, x, x, x0, lambdas, rstd, x)
            kernels.mix_forward(x, None, x0, lambdas, 12)
            _, head, _ = kernels.mix_forward(x, x, x0, lambdas, 12)
            kernels.mix_backward(x, None, None, x, x0, lambdas, rstd, None)
            kernels.mix_backward(x, x, head, x, x0, lambdas, rstd, x)
            heads = width // 128
            qkv, cos = torch.zeros(2, 64, 3 * width, dtype=dtype), torch.zeros(64, 64, dtype=dtype)
            ids, table = torch.arange(128).view(2, 64) % 50, torch.zeros(50, width, dtype=dtype)
            for gate in (None, torch.zeros(2, 64, heads, dtype=dtype)):
                values = (gate, None if gate is None else table, None if gate is None else ids)
                q, k, v, rstd_heads = kernels.heads_forward(qkv, cos, cos, (heads, heads), *values)
                kernels.heads_backward(q, k, v, q, k, rstd_heads, cos, cos, *values)
                kernels.add_rows_(table, x, gate, *token_order(ids))
        hidden = torch.zeros(128, 3072, dtype=dtype)
        kernels.relu_squared_(hidden), kernels.relu_squared_backward_(hidden, hidden)
        logits, targets = torch.zeros(16, 32768, dtype=dtype), torch.zeros(16, dtype=torch.int64)
        kernels.softcap_cross_entropy_(logits, targets, 32768, 15.0, None)
        kernels.softcap_cross_entropy_(logits, targets, 32768, 15.0, torch.ones(()))
        kernels.scale_(logits, torch.ones(()))
        shapes = (768, 3072), (3072, 768), (24, 12)  # scales by column, by row of whole blocks, by any row
        for rows, columns in shapes if EVERY else shapes[:2]:
            weights = [torch.zeros(rows, columns, dtype=dtype) for _ in range(2)]
            x, scale = torch.zeros(2, rows, columns), torch.ones(2, rows, 1) if rows > columns else torch.ones(2, 1, columns)
            keys = [1, 2]
            for name in STATE_DTYPES:
                if name == "e4m3" and CAPABILITY < 89:  # no instruction converts it
                    continue
                momentum = codec(name).allocate(x.shape, "cpu", stacked=True)
                scales = kernels.equilibrating_scale(weights, *momentum, 0.1, 0.9)
                kernels.muon_nesterov_(weights, *momentum, x.bfloat16(), 0.1, 0.9, keys)
                for worked_in in (torch.bfloat16, torch.float16):
                    kernels.muon_nesterov_(weights, *momentum, x.to(worked_in), 0.1, 0.9, keys, scales, 32.0)
            kept = [None]
            if dtype == torch.bfloat16:
                kept += [torch.zeros_like(x, dtype=m.dtype) for m in MASTERS.values() if m.dtype is not None]
            for beside in kept:
                for computed in (torch.bfloat16, torch.float16):
                    kernels.muon_descend_(weights, beside, x.to(computed), scale, 0.1, 0.1, keys)
            for computed in (torch.bfloat16, torch.float16):
                kernels.normuon_scale(x.to(computed), scale, 0.1)
            kernels.polar_express_(torch.zeros(2, 24, 12, dtype=torch.bfloat16), (1.0,) * 15)
        if dtype == torch.bfloat16:
            for computed in (torch.bfloat16, torch.float16)[not EVERY :]:
                x, gram, poly = torch.zeros(2, 768, 3072, dtype=computed), *torch.zeros(2, 2, 768, 768, dtype=computed)
                for rows_first in (x, x.mT.contiguous().mT):
                    kernels.symmetric_product_(rows_first, rows_first, gram)
                kernels.symmetric_product_(gram, gram, poly, 0.5, gram, -2.0, 4.0)
                kernels.symmetric_product_(poly, gram, torch.zeros_like(gram))
            for rows_first in (x, x.mT.contiguous().mT):  # what the Gram form needs beside them, in fp16
                kernels.symmetric_product_(rows_first, rows_first, gram, rest=poly)
            kernels.symmetric_product_(poly, gram, torch.zeros_like(gram), 1.0, gram, 0.5)
    compile_adamw(kernels)
    if CAPABILITY >= 89:  # Triton has no E4M3 before
        compile_fp8(kernels)


def compile_fp8(kernels: Any) -> None:
    """Every kernel that writes FP8, in E4M3 and in E5M2, with and without an amax and what else may be left out."""

    one, lambdas, e4m3, e5m2 = torch.ones(()), torch.ones(2), torch.float8_e4m3fn, torch.float8_e5m2
    compile_copies(kernels)
    forms = (768, e4m3, torch.zeros(())), (1536, e5m2, torch.zeros(())), (1536, e5m2, None)
    for width, dtype, amax in forms if EVERY else forms[::2]:
        x, rstd = torch.zeros(2, 64, width, dtype=torch.bfloat16), torch.ones(2, 64)
        flat = x.view(128, width)
        for rows, columns in ((True, True), (True, False), (False, True)):
            kernels.quantize(flat, one, dtype, amax, rows=rows, columns=columns)
        kernels.quantize(flat, one, dtype, None, rows=False, columns=True, factors=rstd)
        kernels.quantize(flat.float(), one, dtype, amax, rows=True, columns=True)
        for run in (flat, x.view(-1, 128), x.float().view(1, -1)):
            kernels.quantize_rows(run, dtype)
        kernels.amax_(x, one), kernels.amax_(x.float(), one)
        kernels.relu_squared_quantize(flat, one, dtype, amax)
        a_t = torch.zeros(width, 128, dtype=e4m3)
        kernels.relu_squared_backward_quantize(flat, a_t, one, one, dtype, amax)
        kernels.add_norm_quantize(x, x, one, dtype, amax), kernels.norm_quantize(x, one, dtype)
        for pending, head in ((x, x[..., :12].contiguous()), (None, None)):
            kernels.mix_norm_quantize(x, pending, x, lambdas, 0 if head is None else 12, one, dtype, amax)
        along = torch.zeros(24, 128)
        kernels.norm_backward_quantize(x, x, rstd, x, one, e4m3, one, dtype, amax, along=along if EVERY else None)
        for d_x0, head, known in ((x, x[..., :12].contiguous(), along), (None, None, None)):
            kernels.mix_norm_backward_quantize(x, x, head, x, x, lambdas, rstd, d_x0, one, e4m3, one, dtype, amax, along=known)
        heads, cos = width // 128, torch.zeros(64, 64, dtype=torch.bfloat16)
        q, ids, table = x.view(2, 64, heads, 128), torch.arange(128).view(2, 64), x.view(128, width)
        gate, of_heads = torch.zeros(2, 64, heads, dtype=torch.bfloat16), torch.ones(2, 64, 2 * heads)
        for values in ((None, None, None), (gate, table, ids)):
            kernels.heads_backward_quantize(q, q, q, q, q, q, of_heads, cos, cos, *values, one, dtype, amax)
        logits, targets = torch.zeros(16, 32768, dtype=torch.bfloat16), torch.zeros(16, dtype=torch.int64)
        losses, codes, codes_t = torch.zeros(16), torch.zeros(16, 32768, dtype=dtype), torch.zeros(32768, 32, dtype=dtype)[:, :16]
        for vocab in (32768, 32700):
            kernels.softcap_cross_entropy_quantize(logits, targets, losses, losses, vocab, 15.0, one, codes, codes_t)
        kernels.scale_rows_(flat, rstd)
        if CAPABILITY >= 90:  # TMA
            x_q, w_q = torch.zeros(256, 768, dtype=e4m3), torch.zeros(3072, 768, dtype=e4m3)
            a_t = torch.zeros(3072, 256, dtype=e4m3)
            for fast, rows, columns in ((True, True, True), (False, True, False), (EVERY, False, True)):
                kernels.gemm_relu_squared(x_q, w_q, one, one, one, dtype, fast, amax, rows=rows, columns=columns)
            kernels.gemm_relu_squared_backward(x_q.to(dtype), w_q, one, one, a_t, one, one, dtype, width == 768, amax)
    if CAPABILITY >= 90:
        compile_gemm_heads(kernels)


def compile_copies(kernels: Any) -> None:
    """Optimizers that write FP8 copies, beside each form of weights: scaled by row and column, with and without hints."""
    from nvfp8.reference import AdamWTensor, Copies
    from nvfp8.state import codec, master

    one, c = torch.ones(()), 768
    forms = ("fp32", "bf16", 1536), ("e4m3", "bf16+8", 1536), ("e4m3", "bf16+8", 1537), ("bf16", "fp32", 1536), ("fp32", None, 1536)
    for state, kept, r in forms if EVERY else forms[1:3]:
        weight = torch.zeros(r, c, dtype=torch.bfloat16 if kept else torch.float32)
        q, t = (torch.zeros(shape, dtype=torch.float8_e4m3fn) for shape in ((r, c), (c, r)))
        rest, copies = master(kept).allocate(weight) if kept else None, Copies(q, t, one, one)
        scale, x = torch.ones(1, r, 1) if state == "e4m3" else torch.ones(1, 1, c), torch.zeros(1, r, c, dtype=torch.bfloat16)
        kernels.muon_descend_([weight], None if rest is None else rest[None], x, scale, 0.1, 0.1, [1], [copies])
        states = codec(state).allocate((r, c), "cpu"), codec(state, second_moment=True).allocate((r, c), "cpu")
        kernels.adamw_([AdamWTensor(weight, torch.zeros_like(weight), *states, rest, torch.zeros(8), kept == "bf16+8", copies)])


def compile_gemm_heads(kernels: Any) -> None:
    """Heads of both sizes, with and without a value embedding, as many of k and v as of q and fewer."""
    one, e4m3, shape = torch.ones(()), torch.float8_e4m3fn, (2, 64)
    x, ids = torch.zeros(128, 768, dtype=e4m3), torch.arange(128).view(shape)
    every = itertools.product((64, 128), ((6, 6), (6, 2)), (True, False), (True, False))
    pairs = (64, (6, 6), True, True), (64, (6, 2), False, False), (128, (6, 6), False, True), (128, (6, 2), True, False)
    half = (form for form in every if [form[0] == 64, form[1][1] == 6, *form[2:]].count(True) % 2 == 0)  # all pairs of options
    for size, heads, fast, values in half if EVERY else pairs:
        n_kv = heads[1]
        w, cos = torch.zeros((6 + 2 * n_kv) * size, 768, dtype=e4m3), torch.zeros(64, size // 2, dtype=torch.bfloat16)
        gate, table = torch.zeros(*shape, n_kv, dtype=torch.bfloat16), torch.zeros(128, n_kv * size, dtype=torch.bfloat16)
        embedded = (gate, table, ids) if values else (None, None, None)
        kernels.gemm_heads(x, w, one, one, cos, cos, heads, *embedded, shape, torch.bfloat16, fast)


def compile_adamw(kernels: Any) -> None:
    """Every codec of each moment beside one of the other, every form of weights, with and without 16 dividing the size."""
    from nvfp8.reference import AdamWTensor
    from nvfp8.state import MASTERS, STATE_DTYPES, codec, master

    def call(dtype: torch.dtype, gradient: torch.dtype, first: str, second: str, kept: str, size: int) -> None:
        parameter = torch.zeros(size, dtype=dtype)
        states = codec(first).allocate((size,), "cpu"), codec(second, second_moment=True).allocate((size,), "cpu")
        rest = master(kept).allocate(parameter)
        stochastic = kept != "fp32"
        kernels.adamw_([AdamWTensor(parameter, torch.zeros(size, dtype=gradient), *states, rest, torch.zeros(8), stochastic)])

    codecs = [name for name in STATE_DTYPES if name != "e4m3" or CAPABILITY >= 89]  # Triton has no E4M3 before
    every = {*itertools.product(codecs, codecs[-1:]), *itertools.product(codecs[-1:], codecs)}
    for first, second in every if EVERY else zip(codecs, reversed(codecs), strict=True):
        call(torch.bfloat16, torch.bfloat16, first, second, "bf16+8", 8192)
    for kept in MASTERS:
        call(torch.bfloat16, torch.float32, codecs[-1], codecs[-2], kept, 8192)
    for size in (7, 8192):
        call(torch.float32, torch.float32, "fp32", "fp32", "fp32", size)
    call(torch.bfloat16, torch.float32, codecs[-1], codecs[-1], "bf16+8", 7)


if __name__ == "__main__":
    main()
