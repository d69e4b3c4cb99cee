"""Checkpoints when the disk is full, when several ranks write one, and when the process is killed at any line."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from errno import EIO, ENOSPC
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from nanochat import checkpoint, durable
from nanochat.checkpoint import Checkpoint, damage, find, save
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


# ----------------------------------------------------------------------------------------------------------- full disks


class Disk:
    """A disk with `room` bytes left: stands in for `open` in the module that writes."""

    def __init__(self, room: int) -> None:
        self.room = room

    def open(self, path: Path, mode: str) -> "Disk":
        self.file = path.open(mode)
        return self

    def __enter__(self) -> "Disk":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> None:
        self.file.write(data[: self.room])
        self.room -= len(data)
        if self.room < 0:
            raise OSError(ENOSPC, os.strerror(ENOSPC))

    def flush(self) -> None:
        self.file.flush()

    def fileno(self) -> int:
        return int(self.file.fileno())


def test_a_disk_that_fills_at_any_byte_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = put(tmp_path, 1)
    failures, room = 0, 0
    while True:
        with monkeypatch.context() as patch:
            patch.setattr(durable, "open", Disk(room).open, raising=False)
            try:
                put(tmp_path, 2)
                break
            except BadInput as error:
                assert re.fullmatch(
                    r"checkpoint of step 2 not saved in \S+ \(earlier ones are intact\): "
                    "the disk is full; free space there and resume",
                    str(error),
                )
        assert names(tmp_path) == [older.name]
        assert damage(older) is None
        failures, room = failures + 1, room + 61
    assert failures > 15  # every file was hit
    assert value_of(find(tmp_path)) == 2.0


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_any_other_error_of_the_system_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    put(tmp_path, 1)

    def fail(*_: object, **__: object) -> None:
        raise OSError(EIO, os.strerror(EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(BadInput, match=r"step 2 not saved in .*Input/output error"):
            put(tmp_path, 2)
    assert names(tmp_path) == ["step_000001"]
    assert value_of(find(tmp_path)) == 1.0


def test_a_place_that_cannot_be_a_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"not saved in .*file.*(File exists|Not a directory)"):
        put(tmp_path / "file", 1)


def test_an_old_checkpoint_that_cannot_be_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 1)

    def fail(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(EIO, os.strerror(EIO))

    monkeypatch.setattr(shutil, "rmtree", fail)
    with pytest.raises(BadInput, match=r"step 2 is saved, but an older one .* could not be removed: .*Input/output"):
        put(tmp_path, 2, keep=1)
    assert value_of(find(tmp_path)) == 2.0


FILL_A_SMALL_DISK = """
import sys
from pathlib import Path
import torch
from nanochat.checkpoint import damage, find, save
from nanochat.errors import run

def main():
    directory = Path(sys.argv[1]) / "run"
    save(directory, 1, {"w": torch.ones(1000)}, {}, {}, keep=1)
    try:
        save(directory, 2, {"w": torch.ones(1000)}, {"m": torch.ones(1_000_000)}, {}, keep=1)
    finally:
        print([path.name for path in directory.iterdir()], damage(find(directory).path))

run(main)
"""


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    mount = 'mount -t tmpfs -o size=1m none "$0"'
    in_namespace = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*in_namespace, mount, str(tmp_path)], capture_output=True).returncode:
        pytest.skip("this user may not mount a small file system")
    command = [
        *in_namespace,
        f'{mount} && exec "$@"',
        str(tmp_path),
        sys.executable,
        "-c",
        FILL_A_SMALL_DISK,
        str(tmp_path),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(checkpoint.__file__).parents[1])
    assert ended.stdout == "['step_000001'] None\n"
    assert re.fullmatch("error: checkpoint of step 2 not saved in .*: the disk is full; free space .*\n", ended.stderr)
    assert ended.returncode == 2


# ---------------------------------------------------------------------------------------------------------- many ranks


def save_as_ranks(directory: Path, step: int, moments: list[dict[str, Tensor]], **arguments: Any) -> list[Any]:
    """Save from one thread a rank; return what each rank's call returned or raised."""
    world = len(moments)
    barrier, failures = threading.Barrier(world, timeout=30), [None] * world

    def rank_saves(rank: int) -> object:
        def agree(failure: Any) -> None:
            failures[rank] = failure
            barrier.wait()
            first = next((r for r, met in enumerate(failures) if met), None)
            barrier.wait()
            if first == rank:
                raise failure
            if first is not None:
                sys.exit(2)

        weights = model(float(step)) if rank == 0 else {}
        try:
            return save(
                directory,
                step,
                weights,
                moments[rank],
                {"rank": rank},
                keep=1,
                rank=rank,
                world=world,
                agree=agree,
            )
        except (BadInput, SystemExit) as error:
            return error

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(rank_saves, range(world)))


def test_ranks_write_their_shards_and_any_number_of_ranks_reads_them(tmp_path: Path) -> None:
    moments = [{f"h.{rank}.exp_avg": torch.full((2,), float(rank)), "adamw.steps": torch.tensor(3)} for rank in range(3)]
    results = save_as_ranks(tmp_path, 3, moments)
    assert results == [tmp_path / "step_000003"] * 3
    assert names(results[0]) == [
        "manifest.json",
        "model.safetensors",
        *(f"optim_rank{rank}.safetensors" for rank in range(3)),
        "state.json",
    ]
    found = find(tmp_path)
    assert found.state == {"rank": 0}
    assert found.model().keys() == model(0).keys()
    optimizer = Checkpoint(found.path).optimizer()  # as a rank does that was given the path
    assert sorted(optimizer) == ["adamw.steps", "h.0.exp_avg", "h.1.exp_avg", "h.2.exp_avg"]
    assert [optimizer[f"h.{rank}.exp_avg"].tolist() for rank in range(3)] == [[0, 0], [1, 1], [2, 2]]
    assert optimizer["adamw.steps"].item() == 3
    (found.path / "optim_rank1.safetensors").unlink()
    with pytest.raises(BadInput, match=r"optim_rank1\.safetensors is missing"):
        find(tmp_path)


def test_fewer_ranks_after_more_leave_no_shard_behind(tmp_path: Path) -> None:
    save_as_ranks(tmp_path, 1, [{"a": torch.ones(1)}, {"b": torch.ones(1)}])
    save_as_ranks(tmp_path, 1, [{"a": torch.zeros(1), "b": torch.zeros(1)}])
    optimizer = find(tmp_path).optimizer()
    assert {name: optimizer[name].item() for name in optimizer} == {"a": 0, "b": 0}


def test_ranks_that_disagree_about_a_tensor_are_found_out(tmp_path: Path) -> None:
    nan = torch.tensor([float("nan")]).to(torch.float8_e5m2)  # equal bits are agreement, also where NaN ≠ NaN
    save_as_ranks(tmp_path, 1, [{"s": torch.tensor(3), "n": nan}, {"s": torch.tensor(4), "n": nan.clone()}])
    optimizer = find(tmp_path).optimizer()
    assert optimizer["n"].shape == (1,)
    with pytest.raises(BadInput, match="optimizer files of several ranks disagree about s"):
        optimizer["s"]


def test_only_the_tensor_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    class Spy:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.file: Any = safe_open(*arguments, **options)

        def keys(self) -> list[str]:
            return list(self.file.keys())

        def get_tensor(self, name: str) -> Tensor:
            read.append(name)
            tensor: Tensor = self.file.get_tensor(name)
            return tensor

    monkeypatch.setattr(checkpoint, "safe_open", Spy)
    save_as_ranks(tmp_path, 1, [{"a": torch.ones(1), "b": torch.ones(1)}, {"c": torch.ones(1)}])
    optimizer = find(tmp_path).optimizer()
    assert "b" in optimizer
    assert read == []
    assert optimizer["c"].item() == 1
    assert read == ["c"]


def test_one_rank_out_of_space_fails_all_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 1)
    write = durable.write

    def fails_on_rank_1(path: Path, chunks: Any) -> dict[str, Any]:
        if path.name == "optim_rank1.safetensors":
            raise OSError(ENOSPC, os.strerror(ENOSPC))
        return write(path, chunks)

    monkeypatch.setattr(durable, "write", fails_on_rank_1)
    first, second = save_as_ranks(tmp_path, 2, [{}, {}])
    assert isinstance(first, SystemExit) and first.code == 2
    assert isinstance(second, BadInput) and "the disk is full" in str(second)
    assert names(tmp_path) == ["step_000001"]
    assert value_of(find(tmp_path)) == 1.0


# --------------------------------------------------------------------------------------------------- kills, power cuts


def save_killed_at(line: int, directory: Path, step: int) -> bool:
    """Save in a forked process that dies of SIGKILL before the `line`-th line it runs; false when it got to the end."""
    files = {checkpoint.__file__, durable.__file__, shutil.__file__}
    child = os.fork()
    if child == 0:
        left = line

        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal left
            if frame.f_code.co_filename not in files:
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        try:
            sys.settrace(trace)
            put(directory, step, 9.0, keep=2)
            sys.settrace(None)
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("step", [3, 2], ids=["a new step", "a step saved again"])
def test_killed_at_any_line_the_newest_loads_and_the_next_save_tidies_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    before = tmp_path / "before"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)  # a kill is not a power cut; flushing only costs time here
        put(before, 1)
        put(before, 2)
        (before / "step_000005.tmp").mkdir()
        (before / "step_000005.tmp" / "state.json").touch()
        outcomes: list[float] = []
        for line in range(1, 10_000):
            directory = tmp_path / "run"
            shutil.copytree(before, directory)
            killed = save_killed_at(line, directory, step)
            lines: list[str] = []
            outcomes.append(value_of(find(directory, log=lines.append)))
            assert lines == []  # nothing half written carries a checkpoint's name
            put(directory, 4, keep=2)
            assert names(directory) == [
                f"step_00000{step}" if outcomes[-1] == 9.0 or step == 2 else "step_000002",
                "step_000004",
            ]
            shutil.rmtree(directory)
            if not killed:
                break
    assert outcomes[-1] == 9.0
    assert set(outcomes) == {2.0, 9.0}
    assert outcomes == sorted(outcomes)  # once the new one is there, no later kill takes it away
    assert len(outcomes) > 100


def test_everything_is_flushed_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 1)
    events: list[str] = []
    rename = os.rename

    def record_fsync(descriptor: int) -> None:
        events.append("flush " + os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))

    def record_rename(source: Path, target: Path) -> None:
        events.append(f"rename {source.name} {target.name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    put(tmp_path, 2, keep=1)
    tmp = "flush step_000002.tmp"
    assert sorted(events[:3]) == [f"{tmp}/{name}" for name in ("model.safetensors", "optim_rank0.safetensors", "state.json")]
    assert events[3:] == [
        f"{tmp}/manifest.json",
        tmp,
        "rename step_000002.tmp step_000002",
        "flush .",
        "rename step_000001 step_000001.tmp",
    ]
