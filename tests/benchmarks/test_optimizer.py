"""The benchmark of the optimizers says what it measured, and on a machine without a GPU why it did not."""

import json
import os

import forked
import pytest
import torch

from benchmarks import optimizer, optimizer_peers
from nanochat.adamw import AdamW

COMMAND = ["-m", "benchmarks.optimizer", "--depth", "2", "--steps", "2"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line() -> None:
    done = forked.run(COMMAND, os.environ)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the optimizers are timed on a GPU, and torch finds no CUDA device\n"


def test_the_bytes_of_a_step_are_counted_by_hand() -> None:
    hyper = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.1, "master": True}
    for master, beside in (("fp32", 2 + 2 * 4), ("bf16+8", 2 * 2 + 2 * 1)):  # a weight beside its fp32 master is only written
        p = torch.nn.Parameter(torch.zeros(256, 4, dtype=torch.bfloat16))
        p.grad = torch.zeros_like(p)
        adamw = AdamW([{"params": [p], "param_names": ["p"], **hyper}], exp_avg="e4m3", exp_avg_sq="bf16", master=master)
        scales = 4 * 1024 // 128
        assert optimizer.bytes_moved(adamw) == 1024 * (2 + 2 * (1 + 2) + beside) + 2 * scales
        state = optimizer.bytes_of_state(adamw)
        assert optimizer_peers.bytes_moved(f"ours e4m3, {master} masters", [p], state) == optimizer.bytes_moved(adamw)


PEERS = ["-m", "benchmarks.optimizer_peers", "--rows", "512", "--width", "256", "--tensors", "2", "--repeats", "2"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_peers_need_a_gpu_too() -> None:
    done = forked.run(PEERS, os.environ)
    assert (done.returncode, done.stdout) == (2, "") and len(done.stderr.splitlines()) == 1


@pytest.mark.gpu
def test_every_peer_is_a_line_and_a_missing_one_says_so() -> None:
    done = forked.run(PEERS, os.environ)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({line["adamw"] for line in lines}) == len(lines) == 14
    for line in lines:
        assert line.keys() & {"ms", "missing", "failed"}
        assert "ours" not in line["adamw"] or line["ms"] > 0


@pytest.mark.gpu
def test_a_small_model_is_timed() -> None:
    done = forked.run(COMMAND, os.environ)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    for kind in ("muon", "adamw"):
        assert 0 < result[f"{kind}_host_ms"] <= result[f"{kind}_ms"]
        assert 2 < result[f"{kind}_parameter_bytes"] < 17
    assert result["adamw_of_copy"] > 0  # more than 1 where all fits into the cache
    assert 0 < result["step_host_ms"] <= result["step_ms"] and result["step_gpu_ms"] > 0
    assert "_adamw" in result["kernels_ms"] and all(ms > 0 for ms in result["kernels_ms"].values())
    done = forked.run([*COMMAND, "--precision", "fp8"], os.environ)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert all(result[f"{kind}_gpu_ms_{way}_copies"] > 0 for kind in ("muon", "adamw") for way in ("with", "without"))
    assert result["cast_gpu_ms"] > 0 and result["step_gpu_ms"] > 0
