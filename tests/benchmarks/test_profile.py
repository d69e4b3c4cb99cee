"""The benchmark's table: sums are per micro-batch and complete."""

import os
import subprocess
import sys

import pytest

from benchmarks.profile import table


def test_sums_are_per_micro_batch_and_complete() -> None:
    lines = table([("nvjet_a", 8, 60.0), ("nvjet_b", 4, 20.0), ("_norm_forward", 4, 16.0), ("strange", 2, 4.0)], 4, largest=2)
    assert [line.split() for line in lines[1:5]] == [
        ["GEMMs", "20.00", "80.0%", "3"],
        ["our", "Triton", "kernels", "4.00", "16.0%", "1"],
        ["other", "1.00", "4.0%", "0"],
        ["sum", "of", "kernels", "25.00"],
    ]
    assert [line.split() for line in lines[6:]] == [
        ["15.00", "ms", "2", "x", "GEMMs:", "nvjet_a"],
        ["5.00", "ms", "1", "x", "GEMMs:", "nvjet_b"],
    ]


@pytest.mark.gpu
def test_a_small_model_is_profiled() -> None:
    command = [sys.executable, "-m", "benchmarks.profile", "--depth", "2", "--batch", "2", "--micro-batches", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    for fragment in ("GEMMs", "attention", "our Triton kernels", "casts and copies", "sum of kernels"):
        assert fragment in done.stdout
