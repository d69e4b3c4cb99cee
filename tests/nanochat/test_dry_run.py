"""What a dry run concludes, on losses by hand; and one that trains, each precision in a process of its own."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanochat import dry_run
from nanochat.dataset import base_dir
from nanochat.dry_run import Comparison, Measured, Row, behind, compare, defaults, learned, parse_precisions, reference_of
from nanochat.errors import BadInput
from nanochat.gpt import GPTConfig
from nanochat.memory import GIB, Setup, predict
from nanochat.planner import CONTEXT, UNUSABLE
from nanochat.train_config import TrainConfig
from nvfp8.precision import bf16

LINE = [8.0 - 0.1 * step for step in range(20)]


def measured(losses: list[float], *, rate: float = 1000.0, gib: float = 10.0, bad: int = 0) -> Measured:
    return Measured(
        layers={}, losses=losses, bad_steps=bad, seconds=[9.0] * 3 + [100 / rate] * (len(losses) - 3), tokens=100, warm_up=27.0,
        parameters=1000, bytes_per_parameter=12.0, mfu=0.5, gib=gib, predicted_gib=gib, joules_per_token=0.001, no_energy="",
    )  # fmt: skip


def comparison(*rows: Row, device: str = "cuda") -> Comparison:
    return Comparison(list(rows), reference_of([row.precision for row in rows]), device, "a GPU", TrainConfig(), {}, "today")


def test_a_run_a_quarter_behind_a_straight_line_is_at_the_bound() -> None:
    """Means of quarters: what lies between their middles is 15 of 20 steps, of which 5 are a third."""
    late = [8.0 - 0.1 * (step - 5) for step in range(20)]
    assert learned(LINE) == pytest.approx(1.5)
    assert behind(late, LINE) == pytest.approx(dry_run.BEHIND * learned(LINE))
    for lag, fails in ((4.9, False), (5.1, True)):
        late = [8.0 - 0.1 * (step - lag) for step in range(20)]
        problems = comparison(Row("bf16", measured(LINE)), Row("fp8", measured(late, rate=2000))).problems()
        assert bool(problems) == fails
        assert not fails or problems[0].startswith("fp8: diverged: over the last quarter its loss is 0.510 above bf16's")


def test_a_loss_below_the_reference_has_not_diverged() -> None:
    lower = [loss - 2 for loss in LINE]
    done = comparison(Row("bf16", measured(LINE)), Row("fp8", measured(lower, rate=2000)))
    assert done.problems() == [] and done.gap(done.rows[1]) == pytest.approx(2.0)


@pytest.mark.parametrize(("losses", "bad"), [([*LINE[:-1], math.nan], 0), ([*LINE[:4], math.inf, *LINE[5:]], 1), (LINE, 2)])
def test_what_is_not_finite_names_the_row(losses: list[float], bad: int) -> None:
    done = comparison(Row("bf16", measured(LINE)), Row("te", measured(losses, rate=2000, bad=bad)))
    odd = sum(not math.isfinite(loss) for loss in losses)
    assert done.problems() == [f"te: not finite: {odd} losses, {bad} refused steps of 20"]
    assert done.rows[1].measured is not None
    gap = done.gap(done.rows[1])
    assert gap is not None and math.isnan(gap) == bool(odd)


def test_a_reference_that_is_not_finite_or_learns_nothing_is_a_problem_of_its_own() -> None:
    broken = comparison(Row("bf16", measured([*LINE[:-1], math.nan])), Row("fp8", measured(LINE, rate=2000)))
    assert [problem.partition(":")[0] for problem in broken.problems()] == ["bf16"]
    flat = comparison(Row("bf16", measured([8.0] * 20)), Row("fp8", measured([8.0] * 20, rate=2000)))
    assert flat.problems() == ["bf16: the reference has learned nothing, so nothing can be compared with it: more --steps"]


@pytest.mark.parametrize(
    ("name", "rate", "gib", "fails"),
    [
        ("fp8", 1000, 10.0, True), ("te", 900, 12.0, True), ("fp8", 1005, 9.95, True), ("fp8", 1300, 12.0, False),
        ("fp8", 900, 9.0, False), ("fp8-emulated", 10, 20.0, False), ("fp32", 500, 15.0, False),
    ],
)  # fmt: skip
def test_fp8_must_save_time_or_memory(name: str, rate: float, gib: float, fails: bool) -> None:
    rows = Row("bf16", measured(LINE)), Row(name, measured(LINE, rate=rate, gib=gib))
    problems = comparison(*rows).problems()
    assert [problem.startswith(f"{name}: saves neither time nor memory: {rate / 1000:.2f} of bf16's") for problem in problems] == [
        True
    ] * fails
    assert comparison(*rows, device="cpu").problems() == []


def test_unavailable_is_no_failure_but_of_the_reference() -> None:
    missing = Row("te", unavailable="not installed")
    assert comparison(Row("bf16", measured(LINE)), missing).problems() == []
    assert comparison(Row("bf16", unavailable="no units"), Row("fp32", measured(LINE))).problems() == [
        "bf16: unavailable, and the others are compared with it"
    ]
    failed = comparison(Row("bf16", failed="OutOfMemoryError: CUDA"), Row("te", measured(LINE)))
    assert failed.problems() == ["bf16: OutOfMemoryError: CUDA"]


def test_a_process_without_a_result_says_how_it_ended(tmp_path: Path) -> None:
    ended = [dry_run._read("te", tmp_path, SimpleNamespace(exitcode=code), None) for code in (-signal.SIGKILL, 3)]  # type: ignore[arg-type]
    assert [row.failed for row in ended] == [
        "its process was killed by SIGKILL before it had a result",
        "its process was ended with status 3 before it had a result",
    ]


def test_speed_and_memory_are_ratios_to_the_reference_behind_the_warm_up() -> None:
    done = comparison(Row("bf16", measured(LINE)), Row("te", measured(LINE, rate=1250, gib=8.0)))
    assert done.speed(done.rows[1]) == pytest.approx(1.25) and done.memory(done.rows[1]) == pytest.approx(0.8)
    record = json.loads(json.dumps(done.record(), default=str))
    assert record["rows"][1]["speed_ratio"] == pytest.approx(1.25) and record["problems"] == []


def test_precisions_are_parsed() -> None:
    assert parse_precisions("te, bf16") == ["te", "bf16"]
    assert [reference_of(names) for names in (["te", "bf16"], ["fp8", "fp32"], ["te"])] == ["bf16", "fp32", "te"]
    for text, what in (("bf16,fp4", "'fp4' is none"), ("auto", "'auto' is none"), ("", "'' is none"), ("te,te", "twice")):
        with pytest.raises(BadInput, match=what):
            parse_precisions(text)


def test_rows_are_made_fewer_until_all_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(dry_run, "choose_precision", lambda name, device: (bf16(), ""))
    config = replace(defaults("cuda"), depth=4)
    shape = GPTConfig.from_depth(4)

    def free(rows: int) -> float:
        """What a process must find free so that just `rows` rows have room."""
        return predict(Setup(shape, bf16(), rows, graphs=True)).total / (1 - UNUSABLE) + CONTEXT

    assert dry_run.fitting_rows(config, ["bf16"], 100 * GIB, shape) == config.device_batch_size
    assert dry_run.fitting_rows(config, ["bf16"], free(8) + 2**20, shape) == 8
    assert dry_run.fitting_rows(config, ["bf16"], free(8) - 2**20, shape) == 4
    with pytest.raises(BadInput, match="not even one row fits"):
        dry_run.fitting_rows(config, ["bf16"], free(1) - 2**20, shape)


@pytest.fixture
def tiny(torch_texts: str) -> TrainConfig:
    return replace(
        defaults("cpu"), depth=1, max_seq_len=32, device_batch_size=4, total_batch_size=128, num_iterations=6, data=torch_texts,
        tokenizer=str(base_dir() / "tokenizer"),
    )  # fmt: skip


def test_each_precision_trains_in_a_process_of_its_own(tiny: TrainConfig, tmp_path: Path) -> None:
    done = compare(tiny, ["fp32", "fp8-emulated", "te"], tmp_path / "out")
    plain, emulated, engine = done.rows
    assert plain.measured is not None and emulated.measured is not None and engine.measured is None
    assert "it needs a CUDA device" in engine.unavailable
    # Output projections start at zero: the first loss is of the head alone, in fp32 and in bf16 (8 bits) of a logit's error.
    assert plain.measured.losses[0] == pytest.approx(emulated.measured.losses[0], abs=2**-8)
    gap = done.gap(emulated)
    assert gap is not None and 0 < gap < 0.1  # the same data in the same order, and not the same arithmetic
    assert len(plain.measured.losses) == len(emulated.measured.losses) == 6
    assert emulated.measured.layers["FP8"] == "emulated in fp32"
    assert plain.measured.bytes_per_parameter > emulated.measured.bytes_per_parameter
    assert plain.measured.gib > 0.1 and plain.measured.mfu is None and plain.measured.joules_per_token is None
    assert done.speed(emulated) is None and done.memory(emulated) is None
    assert not (base_dir() / "base_checkpoints").exists()  # no checkpoint is left behind


@pytest.mark.gpu
def test_on_a_gpu_time_memory_and_energy_are_measured(tiny: TrainConfig, tmp_path: Path) -> None:
    config = replace(tiny, device_type="cuda", aspect_ratio=256, head_dim=64, max_seq_len=256, total_batch_size=1024)
    for attempt in range(4):
        done = compare(config, ["bf16", "fp8"], tmp_path / f"out{attempt}", fit=True)
        # The board gives away what the allocator has, and CUDA's context besides; other tests may give memory back meanwhile.
        measured = [row.measured for row in done.rows if row.measured is not None]
        if all(m.board_gib is None or m.board_gib > m.gib for m in measured):
            break
    else:
        pytest.fail(f"the board's memory did not grow: {[(m.board_gib, m.gib) for m in measured]}")
    for row in done.rows:
        if row.precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
            assert "FP8 units" in row.unavailable
            continue
        assert row.measured is not None, row.failed
        assert row.measured.predicted_gib is not None and 0 < row.measured.gib < 10
        assert done.speed(row) is not None and done.memory(row) is not None
        assert row.measured.joules_per_token is not None or row.measured.no_energy
        assert row.measured.mfu is None or 0 < row.measured.mfu < 1


SLOW = """
import os, sys, time
from pathlib import Path
from nanochat import dry_run

def slow(config, directory):
    (directory / "written").write_text(str(os.getpid()))
    (directory / "written").rename(directory / "pid")
    time.sleep(600)

if __name__ == "__main__":
    dry_run._worker = slow
    dry_run._train("fp32", dry_run.defaults("cpu"), Path(sys.argv[1]))
"""


def test_a_signal_that_ends_a_dry_run_ends_its_process_too(tmp_path: Path) -> None:
    """A process left behind would keep the GPU."""
    (tmp_path / "slow.py").write_text(SLOW)
    root = str(Path(dry_run.__file__).parents[1])
    parent = subprocess.Popen([sys.executable, tmp_path / "slow.py", tmp_path], env={**os.environ, "PYTHONPATH": root})
    try:
        while not (tmp_path / "pid").exists():
            assert parent.poll() is None
            time.sleep(0.05)
        child = int((tmp_path / "pid").read_text())
        parent.send_signal(signal.SIGTERM)
        try:
            assert parent.wait(60) == 128 + signal.SIGTERM
            with pytest.raises(ProcessLookupError):
                os.kill(child, 0)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
    finally:
        parent.kill()


def test_only_an_earlier_dry_run_is_overwritten(tiny: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "fp32").mkdir()
    (tmp_path / "fp32" / "mine").write_text("")
    with pytest.raises(BadInput, match="fp32 is not of an earlier dry run"):
        compare(tiny, ["fp32"], tmp_path)
    assert (tmp_path / "fp32" / "mine").exists()
    (tmp_path / "fp32" / "result.json").write_text("{}")
    dry_run._clear(tmp_path / "fp32")
    assert not (tmp_path / "fp32").exists()


def test_what_fails_in_its_process_is_a_row(tiny: TrainConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    done = compare(replace(tiny, attention="cudnn"), ["fp32"], tmp_path / "out")
    assert "cudnn" in done.rows[0].failed and done.problems() == [f"fp32: {done.rows[0].failed}"]
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("change", "names", "what"),
    [
        ({"num_iterations": 3}, ["fp32"], r"--steps is 3: it must be at least 4"),
        ({}, ["te", "fp8"], r"none of the precisions runs here: te: .*CUDA device.*; fp8: "),
        ({"device_batch_size": 3}, ["fp32"], "micro-batch"),
        ({"data": "/nowhere"}, ["fp32"], "/nowhere"),
        ({"tokenizer": "/nowhere"}, ["fp32"], "no tokenizer in /nowhere"),
    ],
)
def test_what_no_process_could_do_is_refused_at_once(
    tiny: TrainConfig, tmp_path: Path, change: dict[str, object], names: list[str], what: str
) -> None:
    with pytest.raises(BadInput, match=what):
        compare(replace(tiny, **change), names, tmp_path / "out")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_dry_run_under_torchrun_is_refused(tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="without torchrun"):
        compare(tiny, ["fp32"], tmp_path)
