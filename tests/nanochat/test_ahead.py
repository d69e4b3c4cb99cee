"""What a miniature of a model asks Triton for is all that the model's first steps need, and leaves no trace in the run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from nanochat import ahead
from nanochat.build import build_model, build_optimizers
from nanochat.gpt import GPT, GPTConfig
from nanochat.param_groups import groups, ownership
from nvfp8 import cublaslt
from nvfp8.hardware import missing
from nvfp8.precision import Precision, bf16, fp8, te
from nvfp8.recipe import RECIPES
from nvfp8.scaling import Scaling

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).parents[2]


def ran(cache: Path, *arguments: str) -> Any:
    """What ahead_steps.py prints, with nothing compiled beforehand."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests" / "nvfp8")))  # as pytest has it
    environment |= {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, str(Path(__file__).with_name("ahead_steps.py")), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def test_no_product_is_timed_beside_compilers() -> None:
    assert cublaslt._timing
    with ahead._Compilers(1) as compilers, ahead._launching_nothing(compilers):
        assert not cublaslt._timing
    assert cublaslt._timing


def test_a_miniature_asks_for_all_that_two_steps_launch(tmp_path: Path) -> None:
    """Other depths modulo 4 put the first, the middle and the last layer beside other neighbours."""
    cases = ran(tmp_path, "keys")
    too_small = cases.pop("four layers")
    assert len(cases) == 3
    for name, case in cases.items():
        assert case["asked"] > 25 and case["missing"] == [], name
        assert case["untouched"], name
    assert too_small["missing"], "four layers meet fewer cases: in them the layer behind the middle is the last"


def test_after_it_nothing_is_left_to_compile(tmp_path: Path) -> None:
    done = ran(tmp_path, "compile")
    assert done["before"] > 25 and done["after"] == 0
    assert done["launchers"] == ["compiler"], "a launcher, and loading, is work for the threads too"


@pytest.mark.parametrize("precision", [te(RECIPES["delayed"]), fp8(RECIPES["delayed"], emulated=True), bf16()], ids=str)
def test_only_where_our_kernels_run(precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("nothing is to be compiled")

    monkeypatch.setattr(ahead, "request_kernels", refuse)
    on_a_gpu = precision.name != "bf16"
    ahead.compile_kernels(cast(GPT, SimpleNamespace(precision=precision, cos=SimpleNamespace(is_cuda=on_a_gpu))), 2)


def test_what_has_a_history_when_weights_are_first_updated() -> None:
    config = GPTConfig(32, 128, 3, 2, 2, 128)
    model = build_model(config, fp8(RECIPES["delayed"], emulated=True), torch.device("cpu"))
    scaling = model.scaling
    assert isinstance(scaling, Scaling)
    every, expected = groups(model, config, weight_decay=0.1), ahead.seen_after_first_step(model)
    optimizers = build_optimizers(every, ownership(every, 1), 0, torch.bfloat16)
    ids = torch.arange(64).view(2, 32)
    copies = [site.index for site in scaling.sites if site.kind == "copies"]
    for expecting in (expected, [True] * len(scaling.sites)):
        model(ids, ids).backward()
        assert scaling.update() == []
        assert [scaling.seen[i] for i in copies] == [expecting[i] for i in copies]
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
    assert {expected[i] for i in copies} == {True, False}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_steps_after_it_compile_nothing_and_compute_the_same(precision: str, tmp_path: Path) -> None:
    if reason := missing(precision, torch.cuda.get_device_capability()):
        pytest.skip(reason)
    with_it, without = ran(tmp_path / "with", "gpu", precision, "yes"), ran(tmp_path / "without", "gpu", precision, "no")
    assert with_it["ahead"] > 25 and with_it["steps"] == [[]] * 4
    assert without["ahead"] == 0 and len(without["steps"][0]) > 25
    assert with_it["losses"] == without["losses"]
    assert with_it["untouched"] and with_it["kept"] < 2**27, "but cuBLAS's workspace, which the run would take itself"
