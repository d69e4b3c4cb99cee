"""Checkpoints that survive a kill, a full disk and a flipped bit.

A checkpoint is a directory:

    <base>/base_checkpoints/<tag>/step_000100/
        model.safetensors            the model's state_dict, written by rank 0
        scaling.safetensors          what FP8 layers remember of magnitudes, where there are any; never among the weights
        optim_rank{r}.safetensors    optimizer state of the parameters that rank r owns, one name a tensor
        state.json                   everything else: config, data position, schedule, random state, environment
        manifest.json                size and sha256 of the others; written last

It is built under `step_000100.tmp`, every file and the directory are flushed to the disk, and one rename makes it
visible. So a name without `.tmp` is complete whenever the process dies; what bit rot or a careless copy does later,
the checksums show. A step that is saved again moves its former self to `step_000100.old` between two renames, where
`find` still sees it.

No pickle: safetensors holds bytes and shapes, and loading it runs no code. Files are memory-mapped and read by name,
so another number of ranks takes what it owns and no more.
"""

import base64
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from nanochat import durable, parallel
from nanochat.errors import BadInput

FORMAT = 1
STEP_NAME = re.compile(r"step_(\d{6,})(\.old)?")


# -------------------------------------------------------------------------------------------------------------- write


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def _discard(path: Path) -> None:
    """Remove a checkpoint; half removed, it must not look like one, hence the rename first."""
    doomed = path.with_suffix(".tmp")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _prepare(directory: Path, tmp: Path) -> None:
    """Make an empty `tmp`, after mending what a killed save left behind."""
    directory.mkdir(parents=True, exist_ok=True)
    for stale in directory.glob("step_*.tmp"):
        shutil.rmtree(stale)
    for old in directory.glob("step_*.old"):
        if old.with_suffix("").exists():
            _discard(old)
        else:
            os.rename(old, old.with_suffix(""))
    tmp.mkdir()


def _publish(tmp: Path, final: Path, step: int, world: int) -> None:
    """Gather what each rank wrote into the manifest, then make the checkpoint visible with one rename."""
    files: dict[str, Any] = {}
    for rank in range(world):
        note = tmp / f"wrote_rank{rank}.json"
        files |= json.loads(note.read_bytes())
        note.unlink()
    durable.write(tmp / "manifest.json", [_json({"format": FORMAT, "step": step, "world": world, "files": files})])
    durable.sync(tmp)
    if final.exists():
        os.rename(final, final.with_suffix(".old"))
    os.rename(tmp, final)
    durable.sync(final.parent)


def _prune(directory: Path, step: int, keep: int) -> None:
    """Remove what `step` replaced and all but the newest `keep` checkpoints up to it."""
    for old in directory.glob("step_*.old"):
        _discard(old)
    for _, path in [found for found in _on_disk(directory) if found[0] <= step][keep:]:
        _discard(path)


def save(
    directory: Path,
    step: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    scaling: Mapping[str, Tensor] = {},
    keep: int,
    rank: int = 0,
    world: int = 1,
    agree: Callable[[Exception | None], object] = parallel.agree,
) -> Path:
    """Save one checkpoint; every rank calls this with the same `directory`, on a file system they share.

    Args:
        directory: holds the checkpoints of one run, `<base>/base_checkpoints/<tag>`; made if absent.
        step: optimizer steps done.
        model: the state_dict, any shapes and dtypes, on any device; only rank 0's is written.
        optimizer: this rank's optimizer state, names unique across ranks (or equal where repeated).
        state: what JSON can hold; only rank 0's is written.
        scaling: scaling state of FP8 layers, equal on all ranks; only rank 0's is written.
        keep: how many checkpoints stay: this one and the newest before it; later steps (another run's) stay too.
        rank: this process.
        world: number of processes.
        agree: returns when all ranks have called it, if none has met a failure; else raises on every rank.

    Returns:
        The checkpoint's directory.

    Raises:
        BadInput: on the first rank that could not write (disk full, no permission); the others exit. Nothing is left of
            this checkpoint and earlier ones are intact.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")
    final = directory / f"step_{step:06d}"
    tmp = final.with_suffix(".tmp")
    state_json = _json(state)  # what JSON cannot hold fails here, before the disk is touched

    def together(work: Callable[[], None], failed: str) -> None:
        """Run `work`; where it fails on any rank, none goes on."""
        failure: Exception | None = None
        try:
            work()
        except OSError as error:
            full = error.errno in (ENOSPC, EDQUOT)
            why = "the disk is full; free space there and resume" if full else str(error)
            failure = BadInput(f"{failed}: {why}")
            failure.__cause__ = error
        except Exception as error:
            failure = error
        try:
            agree(failure)
        except (Exception, SystemExit):
            if rank == 0:
                shutil.rmtree(tmp, ignore_errors=True)
            raise

    def prepare() -> None:
        if rank == 0:
            _prepare(directory, tmp)

    def write() -> None:
        name = f"optim_rank{rank}.safetensors"
        wrote = {name: durable.write(tmp / name, durable.safetensors(optimizer))}
        if rank == 0:
            wrote["model.safetensors"] = durable.write(tmp / "model.safetensors", durable.safetensors(model))
            if scaling:
                wrote["scaling.safetensors"] = durable.write(tmp / "scaling.safetensors", durable.safetensors(scaling))
            wrote["state.json"] = durable.write(tmp / "state.json", [state_json])
        (tmp / f"wrote_rank{rank}.json").write_bytes(_json(wrote))

    def publish() -> None:
        if rank == 0:
            _publish(tmp, final, step, world)

    def prune() -> None:
        if rank == 0:
            _prune(directory, step, keep)

    unsaved = f"checkpoint of step {step} not saved in {directory} (earlier ones are intact)"
    together(prepare, unsaved)
    together(write, unsaved)
    together(publish, unsaved)
    together(prune, f"checkpoint of step {step} is saved, but an older one in {directory} could not be removed")
    return final


# ----------------------------------------------------------------------------------------------------------------- read


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)  # float8 knows no equality on a CPU, and NaN equals nothing


class OptimizerState(Mapping[str, Tensor]):
    """The tensors of all ranks' optimizer files by name, each read from its memory map when asked for."""

    def __init__(self, paths: list[Path]) -> None:
        """Open the files; reads their headers only."""
        self._files: dict[str, list[Any]] = {}
        for path in paths:
            file: Any = safe_open(path, framework="pt", device="cpu")
            for name in file.keys():  # noqa: SIM118 (not a dict: it cannot be iterated)
                self._files.setdefault(name, []).append(file)

    def __getitem__(self, name: str) -> Tensor:
        """Return one tensor, on the CPU.

        Raises:
            KeyError: no rank saved that name.
            BadInput: two ranks saved different values under it.
        """
        first: Tensor
        first, *others = (file.get_tensor(name) for file in self._files[name])
        if any(other.dtype != first.dtype or not torch.equal(_bytes(other), _bytes(first)) for other in others):
            raise BadInput(f"the optimizer files of several ranks disagree about {name}; resume from another step")
        return first

    def __contains__(self, name: object) -> bool:
        """Look the name up without reading the tensor, which Mapping's own method would."""
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._files)

    def __len__(self) -> int:
        """Count the names."""
        return len(self._files)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, as `find` returns it; other ranks make theirs from the path that rank 0 has verified."""

    path: Path

    @cached_property
    def state(self) -> dict[str, Any]:
        """What was passed to `save` as `state`."""
        state: dict[str, Any] = json.loads((self.path / "state.json").read_bytes())
        return state

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.path.stem.removeprefix("step_"))

    def model(self) -> dict[str, Tensor]:
        """Return the model's state_dict on the CPU, memory-mapped."""
        return load_file(self.path / "model.safetensors")

    def scaling(self) -> dict[str, Tensor]:
        """Return the scaling state of FP8 layers on the CPU; empty where the run had none."""
        path = self.path / "scaling.safetensors"
        return load_file(path) if path.exists() else {}

    def optimizer(self) -> OptimizerState:
        """Return the optimizer state of all ranks, whatever their number was, by name."""
        world = json.loads((self.path / "manifest.json").read_bytes())["world"]
        return OptimizerState([self.path / f"optim_rank{rank}.safetensors" for rank in range(world)])


def _on_disk(directory: Path) -> list[tuple[int, Path]]:
    """List (step, path) newest first; a step's `.old`, where a kill left one, follows it."""
    if not directory.is_dir():
        return []
    matches = [(STEP_NAME.fullmatch(path.name), path) for path in directory.iterdir() if path.is_dir()]
    found = [(int(match[1]), match[2] is None, path) for match, path in matches if match]
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def steps(directory: Path) -> list[int]:
    """List the steps that have a checkpoint in `directory`, damaged or not, oldest first."""
    return sorted({step for step, _ in _on_disk(directory)})


def damage(path: Path) -> str | None:
    """Say what is wrong with the checkpoint directory `path`, or None. Reads all of it once."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']!r}, this program reads {FORMAT}"
        if manifest["step"] != int(path.stem.removeprefix("step_")):
            return f"its manifest is that of step {manifest['step']}"
        names = ["model.safetensors", "state.json", *(f"optim_rank{r}.safetensors" for r in range(manifest["world"]))]
        names += [name for name in manifest["files"] if name == "scaling.safetensors"]
        expected = {name: (int(manifest["files"][name]["bytes"]), manifest["files"][name]["sha256"]) for name in names}
    except FileNotFoundError:
        return "manifest.json is missing"
    except OSError as error:
        return f"manifest.json cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError):  # not JSON, or JSON of another shape
        return "manifest.json is damaged"
    try:
        for name, (size, _) in expected.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if (path / name).stat().st_size != size:
                return f"{name} has {(path / name).stat().st_size:,} bytes instead of {size:,}"
        with ThreadPoolExecutor() as pool:  # hashlib lets go of the interpreter's lock
            digests = pool.map(durable.sha256, [path / name for name in expected])
            for (name, (_, digest)), actual in zip(expected.items(), digests, strict=True):
                if actual != digest:
                    return f"{name} does not match its checksum"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    return None


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def find(directory: Path, step: int | None = None, *, log: Callable[[str], None] = _to_stderr) -> Checkpoint:
    """Return the newest good checkpoint in `directory`, or that of `step`.

    Every file is read and hashed, so one rank calls this and the others take its `path`.

    Args:
        directory: `<base>/base_checkpoints/<tag>`.
        step: this one and no other.
        log: gets one line for each damaged checkpoint that is newer than the one returned.

    Raises:
        BadInput: no checkpoint there, none of that step (those that exist are named), or none that is whole.
    """
    found = _on_disk(directory)
    if not found:
        raise BadInput(_nothing_in(directory))
    if step is not None:
        present = ", ".join(map(str, steps(directory)))
        found = [(number, path) for number, path in found if number == step]
        if not found:
            raise BadInput(f"{directory} has no checkpoint of step {step}; it has {present}")
    damaged: list[str] = []
    for _, path in found:
        reason = damage(path)
        if reason is None:
            for line in damaged:
                log(f"skipping a damaged checkpoint: {line}")
            return Checkpoint(path)
        damaged.append(f"{path}: {reason}")
    if step is not None:
        raise BadInput(f"the checkpoint of step {step} is damaged: {'; '.join(damaged)} (steps there: {present})")
    raise BadInput(f"no checkpoint in {directory} is whole: {'; '.join(damaged)}")


def _nothing_in(directory: Path) -> str:
    if not directory.is_dir():
        return f"no checkpoint: {directory} is not a directory"
    if any(directory.glob("model_*.pt")):
        command = f"python -m scripts.convert import {directory} --to <new directory>"
        return f"{directory} holds checkpoints of karpathy/nanochat; convert one first: {command}"
    tags = ", ".join(sorted(path.name for path in directory.iterdir() if _on_disk(path)))
    return f"no checkpoint (step_000100 or the like) in {directory}" + (f"; did you mean {tags} in it?" if tags else "")


# ------------------------------------------------------------------------------------------------- what goes into state


def rng_state() -> dict[str, str]:
    """Return torch's random state of this process, CPU and current CUDA device, as base64."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return {device: base64.b64encode(value.numpy().tobytes()).decode() for device, value in state.items()}


def set_rng_state(saved: Mapping[str, str]) -> None:
    """Restore what `rng_state` returned; a CUDA state is left alone where there is no CUDA device.

    Raises:
        BadInput: the saved state is not one.
    """
    try:
        state = {
            device: torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)
            for device, text in saved.items()
        }
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise BadInput("the checkpoint's random state is not one that torch takes; resume from another step") from error


def environment() -> dict[str, Any]:
    """Describe what ran: command line, git commit, versions and hardware, as JSON can hold it."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in ("nvfp8-nanochat", "torch", "triton", "tokenizers", "nvidia-cudnn-frontend", "transformer-engine"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or not a checkout
        commit = None
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "argv": sys.argv,
        "commit": commit,
        "versions": versions,
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "devices": devices},
    }
