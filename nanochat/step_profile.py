"""Where a step's time goes: GPU kernels by family, beside the time they cannot go below.

    floor = FLOPs / peak of their format     for GEMMs and attention
          = bytes / bandwidth                for what lies between them, and for the optimizers' passes
          = nothing                          for what ranks send each other

Bytes of the optimizers' passes, of additions to gradients and of all that lies between GEMMs are counted apart: a cast, say, is
between GEMMs whoever makes it. FLOPs and bytes are counted (`nanochat/roofline.py`), not measured: what our kernels must move,
whatever they do. So a family far from its floor is either slow or does what it need not. A kernel is in exactly one family, found
by its name, and what no family claims is under "other": look at the trace before believing a small "other".

Below the table stands how long the GPU was idle (`nanochat/idle.py`). The profiler, and the allocator that remembers, slow the
host, so that is more than without them: the step before says by how much, since kernels take the same time in it.

The trace opens in https://ui.perfetto.dev, the snapshot of the allocator in https://pytorch.org/memory_viz: both pages read a file
where it is. The snapshot is a pickle, for that is what PyTorch writes; nothing of ours reads it.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity

import nvfp8
from nanochat import gauges, idle, memory, roofline
from nanochat.errors import BadInput
from nanochat.gpt import GPT, GPTConfig
from nanochat.train_config import TrainConfig
from nvfp8.hardware import Peaks

Kernel = tuple[str, int, float]  # name, launches, milliseconds
TRACE, SNAPSHOT, TABLE = "trace.json.gz", "memory.pickle", "table.txt"
HISTORY = 200_000  # allocations and frees that the snapshot goes back

_KERNEL = re.compile(r"^@triton\.jit[^\n]*\n(?:@[^\n]*\n)*def (\w+)", re.MULTILINE)
_FILES = {path.stem: _KERNEL.findall(path.read_text()) for path in Path(nvfp8.__path__[0], "kernels").glob("*.py")}
_BY_FILE = {
    "gemm_fp8": "GEMMs",
    "gemm_heads_fp8": "GEMMs",
    "symmetric": "GEMMs",
    "adamw": "optimizers' kernels",
    "muon": "optimizers' kernels",
    "muon_norms": "optimizers' kernels",
    "polar_express": "optimizers' kernels",
}
OURS = {name: _BY_FILE.get(stem, "our Triton kernels") for stem, names in _FILES.items() for name in names}
# After OURS, the first that matches: attention's kernels are made with CUTLASS too, and embedding gradients copy what they sort.
# What ranks send each other is first of all: it waits for the slowest of them and for links that no peak is known of, so it has no
# floor, and is no part of what has one.
COMMUNICATION = "communication"
FAMILIES = (
    (COMMUNICATION, re.compile(r"^nccl|^gloo:|^c10d::", re.IGNORECASE)),
    ("attention", re.compile(r"cudnn|sdpa|flash|fmha", re.IGNORECASE)),
    ("GEMMs", re.compile(r"gemm|gemv|nvjet|cutlass|xmma|cublas|splitk|aten::\w*mm$", re.IGNORECASE)),
    ("Transformer Engine", re.compile(r"transformer_engine")),
    ("embedding gradients", re.compile(r"embedding|cub::|krn_partial|partial_segments|compute_grad_weight|sum_and_scatter")),
    ("casts and copies", re.compile(r"copy|mem(cpy|set)|FillFunctor|(?<!broad)(?<!no)cast|transpose|quantize|amax", re.IGNORECASE)),
    ("additions (gradients)", re.compile(r"CUDAFunctor_add|CUDAFunctorOnSelf_add|BinaryOpListAlphaFunctor")),
)
_LIMITED_BY_FLOPS = ("GEMMs", "attention")
# Their bytes are counted apart. All others share what passes between GEMMs must move.
_UPDATES, _ADDITIONS, _ALL_ELSE = "optimizers' kernels", "additions (gradients)", "all else"


def family(kernel: str) -> str:
    """The family of a kernel, by the name that the profiler gives it."""
    return OURS.get(kernel) or next((name for name, pattern in FAMILIES if pattern.search(kernel)), "other")


@dataclass(frozen=True)
class Floor:
    """What one step must do.

    Attributes:
        gemms: FLOPs by format: "FP8" and "bf16".
        attention: its FLOPs, of the keys that queries see.
        moved: bytes by family: optimizers' kernels, additions of gradients, and "all else", what lies between GEMMs.
    """

    gemms: dict[str, float]
    attention: float
    moved: dict[str, float]

    def milliseconds(self, known: Peaks) -> dict[str, float]:
        """Shortest times: of "GEMMs", "attention" and the families of `moved`."""
        rates = {"bf16": known.bf16, "FP8": known.fp8 or known.bf16}
        seconds = sum(flops / rates[kind] for kind, flops in self.gemms.items())
        return {
            "GEMMs": 1e3 * seconds,
            "attention": 1e3 * self.attention / known.bf16,
            **{family: 1e3 * size / known.bandwidth for family, size in self.moved.items()},
        }


def floor_of(config: TrainConfig, model: GPT, accumulation: int, ranks: int) -> Floor:
    """The floor of a run's step; arguments as of `memory.setup_of`."""
    counted = memory.Counted(memory.setup_of(config, model, accumulation, ranks))
    return floor(roofline.work(counted, config.device_batch_size), model.config, config.device_batch_size, accumulation)


def floor(done: roofline.Work, shape: GPTConfig, rows: int, accumulation: int) -> Floor:
    """The floor of a step of `accumulation` micro-batches of `rows` rows, each of which does `done`."""
    seen = sum(roofline.keys(shape, layer) for layer in range(shape.n_layer))
    return Floor(
        {"FP8": accumulation * done.fp8, "bf16": accumulation * done.bf16 + sum(done.polar.values())},
        accumulation * 12 * shape.n_embd * rows * shape.sequence_len * seen,
        {_UPDATES: done.updated, _ADDITIONS: accumulation * done.added, _ALL_ELSE: accumulation * (done.moved - done.added)},
    )


def by_family(kernels: Iterable[Kernel], parts: int = 1) -> dict[str, tuple[float, float]]:
    """Launches and milliseconds by family, the longest first, divided by `parts`."""
    sums: dict[str, tuple[float, float]] = {}
    for name, launches, ms in kernels:
        before = sums.get(family(name), (0.0, 0.0))
        sums[family(name)] = before[0] + launches / parts, before[1] + ms / parts
    return dict(sorted(sums.items(), key=lambda item: -item[1][1]))


@dataclass(frozen=True)
class Recorded:
    """A step that was profiled.

    Attributes:
        profiler: what it was profiled by.
        device: where it ran.
        seconds: it took with the profiler around it.
    """

    profiler: torch.profiler.profile
    device: torch.device
    seconds: float

    def kernels(self) -> list[Kernel]:
        """Its kernels (on a CPU its operations)."""
        cuda = self.device.type == "cuda"
        kind = DeviceType.CUDA if cuda else DeviceType.CPU
        rows = [row for row in self.profiler.key_averages() if row.device_type == kind and not row.is_user_annotation]
        return [(row.key, row.count, (row.self_device_time_total if cuda else row.self_cpu_time_total) / 1e3) for row in rows]

    def spans(self) -> list[idle.Span]:
        """When each kernel, copy and memset ran on the GPU; nothing on a CPU, which runs what it is told at once."""
        return [span for span, annotation in self._on_gpu() if not annotation]

    def updates_from(self) -> float | None:
        """When the first kernel of the optimizers started, on the clock of `spans`; None where none was called or seen.

        PyTorch marks every `Optimizer.step`, and the profiler repeats the mark beside the kernels that it launched.
        """
        return min((span.start for span, mark in self._on_gpu() if mark and span.name.startswith("Optimizer.step")), default=None)

    def _on_gpu(self) -> Iterator[tuple[idle.Span, bool]]:
        """What the profiler saw on the GPU, and whether each is a mark of a stretch of time rather than work."""
        for event in self.profiler.events():
            if event.device_type == DeviceType.CUDA:
                yield idle.Span(event.name, event.time_range.start / 1e3, event.time_range.end / 1e3), event.is_user_annotation


def table(kernels: Iterable[Kernel], least: Floor | None, known: Peaks | None) -> list[str]:
    """The lines to print.

    Args:
        kernels: of one step.
        least: what it must do; None where that is not counted.
        known: peaks of the device; None where they are not known, and so no floor is.
    """
    sums = by_family(kernels)
    total = sum(ms for _, ms in sums.values())
    floors = least.milliseconds(known) if least and known else {}
    work = {} if least is None else {"GEMMs": f"{sum(least.gemms.values()) / 1e12:.1f} TFLOP"}
    work |= {} if least is None else {"attention": f"{least.attention / 1e12:.1f} TFLOP"}
    work |= {} if least is None else {family: f"{size / 1e9:.1f} GB" for family, size in least.moved.items()}

    def line(name: str, launches: float, ms: float, group: str = "") -> str:
        shortest = floors.get(group)
        end = f"{shortest:>11.2f}{shortest / ms:>9.1%}" if shortest is not None and ms else f"{'-':>11}{'-':>9}"
        return f"{name:<26}{ms:>10.2f}{ms / total if total else 0:>8.1%}{launches:>10.0f}{work.get(group, '-'):>16}" + (
            end if group else ""
        )

    apart = (*_LIMITED_BY_FLOPS, _UPDATES, _ADDITIONS)
    others = {name: value for name, value in sums.items() if name not in (*apart, COMMUNICATION)}
    lines = [f"{'family':<26}{'ms':>10}{'share':>8}{'launches':>10}{'must do':>16}{'floor, ms':>11}{'of it':>9}"]
    lines += [line(name, *sums[name], name) for name in apart if name in sums]
    lines.append(line(_ALL_ELSE, sum(n for n, _ in others.values()), sum(ms for _, ms in others.values()), _ALL_ELSE))
    lines += [line(f"  {name}", *value).removesuffix(f"{'-':>16}") for name, value in others.items()]
    if COMMUNICATION in sums:
        lines.append(line(COMMUNICATION, *sums[COMMUNICATION], COMMUNICATION))
    shortest = sum(floors.values())
    lines.append(f"{'sum':<26}{total:>10.2f}" + (f"{'':>34}{shortest:>11.2f}{shortest / total:>9.1%}" if floors and total else ""))
    return lines


def recorded(step: Callable[[], Any], device: torch.device) -> Recorded:
    """Run `step` under the profiler."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    start = time.perf_counter()
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        if cuda:
            torch.cuda.synchronize(device)
    return Recorded(profiler, device, time.perf_counter() - start)


# A profile is begun, recorded and written in three calls: what the file system refuses is met by one rank alone, so it must not
# reach around the step, in which the others wait for this one.


def begin(directory: Path, device: torch.device) -> None:
    """Make the directory of a profile, before a step is run for nothing, and let the allocator remember from here on.

    Raises:
        BadInput: it cannot be made.
    """
    with _written(directory):
        directory.mkdir(parents=True, exist_ok=True)
    if device.type == "cuda":
        torch.cuda.memory._record_memory_history(max_entries=HISTORY)


def without_profiler(spans: list[idle.Span], ms: float) -> str:
    """What to print of a step, or a micro-batch, that took `ms` unprofiled, and of whose kernels `spans` tell, profiled."""
    busy = idle.idle(spans).busy
    return f"{ms:.2f} ms; kernels take {busy:.2f} of it, for the other {ms - busy:.2f} ({1 - busy / ms:.1%}) the GPU waits"


def write(done: Recorded, directory: Path, least: Floor, usual: float) -> list[str]:
    """Write a step's trace, the allocator's snapshot and the table, and return what to print. The allocator forgets again.

    Args:
        done: the step, recorded after `begin`.
        directory: of `begin`.
        least: what the step must do.
        usual: seconds of a step without the profiler.

    Raises:
        BadInput: the directory cannot be written.
    """
    cuda, known = done.device.type == "cuda", gauges.peaks(done.device)
    spans = done.spans()
    lines = [*table(done.kernels(), least if cuda else None, known), *idle.lines(spans, done.updates_from())]
    lines.append(f"the step with the profiler around it, which slows the host: {1e3 * done.seconds:.0f} ms")
    before = without_profiler(spans, 1e3 * usual) if spans else f"{1e3 * usual:.0f} ms"
    lines.append(f"the step before, without it: {before}")
    if not cuda:
        lines.append(
            "a CPU runs our kernels' twins, operation by operation: neither bytes nor a floor are counted, and there is no "
            "allocator to take a snapshot of"
        )
    elif known is None:
        lines.append("no floor: the peaks of this GPU are not known")
    lines.append(f"written: {directory}/{TRACE}" + (f", {SNAPSHOT}" if cuda else ""))
    try:
        with _written(directory):
            if cuda:
                torch.cuda.memory._dump_snapshot(str(directory / SNAPSHOT))
            done.profiler.export_chrome_trace(str(directory / TRACE))
            (directory / TABLE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    finally:
        if cuda:
            torch.cuda.memory._record_memory_history(enabled=None)
    return lines


@contextmanager
def _written(directory: Path) -> Iterator[None]:
    """What the file system refuses is one line."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"--profile cannot write into {directory}: {error.strerror}") from error
