"""The table of what a machine can do, for machines this one is not."""

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from nanochat import errors
from nanochat.machine import Row, check
from nvfp8 import attention, te
from nvfp8.recipe import RECIPES
from scripts import dry_run


@pytest.fixture(autouse=True)
def fresh_answers() -> Iterator[None]:
    """Answers are cached: none from the real machine before a test, none from a pretended one after it."""
    for answer in (attention.why_not, te.unavailable):
        answer.cache_clear()
    yield
    for answer in (attention.why_not, te.unavailable):
        answer.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]) -> dict[str, Row]:
    properties = SimpleNamespace(name=name, major=capability[0], minor=capability[1], total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    return {row.what: row for row in check()}


def test_a_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pretend(monkeypatch, "NVIDIA H200", (9, 0))
    assert "2 x NVIDIA H200, 80.0 GiB, compute capability 9.0" in rows["device"].detail
    assert "1979 TFLOP/s FP8" in rows["peaks"].detail
    assert [rows[name].usable for name in ("bf16", "fp8", "fp8_block", "mxfp8", "nvfp4")] == [True, True, True, False, False]
    assert rows["--precision auto"].detail.startswith("fp8: this GPU computes in FP8")
    assert rows["attention plain"].usable is False and "quadratic" in rows["attention plain"].detail


def test_a_spark_says_why_mxfp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pretend(monkeypatch, "NVIDIA GB10", (12, 1))
    assert rows["fp8"].usable and rows["nvfp4"].usable
    assert "lacks GEMM layouts" in rows["mxfp8"].detail and "12.1" in rows["mxfp8"].detail


def test_an_unknown_old_card(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pretend(monkeypatch, "Some Card", (7, 5))
    assert "MFU is shown as -" in rows["peaks"].detail
    assert rows["bf16"].usable is False
    assert rows["--precision auto"].detail.startswith("fp32")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_the_script_prints_how_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["dry_run", "--check"])
    with pytest.raises(SystemExit) as exit_:
        errors.run(dry_run.main)
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "torch sees no CUDA device" in out and "'.[te]'" in out.replace("\n", "") and "fp32" in out


def test_transformer_engine_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(te.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(te.importlib.metadata, "version", lambda _: "2.9.1")
    assert "transformer-engine is 2.9.1, 2.20 or later is needed: pip install" in str(te.unavailable())
    with pytest.raises(RuntimeError, match=r"2\.20 or later"):
        te.unsupported(te.Recipe)  # type: ignore[arg-type]


def test_transformer_engine_that_cannot_be_imported_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("libcublasLt.so.13: cannot open shared object file")

    monkeypatch.setattr(te.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(te.importlib.metadata, "version", lambda _: "2.20.2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(te.importlib, "import_module", broken)
    assert "cannot be imported (libcublasLt.so.13: cannot open" in str(te.unavailable())


def test_a_variable_that_would_change_a_recipe_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(te, "engine", lambda: None)
    monkeypatch.setenv("NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES", "1")
    assert "NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES is set" in str(te.unsupported(RECIPES["current"]))
