"""The benchmark of converted models: its models compile into one graph on a CPU; on a GPU its command runs."""

import json
import subprocess
import sys

import pytest
import torch
import torch._dynamo

from benchmarks import convert as benchmark
from nvfp8 import convert


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiles for a CPU")
@pytest.mark.parametrize(("kind", "converted"), [("blocks", 8), ("encoder", 4)])
def test_models_are_one_graph_and_convert(kind: str, converted: int) -> None:
    torch._dynamo.reset()
    model = benchmark.Model(kind, 256, 2)
    assert len(convert(model, "delayed", skip="head", emulate=True).converted) == converted
    ids = torch.randint(benchmark.VOCABULARY, (2, 17))
    loss = torch.compile(model, backend="aot_eager", fullgraph=True)(ids[:, :-1], ids[:, 1:])
    loss.backward()
    assert abs(loss.item() - torch.tensor(float(benchmark.VOCABULARY)).log().item()) < 1
    assert all(p.grad is not None for p in model.parameters())
    torch._dynamo.reset()


def test_rows_without_torchao() -> None:
    assert [name for name in benchmark.ways(["delayed", "current"]) if "torchao" not in name] == ["bf16", "delayed", "current"]


@pytest.mark.gpu
def test_a_row_for_each_way() -> None:
    command = [sys.executable, "-m", "benchmarks.convert", "--models", "blocks", "--widths", "256", "--layers", "1"]
    command += ["--tokens", "4096", "--steps", "2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    rows = [json.loads(line) for line in result.stdout.splitlines()][1:]
    assert [row["way"] for row in rows][:3] == ["bf16", "delayed", "current"]
    assert all(row["ms"] > 0 and row["loss"][1] < row["loss"][0] + 0.1 for row in rows)
