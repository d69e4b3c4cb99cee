"""The benchmark of the optimizers says what it measured, and on a machine without a GPU why it did not."""

import json
import os
import subprocess
import sys

import pytest
import torch

COMMAND = [sys.executable, "-m", "benchmarks.optimizer", "--depth", "2", "--steps", "2"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line() -> None:
    done = subprocess.run(COMMAND, capture_output=True, text=True, env=os.environ)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the optimizers are timed on a GPU, and torch finds no CUDA device\n"


@pytest.mark.gpu
def test_a_small_model_is_timed() -> None:
    done = subprocess.run(COMMAND, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    for kind in ("muon", "adamw"):
        assert 0 < result[f"{kind}_host_ms"] <= result[f"{kind}_ms"]
