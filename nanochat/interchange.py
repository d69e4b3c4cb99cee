"""karpathy/nanochat's checkpoint files, read and written, so that a model trained by one program runs in the other.

nanochat keeps, under `base_checkpoints/d{depth}/`, `model_{step:06d}.pt` (a pickled state_dict) and
`meta_{step:06d}.json` with the model's configuration. Our parameter names are its names, so what remains is care: the
pickle is read with `weights_only`, which builds tensors and nothing else; its zip checksums are compared, because
`torch.load` does not and takes a flipped bit for a weight; every name and shape is held against the configuration
before a model is built; and what older versions did not save gets the value that those versions computed with.
Optimizer state (`optim_*.pt`) is not exchanged: its layout follows each optimizer's grouping.
"""

import json
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from errno import EINVAL
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat import durable
from nanochat.errors import BadInput
from nanochat.gpt import GPT, GPTConfig
from nvfp8.precision import fp32

EMBEDDINGS = ("transformer.wte.", "value_embeds.")
MODEL_NAME = re.compile(r"model_(\d{6,})\.pt")


def parameter_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor in nanochat's state_dict: those of our model, whatever its precision."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in GPT(config, fp32()).state_dict().items()}


def _listed(names: Iterable[str]) -> str:
    """Join the first few names."""
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _check_config(config: object, source: Path) -> GPTConfig:
    """Return the configuration with defaults of old versions filled in, or raise BadInput."""
    if not isinstance(config, dict):
        raise BadInput(f"{source} has no model_config: it is not the metadata of a nanochat checkpoint")
    # Models from before window patterns attended to everything.
    config = {**config, "window_pattern": config.get("window_pattern", "L")}
    names = {field.name for field in fields(GPTConfig)}
    if missing := names - config.keys():
        raise BadInput(f"model_config in {source} lacks {_listed(missing)}")
    if unknown := config.keys() - names:
        raise BadInput(f"model_config in {source} has fields this program does not know: {_listed(unknown)}")
    try:
        return GPTConfig(**config)
    except ValueError as error:
        raise BadInput(f"model_config in {source}: {error}") from error


def _check_tensors(tensors: Mapping[str, Tensor], config: GPTConfig, source: object) -> None:
    """Hold names, shapes and dtypes against the configuration."""
    shapes = parameter_shapes(config)
    if missing := shapes.keys() - tensors.keys():
        raise BadInput(f"{source} lacks {_listed(missing)}: not a model of this configuration or version")
    if extra := tensors.keys() - shapes.keys():
        raise BadInput(f"{source} has tensors this model does not: {_listed(extra)}")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise BadInput(f"{name} in {source} has shape {tuple(tensors[name].shape)}; model_config asks for {shape}")
        if not tensors[name].is_floating_point():
            raise BadInput(f"{name} in {source} is {tensors[name].dtype}, not floating point")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a state_dict, memory-mapped, after comparing its checksums."""
    damaged = f"{path} is truncated or damaged; copy it again"
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        if bad is not None:
            raise BadInput(f"{damaged} ({bad} does not match its checksum)")
    except OSError as error:
        wrong_offset = error.errno == EINVAL  # a damaged directory sent the reader before the start
        raise BadInput(damaged if wrong_offset else f"{path} cannot be read: {error.strerror}") from error
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, ValueError) as error:  # all from damaged headers
        raise BadInput(f"{damaged} (or is not a file of torch.save)") from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise BadInput(f"{path} holds more than tensors; only a plain state_dict is read") from error
    except (RuntimeError, KeyError, ValueError) as error:  # a whole zip file of something else
        raise BadInput(f"{path} is damaged or not a file of torch.save") from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise BadInput(f"{path} is not a state_dict: names and tensors")
    return {str(name).removeprefix("_orig_mod."): tensor for name, tensor in loaded.items()}


def nanochat_steps(directory: Path) -> list[int]:
    """List the steps that have a `model_*.pt` in `directory`, lowest first."""
    if not directory.is_dir():
        return []
    return sorted(int(match[1]) for path in directory.iterdir() if (match := MODEL_NAME.fullmatch(path.name)))


def import_model(directory: Path, step: int | None = None) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Read the model that nanochat saved at `step`, or at the last one.

    Args:
        directory: holds `model_{step:06d}.pt` and `meta_{step:06d}.json`.
        step: None for the highest there is.

    Returns:
        GPTConfig's fields; the state_dict, dtypes as they are in the file (matrices fp32, embeddings usually bf16),
        memory-mapped; and nanochat's metadata, its "step" that of the file.

    Raises:
        BadInput: nothing there, no such step, or a file that is missing, damaged or not of this architecture.
    """
    present = nanochat_steps(directory)
    if not directory.is_dir():
        raise BadInput(f"no nanochat checkpoint: {directory} is not a directory")
    if not present:
        inside = _listed(path.name for path in directory.iterdir() if nanochat_steps(path))
        hint = f"; did you mean {inside} in it?" if inside else ""
        raise BadInput(f"no nanochat checkpoint (model_000100.pt or the like) in {directory}{hint}")
    step = present[-1] if step is None else step
    if step not in present:
        raise BadInput(f"{directory} has no model of step {step}; it has {', '.join(map(str, present))}")

    meta_path = directory / f"meta_{step:06d}.json"
    try:
        meta = json.loads(meta_path.read_bytes())
    except OSError as error:
        raise BadInput(f"{meta_path}, which belongs to the model, cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BadInput(f"{meta_path} is not JSON: truncated or damaged; copy it again ({error})") from error
    config = _check_config(meta.get("model_config") if isinstance(meta, dict) else None, meta_path)

    model_path = directory / f"model_{step:06d}.pt"
    tensors = _read_tensors(model_path)
    # Models from before these scalars computed as if they were one and zero.
    tensors.setdefault("resid_lambdas", torch.ones(config.n_layer))
    tensors.setdefault("x0_lambdas", torch.zeros(config.n_layer))
    _check_tensors(tensors, config, model_path)
    return asdict(config), tensors, {**meta, "step": step}


def export_model(
    directory: Path, step: int, model: Mapping[str, Tensor], config: Mapping[str, Any], meta: Mapping[str, Any]
) -> Path:
    """Write a model as nanochat saves it; its `build_model` loads the result.

    Args:
        directory: made if absent; must not have a model of this step.
        step: goes into the names and the metadata.
        model: the state_dict, on any device. Written as fp32, except embeddings that are bf16, which stay so.
        config: GPTConfig's fields.
        meta: what else goes into the metadata, as JSON can hold it.

    Returns:
        The path of the `.pt` file.

    Raises:
        BadInput: the model does not fit `config`, the step is there already, or the disk is full; then nothing is left.
    """
    shape = _check_config(dict(config), directory)
    _check_tensors(model, shape, "the model")
    model_path, meta_path = directory / f"model_{step:06d}.pt", directory / f"meta_{step:06d}.json"
    if model_path.exists() or meta_path.exists():
        raise BadInput(f"{directory} has a model of step {step} already; choose another directory")
    tensors = {}
    for name, tensor in model.items():
        keeps = name.startswith(EMBEDDINGS) and tensor.dtype == torch.bfloat16
        tensor = tensor.detach().to("cpu", tensor.dtype if keeps else torch.float32).contiguous()
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        tensors[name] = tensor if whole else tensor.clone()  # torch.save writes the storage behind a view, all of it
    text = json.dumps({**meta, "step": step, "model_config": asdict(shape)}, indent=2).encode()

    model_tmp, meta_tmp = model_path.with_suffix(".tmp"), meta_path.with_suffix(".tmp")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        durable.write(meta_tmp, [text])
        with open(model_tmp, "wb") as file:
            torch.save(tensors, file)
            file.flush()
            os.fsync(file.fileno())
        # The model last: nanochat takes a `model_*.pt` for a checkpoint.
        os.rename(meta_tmp, meta_path)
        os.rename(model_tmp, model_path)
        durable.sync(directory)
    except (OSError, RuntimeError) as error:
        # torch.save turns the file's OSError into a RuntimeError about positions.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        for path in (model_tmp, meta_tmp, meta_path):
            with suppress(OSError):
                path.unlink()
        raise BadInput(f"model of step {step} not written to {directory}: {cause.strerror or cause}") from error
    return model_path
