"""The benchmark of kernels counts the bytes there are, and on a machine without a GPU says why it measures nothing."""

import os

import forked
import pytest
import torch

from benchmarks.kernels import GATE, HEAD, Case, cases

COMMAND = ["-m", "benchmarks.kernels", "--tokens", "256", "--width", "256", "--repeats", "2"]

# Bytes an element of the stream, (tokens, width), bf16: what the kernels' docstrings say
ELEMENT = {
    "norm_forward": 2 + 2,
    "mix_forward": 6 + 4,
    "norm_backward": 6 + 4,
    "mix_norm_backward": 12 + 6,
    "quantize, both": 2 + 2,
    "quantize, rows": 2 + 1,
    "quantize, columns": 2 + 1,
    "quantize_rows, a row": 2 + 1,
    "quantize_rows, 128": 2 + 1,
    "quantize_rows, a column": 2 + 1,
    "amax_": 2,
    "mix_norm_quantize": 6 + 3,
    "add_norm_quantize": 4 + 3,
    "norm_backward_quantize": 6 + 5,
    "mix_norm_backward_quantize": 10 + 7,
    "heads_forward": 6 + 6 + 2,
    "heads_backward": 6 + 4 + 2 + 6,
    "heads_backward_quantize": 6 + 6 + 2 + 6,
    "relu_squared_": 4 * (2 + 2),
    "relu_squared_quantize": 4 * (2 + 2),
    "relu_squared_backward_quantize": 4 * (2 + 1 + 2),
    "gemm_heads": 1 + 6 + 2,
    "gemm_relu_squared": 1 + 4 * 2,
    "gemm_relu_squared_backward": 1 + 4 + 4 * 2,
}


@pytest.fixture(scope="module")
def counted() -> dict[str, tuple[Case, int]]:
    return {case.name: (case, case.must()) for case in cases(64, 256, torch.zeros(()))}


@pytest.mark.parametrize("name", ELEMENT)
def test_bytes_are_those_of_the_tensors(name: str, counted: dict[str, tuple[Case, int]]) -> None:
    m, d = 64, 256
    case, must = counted[name]
    # What is not the stream's size: 1/rms of a token or a head, gates, ids, λ, a weight, scales, sums of a head or a tile.
    heads = d // HEAD
    small = {
        "norm": 4 * m,
        "mix": 4 * m + 2 * m * GATE + 2 * 8,
        "heads": m * (4 * 2 * heads + 2 * 2 * heads + 8 + 4 * 3 * heads),
        "relu": 4 * m * 4 * d // 128,
        "gemm": 4 * d * d + 4 * m * 4 * d // 64,  # tiles of the interpreter
        "add": 4 * m,
        "quantize": 4 * max(m, d, m * d // 128),
    }
    assert 0 <= must - ELEMENT[name] * m * d <= small.get(name.split("_")[0], 0)
    assert case.more == {"norm_backward_quantize": 4 * m * (4 * d // 256), "mix_norm_backward_quantize": 4 * m * 3 * heads}.get(
        name, 0
    )
    assert case.flops == (0 if "gemm" not in name else 6 * m * d * d if "heads" in name else 8 * m * d * d)


def test_no_case_is_uncounted(counted: dict[str, tuple[Case, int]]) -> None:
    assert counted.keys() == ELEMENT.keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line() -> None:
    done = forked.run(COMMAND, os.environ)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: kernels are timed on a GPU, and torch finds no CUDA device\n"


@pytest.mark.gpu
def test_every_kernel_is_a_line() -> None:
    done = forked.run(COMMAND, os.environ)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(ELEMENT) + 2  # two GEMMs, promoted too
