"""The benchmark of Polar Express counts what there is, and on a machine without a GPU says why it measures nothing."""

import os

import forked
import pytest
import torch

from benchmarks.muon import WAYS, shapes, ways
from nanochat.roofline import polar_flops

COMMAND = ["-m", "benchmarks.muon", "--depth", "2", "--repeats", "2"]


def test_d24_has_the_matrices_and_the_operations_that_the_docstrings_say() -> None:
    found = shapes(24)
    assert [found[shape] for shape in ((1536, 1536), (6144, 1536), (1536, 6144))] == [96, 24, 24]
    total = {way: sum(n * polar_flops(*shape, way) for shape, n in found.items()) / 1e12 for way in WAYS}
    assert {way: round(value, 1) for way, value in total.items()} == {"full": 26.1, "half": 18.3, "gram": 14.6}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line() -> None:
    done = forked.run(COMMAND, os.environ)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: Polar Express is timed on a GPU, and torch finds no CUDA device\n"


@pytest.mark.gpu
def test_every_shape_is_timed_in_every_way() -> None:
    done = forked.run(COMMAND, os.environ)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3 + sum(len(ways(*shape)) for shape in shapes(2))
