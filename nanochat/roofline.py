"""How long a training step takes: FLOPs and bytes by kernel family, counted, over a device's peaks times measured efficiencies.

    micro-batch = Σ FLOPs / (peak · efficiency) + bytes / (bandwidth · efficiency);   step = micro-batches + optimizer

Families do not overlap: one stream runs them one after the other, and in each one thing is what limits. The counts are of our
layers; the efficiencies of an H200 (docs/results.md), taken as a property of the kernels, so another device is expected to reach
the same part of its own peaks. That is the weakest assumption here. An H200 is predicted within 4 %, but for small widths, whose
GEMMs reach less (d8 in bf16 and own FP8: 6 and 8 % too fast). An H100 is predicted within 4 %, of whose ten runs two had a part in
what current and block scales cost; `spark` reaches 73 to 80 % of its peaks in single kernels where Hopper reaches 60 to 75 % in
whole runs.

Measured, of a run of d24 in our own FP8 with 16 x 2048 tokens (6a0b4b3), per micro-batch by the profiler, in a fraction of a
second; over seconds the power limit lowers the clock, and all takes 1.033 times as long (189.5 ms for 183.4):

| family | counted | ms | of the peak, with that factor |
| --- | --- | --- | --- |
| GEMMs in FP8, three of them with what follows in their epilogues | 143.5 TFLOP | 111.8 | 62.8 % |
| attention | 23.0 TFLOP, with 559 keys more a query than it sees | 44.9 | 50.0 % of bf16 |
| all else | 109 GB | 26.8 | 82 % of the bandwidth |

GEMMs in bf16: what whole steps of d12 and d24 leave when attention and bytes are taken off, 70 %, and those bytes' kernels in bf16
and te, 75 %. Optimizers' passes as FP8's. Polar Express by full products: 63 %; where half of symmetric products is computed, 63 %
(d24's squares in 11.1 ms, `benchmarks/muon.py`, 6a0b4b3); in the Gram form 56.5 % (d24's 1:4 matrices in 12.5 ms).

The 559 keys: cuDNN's times at windows of 512, 768 and 2047 lie on a line through them (0.3 %).
"""

from collections import defaultdict
from dataclasses import dataclass

from nanochat.gemm_formats import copies, flops_in_fp8, made_again
from nanochat.gpt import GPTConfig
from nanochat.memory import Counted, in_fp8_alone
from nanochat.state_formats import NANOCHAT, SMALL, StateFormats
from nvfp8.hardware import Peaks
from nvfp8.head import CHUNK_BYTES
from nvfp8.precision import FP8Precision, Precision, TEPrecision
from nvfp8.recipe import GEMMS

EFFICIENCY = {"FP8 GEMMs": 0.628, "bf16 GEMMs": 0.70, "attention": 0.50, "bytes": 0.75, "bytes of own FP8": 0.82, "states": 0.82}
POLAR = {"full": 0.63, "half": 0.63, "gram": 0.565, "small": 0.63}  # of Muon's products, by the way it goes
KEYS_MORE = 559
# Bytes that a block's kernels move a token and channel, forward and backward, between their GEMMs and attention.
#   own, bf16: mix and norm 10, rotary and QK norm 13, the MLP's norm 8, relu² 16; backward relu² 24, norms 10 and 18, heads 19.
#   te: mix 8, norms 4 and 4, heads 13, casts of o 4, the addition 6, relu² 12; backward casts of gradients 4, 4 and 12, transposes
#   8, relu² 24, norms 6 and 6, additions 6, heads 19, mix 14.
#   own, FP8: mix, norm and cast 9, o 3, norm and cast 7, aᵀ 4, the value embedding 1 (heads of 64 or 128
#   are in a GEMM's epilogue); backward relu² 8, norm 11, o 3, heads 20, mix 17.
# More than that: current scaling reads gradients twice for their amax and quantizes after norms and relu², not in them; block
# scales need passes of their own for relu² and its gradient.
# Where relu² is made again: norm and cast 3, aᵀ 4, not measured either. Of a layer that a recipe leaves in bf16 FLOPs and copies of
# weights are counted as such, its bytes as if it were in FP8.
_OWN, _TE, _OWN_FP8, _AGAIN = 118, 154, 83, 7
_MORE = {"current": 52, "block1x128": 36}
# A GEMM with block scales takes 1.25 times as long: what d12's blockwise row leaves when its bytes are taken off.
_SLOWER = {"block1x128": 1.25}
# The same, once: table's rows 4, their norm 4, smear 4, the middle stream settled 6, backout 8, the last norm 4; back 6, 10, 6 for
# the middle stream's gradients, smear 8, the norm 6, the table 2.
_ENDS = 68


@dataclass(frozen=True)
class Work:
    """What a micro-batch and a step do.

    Attributes:
        fp8: FLOPs of GEMMs in FP8 (FP4 where the recipe is).
        bf16: FLOPs of GEMMs in bf16.
        attention: its FLOPs, keys it pays for and does not see included.
        moved: bytes between those.
        added: of them, bytes of additions to gradients' sums.
        polar: FLOPs of Muon's products, once a step, by the way it goes: the keys of POLAR.
        updated: bytes of the optimizers' step.
    """

    fp8: float
    bf16: float
    attention: float
    moved: float
    added: float
    polar: dict[str, float]
    updated: float


def work(counted: Counted, rows: int) -> Work:
    """Count.

    Args:
        counted: the model and its optimizers.
        rows: of a micro-batch.
    """
    shape, precision = counted.setup.shape, counted.setup.precision
    tokens, parameters = rows * shape.sequence_len, counted.model.parameter_counts()
    matrices, head = parameters["transformer_matrices"], parameters["lm_head"]
    te_head = isinstance(precision, TEPrecision) and precision.te_head
    in_fp8, again = flops_in_fp8(counted.model), made_again(counted.model)
    written = ((p, copies(precision, name)) for name, p in counted.model.named_parameters())
    cast = sum(p.numel() * (2 + layouts) for p, layouts in written if layouts)  # a weight in bf16, and its copies
    muons = [p for group in counted.muon.param_groups for p in group["params"]]
    copied = sum(p.numel() for p in muons if counted.products(p.shape) == "full")
    added = 3 * precision.matrix_dtype.itemsize * (head + (0 if in_fp8_alone(precision) else matrices))  # FP8 GEMMs add themselves
    between = _between(shape, precision, tokens, matrices, head, te_head) + again * _AGAIN * tokens * shape.n_embd
    return Work(
        fp8=(in_fp8 + again * 8 * shape.n_embd**2) * tokens,  # c_fc (4D, D) once more
        bf16=(6 * (matrices + head) - in_fp8) * tokens,
        attention=12 * shape.n_embd * tokens * sum(keys(shape, layer) + KEYS_MORE for layer in range(shape.n_layer)),
        moved=between + added,
        added=added,
        polar=_polar(counted),
        # States are read and written, Muon's once more for its rows' norms; gradients are looked at and read, its once more, too;
        # weights are read and written; Muon's x is written, read for NorMuon's norms and read, and copied by full products.
        updated=2 * sum(counted.states.values()) + counted.states["Muon: state"]
        + 2 * sum(counted.gradients().values()) + counted.gradients()["gradients: matrices"]
        + 2 * sum(p.nbytes for p in counted.model.parameters()) + 6 * matrices + 20 * copied + cast,
    )  # fmt: skip


def keys(shape: GPTConfig, layer: int) -> float:
    """Keys that a query of `layer` sees, on average."""
    length, window = shape.sequence_len, min(shape.window(layer), shape.sequence_len - 1)
    return window + 1 - window * (window + 1) / (2 * length)


def _between(shape: GPTConfig, precision: Precision, tokens: int, matrices: int, head: int, te_head: bool) -> float:
    """Bytes that are moved between a micro-batch's GEMMs, but for sums of gradients."""
    x = tokens * shape.n_embd
    scaling = _scaling(precision)
    fastest = _OWN_FP8 if isinstance(precision, FP8Precision) else _TE
    block = _OWN if scaling is None else fastest + _MORE.get(scaling, 0)
    logits = tokens * shape.padded_vocab
    moved = float((shape.n_layer * block + _ENDS) * x)
    if te_head:
        moved += (8 + (2 if scaling == "current" else 0)) * logits  # the loss reads and writes them, then they are quantized
    elif isinstance(precision, FP8Precision) and len(precision.head_in_bf16) < len(GEMMS):
        chunks = max(1, logits // CHUNK_BYTES)
        # Logits read once, their gradient in two layouts; dx scaled by rows, x read once more for dW, which is added in a GEMM.
        moved += 4 * logits + 6 * x + (chunks - 1) * 4 * head
    else:
        chunks = max(1, logits * precision.compute_dtype.itemsize // CHUNK_BYTES)
        moved += 4 * logits + chunks * 8 * head  # dW is read and written once a chunk
    if precision.matrix_dtype != precision.compute_dtype:
        moved += 12 * matrices + 6 * head  # weights are cast where they are used, forward and backward
    return moved


def _scaling(precision: Precision) -> str | None:
    """How activations are scaled, None where there is no recipe."""
    return precision.recipe.fprop.left.scaling if isinstance(precision, TEPrecision | FP8Precision) else None


def _polar(counted: Counted) -> dict[str, float]:
    flops: dict[str, float] = defaultdict(float)
    for group in counted.muon.param_groups:
        for p in group["params"]:
            (rows, columns), products = p.shape, counted.products(p.shape)
            if products != "small":  # the gates' products are nothing beside their launch
                flops[products] += polar_flops(rows, columns, products)
    return dict(flops)


def polar_flops(rows: int, columns: int, products: str) -> float:
    """FLOPs of Polar Express on one matrix, as the table in `nvfp8/polar_express.py` counts them.

    Args:
        rows: of the matrix.
        columns: of the matrix.
        products: "full", "small" (the same, in one launch), "half" or "gram".
    """
    short, k = min(rows, columns), max(rows, columns) / min(rows, columns)
    return short**3 * {"full": 20 * k + 10, "small": 20 * k + 10, "half": 15 * k + 5, "gram": 6 * k + 16}[products]


def seconds(done: Work, peaks: Peaks, precision: Precision) -> tuple[dict[str, float], dict[str, float]]:
    """Time of a micro-batch and of the optimizers' step, by family.

    Args:
        done: of `work`.
        peaks: of the device.
        precision: what it computes in; its recipe says how fast its GEMMs are.

    Raises:
        ValueError: the device has no units for its GEMMs.
    """
    micro = {}
    scaling = _scaling(precision)
    if scaling is not None and done.fp8:
        name, peak = ("FP4 GEMMs", peaks.fp4) if scaling == "nv16" else ("FP8 GEMMs", peaks.fp8)
        if peak is None:
            raise ValueError(f"{precision.name} on a device without units for its GEMMs")
        micro[name] = done.fp8 * _SLOWER.get(scaling, 1.0) / (peak * EFFICIENCY["FP8 GEMMs"])
    between = "bytes of own FP8" if isinstance(precision, FP8Precision) else "bytes"
    micro |= {
        "bf16 GEMMs": done.bf16 / (peaks.bf16 * EFFICIENCY["bf16 GEMMs"]),
        "attention": done.attention / (peaks.bf16 * EFFICIENCY["attention"]),
        "norms, casts, losses, sums": done.moved / (peaks.bandwidth * EFFICIENCY[between]),
    }
    step = {
        "Muon's products": sum(flops / (peaks.bf16 * POLAR[products]) for products, flops in done.polar.items()),
        "states and weights": done.updated / (peaks.bandwidth * EFFICIENCY["states"]),
    }
    return micro, step


def tokens_per_second(done: Work, peaks: Peaks, precision: Precision, micro_tokens: int, accumulation: int) -> float:
    """Throughput of whole steps of `accumulation` micro-batches."""
    micro, step = seconds(done, peaks, precision)
    return micro_tokens * accumulation / (accumulation * sum(micro.values()) + sum(step.values()))


@dataclass(frozen=True)
class Measured:
    """A run that was made: one GPU, T = 2048, 8 micro-batches, optimizer included (docs/results.md).

    Attributes:
        device: name of the GPU.
        depth: of the model, of nanochat's shape.
        rows: of a micro-batch.
        window: pattern.
        label: what the planner calls the precision.
        tokens_per_second: measured.
        gib: peak of the allocator.
        commit: what ran.
        graphs: whether micro-batches were captured (`nanochat/micro_batches.py`), which is a matter of memory too.
        captured_updates: whether the optimizers' step was.
        formats: of optimizer state and masters.
    """

    device: str
    depth: int
    rows: int
    window: str
    label: str
    tokens_per_second: int
    gib: float
    commit: str
    graphs: bool = False
    captured_updates: bool = False
    formats: StateFormats = NANOCHAT


MICRO_BATCHES = 8  # a step, of all of these
_H100, _H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
MEASURED = (
    Measured(_H100, 12, 32, "L", "bf16", 542_304, 15.17, "48cd68f"),
    Measured(_H100, 12, 32, "SSSL", "bf16", 570_891, 15.17, "48cd68f"),
    Measured(_H100, 24, 16, "L", "bf16", 102_970, 37.12, "48cd68f"),
    Measured(_H100, 24, 16, "SSSL", "bf16", 107_227, 37.12, "48cd68f"),
    Measured(_H100, 12, 32, "L", "te delayed", 624_371, 27.52, "48cd68f"),
    Measured(_H100, 24, 16, "L", "te delayed", 132_083, 51.11, "48cd68f"),
    Measured(_H100, 12, 32, "L", "te delayed, head in chunks", 591_345, 19.95, "8d89563"),
    Measured(_H100, 24, 16, "L", "te delayed, head in chunks", 126_480, 47.47, "8d89563"),
    Measured(_H100, 12, 32, "L", "te current", 560_993, 27.52, "48cd68f"),
    Measured(_H100, 12, 32, "L", "te blockwise", 537_881, 30.11, "48cd68f"),
    Measured(_H200, 8, 32, "L", "bf16", 1_318_180, 7.02, "fa9f877", graphs=True, captured_updates=True),
    Measured(_H200, 12, 32, "L", "bf16", 597_660, 15.14, "6a0b4b3", graphs=True, captured_updates=True),
    Measured(_H200, 16, 16, "L", "bf16", 294_590, 15.94, "fa9f877", graphs=True, captured_updates=True),
    Measured(_H200, 24, 16, "L", "bf16", 111_196, 37.08, "6a0b4b3", graphs=True, captured_updates=True),
    Measured(_H200, 24, 16, "SSSL", "bf16", 110_934, 37.08, "c15de00", graphs=True, captured_updates=True),
    Measured(_H200, 12, 32, "L", "te delayed", 702_400, 27.36, "6a0b4b3"),
    Measured(_H200, 24, 16, "L", "te delayed", 144_165, 50.95, "6a0b4b3"),
    Measured(_H200, 8, 32, "L", "fp8 delayed", 1_876_714, 6.47, "6a0b4b3", graphs=True, captured_updates=True),
    Measured(_H200, 12, 32, "L", "fp8 delayed", 850_320, 13.30, "6a0b4b3", graphs=True, captured_updates=True),
    Measured(_H200, 16, 16, "L", "fp8 delayed", 441_348, 14.70, "6a0b4b3", graphs=True, captured_updates=True),
    Measured(_H200, 24, 16, "L", "fp8 delayed", 169_394, 34.20, "6a0b4b3", graphs=True, captured_updates=True),
    Measured(_H200, 12, 32, "L", "fp8 delayed", 848_967, 12.30, "6a0b4b3", graphs=True, captured_updates=True, formats=SMALL),
    Measured(_H200, 24, 16, "L", "fp8 delayed", 169_346, 28.82, "6a0b4b3", graphs=True, captured_updates=True, formats=SMALL),
)
# By others, not with this code: karpathy/nanochat's own FP8, which scales currently, d24, SSSL, on a DGX Spark.
PUBLISHED_SPARK = 13_125
