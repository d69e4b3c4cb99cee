import json
import math
import os
import pty
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nanochat import metrics
from nanochat.errors import BadInput
from nanochat.metrics import Metrics, StepRecord

RECORD = StepRecord(
    step=0,
    loss=2.5,
    lr_multiplier=0.5,
    seconds=0.25,
    tokens=1000,
    tokens_per_second=4000.0,
    mfu=0.412,
    memory_gib=21.34,
    eta_seconds=3725.0,
    epoch=1,
    grad_norm=0.125,
)


def at(step: int, **changes: Any) -> StepRecord:
    return replace(RECORD, step=step, **changes)


def run(directory: Path, steps: range, total: int = 10, **options: Any) -> None:
    sink = Metrics(directory, total, {"depth": 4}, start_step=steps.start, **options)
    for step in steps:
        sink.step(at(step))
    sink.close()


def test_every_call_leaves_one_json_object_a_line(tmp_path: Path) -> None:
    sink = Metrics(tmp_path / "a" / "run", 3, {"depth": 4, "path": Path("x")}, console=False)
    sink.evaluation(0, 3.25)
    sink.step(at(0))
    sink.step(at(1, mfu=None))
    sink.sample(2, "line one\nline two: é")
    sink.message("stopped by SIGTERM")
    lines = (tmp_path / "a" / "run" / "metrics.jsonl").read_text().splitlines()  # before close: nothing is held back
    sink.close()
    sink.close()
    records = [json.loads(line) for line in lines]
    assert [(record["kind"], record["step"]) for record in records] == [
        ("run", 0),
        ("eval", 0),
        ("step", 0),
        ("step", 1),
        ("sample", 2),
        ("event", 2),
    ]
    assert records[0]["total_steps"] == 3 and records[0]["config"] == {"depth": 4, "path": "x"}
    assert records[1]["bpb"] == 3.25
    step = dict(records[2])
    assert step.pop("kind") == "step"
    assert StepRecord(**step) == RECORD
    assert records[3]["mfu"] is None
    assert records[4]["text"] == "line one\nline two: é"
    assert records[5]["text"] == "stopped by SIGTERM"
    assert records == metrics.read(tmp_path / "a" / "run")


@pytest.mark.parametrize(("value", "text"), [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity")])
def test_values_that_are_not_finite_stay_valid_json(tmp_path: Path, value: float, text: str) -> None:
    sink = Metrics(tmp_path, 1, {"limits": [value, 1.0]}, console=False)
    sink.step(at(0, loss=value))
    sink.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    first, second = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(first, parse_constant=refuse)["config"]["limits"] == [text, 1.0]
    loss = json.loads(second, parse_constant=refuse)["loss"]
    assert loss == text
    assert float(loss) == value or math.isnan(value)


def test_resuming_drops_what_will_be_done_again(tmp_path: Path) -> None:
    run(tmp_path, range(0, 6), console=False)
    sink = Metrics(tmp_path, 10, {"depth": 4}, console=False, start_step=4)
    sink.evaluation(4, 1.5)
    sink.step(at(4, loss=9.0))
    sink.close()
    records = metrics.read(tmp_path)
    assert [(record["kind"], record["step"]) for record in records] == [
        ("run", 0),
        *[("step", step) for step in range(4)],
        ("run", 4),
        ("eval", 4),
        ("step", 4),
    ]
    assert records[-1]["loss"] == 9.0
    assert list(tmp_path.glob("*.tmp")) == []


def test_a_run_from_the_start_leaves_nothing_of_the_earlier_one(tmp_path: Path) -> None:
    run(tmp_path, range(0, 3), console=False)
    run(tmp_path, range(0, 1), console=False)
    assert [record["kind"] for record in metrics.read(tmp_path)] == ["run", "step"]


def test_a_line_torn_by_a_kill_is_dropped(tmp_path: Path) -> None:
    run(tmp_path, range(0, 2), console=False)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "st')
    assert [record["step"] for record in metrics.read(tmp_path)] == [0, 0, 1]
    run(tmp_path, range(2, 3), console=False)
    assert [record["step"] for record in metrics.read(tmp_path)] == [0, 0, 1, 2, 2]


@pytest.mark.parametrize(
    "line", ["{", "[1]", "7", '{"kind": "step"}', '{"kind": 1, "step": 1}', '{"kind": "step", "step": "1"}', "\xff"]
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    run(tmp_path, range(0, 2), console=False)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_bytes("\n".join([lines[0], line, *lines[1:], ""]).encode("latin-1"))
    before = path.read_bytes()
    for attempt in (lambda: metrics.read(tmp_path), lambda: run(tmp_path, range(2, 3), console=False)):
        with pytest.raises(BadInput, match=r"metrics\.jsonl, line 2, is not a metrics record: delete that line"):
            attempt()
    assert path.read_bytes() == before


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"cannot write metrics into .*file/run: Not a directory"):
        Metrics(tmp_path / "file" / "run", 1, {}, console=False)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    sink = Metrics(tmp_path, 1, {}, console=False)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(BadInput, match=r"cannot write .*metrics\.jsonl: No space left on device; free some space"):
        sink.step(at(0))
    sink.close()


def test_reading_where_there_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"has no metrics\.jsonl: name the directory of a run"):
        metrics.read(tmp_path)


def test_plain_lines_read_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sink = Metrics(tmp_path, 100, {})
    sink.step(at(7))
    sink.step(at(8, mfu=None, memory_gib=None, eta_seconds=None, loss=math.nan))
    sink.evaluation(9, 1.23456)
    sink.sample(9, "once [bold]upon")
    sink.message("a [red]message")
    sink.close()
    assert capsys.readouterr().out.splitlines() == [
        "step 007/100 | loss 2.5000 | 4,000 tok/s | MFU 41.2% | 21.3 GiB | ETA 1h02m",
        "step 008/100 | loss nan | 4,000 tok/s | MFU - | - GiB | ETA -",
        "step 9 | validation 1.2346 bits per byte",
        "step 9 | sample: once [bold]upon",
        "a [red]message",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0s"),
        (41.4, "41s"),
        (59.6, "1m00s"),
        (189, "3m09s"),
        (3599.7, "1h00m"),
        (7500, "2h05m"),
        (360000, "100h00m"),
    ],
)
def test_durations(tmp_path: Path, capsys: pytest.CaptureFixture[str], seconds: float, text: str) -> None:
    sink = Metrics(tmp_path, 1, {})
    sink.step(at(0, eta_seconds=seconds))
    sink.close()
    assert capsys.readouterr().out.endswith(f"ETA {text}\n")


def test_long_runs_are_thinned_on_the_console_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, range(350, 1000), total=1000)
    printed = [int(line.split()[1].split("/")[0]) for line in capsys.readouterr().out.splitlines()]
    assert printed == [*range(350, 370), *range(370, 1000, 10), 999]
    assert len(metrics.read(tmp_path)) == 1 + 650


def test_short_runs_are_printed_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, range(0, 90), total=90)
    assert len(capsys.readouterr().out.splitlines()) == 90


def test_without_console_nothing_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, range(0, 2), console=False)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_live_bar_and_is_given_back(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; import sys; from nanochat.metrics import *\n"
        "sink = Metrics(Path(sys.argv[1]), 7, {})\n"
        "sink.step(StepRecord(6, 2.5, 1.0, 1.0, 10, 1234.0, None, None, 0.0, 1))\n"
        "sink.message('a [red]message'); sink.close()\n"
    )
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    screen = b""
    while True:
        try:
            piece = os.read(ours, 1 << 16)
        except OSError:  # Linux's end of file on a pty
            break
        if not piece:
            break
        screen += piece
    os.close(ours)
    text = screen.decode()
    assert process.wait() == 0, text
    assert "7/7" in text and "loss 2.5000 | 1,234 tok/s" in text and "a [red]message" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # cursor hidden, and shown again


def scalars(directory: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_holds_the_curves_and_forgets_what_is_done_again(tmp_path: Path) -> None:
    run(tmp_path, range(0, 6), console=False)
    sink = Metrics(tmp_path, 10, {}, console=False, start_step=4)
    sink.evaluation(4, 1.5)
    sink.step(at(4, loss=9.0))
    sink.close()
    assert scalars(tmp_path, "train/loss") == [(0, 2.5), (1, 2.5), (2, 2.5), (3, 2.5), (4, 9.0)]
    assert scalars(tmp_path, "val/bits_per_byte") == [(4, 1.5)]


class FakeWandb(types.ModuleType):
    """As much of wandb as is used."""

    class Error(Exception):
        """wandb's own base of errors."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[tuple[str, Any]] = []
        self.problem = ""

    def init(self, **arguments: Any) -> "FakeWandb":
        if self.problem:
            raise self.Error(self.problem)
        self.calls.append(("init", arguments))
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.calls.append(("log", (values, step)))

    def finish(self) -> None:
        self.calls.append(("finish", None))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_only_when_asked(tmp_path: Path, wandb: FakeWandb) -> None:
    run(tmp_path, range(0, 1), console=False)
    assert wandb.calls == []


def test_wandb_gets_the_same_curves(tmp_path: Path, wandb: FakeWandb) -> None:
    sink = Metrics(tmp_path, 2, {"depth": 4}, console=False, wandb_run="mine")
    sink.step(at(1, mfu=None))
    sink.evaluation(2, 1.25)
    sink.close()
    sink.close()
    init, step, evaluation, finish = wandb.calls
    assert init == ("init", {"project": "nanochat", "name": "mine", "config": {"depth": 4}})
    figures = {
        "train/loss": 2.5,
        "train/lr_multiplier": 0.5,
        "train/tokens_per_second": 4000.0,
        "train/memory_gib": 21.34,
    }
    assert step == ("log", ({**figures, "train/grad_norm": 0.125}, 1))
    assert evaluation == ("log", ({"val/bits_per_byte": 1.25}, 2))
    assert finish[0] == "finish"


def test_wandb_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    run(tmp_path, range(0, 2), console=False)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(BadInput, match=r"wandb is not installed: pip install wandb, or leave out --run"):
        Metrics(tmp_path, 1, {}, console=False, wandb_run="mine")
    assert (tmp_path / "metrics.jsonl").read_bytes() == before  # refused before an earlier run's records are dropped


def test_wandb_refusing(tmp_path: Path, wandb: FakeWandb) -> None:
    wandb.problem = "api_key not configured (no-tty)\ncall wandb login"
    with pytest.raises(BadInput, match=r"^wandb: api_key not configured \(no-tty\); mend that.*WANDB_MODE=offline"):
        Metrics(tmp_path, 1, {}, console=False, wandb_run="mine")
