"""The same few steps in several precisions, each in a process of its own, and what they say of each other.

A process of its own, because peak memory, compiled kernels and cuBLAS's workspaces belong to a process: the second precision in one
would inherit what the first has left. Steps, seed and data are the same, so two losses of a step are of the same tokens: their
difference holds no noise of sampling, only of rounding. Every process makes real steps, those of `scripts.base_train`.

When has a precision diverged? Let the reference learn L nats from the mean of its first quarter of the steps to that of its last.
Three quarters of the run lie between their middles, so a loss that fell along a straight line would fall L/3 in a quarter of the
run, and one that falls ever more slowly, as training's does, less than that at the end. A precision whose last quarter is more than
L/3 above the reference's is therefore at least a quarter of the run behind: it would have to be 4/3 as fast to win that back, which
is as much as FP8 has brought here. The bound is in units of what was learned, so it holds for any depth, number of steps and data.
"""

import json
import math
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import time
import traceback
from dataclasses import asdict, dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from nanochat import gauges, memory, metrics, parallel, process
from nanochat.build import PRECISIONS, choose_precision
from nanochat.checkpoint import environment
from nanochat.dataset import resolve
from nanochat.errors import BadInput
from nanochat.gpt import GPTConfig
from nanochat.planner import CONTEXT, UNUSABLE
from nanochat.schedule import accumulation_steps
from nanochat.tokenizer import Tokenizer
from nanochat.train import WARMUP_STEPS, Run
from nanochat.train_config import TrainConfig

FEWEST = WARMUP_STEPS + 1  # steps: one that is not warm-up must be left
BEHIND = 1 / 3  # of what the reference has learned
SAVES = 0.01  # of time or memory: less is nothing
_FP8 = ("te", "fp8")
_RESULT = "result.json"
_POLL = 0.05  # seconds between two looks at the board's memory


@dataclass(frozen=True)
class Measured:
    """What one precision's process has measured.

    Attributes:
        layers: what every part of the model ran in.
        losses: nats per token, one a step.
        bad_steps: steps that were refused for something that was not finite.
        seconds: of each step.
        tokens: of a step.
        warm_up: seconds of the first WARMUP_STEPS steps, compilation included.
        parameters: of the model.
        bytes_per_parameter: weights, copies, optimizer state, masters and gradients, counted.
        mfu: model FLOP/s over the peak of the formats they are in; None where that is not known.
        gib: peak of the allocator, or of the process on a CPU.
        predicted_gib: what `nanochat/memory.py` says of that; None on a CPU.
        joules_per_token: of the whole board after the warm-up; None where it was not counted.
        no_energy: why not.
        board_gib: what the board's taken memory has grown by at most, all programs; None where it was not measured.
    """

    layers: dict[str, str]
    losses: list[float]
    bad_steps: int
    seconds: list[float]
    tokens: int
    warm_up: float
    parameters: int
    bytes_per_parameter: float
    mfu: float | None
    gib: float
    predicted_gib: float | None
    joules_per_token: float | None
    no_energy: str
    board_gib: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Median of the steps after the warm-up."""
        return self.tokens / statistics.median(self.seconds[WARMUP_STEPS:])


@dataclass(frozen=True)
class Row:
    """One precision of the comparison.

    Attributes:
        precision: its name.
        measured: None where it could not run, or failed.
        unavailable: why it cannot run here.
        failed: what its process ended with.
    """

    precision: str
    measured: Measured | None = None
    unavailable: str = ""
    failed: str = ""


@dataclass(frozen=True)
class Comparison:
    """All rows, and what they were asked for.

    Attributes:
        rows: in the order asked for.
        reference: the precision that the others are compared with.
        device: "cuda" or "cpu".
        device_name: a GPU's name, or "CPU".
        config: of every run, but for precision.
        environment: of `checkpoint.environment`.
        date: when it began, in UTC.
    """

    rows: list[Row]
    reference: str
    device: str
    device_name: str
    config: TrainConfig
    environment: dict[str, Any]
    date: str

    def of_reference(self) -> Measured | None:
        """What the reference has measured."""
        return next(row.measured for row in self.rows if row.precision == self.reference)

    def gap(self, row: Row) -> float | None:
        """The largest distance of a loss from the reference's at the same step; None without both, not finite if one is not."""
        base = self.of_reference()
        if base is None or row.measured is None or row.precision == self.reference:
            return None
        gaps = [abs(one - other) for one, other in zip(row.measured.losses, base.losses, strict=True)]
        return max(gaps) if all(map(math.isfinite, gaps)) else math.nan

    def speed(self, row: Row) -> float | None:
        """Throughput over the reference's; None on a CPU, where emulation is no measure of FP8."""
        base = self.of_reference()
        if self.device != "cuda" or base is None or row.measured is None:
            return None
        return row.measured.tokens_per_second / base.tokens_per_second

    def memory(self, row: Row) -> float | None:
        """The allocator's peak over the reference's; None on a CPU."""
        base = self.of_reference()
        if self.device != "cuda" or base is None or row.measured is None:
            return None
        return row.measured.gib / base.gib

    def problems(self) -> list[str]:
        """What makes the dry run fail, a line each, beginning with the name of the row."""
        found = []
        base = self.of_reference()
        for row in self.rows:
            if row.failed:
                found.append(f"{row.precision}: {row.failed}")
            elif row.measured is not None:
                found += [f"{row.precision}: {what}" for what in self._wrong(row, row.measured, base)]
        if base is None and not any(row.failed for row in self.rows if row.precision == self.reference):
            found.append(f"{self.reference}: unavailable, and the others are compared with it")
        return found

    def _wrong(self, row: Row, measured: Measured, base: Measured | None) -> list[str]:
        odd = [step for step, loss in enumerate(measured.losses) if not math.isfinite(loss)]
        if measured.bad_steps or odd:
            return [f"not finite: {len(odd)} losses, {measured.bad_steps} refused steps of {len(measured.losses)}"]
        if base is None:
            return []
        if row.precision == self.reference:
            if learned(base.losses) <= 0:
                return ["the reference has learned nothing, so nothing can be compared with it: more --steps"]
            return []
        found = []
        lag, bound = behind(measured.losses, base.losses), BEHIND * learned(base.losses)
        if learned(base.losses) > 0 and lag > bound:
            found.append(
                f"diverged: over the last quarter its loss is {lag:.3f} above {self.reference}'s, more than {bound:.3f}, which "
                "is a quarter of the run behind"
            )
        speed, room = self.speed(row), self.memory(row)
        if row.precision in _FP8 and speed is not None and room is not None and speed < 1 + SAVES and room > 1 - SAVES:
            found.append(f"saves neither time nor memory: {speed:.2f} of {self.reference}'s speed, {room:.2f} of its memory")
        return found

    def record(self) -> dict[str, Any]:
        """Everything as JSON has it, derived figures and problems included."""
        rows = []
        for row in self.rows:
            derived = {"gap": self.gap(row), "speed_ratio": self.speed(row), "memory_ratio": self.memory(row)}
            rate = row.measured.tokens_per_second if row.measured else None
            rows.append(asdict(row) | derived | {"tokens_per_second": rate})
        return metrics.finite({**asdict(self), "rows": rows, "problems": self.problems(), "speed_is_judged": self.device == "cuda"})


def _quarter(losses: list[float]) -> int:
    return max(1, len(losses) // 4)


def learned(losses: list[float]) -> float:
    """Nats that a loss has fallen by, from the mean of its first quarter to that of its last."""
    n = _quarter(losses)
    return statistics.fmean(losses[:n]) - statistics.fmean(losses[-n:])


def behind(losses: list[float], reference: list[float]) -> float:
    """Nats that the mean of the last quarter lies above the reference's."""
    n = _quarter(losses)
    return statistics.fmean(losses[-n:]) - statistics.fmean(reference[-n:])


def defaults(device: str) -> TrainConfig:
    """What is trained: nanochat's d12 on a GPU; on a CPU what two cores train in seconds, with rates for so small a batch."""
    common = TrainConfig(
        device_type=device, num_iterations=20, eval_every=-1, sample_every=-1, core_metric_every=-1, max_bad_steps=sys.maxsize
    )
    if device == "cuda":
        return replace(common, depth=12, total_batch_size=2**19)
    return replace(
        common, depth=4, aspect_ratio=32, head_dim=32, max_seq_len=256, device_batch_size=8, total_batch_size=2048,
        matrix_lr=0.3, embedding_lr=3.0, unembedding_lr=0.08, scalar_lr=1.0,
    )  # fmt: skip


def parse_precisions(text: str) -> list[str]:
    """The names in "bf16,fp8,te".

    Raises:
        BadInput: one that is no precision, or is there twice, or none at all.
    """
    names = [name.strip() for name in text.split(",")]
    known = [name for name in PRECISIONS if name != "auto"]
    for name in names:
        if name not in known:
            raise BadInput(f"--precisions {text}: {name!r} is none; choose among {', '.join(known)}")
    if len(set(names)) < len(names):
        raise BadInput(f"--precisions {text}: one of them is there twice")
    return names


def reference_of(names: list[str]) -> str:
    """What the others are compared with: bf16 where it is among them, else fp32, else the first."""
    return next((name for name in ("bf16", "fp32") if name in names), names[0])


def unavailable(name: str, config: TrainConfig, shape: GPTConfig) -> str:
    """Why a precision cannot train this here; "" where it can."""
    try:
        precision, _ = choose_precision(name, config.device_type)
    except BadInput as error:
        return str(error).removeprefix(f"--precision {name}: ")
    return precision.refuses(config.device_batch_size * config.max_seq_len, shape.n_embd) or ""


def fitting_rows(config: TrainConfig, names: list[str], free: float, shape: GPTConfig) -> int:
    """Rows of a micro-batch that every precision has room for: the largest power of two up to the default that does.

    Args:
        config: with the most rows wanted.
        names: precisions that run here.
        free: bytes of the GPU that nobody has.
        shape: of the model.

    Raises:
        BadInput: not one row fits.
    """
    room = (free - CONTEXT) * (1 - UNUSABLE)
    capability, rows = torch.cuda.get_device_capability(), config.device_batch_size
    for name in names:
        computes, _ = choose_precision(name, "cuda")
        formats = config.formats(computes)
        setup = memory.Setup(
            shape, formats.stored_by(computes, "cuda"), 1, formats=formats, graphs=name != "te", capability=capability
        )
        rows = min(rows, memory.largest_batch(setup, room))
    if rows < 1:
        raise BadInput(f"--depth {config.depth}: not even one row fits into {room / memory.GIB:.1f} GiB: take a smaller depth")
    return 2 ** (rows.bit_length() - 1)


def measure(config: TrainConfig, directory: Path) -> Measured:
    """Train one precision in this process.

    Args:
        config: what; its precision included.
        directory: what the run writes to.

    Raises:
        BadInput: it cannot be trained.
    """
    with process.restored():
        world = parallel.init(config.device_type)
        try:
            return _measure(Run(config, world, directory))
        finally:
            parallel.shutdown()


def _measure(run: Run) -> Measured:
    model, plan, device = run.model, run.plan, run.world.device
    board, bad, joules = gauges.board(device), 0, None
    try:
        for step in range(plan.steps):
            if step == WARMUP_STEPS and isinstance(board, gauges.Board):
                joules = board.joules()
            run.step()
            bad += run.progress.bad_steps > 0
    finally:
        run.batches.close()
        if run.metrics is not None:
            run.metrics.close()
    if run.failure is not None:
        raise run.failure
    energy = None
    if joules is not None and isinstance(board, gauges.Board):
        now = board.joules()
        energy = None if now is None else (now - joules) / (plan.batch_tokens * (plan.steps - WARMUP_STEPS))
    steps = [record for record in metrics.read(run.directory) if record["kind"] == "step"]
    seconds = [record["seconds"] for record in steps]
    setup = memory.setup_of(run.config, model, plan.accumulation, 1)
    counted = memory.Counted(setup)
    peak = gauges.model_peak(model, gauges.peaks(device))
    rate = plan.batch_tokens / statistics.median(seconds[WARMUP_STEPS:])
    return Measured(
        layers=run.layers(), losses=[float(record["loss"]) for record in steps], bad_steps=bad, seconds=seconds,
        tokens=plan.batch_tokens, warm_up=sum(seconds[:WARMUP_STEPS]), parameters=model.parameter_counts()["total"],
        bytes_per_parameter=memory.bytes_per_parameter(counted),
        mfu=None if peak is None else rate * model.flops_per_token() / peak,
        gib=gauges.peak_gib(device, run.micro_batches.hidden),
        predicted_gib=memory.predict(setup, counted).total / memory.GIB if device.type == "cuda" else None,
        joules_per_token=energy,
        no_energy=board if isinstance(board, str) else "" if energy is not None else "this board does not count its energy",
    )  # fmt: skip


def _worker(config: TrainConfig, directory: Path) -> None:
    """The whole life of a precision's process: its result, or its failure, goes to a file."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback beside its parent's word
    try:
        result: dict[str, Any] = {"measured": asdict(measure(config, directory))}
    except Exception as error:
        if not isinstance(error, BadInput):
            traceback.print_exc()
        name = "" if isinstance(error, BadInput) else f"{type(error).__name__}: "
        result = {"failed": name + str(error).partition("\n")[0]}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _RESULT).write_text(json.dumps(metrics.finite(result)))
    sys.exit("failed" in result)


def _train(name: str, config: TrainConfig, directory: Path) -> Row:
    """Train one precision in a new process, and watch the board's memory from here meanwhile.

    Whatever ends this process ends that one too, for it would keep the GPU: Ctrl-C, a failure, and SIGTERM, of which Python makes
    an exception only where it is told to.
    """
    board = gauges.board(torch.device(config.device_type))
    used = board.used() if isinstance(board, gauges.Board) else None
    most = used or 0
    child = multiprocessing.get_context("spawn").Process(target=_worker, args=(replace(config, precision=name), directory))
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        child.start()
        while child.is_alive():
            if used is not None and isinstance(board, gauges.Board):
                most = max(most, board.used() or 0)
                child.join(_POLL)
            else:
                child.join()
    finally:
        if child.is_alive():
            child.terminate()
            child.join()
        signal.signal(signal.SIGTERM, before)
    return _read(name, directory, child, None if used is None else (most - used) / 2**30)


def _leave(number: int, _: FrameType | None) -> NoReturn:
    """End this process by an exception, which `finally` sees, with the status of the signal."""
    sys.exit(128 + number)


def _clear(directory: Path) -> None:
    """Remove what an earlier dry run has left in a precision's folder, and nothing else."""
    if not directory.exists():
        return
    if not any((directory / name).is_file() for name in (_RESULT, metrics.JSONL)):
        raise BadInput(f"{directory} is not of an earlier dry run, so it is not overwritten: remove it, or give another --out")
    shutil.rmtree(directory)


def _read(name: str, directory: Path, child: BaseProcess, board_gib: float | None) -> Row:
    path = directory / _RESULT
    if not path.exists():
        code = child.exitcode or 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        return Row(name, failed=f"its process was {how} before it had a result")
    result = json.loads(path.read_text())
    if "failed" in result:
        return Row(name, failed=result["failed"])
    measured = result["measured"]
    measured["losses"] = [float(loss) for loss in measured["losses"]]  # "NaN" is how JSON has them
    return Row(name, replace(Measured(**measured), board_gib=board_gib))


def compare(config: TrainConfig, names: list[str], directory: Path, *, fit: bool = False) -> Comparison:
    """Train every precision that runs here, one after the other.

    Args:
        config: of `defaults`, with what the flags say.
        names: of `parse_precisions`.
        directory: each precision writes to a folder of it.
        fit: whether rows of a micro-batch are made fewer until all have room.

    Raises:
        BadInput: what was asked for cannot be trained, or none of the precisions runs here.
    """
    if config.num_iterations < FEWEST:
        raise BadInput(f"--steps is {config.num_iterations}: it must be at least {FEWEST}, {WARMUP_STEPS} are warm-up")
    if "WORLD_SIZE" in os.environ:
        raise BadInput("a dry run is one process on one device: start it without torchrun")
    # What would fail in every process alike is refused before one is started.
    resolve(config.data)
    shape, cuda = config.shape(Tokenizer.load(config.tokenizer).vocab_size), config.device_type == "cuda"
    reasons = {name: unavailable(name, config, shape) for name in names}
    usable = [name for name in names if not reasons[name]]
    if not usable:
        raise BadInput("none of the precisions runs here: " + "; ".join(f"{name}: {reasons[name]}" for name in names))
    if fit and cuda:
        config = replace(config, device_batch_size=fitting_rows(config, usable, torch.cuda.mem_get_info()[0], shape))
    accumulation_steps(config.total_batch_size, config.device_batch_size, config.max_seq_len, 1)
    for name in usable:
        _clear(directory / name)
    config = replace(config, warmup_steps=max(1, config.num_iterations // 5))
    date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    rows = [Row(name, unavailable=reasons[name]) if reasons[name] else _train(name, config, directory / name) for name in names]
    device_name = torch.cuda.get_device_name() if cuda else "CPU"
    return Comparison(rows, reference_of(names), config.device_type, device_name, config, environment(), date)
