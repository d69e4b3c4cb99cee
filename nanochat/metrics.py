"""What a run tells while it goes: a terminal, a JSONL file, TensorBoard and, if asked, wandb, from one record a step.

metrics.jsonl is the truth and holds everything: one JSON object a line, each handed to the system at once, so that a
killed run loses nothing but perhaps its last line. Each has a "kind" (run, step, eval, sample, memory, event) and the "step" it
belongs to: the number of updates before it, so step n's record is the update that starts from the checkpoint of step n.
JSON has no NaN; a value that is not finite is written as "NaN", "Infinity" or "-Infinity", strings that `float` reads.

The others are views. A terminal shows a live bar; a log file shows a thinned line a step. On resuming from step n the
records from n on describe updates that are about to be done again: they are dropped, in TensorBoard too.
"""

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TaskID, TextColumn
from torch.utils.tensorboard import SummaryWriter

from nanochat.errors import BadInput

JSONL = "metrics.jsonl"
BOARD = "tensorboard"


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, over all ranks.

    Attributes:
        step: updates done before this one.
        loss: nats per token, the mean over the step's batch.
        lr_multiplier: the schedule's factor on every learning rate.
        seconds: wall-clock time from one look at gradients to the next (`nanochat/clock.py`).
        tokens: tokens of the step's batch.
        tokens_per_second: throughput of this step.
        mfu: model FLOP/s as a part of the bf16 peak, 0 to 1; None where the peak is not known.
        memory_gib: peak memory so far in GiB, of the GPU where there is one; None if it was not measured.
        eta_seconds: estimated time to the end of training; None before there is a basis for it.
        epoch: passes over the training text begun, from 1.
        grad_norm: Frobenius norm of the gradient; None if it was not computed.
    """

    step: int
    loss: float
    lr_multiplier: float
    seconds: float
    tokens: int
    tokens_per_second: float
    mfu: float | None
    memory_gib: float | None
    eta_seconds: float | None
    epoch: int
    grad_norm: float | None = None


class Metrics:
    """The sinks of one run; made by the rank that speaks, and closed at its end."""

    def __init__(
        self,
        directory: Path,
        total_steps: int,
        config: Mapping[str, Any],
        *,
        wandb_run: str | None = None,
        console: bool = True,
        start_step: int = 0,
    ) -> None:
        """Open every sink, dropping what an earlier run recorded at or after `start_step`.

        Args:
            directory: holds metrics.jsonl and tensorboard/; created if missing.
            total_steps: updates of the whole run.
            config: what the run was asked to do; recorded once. JSON types; anything else is recorded as its `str`.
            wandb_run: name of a wandb run to log to; None for no wandb.
            console: whether to print; files are written in any case.
            start_step: the step of the first record to come, above 0 when resuming.

        Raises:
            BadInput: the directory cannot be written, its metrics.jsonl is damaged, or wandb was asked for and is not
                installed or refuses (not logged in, say).
        """
        self._total = total_steps
        self._start = self._step = start_step
        self._console = console
        self._wandb = _start_wandb(wandb_run, config) if wandb_run is not None else None
        self._path = directory / JSONL
        try:
            directory.mkdir(parents=True, exist_ok=True)
            _rewrite(self._path, [record for record in _read(self._path) if record["step"] < start_step])
            self._board = SummaryWriter(str(directory / BOARD), purge_step=start_step)
        except OSError as error:
            raise BadInput(f"cannot write metrics into {directory}: {error.strerror}") from error
        self._record("run", total_steps=total_steps, config=dict(config))
        self._progress = self._task = None
        if console and sys.stdout.isatty():
            self._progress, self._task = _live_bar(total_steps, start_step)

    def step(self, record: StepRecord) -> None:
        """Record one step everywhere; print it on a terminal always, elsewhere if `_is_printed`."""
        self._step = record.step
        values = asdict(record)
        self._record("step", **{name: value for name, value in values.items() if name != "step"})
        names = ("loss", "lr_multiplier", "tokens_per_second", "mfu", "memory_gib", "grad_norm")
        self._plot({f"train/{name}": values[name] for name in names})
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=record.step + 1, figures=_figures(record))
        elif self._is_printed(record.step):
            self._print(f"step {record.step:0{len(str(self._total))}d}/{self._total} | {_figures(record)}")

    def evaluation(self, step: int, bpb: float) -> None:
        """Record the validation loss after `step` updates, in bits per byte."""
        self._step = step
        self._record("eval", bpb=bpb)
        self._plot({"val/bits_per_byte": bpb})
        self._print(f"step {step} | validation {bpb:.4f} bits per byte")

    def sample(self, step: int, text: str) -> None:
        """Record text that the model wrote after `step` updates."""
        self._step = step
        self._record("sample", text=text)
        with _writing(self._path.with_name(BOARD)):
            self._board.add_text("sample", text, step)
        self._print(f"step {step} | sample: {text}")

    def memory(self, *, measured: float, predicted: float, moment: str, lines: Mapping[str, float]) -> None:
        """Record peak memory, all in GiB: measured, predicted, in which moment, and what that consists of."""
        self._record("memory", measured_gib=measured, predicted_gib=predicted, moment=moment, lines=dict(lines))

    def message(self, text: str) -> None:
        """Record something that happened, at the step last recorded."""
        self._record("event", text=text)
        self._print(text)

    def close(self) -> None:
        """Flush and close every sink and give the terminal back; harmless if called again."""
        if self._progress is not None:
            self._progress.stop()
        with _writing(self._path.with_name(BOARD)):
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def _record(self, kind: str, **values: Any) -> None:
        line = json.dumps(finite({"kind": kind, "step": self._step, **values}), allow_nan=False, default=str)
        with _writing(self._path), open(self._path, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _plot(self, scalars: Mapping[str, float | None]) -> None:
        known = {name: value for name, value in scalars.items() if value is not None}
        with _writing(self._path.with_name(BOARD)):
            for name, value in known.items():
                self._board.add_scalar(name, value, self._step)
        if self._wandb is not None:
            self._wandb.log(known, step=self._step)

    def _is_printed(self, step: int) -> bool:
        """The first 20 steps of this process, then about a hundred lines a run, and the last step."""
        return step - self._start < 20 or step % max(1, self._total // 100) == 0 or step == self._total - 1

    def _print(self, line: str) -> None:
        if self._progress is not None:
            self._progress.console.print(line, markup=False, highlight=False)
        elif self._console:
            print(line, flush=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}; free some space and resume") from error


def read(directory: Path) -> list[dict[str, Any]]:
    """The records of a run in the order written, without a last line that a killed run left unfinished.

    Raises:
        BadInput: there is no metrics.jsonl, it cannot be read, or it is damaged.
    """
    path = directory / JSONL
    if not path.is_file():
        raise BadInput(f"{directory} has no {JSONL}: name the directory of a run")
    return _read(path)


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from error
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is nothing, or a torn line
        try:
            record = json.loads(line)
            whole = isinstance(record["step"], int) and isinstance(record["kind"], str)
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise BadInput(f"{path}, line {number}, is not a metrics record: delete that line, or the whole file")
        records.append(record)
    return records


def _rewrite(path: Path, records: list[dict[str, Any]]) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    os.replace(aside, path)


def finite(value: Any) -> Any:
    """`value` with every non-finite float as the string that protobuf's JSON uses for it."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def require_wandb() -> None:
    """Raise BadInput where wandb is not installed."""
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise BadInput("wandb is not installed: pip install wandb, or leave out --run") from error


def _start_wandb(name: str, config: Mapping[str, Any]) -> Any:
    require_wandb()
    import wandb

    try:
        return wandb.init(project="nanochat", name=name, config=dict(config))
    except wandb.Error as error:
        reason = str(error).partition("\n")[0]
        raise BadInput(f"wandb: {reason}; mend that, set WANDB_MODE=offline, or leave out --run") from error


def _live_bar(total: int, start: int) -> tuple[Progress, TaskID]:
    count, figures = TextColumn("{task.completed}/{task.total}"), TextColumn("{task.fields[figures]}")
    bar = Progress(count, BarColumn(bar_width=None), figures, expand=True)
    task = bar.add_task("training", total=total, completed=start, figures="starting")
    bar.start()
    return bar, task


def _figures(record: StepRecord) -> str:
    """The columns of a step as a person reads them; "-" for what is not known."""
    mfu = "-" if record.mfu is None else f"{100 * record.mfu:.1f}%"
    memory = "-" if record.memory_gib is None else f"{record.memory_gib:.1f}"
    eta = "-" if record.eta_seconds is None else _duration(record.eta_seconds)
    return f"loss {record.loss:.4f} | {record.tokens_per_second:,.0f} tok/s | MFU {mfu} | {memory} GiB | ETA {eta}"


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds, the two largest that count: "2h05m", "3m09s", "41s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
