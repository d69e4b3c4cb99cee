"""The command that converts checkpoints: there and back, and what it refuses."""

import os
import shutil
import sys
from pathlib import Path

import forked
import pytest
import torch

from nanochat.checkpoint import find, save, steps
from nanochat.errors import run
from scripts.convert import main

ROOT = Path(__file__).parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "nanochat_tiny"
MODEL, META = "model_000007.pt", "meta_000007.json"


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> "Convert":
    return Convert(monkeypatch, capsys)


class Convert:
    """Runs the command in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> tuple[int, str]:
        """Return the exit status and what was printed: stdout if it is 0, else stderr."""
        self.monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run(main)
        printed = self.capsys.readouterr()
        assert (printed.err == "") == (ended.value.code == 0)
        assert isinstance(ended.value.code, int)
        return ended.value.code, printed.err or printed.out


def test_there_and_back_changes_nothing(tmp_path: Path, convert: Convert) -> None:
    ours, back = tmp_path / "ours", tmp_path / "back"
    status, line = convert("import", FIXTURE, "--to", ours)
    assert (status, line.count("\n")) == (0, 1)
    assert f"wrote {ours / 'step_000007'} (weights and configuration; optimizer state is not converted)" in line
    found = find(ours)
    assert found.state["model_config"]["window_pattern"] == "SL"
    assert len(found.optimizer()) == 0
    status, line = convert("export", ours, "--to", back)
    assert (status, f"wrote {back / MODEL}" in line) == (0, True)
    assert (back / META).read_text() == (FIXTURE / META).read_text()
    written, original = (torch.load(place / MODEL, weights_only=True) for place in (back, FIXTURE))
    assert written.keys() == original.keys()
    for name, tensor in original.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor), name


def test_masters_are_exported_rather_than_the_weights_they_were_rounded_to(tmp_path: Path, convert: Convert) -> None:
    ours, low = tmp_path / "ours", tmp_path / "low"
    convert("import", FIXTURE, "--to", ours)
    found, name = find(ours), "transformer.h.0.mlp.c_fc.weight"
    exact = found.model()
    rounded = {key: value.bfloat16() if key == name else value for key, value in exact.items()}
    save(low, 7, rounded, {f"{name}.master": exact[name]}, found.state, keep=1)
    assert convert("export", low, "--to", tmp_path / "back")[0] == 0
    written = torch.load(tmp_path / "back" / MODEL, weights_only=True)
    assert torch.equal(written[name], exact[name]) and not torch.equal(rounded[name].float(), exact[name])


def test_one_checkpoint_of_several_can_be_named_by_step_or_by_path(tmp_path: Path, convert: Convert) -> None:
    ours = tmp_path / "ours"
    convert("import", FIXTURE, "--step", 7, "--to", ours)
    shutil.copytree(ours / "step_000007", ours / "step_000009")  # damaged: its manifest is that of step 7
    assert convert("export", ours, "--step", 7, "--to", tmp_path / "a")[0] == 0
    assert convert("export", ours / "step_000007", "--to", tmp_path / "b")[0] == 0
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [META, MODEL]
    status, line = convert("export", ours / "step_000009", "--to", tmp_path / "c")
    assert status == 2
    assert "the checkpoint of step 9 is damaged" in line


def test_import_removes_no_checkpoint_and_overwrites_none(tmp_path: Path, convert: Convert) -> None:
    for step in (1, 2, 3, 20):
        save(tmp_path, step, {}, {}, {}, keep=99)
    assert convert("import", FIXTURE, "--to", tmp_path)[0] == 0
    assert steps(tmp_path) == [1, 2, 3, 7, 20]
    status, line = convert("import", FIXTURE, "--to", tmp_path)
    assert (status, line) == (2, f"error: {tmp_path} has a checkpoint of step 7 already; choose another --to\n")


def test_our_metadata_is_exported_under_nanochats_names(tmp_path: Path, convert: Convert) -> None:
    convert("import", FIXTURE, "--to", tmp_path / "a")
    found = find(tmp_path / "a")
    state = {"model_config": found.state["model_config"], "val_bpb": 0.75, "rng": {"cpu": "…"}}
    save(tmp_path / "b", 12, found.model(), {}, state, keep=1)
    assert convert("export", tmp_path / "b", "--to", tmp_path / "c")[0] == 0
    meta = (tmp_path / "c" / "meta_000012.json").read_text()
    assert '"val_bpb": 0.75' in meta
    assert '"step": 12' in meta
    assert "rng" not in meta


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ((), "the following arguments are required: command"),
        (("frobnicate",), "invalid choice: 'frobnicate'"),
        (("import", "x"), "the following arguments are required: --to"),
        (("import", "x", "--to", "y", "--step", "last"), "argument --step: invalid int value: 'last'"),
        (("import", "absent", "--to", "y"), "absent is not a directory"),
        (("export", "absent", "--to", "y"), "absent is not a directory"),
        (("export", FIXTURE, "--to", "y"), "convert one first: python -m scripts.convert import"),
        (("import", FIXTURE, "--step", "8", "--to", "y"), "has no model of step 8; it has 7"),
    ],
)
def test_bad_commands_are_one_line_and_status_2(convert: Convert, arguments: tuple[str, ...], fragment: str) -> None:
    status, line = convert(*arguments)
    assert status == 2
    assert fragment in line
    assert line.count("\n") == 1


def test_a_checkpoint_of_something_else_is_not_exported(tmp_path: Path, convert: Convert) -> None:
    save(tmp_path, 1, {}, {}, {"other": 1}, keep=1)
    status, line = convert("export", tmp_path, "--to", tmp_path / "out")
    assert status == 2
    assert "state.json has no model_config: not a checkpoint of a GPT" in line


def test_it_runs_as_a_module() -> None:
    ended = forked.run(["-m", "scripts.convert", "--help"], os.environ)
    assert ended.returncode == 0
    assert "python -m scripts.convert" in ended.stdout
