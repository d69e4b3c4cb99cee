"""The benchmark of heads: what it refuses without a GPU, and that it times both heads at both shapes on one."""

import json
import os

import forked
import pytest
import torch

from benchmarks.head import HEADS
from nvfp8.recipe import GEMMS, parse_recipe

COMMAND = ["-m", "benchmarks.head", "--repeats", "2"]


def test_each_head_leaves_in_bf16_what_its_name_says() -> None:
    left = {name: parse_recipe(recipe).gemms_in_bf16("lm_head") for name, recipe in HEADS.items()}
    assert left.pop("bf16") == set(GEMMS) and left.pop("fp8") == set()
    assert left == {f"fp8-but-{gemm}": {gemm} for gemm in GEMMS}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["head", "products"])
def test_without_a_gpu_it_is_one_line(name: str) -> None:
    done = forked.run(["-m", f"benchmarks.{name}", "--repeats", "2"], os.environ)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: this times FP8 GEMMs, and torch finds no CUDA device that has them (8.9 or newer)\n"


@pytest.mark.gpu
def test_both_heads_are_timed_beside_their_floor() -> None:
    done = forked.run([*COMMAND, "--depths", "12", "24"], os.environ)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["depth"], row["head"]) for row in rows] == [(d, h) for d in (12, 24) for h in ("floor", "bf16", "fp8")]
    for floor, _, fp8 in (rows[:3], rows[3:]):
        assert 0 < floor["floor_ms"] < 1.1 * fp8["ms"]  # clocks move
