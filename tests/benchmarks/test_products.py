"""The benchmark of products: which it takes, and its rows on a GPU; `test_head.py` has what it refuses without one."""

import json
import os

import forked
import pytest
import torch

from benchmarks.products import cases
from nanochat.gemm_formats import flops_in_fp8
from nanochat.gpt import GPT, GPTConfig
from nvfp8.precision import fp8
from nvfp8.recipe import recipe

COMMAND = ["-m", "benchmarks.products", "--widths", "768", "--repeats", "2"]


def test_they_are_all_fp8_gemms_but_the_three_with_epilogues() -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig.from_depth(12), fp8(recipe("delayed")))
    flops = {case.name: 2 * case.shape[0] * case.shape[1] * case.shape[2] for case in cases(768) if len(case.shape) == 3}
    head = 32 * flops.pop("logits") + 8 * (flops.pop("head: dx") + flops.pop("head: dW"))
    ours = 65536 * (2 * 3 * 768 * 768 + 2 * 2 * 4 * 768 * 768)  # q, k, v; relu²'s forward and backward
    assert 12 * (sum(flops.values()) + ours) + head == pytest.approx(65536 * flops_in_fp8(model))


@pytest.mark.gpu
def test_every_product_has_a_row() -> None:
    done = forked.run(COMMAND, os.environ)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["product"] for row in rows] == [case.name for case in cases(768)]
    assert all(row["ms"][row["fastest"]] == min(row["ms"]) > 0 < row["torch_ms"] for row in rows)
