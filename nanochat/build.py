"""From a shape or a checkpoint to a model on a device, the choice of precision, and the optimizers.

Training, evaluation, sampling and the benchmarks share it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from nanochat import checkpoint, parallel
from nanochat.adamw import AdamW
from nanochat.checkpoint import Checkpoint
from nanochat.dataset import base_dir
from nanochat.errors import BadInput
from nanochat.gpt import GPT, GPTConfig
from nanochat.muon import Muon
from nanochat.optimizer import NamedOptimizer
from nanochat.param_groups import owned
from nanochat.state_formats import NANOCHAT, StateFormats
from nanochat.te_adam import TEAdam
from nanochat.tokenizer import Tokenizer
from nvfp8 import te
from nvfp8.hardware import best_recipe, missing
from nvfp8.precision import Precision, bf16, fp8, fp32
from nvfp8.precision import te as te_precision
from nvfp8.recipe import parse_recipe

PRECISIONS = ("auto", "te", "fp8", "fp8-emulated", "bf16", "fp32")


@dataclass(frozen=True)
class EngineOptions:
    """What `--precision te` can be told, and of it the recipe `--precision fp8`; `base_train --help` says what each means.

    Attributes:
        recipe: "auto", a name of `nvfp8.recipe.RECIPES`, or one with changes: "delayed:margin=1,bf16=h.0+h.*.mlp.c_fc:wgrad".
        layers: "fused" or "separate".
        head: "chunked", "te", or "auto": "te", which is faster, where weights are bf16, as it needs them.
        weights: "bf16" or "fp8".
        norm_weight: whether norms have learnable scales.
        recompute_mlp: whether own FP8 layers make relu² again in backward.
    """

    recipe: str = "auto"
    layers: Literal["fused", "separate"] = "fused"
    head: Literal["auto", "chunked", "te"] = "auto"
    weights: Literal["bf16", "fp8"] = "bf16"
    norm_weight: bool = False
    recompute_mlp: bool = False


def choose_precision(
    name: str, device_type: str, options: EngineOptions | None = None, shape: tuple[int, int] | None = None
) -> tuple[Precision, str]:
    """The precision a run computes in, and why in a few words.

    Args:
        name: one of PRECISIONS; "auto" takes the first that this device and `options` allow: our own FP8 layers, Transformer
            Engine (both only where `options` are given: it trains; evaluation is bf16 anyway), bf16 on a GPU that computes in
            it, fp32.
        device_type: "cuda" or "cpu".
        options: for FP8.
        shape: tokens of a micro-batch and width, which "auto" respects; None where nothing is trained.

    Raises:
        BadInput: the device cannot run it, or an option is not one, or what is chosen does not follow it.
    """
    native = device_type == "cuda" and missing("bf16", torch.cuda.get_device_capability()) is None
    if name == "te":
        chosen = _transformer_engine(device_type, options or EngineOptions())
        if isinstance(chosen, str):
            raise BadInput(f"--precision te: {chosen}, or --precision bf16")
        return chosen, "asked for"
    if name in ("fp8", "fp8-emulated"):
        return _own_fp8(name, device_type, options or EngineOptions()), "asked for"
    if name == "auto":
        return _best(device_type, options, shape, native)
    if options not in (None, EngineOptions()):
        raise BadInput(_for_fp8(options, f"not with {name}"))
    if name == "bf16" and device_type == "cuda" and not native:
        raise BadInput(f"--precision bf16: {torch.cuda.get_device_name()} has no bf16 units; use --precision fp32")
    return {"fp32": fp32, "bf16": bf16}[name](), "asked for"


def _best(device_type: str, options: EngineOptions | None, shape: tuple[int, int] | None, native: bool) -> tuple[Precision, str]:
    """What "auto" takes, and why; arguments as in `choose_precision`, `native` where the GPU computes in bf16."""
    plain, why = (bf16(), "this GPU computes in bf16") if native else (fp32(), "no bf16 GPU here")
    if options is None or (device_type != "cuda" and options == EngineOptions()):
        return plain, why
    no_fp8 = missing("fp8", torch.cuda.get_device_capability()) if device_type == "cuda" else "it needs a CUDA device"
    refusals = [no_fp8] if no_fp8 else []
    for name, whose in () if no_fp8 else (("fp8", "our own layers"), ("te", "Transformer Engine")):
        try:
            chosen, _ = choose_precision(name, device_type, options)
        except BadInput as error:
            refusals.append(str(error))
            continue
        refusal = chosen.refuses(*shape) if shape else None
        if refusal is None:
            return chosen, f"this GPU computes in FP8, by {whose}" + "".join(f"; {reason}" for reason in refusals)
        refusals.append(f"--precision {name}: {refusal}")
    if options != EngineOptions():
        raise BadInput(_for_fp8(options, f"and auto can take neither: {'; '.join(refusals)}"))
    return plain, f"{why}; no FP8: {'; '.join(refusals)}"


def _for_fp8(options: EngineOptions, why_not: str) -> str:
    """What to say where options that only FP8 layers follow cannot be followed."""
    if options.recompute_mlp:
        return f"--recompute-mlp goes with --precision fp8 or fp8-emulated, {why_not}"
    if options == EngineOptions(options.recipe):
        return f"--recipe goes with --precision te, fp8 or fp8-emulated, {why_not}"
    return f"the --te flags and --norm-weight go with --precision te, {why_not}"


def _own_fp8(name: str, device_type: str, options: EngineOptions) -> Precision:
    if options != EngineOptions(options.recipe, recompute_mlp=options.recompute_mlp):
        raise BadInput(f"the --te flags and --norm-weight go with --precision te, not with {name}")
    if name == "fp8":
        capability = torch.cuda.get_device_capability() if device_type == "cuda" else None
        reason = "it needs a CUDA device" if capability is None else missing("fp8", capability)
        if reason is not None:
            raise BadInput(f"--precision fp8: {reason}; --precision fp8-emulated has the same numerics anywhere")
    try:
        asked = parse_recipe("delayed" if options.recipe == "auto" else options.recipe)
        chosen = fp8(asked, emulated=name == "fp8-emulated", recompute=options.recompute_mlp)
    except ValueError as error:
        raise BadInput(f"--precision {name}: {error}") from error
    for feature in chosen.recipe.features if name == "fp8" else ():
        reason = missing(feature, torch.cuda.get_device_capability())
        if reason is not None:
            raise BadInput(f"--precision fp8: recipe {chosen.recipe.name}: {reason}; use --recipe delayed")
    return chosen


def _transformer_engine(device_type: str, options: EngineOptions) -> Precision | str:
    """Return the precision, or why it cannot be had here, with what to do instead."""
    if options.recompute_mlp:
        raise BadInput(_for_fp8(options, "not with te"))
    try:
        chosen = parse_recipe("delayed" if options.recipe == "auto" else options.recipe)
        reason = "it needs a CUDA device" if device_type != "cuda" else te.unavailable()
        if reason is not None:
            return reason
        best = parse_recipe(best_recipe(torch.cuda.get_device_capability()))
        if options.recipe == "auto":
            chosen = best
        reason = te.unsupported(chosen)
        if reason is not None:
            usable = best != chosen and te.unsupported(best) is None
            return f"recipe {chosen.name}: {reason}" + (f"; use --recipe {best.name} here" if usable else "")
        te_head = options.head == "te" or (options.head == "auto" and options.weights == "bf16")
        return te_precision(
            chosen, layers=options.layers, te_head=te_head, weights=options.weights, norm_weight=options.norm_weight
        )
    except ValueError as error:
        raise BadInput(str(error)) from error


def build_model(config: GPTConfig, precision: Precision, device: torch.device, attention: str = "auto", seed: int = 42) -> GPT:
    """A model with initial weights on `device`; memory is taken once, for the parameters as they will be.

    Raises:
        BadInput: the attention backend cannot run there, or the recipe names a layer that the model has not.
    """
    try:
        with torch.device("meta"):
            model = GPT(config, precision, attention)
        model.to_empty(device=device)
        model.init_weights(seed)
        _ = model.attention_backend
    except ValueError as error:
        raise BadInput(str(error)) from error
    return model


def build_optimizers(
    groups: list[dict[str, Any]], owner: Mapping[str, int], rank: int, compute_dtype: torch.dtype, adamw: str = "own",
    formats: StateFormats = NANOCHAT, seed: int = 0,
) -> tuple[NamedOptimizer, Muon]:  # fmt: skip
    """AdamW and Muon over what `rank` owns.

    Args:
        groups: of `param_groups.groups`.
        owner: of `param_groups.ownership`.
        rank: of this process.
        compute_dtype: of Muon's polar step.
        adamw: one of `te_adam.CHOICES`.
        formats: how state and weights are stored; `formats.stored_by` has said that they can be.
        seed: of stochastic rounding.
    """
    mine = {kind: owned(groups, kind, owner, rank) for kind in ("adamw", "muon")}
    master = formats.master or "fp32"
    first: NamedOptimizer
    if adamw == "own":
        first = AdamW(mine["adamw"], exp_avg=formats.exp_avg, exp_avg_sq=formats.exp_avg_sq, master=master, seed=seed)
    else:
        first = TEAdam(mine["adamw"], adamw)
    return first, Muon(mine["muon"], compute_dtype, state=formats.momentum or "fp32", master=master, seed=seed)


def load_weights(model: GPT, saved: Checkpoint) -> None:
    """Copy a checkpoint's weights into `model`, whatever precision either has.

    Raises:
        BadInput: the checkpoint is of another shape.
    """
    try:
        model.load_state_dict(saved.model())
    except RuntimeError as error:
        detail = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise BadInput(f"{saved.path} does not fit this model: {detail}") from error


def load_model(
    tag: str, step: int | None, device: torch.device, precision: str = "auto", attention: str = "auto"
) -> tuple[GPT, Checkpoint]:
    """The model of a run's checkpoint, ready to evaluate or sample.

    Args:
        tag: name of the run below <base>/base_checkpoints, or the path of a directory of checkpoints.
        step: which checkpoint; None takes the newest good one.
        device: where the model goes.
        precision: one of PRECISIONS.
        attention: attention backend.

    Raises:
        BadInput: there is no such checkpoint, or it cannot run here.
    """
    directory = base_dir() / "base_checkpoints" / tag
    directory = directory if directory.is_dir() or not Path(tag).is_dir() else Path(tag)
    saved = Checkpoint(Path(parallel.from_rank_0(lambda: str(checkpoint.find(directory, step).path))))  # read whole, once
    options = None
    if saved.state.get("train_config", {}).get("norm_weight", False):
        if precision not in ("auto", "te"):
            raise BadInput(f"{saved.path} was trained with --norm-weight, which only --precision te computes")
        precision, options = "te", EngineOptions(norm_weight=True)
    model = build_model(config_of(saved), choose_precision(precision, device.type, options)[0], device, attention)
    load_weights(model, saved)
    return model, saved


def config_of(saved: Checkpoint) -> GPTConfig:
    """The shape of the model in a checkpoint.

    Raises:
        BadInput: it records none that can be built.
    """
    fields: dict[str, Any] = saved.state.get("model_config", {})
    try:
        return GPTConfig(**fields)
    except (TypeError, ValueError) as error:
        raise BadInput(f"{saved.path / 'state.json'} holds no usable model_config: {error}") from error


def check_tokenizer(tokenizer: Tokenizer, saved: Checkpoint) -> None:
    """Refuse a tokenizer other than the one the checkpoint was trained with.

    Raises:
        BadInput: vocabulary size or fingerprint differ.
    """
    expected = saved.state.get("tokenizer", {}).get("fingerprint")  # an imported model has none
    size = config_of(saved).vocab_size
    if tokenizer.vocab_size != size or expected not in (None, tokenizer.fingerprint):
        raise BadInput(
            f"the tokenizer ({tokenizer.vocab_size:,} entries, {tokenizer.fingerprint[:12]}) is not the one that "
            f"{saved.path} was trained with ({size:,} entries, {str(expected)[:12]}): point --tokenizer at that one"
        )
