"""`python -m scripts.plan` as a user runs it."""

import sys

import pytest

from nanochat.errors import run
from scripts.plan import main


def plan(monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["plan", *flags])
    with pytest.raises(SystemExit) as ended:
        run(main)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_a_plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(monkeypatch, "--depth", "12", "--gpu", "spark", "--tokens", "1e9", "--state-dtype", "e4m3") == 0
    out, err = capsys.readouterr()
    for part in ("NVIDIA GB10", "te current, head in chunks", "1 G tokens in all", "exp_avg e4m3", "log-sum-exp", "kWh"):
        assert part in out
    assert err == ""


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ("--depth 12 --gpu h1000", "no such GPU is known"),
        ("--depth 0 --gpu h100", "--depth is 0"),
        ("--depth 12 --gpu h100 --device-batch-size 0", "--device-batch-size is 0"),
        ("--depth 12 --gpu h100 --device-batch-size 3", "no whole number of micro-batches"),
        ("--depth 12 --gpu h100 --tokens nan", "--tokens is nan"),
        ("--depth 12 --gpu h100 --window-pattern X", "window_pattern"),
        ("--depth 12 --gpu h100 --vocab-size 0", "--vocab-size is 0"),
        ("--depth 12 --gpu h100 --target-param-data-ratio -1", "nothing says how long to train"),
        ("--depth 12 --gpu a100 --precision te", "FP8 units came with"),
        ("--depth 12 --gpu a100 --state-dtype e4m3", "--state-dtype exp_avg=e4m3"),
        ("--depth 12 --gpu h100 --precision fp16", "invalid choice"),
        ("--gpu h100", "--depth"),
        ("--depth 12 --gpu h100 --precision fp8 --recipe delayed:bf16=h.12", "bf16=h.12 is no part of this model"),
        ("--depth 2 --gpu h100 --precision fp8 --recompute-mlp --recipe delayed:bf16=h.0.mlp", "in FP8 as a whole"),
        ("--depth 12 --gpu h100 --precision te --recompute-mlp", "--recompute-mlp goes with our own FP8 layers"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    flags: str, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(monkeypatch, *flags.split()) == 2
    out, err = capsys.readouterr()
    assert what in err and len(err.splitlines()) == 1 and out == ""
