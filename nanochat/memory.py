"""The peak memory of a training step, line by line, from configuration alone: no GPU, nothing allocated.

    peak = what lasts (weights, copies of them, optimizer state, gradients, workspaces, batch)
         + what a micro-batch keeps for backward (`nanochat/activations.py`)
         + what lies beside it in the worst moment

What lasts is read off the real thing: the model and both optimizers are built on PyTorch's meta device, whose tensors have sizes
and no memory, so a new storage format is counted without a word here. Gradients' sums exist from beginning to end of all
micro-batches but the first; where a step is one micro-batch, they appear as backward goes. So do a further micro-batch's
gradients of the blocks, beside their sums (`nanochat/micro_batches.py`), unless FP8 GEMMs add them themselves: that is counted
where all of a model's do.

The moments looked at, of which the largest is the peak:

    the head                     logits and their gradient, with everything kept for backward still there
    backward of the last MLP     the block that backward reaches first: nothing but the head's part is released yet
    backward of the last attention
    backward of the first block  all gradients exist, one block's activations: counts where a step is one micro-batch
    the optimizer's step         Muon's workspace; no activations. In CUDA graphs it lies in the memory that those had, which
                                 nobody else could use: optimizers that are not captured work beside it

What is predicted is `torch.cuda.max_memory_allocated()`. A process takes more: the CUDA context and loaded kernels, and what the
allocator reserves and cannot use (`nanochat/planner.py` adds both before it says what fits).
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanochat import activations
from nanochat.activations import Bytes, MicroBatch
from nanochat.build import build_optimizers
from nanochat.gemm_formats import copies, in_blocks
from nanochat.gpt import GPT, GPTConfig
from nanochat.metrics import Metrics
from nanochat.micro_batches import refusal
from nanochat.optimizer import NamedOptimizer
from nanochat.param_groups import groups, ownership
from nanochat.state_formats import NANOCHAT, StateFormats
from nanochat.train_config import TrainConfig
from nvfp8.polar_express import fastest_products, room, together
from nvfp8.precision import FP8Precision, Precision, TEPrecision

GIB = 2**30
# A cuBLAS workspace of torch's, from the same allocator: 8 buffers of 4 MiB from compute capability 9.0 on, else 2 of 4 MiB and 8
# of 16 KiB (`CUBLAS_WORKSPACE_CONFIG`, aten/src/ATen/cuda/CublasHandlePool.cpp). Each handle has one for each stream, and each
# thread a handle: that of forward and that of autograd. Graphs are captured on a stream of their own.
_CUBLAS = {True: 32 * 2**20, False: 2 * 2**22 + 8 * 2**14}
# Transformer Engine's own (`cpp_extensions/gemm.py`, get_cublas_workspace_size_bytes).
_TE_CUBLAS = {True: 32 * 2**20 + 1024, False: 2**22}


@dataclass(frozen=True)
class Setup:
    """What a step's memory depends on.

    Attributes:
        shape: of the model.
        precision: with its matrices as `formats` wants them (`StateFormats.stored_by`).
        rows: of a micro-batch on one process.
        accumulation: micro-batches of a step.
        formats: of optimizer state and masters.
        attention: the backend that runs.
        deterministic: `--deterministic`.
        update_early: `--update-early`.
        graphs: whether micro-batches are captured: then their memory is nobody else's.
        captured_updates: whether the optimizers' step is, wherever micro-batches are.
        ranks: processes, among which optimizer state is divided.
        capability: of the GPU, for the size of workspaces and the way of Muon's products.
    """

    shape: GPTConfig
    precision: Precision
    rows: int
    accumulation: int = 8
    formats: StateFormats = NANOCHAT
    attention: str = "cudnn"
    deterministic: bool = False
    update_early: bool = False
    graphs: bool = False
    captured_updates: bool = True
    ranks: int = 1
    capability: tuple[int, int] = (9, 0)


@dataclass(frozen=True)
class Prediction:
    """What was predicted.

    Attributes:
        lasting: what is there all the time, bytes by line.
        moments: what is there in each candidate moment beside that.
    """

    lasting: Bytes
    moments: dict[str, Bytes]

    @property
    def moment(self) -> str:
        """The worst moment."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def lines(self) -> Bytes:
        """Every line of the peak."""
        return {what: size for what, size in {**self.lasting, **self.moments[self.moment]}.items() if size}

    @property
    def total(self) -> float:
        """The peak, bytes."""
        return sum(self.lines.values())

    def table(self) -> list[str]:
        """The lines to print, GiB, what adds to less than 0.005 GiB together in one; then every moment's sum."""
        small = {what: size for what, size in self.lines.items() if abs(size) < 0.005 * GIB}
        lines = [f"{size / GIB:>9.2f}  {what}" for what, size in self.lines.items() if what not in small]
        lines.append(f"{sum(small.values()) / GIB:>9.2f}  {len(small)} smaller ones")
        lines.append(f"{self.total / GIB:>9.2f}  GiB, the peak: {self.moment}")
        beneath = sum(self.lasting.values())
        others = {name: beneath + sum(of.values()) for name, of in self.moments.items() if name != self.moment}
        return [*lines, "other moments: " + ", ".join(f"{name} {size / GIB:.2f}" for name, size in others.items())]


class Counted:
    """Model and optimizers of a setup on the meta device: what lasts. One serves for all micro-batches of a shape."""

    def __init__(self, setup: Setup, adamw: str = "own"):
        """Build both.

        Args:
            setup: its rows and accumulation do not matter here.
            adamw: one of `te_adam.CHOICES`; Transformer Engine's state is counted as its formats say.
        """
        self.setup = setup
        with torch.device("meta"):
            self.model = GPT(setup.shape, setup.precision, "auto")
        all_groups = groups(self.model, setup.shape, weight_decay=0.0)
        owner = ownership(all_groups, setup.ranks)
        first, self.muon = build_optimizers(all_groups, owner, 0, setup.precision.compute_dtype, "own", setup.formats)
        self.states = _state(self.muon, "Muon") | (_state(first, "AdamW") if adamw == "own" else _te_adam(first, adamw))

    def lasting(self) -> Bytes:
        """Weights, what is kept beside them, optimizer state, workspaces; not gradients."""
        precision, hopper = self.setup.precision, self.setup.capability >= (9, 0)
        te = isinstance(precision, TEPrecision)
        return {
            **self._by_group("weights", lambda name, p: p.nbytes),
            "FP8 copies of weights, both layouts": self._fp8_copies(),
            **self.states,
            "cuBLAS's workspaces": 2 * self._workspace_of_torch() + (_TE_CUBLAS[hopper] if te else 0),
        }

    def _workspace_of_torch(self) -> int:
        """A workspace of PyTorch's cuBLAS; 0 where steps are of FP8 GEMMs alone, of which some take one for a moment.

        Evaluation is bf16 there, too: 32 MiB from the first one on, which are not counted.
        """
        return 0 if in_fp8_alone(self.setup.precision) else _CUBLAS[self.setup.capability >= (9, 0)]

    def gradients(self) -> Bytes:
        """Gradients of all parameters, as they are summed."""
        return self._by_group("gradients", lambda name, p: p.numel() * self._gradient_size(name, p))

    def tables_gradients(self) -> Bytes:
        """Those of lookup tables, which are written past autograd."""
        return {what: size for what, size in self.gradients().items() if what.endswith("tables")}

    def _by_group(self, what: str, size: Callable[[str, Tensor], float]) -> Bytes:
        """Sum `size(name, parameter)` over tables, lm_head and the rest."""
        sums: Bytes = {}
        for name, p in self.model.named_parameters():
            kind = "tables" if "wte" in name or "value_embeds" in name else "lm_head" if "lm_head" in name else "matrices"
            key = f"{what}: {kind}"
            sums[key] = sums.get(key, 0) + size(name, p)
        return sums

    def _gradient_size(self, name: str, p: Tensor) -> int:
        """Bytes an element. FP8 modules hand bf16 gradients to fp32 matrices (`te_engine._hand_over`); others are as the weight."""
        precision = self.setup.precision
        handed = isinstance(precision, TEPrecision) and precision.weights == "fp8" and in_blocks(name)
        return 2 if handed else p.itemsize

    def _fp8_copies(self) -> float:
        precision = self.setup.precision
        scaling = precision.recipe.fprop.right.scaling if isinstance(precision, TEPrecision) else ""
        one = {"nv16": 0.5 + 1 / 16, "mx32": 1 + 1 / 32}.get(scaling, 1.0)
        return one * sum(p.numel() * copies(precision, name) for name, p in self.model.named_parameters())

    def workspace(self) -> Bytes:
        """What Muon works in: its largest chunk."""
        return {"Muon's workspace": max((size for _, size in self._chunks()), default=0)}

    def early(self) -> Bytes:
        """What an update in the middle of backward needs: gradients of one chunk of every shape, and the workspace."""
        matrices = sum(p.numel() for group in self.muon.param_groups for p in group["params"])
        part = sum(elements for elements, _ in self._chunks()) / matrices
        return {"gradients: matrices": part * self.gradients()["gradients: matrices"], **self.workspace()}

    def products(self, shape: torch.Size) -> str:
        """The way that Muon goes for matrices of a shape (`nvfp8/polar_express.py`)."""
        rows, columns = shape
        return fastest_products(rows, columns, self.setup.precision.compute_dtype, self.setup.capability)

    def _chunks(self) -> list[tuple[int, int]]:
        """Of every shape the elements that Muon takes at once, and the bytes it works in then (`nvfp8/optim/muon.py`)."""
        dtype = self.setup.precision.compute_dtype
        shapes = Counter(p.shape for group in self.muon.param_groups for p in group["params"])
        found = []
        for shape, count in shapes.items():
            rows, columns = shape
            how = rows, columns, dtype, self.products(shape)
            size = together(count, self.muon.workspace, *how)
            found.append((size * rows * columns, size * room(*how)))
        return found


def _state(optimizer: NamedOptimizer, kind: str) -> Bytes:
    sums: Bytes = {}
    for name, value in optimizer.named_state().items():
        what = "masters" if name.endswith((".master", ".remainder")) else "state"
        key = f"{kind}: {what}"
        sums[key] = sums.get(key, 0) + value.nbytes
    return sums


def _te_adam(own: NamedOptimizer, choice: str) -> Bytes:
    """FusedAdam's: both moments in one format for all (`nanochat/te_adam.py`), masters or remainders of bf16 matrices."""
    moment = {"te-bf16": 2, "te-fp8": 1}.get(choice, 4)
    rest = 2 if choice == "te-remainders" else 4
    parameters = [(group["master"], p) for group in own.param_groups for p in group["params"]]
    state = sum(p.numel() * 2 * moment for _, p in parameters)
    masters = sum(p.numel() * rest for master, p in parameters if master and p.dtype != torch.float32)
    return {"AdamW: state": state, "AdamW: masters": masters}


def in_fp8_alone(precision: Precision) -> bool:
    """Whether all products of a step are FP8 GEMMs of our own: each adds a weight's gradient to those there are."""
    return isinstance(precision, FP8Precision) and not (precision.recipe.bf16 or precision.head_in_bf16 or precision.emulated)


def predict(setup: Setup, counted: Counted | None = None) -> Prediction:
    """Predict the peak.

    Args:
        setup: what is to be trained, and how.
        counted: of a setup that differs in rows, accumulation, attention or determinism only, to save building it again.
    """
    counted = counted or Counted(setup)
    shape, precision = setup.shape, setup.precision
    batch = MicroBatch(shape, setup.rows, precision.compute_dtype.itemsize, setup.attention, setup.deterministic)
    blocks = [activations.block(precision, batch, layer) for layer in range(shape.n_layer)]
    ends, last = activations.ends(precision, batch), blocks[-1]
    first_halves, halves = [b.attention for b in blocks], [half for b in blocks for half in (b.attention, b.mlp)]
    head = activations.head(precision, batch)
    lasting, gradients = counted.lasting(), counted.gradients()
    summed = gradients if setup.accumulation > 1 else {}
    apart = 0 if in_fp8_alone(precision) else summed.get("gradients: matrices", 0)
    again = {"gradients: matrices, before they are added": apart}
    of_block = {what: size / shape.n_layer for what, size in again.items()}
    late = gradients if not setup.update_early else _sum(counted.tables_gradients(), counted.early())
    moments = {
        head.moment: _sum(ends, *halves, summed, head.working),
        "backward of the last attention": _sum(
            ends, *first_halves, *(b.mlp for b in blocks[:-1]), summed, of_block, activations.after_attention(batch)
        ),
        "the optimizer's step": late if setup.update_early else _sum(late, counted.workspace()),
    }
    worst = max(last.mlp_backward, key=lambda working: sum(working.values()))
    moments["backward of the last MLP"] = _sum(ends, *halves, summed, worst)
    moments["backward of the first block"] = _sum(ends, blocks[0].attention, blocks[0].mlp, late, again, worst)
    if setup.graphs and not setup.captured_updates:  # then beside all that a micro-batch's worst moment takes, not in its place
        moments["the optimizer's step"] = _sum(max(moments.values(), key=lambda of: sum(of.values())), counted.workspace())
    if setup.graphs:
        lasting["cuBLAS's workspaces"] += 2 * counted._workspace_of_torch()
    lasting["token ids and their order"] = 6 * 8 * batch.tokens  # two batches of inputs and targets, and the sorted positions
    return Prediction(lasting, moments)


def _sum(*parts: Bytes) -> Bytes:
    """Join lines, adding those of one name."""
    sums: Bytes = {}
    for part in parts:
        for what, size in part.items():
            sums[what] = sums.get(what, 0) + size
    return sums


def largest_batch(setup: Setup, room: float, counted: Counted | None = None) -> int:
    """The most rows whose peak is at most `room` bytes; 0 where not even one fits."""
    counted = counted or Counted(setup)

    def fits(rows: int) -> bool:
        return predict(replace(setup, rows=rows), counted).total <= room

    if not fits(1):
        return 0
    high = 1
    while fits(2 * high):
        high *= 2
    low, high = high, 2 * high  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def setup_of(config: TrainConfig, model: GPT, accumulation: int, ranks: int) -> Setup:
    """The setup of a run that has built its model.

    Args:
        config: its flags.
        model: what it trains.
        accumulation: micro-batches of a step.
        ranks: processes.
    """
    device = model.cos.device
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return Setup(
        model.config, model.precision, config.device_batch_size, accumulation, config.formats(model.precision),
        model.attention_backend, config.deterministic, config.update_early,
        not config.no_cuda_graphs and refusal(model, ranks, config.update_early) is None, config.adamw == "own", ranks, capability,
    )  # fmt: skip


def of_run(config: TrainConfig, model: GPT, accumulation: int, ranks: int) -> Prediction:
    """Predict the peak of a run that has built its model; arguments as of `setup_of`."""
    setup = setup_of(config, model, accumulation, ranks)
    return predict(setup, Counted(setup, config.adamw))


def bytes_per_parameter(counted: Counted) -> float:
    """What lasts for the sake of parameters: weights, FP8 copies, optimizer state and masters, gradients; over their number."""
    held = counted.lasting() | counted.gradients()
    return sum(size for what, size in held.items() if "workspace" not in what) / counted.model.parameter_counts()["total"]


def beside(metrics: Metrics, config: TrainConfig, model: GPT, accumulation: int, ranks: int, measured: float) -> str:
    """What a run's last line says of memory; on a GPU the prediction is recorded, line by line, beside what was measured.

    A CPU has no allocator to ask: what is measured there is the whole process, and nothing is predicted.

    Args:
        metrics: of the run.
        config: as for `setup_of`, and so the next three.
        model: what was trained.
        accumulation: micro-batches of a step.
        ranks: processes.
        measured: peak, GiB.
    """
    if model.cos.device.type != "cuda":
        return f"peak memory {measured:.1f} GiB"
    predicted = of_run(config, model, accumulation, ranks)
    gib = predicted.total / GIB
    lines = {what: round(size / GIB, 4) for what, size in predicted.lines.items()}
    metrics.memory(measured=measured, predicted=gib, moment=predicted.moment, lines=lines)
    return f"peak memory {measured:.1f} GiB ({gib:.1f} predicted: {predicted.moment})"
