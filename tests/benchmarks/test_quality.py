"""Which runs the benchmark of quality makes, what it reads of them, and what it refuses."""

import json
import os
import subprocess
import threading

import forked
import pytest
import torch

from benchmarks import quality
from nanochat.dataset import base_dir
from nanochat.errors import BadInput
from nanochat.metrics import Metrics, StepRecord


def test_a_run_is_a_name_and_flags() -> None:
    assert quality.arm("momentum=--state-dtype momentum=e4m3") == ("momentum", ["--state-dtype", "momentum=e4m3"])
    assert quality.arm("reference=") == ("reference", [])


@pytest.mark.parametrize("text", ["reference", "=--seed 43", "--seed=43"])
def test_what_is_no_run_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="is no run: write name=FLAGS"):
        quality.arm(text)


def trained(name: str) -> None:
    """Leave behind what a run of 4 steps does."""
    written = Metrics(base_dir() / "base_checkpoints" / f"quality-{name}", 4, {}, console=False)
    written.evaluation(0, 3.5)
    for i in range(4):
        written.step(StepRecord(i, 3.0 - i / 10, 1.0, 0.5, 100, 200.0 + i, None, None, None, 1))
    written.evaluation(4, 1.25)
    written.close()


def test_the_result_is_the_last_validation() -> None:
    trained("seed")
    found = {"run": "seed", "flags": "--seed 43", "steps": 4, "bits_per_byte": 1.25, "loss": 2.85}
    assert quality.result("seed", ["--seed", "43"], alone=True) == {**found, "tok_s": 202}
    assert quality.result("seed", ["--seed", "43"], alone=False) == found


@pytest.mark.parametrize("at_once", [1, 2])
def test_every_gpu_has_so_many_runs_at_once(
    at_once: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 8 runs on two GPUs as many start together as there is room for, and never more; each waits for the others to start."""
    together, running, most = threading.Barrier(2 * at_once, timeout=20), {"0": 0, "1": 0}, {"0": 0, "1": 0}
    count = threading.Lock()

    def run(command: list[str], env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
        gpu = env["CUDA_VISIBLE_DEVICES"]
        with count:
            running[gpu] += 1
            most[gpu] = max(most[gpu], running[gpu])
        together.wait()
        trained(command[command.index("--model-tag") + 1].removeprefix("quality-"))
        with count:
            running[gpu] -= 1
        together.wait()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(quality, "prepare", lambda data: None)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("sys.argv", ["quality", "--at-once", str(at_once), *(f"run{i}=--seed {i}" for i in range(8))])
    quality.main()
    assert most == {"0": at_once, "1": at_once}
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["run"] for record in records] == [f"run{i}" for i in range(8)]
    assert all(("tok_s" in record) == (at_once == 1) for record in records)


def test_no_run_at_once_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["quality", "--at-once", "0", "reference="])
    with pytest.raises(BadInput, match="--at-once must be at least 1"):
        quality.main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line() -> None:
    command = ["-m", "benchmarks.quality", "reference="]
    done = forked.run(command, os.environ)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: these runs take hours on a CPU, and torch finds no CUDA device\n"
