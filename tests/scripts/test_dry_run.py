"""`python -m scripts.dry_run` as a user runs it; what `--check` prints is in tests/nanochat/test_machine.py."""

import json
import sys
from pathlib import Path

import pytest
import torch

from nanochat.dry_run import Comparison, Row
from nanochat.errors import run
from nanochat.train_config import TrainConfig
from scripts import dry_run


def dry(monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["dry_run", *flags])
    with pytest.raises(SystemExit) as ended:
        run(dry_run.main)
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_a_dry_run_without_a_gpu(
    torch_texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    small = ("--depth", "1", "--steps", "4", "--data", torch_texts, "--out", str(out))
    assert dry(monkeypatch, *small) == 0
    printed = capsys.readouterr().out
    for fragment in ("nats from fp32 after 4 steps", "largest gap to fp32", "Speed and memory are not judged", "report.html"):
        assert fragment in printed, printed
    written = json.loads((out / "report.json").read_text())
    assert [row["precision"] for row in written["rows"]] == ["fp32", "fp8-emulated"] and written["speed_is_judged"] is False
    assert "Speed and memory are not judged" in (out / "report.html").read_text()
    assert (out / "report.png").stat().st_size > 10_000


def test_a_problem_is_named_and_the_status_is_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [Row("bf16", failed="OutOfMemoryError: CUDA"), Row("te", unavailable="[te] is not installed")]
    done = Comparison(rows, "bf16", "cpu", "CPU", TrainConfig(), {}, "today")
    monkeypatch.setattr(dry_run, "compare", lambda *_, **__: done)
    assert dry(monkeypatch, "--out", str(tmp_path)) == 1
    out, err = capsys.readouterr()
    assert err == "FAILED bf16: OutOfMemoryError: CUDA\n"
    assert "unavailable" in out and "[te]" in out  # rich must not take it for a style
    assert json.loads((tmp_path / "report.json").read_text())["problems"] == ["bf16: OutOfMemoryError: CUDA"]


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ("--depth 0", "--depth is 0"),
        ("--steps 3", "--steps is 3"),
        ("--precisions bf16,fp4", "'fp4' is none"),
        ("--device-batch-size 0", "--device-batch-size is 0"),
        ("--tokenizer /nowhere", "no tokenizer in /nowhere"),
        ("--steps twenty", "invalid int value"),
        ("--out /proc/nowhere", "--out /proc/nowhere"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    flags: str, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry(monkeypatch, *flags.split()) == 2
    out, err = capsys.readouterr()
    assert what in err and len(err.splitlines()) == 1 and out == ""


def test_ctrl_c_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dry_run, "compare", interrupted)
    assert dry(monkeypatch, "--out", str(tmp_path)) == 130
