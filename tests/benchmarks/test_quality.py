"""Which runs the benchmark of quality makes, what it reads of them, and what it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import quality
from nanochat.errors import BadInput
from nanochat.metrics import Metrics, StepRecord


def test_a_run_is_a_name_and_flags() -> None:
    assert quality.arm("momentum=--state-dtype momentum=e4m3") == ("momentum", ["--state-dtype", "momentum=e4m3"])
    assert quality.arm("reference=") == ("reference", [])


@pytest.mark.parametrize("text", ["reference", "=--seed 43", "--seed=43"])
def test_what_is_no_run_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="is no run: write name=FLAGS"):
        quality.arm(text)


def test_the_result_is_the_last_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "base_dir", lambda: tmp_path)
    directory = tmp_path / "base_checkpoints" / "quality-seed"
    written = Metrics(directory, 4, {}, console=False)
    written.evaluation(0, 3.5)
    for i in range(4):
        written.step(StepRecord(i, 3.0 - i / 10, 1.0, 0.5, 100, 200.0 + i, None, None, None, 1))
    written.evaluation(4, 1.25)
    written.close()
    found = quality.result("seed", ["--seed", "43"])
    assert found == {"run": "seed", "flags": "--seed 43", "steps": 4, "bits_per_byte": 1.25, "loss": 2.85, "tok_s": 202}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line() -> None:
    command = [sys.executable, "-m", "benchmarks.quality", "reference="]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: these runs take hours on a CPU, and torch finds no CUDA device\n"
