"""What one of two ranks meets alone ends both, at once and with one line; a signal to one stops both.

The processes run this file as a script (see the end): gloo on a CPU, NCCL where there are two GPUs.
"""

import contextlib
import errno
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from nanochat import checkpoint, errors, gauges, metrics, report
from nanochat.dataset import base_dir
from nanochat.errors import BadInput
from nanochat.gpt import GPT
from nanochat.tokenizer import Tokenizer
from nanochat.train import train
from nanochat.train_config import TrainConfig

DEVICE = "cuda" if torch.cuda.device_count() >= 2 else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
RANK = int(os.environ.get("RANK", "0"))
Patch = pytest.MonkeyPatch


@pytest.fixture
def data() -> None:
    """Texts and their tokenizer in the base directory."""
    texts = [f"the {word} of step {i} is {i * i}" for i in range(400) for word in ("loss", "norm", "rate")]
    base_dir().mkdir(parents=True, exist_ok=True)
    (base_dir() / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    Tokenizer.train(texts[:100], 290).save(base_dir() / "tokenizer")


def directory(tag: str) -> Path:
    return base_dir() / "base_checkpoints" / tag / "run"


def run(tag: str, **changes: Any) -> NoReturn:
    """As `scripts.base_train` does."""
    settings = {
        "data": str(base_dir() / "texts.jsonl"), "depth": 1, "aspect_ratio": 32, "head_dim": 16, "max_seq_len": 16,
        "device_batch_size": 2, "total_batch_size": 64, "num_iterations": 3, "eval_every": -1, "core_metric_every": -1,
        "model_tag": f"{tag}/run", "device_type": DEVICE,
    }  # fmt: skip
    errors.run(lambda: train(TrainConfig(**{**settings, **changes})))


# Each fault stands in the way of a run that is called after it, on one rank.


def no_tokenizer(patch: Patch) -> None:
    def load(path: Path) -> None:
        raise BadInput(f"no tokenizer in {path}")

    if RANK == 1:
        patch.setattr(Tokenizer, "load", load)


def earlier_run_stays(patch: Patch) -> None:
    def rename(path: Path, to: Path) -> None:
        if path.name == "run":
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        real(path, to)

    directory("earlier_run_stays").mkdir(parents=True, exist_ok=True)
    real = Path.rename
    patch.setattr(Path, "rename", rename)


def metrics_unopened(_: Patch) -> None:
    directory("metrics_unopened").parent.parent.mkdir(parents=True, exist_ok=True)
    directory("metrics_unopened").parent.touch()  # a file where a directory should be made


def metrics_unwritten(patch: Patch) -> None:
    real = metrics.Metrics.step

    def step(self: metrics.Metrics, record: metrics.StepRecord) -> None:
        if record.step == 1:
            path = directory("metrics_unwritten") / "metrics.jsonl"
            path.unlink()
            path.mkdir()
        real(self, record)

    patch.setattr(metrics.Metrics, "step", step)


def unsaved(patch: Patch) -> None:
    def write(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if RANK == 0:
        patch.setattr(checkpoint.durable, "write", write)


def no_report(patch: Patch) -> None:
    def draw(path: Path) -> None:
        raise BadInput(f"{path} cannot be drawn")

    patch.setattr(report, "draw", draw)


def profile_without_a_folder(patch: Patch) -> None:
    def mkdir(path: Path, *given: Any, **named: Any) -> None:
        if path.name == "profile":
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        real(path, *given, **named)

    real = Path.mkdir
    patch.setattr(Path, "mkdir", mkdir)


def profile_unwritten(patch: Patch) -> None:
    def export(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(torch.profiler.profile, "export_chrome_trace", export)


def a_bug(patch: Patch) -> None:
    patch.setattr(gauges, "mfu", lambda *_: 1 / 0)


def nothing(_: Patch) -> None:
    """After all those, this process can still join others and train."""


# The status of both, the rank that speaks, and what it says.
FAULTS: dict[Callable[[Patch], None], tuple[int, int, str]] = {
    no_tokenizer: (2, 1, "error: no tokenizer in "),
    earlier_run_stays: (2, 0, "error: cannot rename "),
    metrics_unopened: (2, 0, "error: cannot write metrics into "),
    metrics_unwritten: (2, 0, "metrics.jsonl: Is a directory; free some space and resume"),
    unsaved: (2, 0, "error: checkpoint of step 3 not saved in "),
    no_report: (2, 0, "cannot be drawn"),
    profile_without_a_folder: (2, 0, "profile: Permission denied"),
    profile_unwritten: (2, 0, "profile: No space left on device"),
    a_bug: (1, 0, "ZeroDivisionError"),
    nothing: (0, 0, ""),
}


# Flags without which it is not met.
CHANGES: dict[Callable[[Patch], None], dict[str, Any]] = {
    fault: {"profile": True, "num_iterations": 5} for fault in (profile_without_a_folder, profile_unwritten)
}


@pytest.mark.usefixtures("data")
def test_what_one_rank_meets_alone_ends_both_with_one_line(two_ranks: Any, free_port: Callable[[], str]) -> None:
    for process in two_ranks(__file__, *(free_port() for _ in FAULTS)):
        _, error = process.communicate(timeout=120)  # a rank left waiting would exceed it
        assert process.returncode == 0, error
    said = [json.loads((base_dir() / f"rank{rank}.json").read_text()) for rank in range(2)]
    for fault, (status, speaker, text) in FAULTS.items():
        name = fault.__name__
        assert [said[rank][name][0] for rank in range(2)] == [status, status], name
        assert text in said[speaker][name][1] and said[speaker][name][1].count("\n") == (status != 0), name
        assert said[1 - speaker][name][1] == "", name
    assert checkpoint.steps(directory("no_report")) == [3]
    assert checkpoint.steps(directory("unsaved")) == checkpoint.steps(directory("metrics_unwritten")) == []
    assert checkpoint.find(directory("nothing")).step == 3


@pytest.mark.usefixtures("data")
def test_a_signal_to_one_rank_during_evaluation_saves_and_stops_both(two_ranks: Any) -> None:
    ranks = two_ranks(__file__, "slow")
    assert any(line == "evaluating\n" for line in ranks[1].stdout)
    ranks[1].send_signal(signal.SIGTERM)
    (first, _), (second, _) = (process.communicate(timeout=60) for process in ranks)
    assert [process.returncode for process in ranks] == [128 + signal.SIGTERM] * 2
    assert "stopped by a signal to another rank: step 0 is saved" in first
    assert second.count("evaluating") <= 1  # of 5 batches: the one in which the signal came, or the next if it came between
    assert checkpoint.find(directory("slow")).step == 0
    assert "eval" not in {record["kind"] for record in metrics.read(directory("slow"))}


def worker(ports: list[str]) -> None:
    """Meet every fault in turn, each in a new group of processes; write down how it ended here."""
    ends = {}
    for fault, port in zip(FAULTS, ports, strict=True):
        os.environ["MASTER_PORT"] = port
        error = io.StringIO()
        with Patch.context() as patch, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
            fault(patch)
            try:
                run(fault.__name__, **CHANGES.get(fault, {}))
            except SystemExit as exit_:
                status = exit_.code
            except ZeroDivisionError as bug:
                status = 1
                print(repr(bug), file=sys.stderr)
        ends[fault.__name__] = (status, error.getvalue())
    (base_dir() / f"rank{RANK}.json").write_text(json.dumps(ends))


def slow_evaluation() -> NoReturn:
    real = GPT.token_losses

    def token_losses(self: GPT, *batch: torch.Tensor) -> torch.Tensor:
        print("evaluating", flush=True)
        time.sleep(1)
        return real(self, *batch)

    GPT.token_losses = token_losses  # type: ignore[method-assign]
    run("slow", eval_every=1)


if __name__ == "__main__":
    slow_evaluation() if sys.argv[1] == "slow" else worker(sys.argv[1:])
