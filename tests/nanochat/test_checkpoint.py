"""Checkpoints: what comes back, what is kept, what damage does, and the state of the world that goes along."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanochat import checkpoint
from nanochat.checkpoint import Checkpoint, damage, environment, find, rng_state, save, set_rng_state, steps
from nanochat.errors import BadInput


def model(value: float) -> dict[str, Tensor]:
    return {"wte.weight": torch.full((8, 4), value, dtype=torch.bfloat16), "h.0.weight": torch.full((4, 4), value)}


def put(directory: Path, step: int, value: float | None = None, keep: int = 99) -> Path:
    value = float(step) if value is None else value
    moments = {"h.0.weight.momentum_buffer": torch.full((4, 4), -value), "muon.steps": torch.tensor(step)}
    return save(directory, step, model(value), moments, {"value": value}, keep=keep)


def value_of(found: Checkpoint) -> float:
    """Check that the three files belong together and return their common value."""
    value = float(found.state["value"])
    assert all(torch.equal(tensor, model(value)[name]) for name, tensor in found.model().items())
    assert torch.equal(found.optimizer()["h.0.weight.momentum_buffer"], torch.full((4, 4), -value))
    return value


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# ----------------------------------------------------------------------------------------------------- what comes back


def test_all_that_was_saved_comes_back_and_nothing_is_pickled(tmp_path: Path) -> None:
    state = {"min_val_bpb": None, "loader": {"epoch": 1, "buffer": [3, 1]}, "note": "ü"}
    moments = {"a.exp_avg": torch.arange(6.0).reshape(2, 3), "adamw.steps": torch.tensor(100)}
    path = save(tmp_path / "base_checkpoints" / "d2", 100, model(0.5), moments, state, keep=1)
    assert path == tmp_path / "base_checkpoints" / "d2" / "step_000100"
    assert names(path) == ["manifest.json", "model.safetensors", "optim_rank0.safetensors", "state.json"]
    found = find(path.parent)
    assert (found.path, found.step, found.state) == (path, 100, state)
    loaded = found.model()
    assert loaded.keys() == model(0.5).keys()
    assert all(loaded[name].dtype == t.dtype and torch.equal(loaded[name], t) for name, t in model(0.5).items())
    optimizer = found.optimizer()
    assert set(optimizer) == moments.keys() and len(optimizer) == 2
    assert all(torch.equal(optimizer[name], t) for name, t in moments.items())
    with pytest.raises(KeyError, match=r"b\.exp_avg"):
        optimizer["b.exp_avg"]


def test_scaling_state_lies_beside_the_weights_and_is_verified(tmp_path: Path) -> None:
    scaling = {"h.0.mlp.scale_fwd": torch.tensor([1.0, 448.0]), "h.0.mlp.amax_history_fwd": torch.zeros(16, 2)}
    path = save(tmp_path, 1, model(0.5), {}, {}, scaling=scaling, keep=2)
    assert "scaling.safetensors" in names(path) and find(tmp_path).model().keys() == model(0.5).keys()
    assert all(torch.equal(value, scaling[name]) for name, value in find(tmp_path).scaling().items())
    put(tmp_path, 2)
    assert find(tmp_path).scaling() == {}
    (path / "scaling.safetensors").write_bytes(b"")
    with pytest.raises(BadInput, match=r"scaling\.safetensors has 0 bytes"):
        find(tmp_path, 1)


@pytest.mark.parametrize("value", [torch.ones(1), math.inf, math.nan])
def test_state_that_json_cannot_hold_fails_before_the_disk_is_touched(value: object, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError)):
        save(tmp_path / "run", 1, {}, {}, {"x": value}, keep=1)
    assert not (tmp_path / "run").exists()


def test_steps_beyond_six_digits_sort_as_numbers(tmp_path: Path) -> None:
    put(tmp_path, 999_999)
    put(tmp_path, 1_000_000)
    assert find(tmp_path).step == 1_000_000
    assert steps(tmp_path) == [999_999, 1_000_000]


# -------------------------------------------------------------------------------------------------------- what is kept


def test_the_newest_are_kept_and_later_steps_of_another_run_left_alone(tmp_path: Path) -> None:
    put(tmp_path, 900)
    for step in (10, 20, 30):
        put(tmp_path, step, keep=2)
    assert steps(tmp_path) == [20, 30, 900]
    with pytest.raises(ValueError, match="keep"):
        put(tmp_path, 40, keep=0)


def test_a_step_saved_again_replaces_itself(tmp_path: Path) -> None:
    put(tmp_path, 1, 1.0)
    put(tmp_path, 1, 2.0, keep=1)
    assert value_of(find(tmp_path)) == 2.0
    assert names(tmp_path) == ["step_000001"]


def test_leftovers_of_killed_saves_are_mended(tmp_path: Path) -> None:
    put(tmp_path, 1)
    put(tmp_path, 2)
    put(tmp_path, 3)
    (tmp_path / "step_000007.tmp").mkdir()
    (tmp_path / "step_000007.tmp" / "model.safetensors").write_bytes(b"half")
    shutil.copytree(tmp_path / "step_000001", tmp_path / "step_000001.old")  # killed before it was removed
    os.rename(tmp_path / "step_000003", tmp_path / "step_000003.old")  # killed between two renames
    assert value_of(find(tmp_path)) == 3.0
    assert find(tmp_path).step == 3
    put(tmp_path, 4)
    assert names(tmp_path) == ["step_000001", "step_000002", "step_000003", "step_000004"]
    assert value_of(find(tmp_path, 3)) == 3.0


# -------------------------------------------------------------------------------------------------------------- damage


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def replace_manifest_by_directory(path: Path) -> None:
    (path / "manifest.json").unlink()
    (path / "manifest.json").mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (
        lambda p: os.truncate(p / "model.safetensors", 100),
        r"model\.safetensors has 100 bytes instead of \d+",
    ),
    "flip in model": (lambda p: flip(p / "model.safetensors"), r"model\.safetensors does not match its checksum"),
    "flip in header": (lambda p: flip(p / "model.safetensors", 20), r"model\.safetensors does not match its checksum"),
    "flip in optimizer": (lambda p: flip(p / "optim_rank0.safetensors"), r"optim_rank0\.safetensors does not match"),
    "flip in state": (lambda p: flip(p / "state.json", 3), r"state\.json does not match its checksum"),
    "no model": (lambda p: (p / "model.safetensors").unlink(), r"model\.safetensors is missing"),
    "no optimizer": (lambda p: (p / "optim_rank0.safetensors").unlink(), r"optim_rank0\.safetensors is missing"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), r"manifest\.json is missing"),
    "manifest cut": (lambda p: os.truncate(p / "manifest.json", 50), r"manifest\.json is damaged"),
    "manifest not text": (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe"), r"manifest\.json is damaged"),
    "manifest a list": (lambda p: (p / "manifest.json").write_text("[1]"), r"manifest\.json is damaged"),
    "manifest lacks a file": (
        lambda p: edit_manifest(p, lambda m: m["files"].pop("state.json")),
        r"manifest\.json is damaged",
    ),
    "manifest a directory": (replace_manifest_by_directory, r"manifest\.json cannot be read \(Is a directory\)"),
    "another format": (
        lambda p: edit_manifest(p, lambda m: m.update(format=9)),
        "its format is 9, this program reads 1",
    ),
    "copied from another step": (lambda p: edit_manifest(p, lambda m: m.update(step=5)), "manifest is that of step 5"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_skipped(tmp_path: Path, kind: str) -> None:
    break_it, reason = DAMAGE[kind]
    put(tmp_path, 1)
    broken = put(tmp_path, 2)
    assert damage(broken) is None
    break_it(broken)
    lines: list[str] = []
    assert value_of(find(tmp_path, log=lines.append)) == 1.0
    assert len(lines) == 1
    assert re.search(f"skipping a damaged checkpoint: {re.escape(str(broken))}: .*{reason}", lines[0])
    with pytest.raises(BadInput, match=f"step 2 is damaged: .*{reason}.*steps there: 1, 2"):
        find(tmp_path, 2)
    shutil.rmtree(tmp_path / "step_000001")
    with pytest.raises(BadInput, match=f"no checkpoint in .* is whole: .*{reason}") as caught:
        find(tmp_path)
    assert "\n" not in str(caught.value)


def test_damage_is_reported_on_stderr_and_older_damage_is_not_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2, 3):
        put(tmp_path, step)
    flip(tmp_path / "step_000001" / "state.json")
    flip(tmp_path / "step_000003" / "state.json")
    assert find(tmp_path).step == 2
    output = capsys.readouterr()
    assert "step_000003" in output.err
    assert "step_000001" not in output.err
    assert output.out == ""


def test_no_checkpoint_says_what_is_there_instead(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no checkpoint: .*absent is not a directory"):
        find(tmp_path / "absent")
    with pytest.raises(BadInput, match=r"no checkpoint \(step_000100 or the like\) in [^;]*$"):
        find(tmp_path)
    put(tmp_path / "d2", 1)
    put(tmp_path / "d4", 1)
    with pytest.raises(BadInput, match="did you mean d2, d4 in it"):
        find(tmp_path)
    (tmp_path / "model_000100.pt").touch()
    with pytest.raises(BadInput, match=r"karpathy/nanochat; convert one first: python -m scripts\.convert import"):
        find(tmp_path)
    assert steps(tmp_path / "absent") == []


def test_an_unknown_step_names_those_that_exist(tmp_path: Path) -> None:
    put(tmp_path, 50)
    put(tmp_path, 100)
    with pytest.raises(BadInput, match="has no checkpoint of step 75; it has 50, 100"):
        find(tmp_path, 75)
    assert find(tmp_path, 50).step == 50


# ------------------------------------------------------------------------------------------------- what goes into state


def test_random_state_goes_through_json() -> None:
    saved = json.loads(json.dumps(rng_state()))
    expected = torch.rand(4)
    torch.rand(9)
    set_rng_state(saved)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.gpu
def test_random_state_of_the_gpu_goes_through_json() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    saved = json.loads(json.dumps(rng_state()))
    expected = torch.rand(4, device="cuda")
    set_rng_state(saved)
    assert torch.equal(torch.rand(4, device="cuda"), expected)


@pytest.mark.parametrize("saved", [{}, {"cpu": "?"}, {"cpu": "AAAA"}, {"cpu": ""}, {"cpu": 3}, {"cpu": None}])
def test_a_random_state_that_is_none_is_refused(saved: dict[str, Any]) -> None:
    before = torch.get_rng_state()
    with pytest.raises(BadInput, match="random state is not one that torch takes"):
        set_rng_state(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_environment_is_recorded() -> None:
    described = json.loads(json.dumps(environment()))
    assert described["argv"] == sys.argv
    # PyPI's CUDA build is called 2.13.0 by pip and 2.13.0+cu130 by itself.
    assert described["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert described["versions"]["cuda"] == torch.version.cuda
    assert described["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert described["hardware"]["cpus"] == os.cpu_count()
    assert len(described["hardware"]["devices"]) == torch.cuda.device_count()


def test_the_commit_is_recorded_and_its_absence_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "nanochat"
    package.mkdir()
    monkeypatch.setattr(checkpoint, "__file__", str(package / "checkpoint.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment()["commit"] is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (package / "checkpoint.py").write_text("1")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *arguments], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert environment()["commit"] == head
    (package / "checkpoint.py").write_text("2")
    assert environment()["commit"] == head + "-dirty"
    monkeypatch.setenv("PATH", "")
    assert environment()["commit"] is None
