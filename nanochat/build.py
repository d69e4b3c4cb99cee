"""From a shape or a checkpoint to a model on a device, and the choice of precision: what training, evaluation and sampling share."""

from typing import Any

import torch

from nanochat.checkpoint import Checkpoint
from nanochat.errors import BadInput
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer
from nvfp8.precision import Precision, bf16, fp32

PRECISIONS = ("auto", "fp32", "bf16")


def choose_precision(name: str, device_type: str) -> tuple[Precision, str]:
    """The precision a run computes in, and why in a few words.

    Args:
        name: one of PRECISIONS; "auto" takes the best this device has: bf16 on a GPU that computes in it, fp32 elsewhere.
        device_type: "cuda" or "cpu".

    Raises:
        BadInput: the device cannot run it.
    """
    native = device_type == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    if name == "auto":
        return (bf16(), "this GPU computes in bf16") if native else (fp32(), "no bf16 GPU here")
    if name == "bf16" and device_type == "cuda" and not native:
        raise BadInput(f"--precision bf16: {torch.cuda.get_device_name()} has no bf16 units; use --precision fp32")
    return {"fp32": fp32, "bf16": bf16}[name](), "asked for"


def build_model(config: GPTConfig, precision: Precision, device: torch.device, attention: str = "auto", seed: int = 42) -> GPT:
    """A model with initial weights on `device`; memory is taken once, for the parameters as they will be.

    Raises:
        BadInput: the attention backend cannot run there.
    """
    with torch.device("meta"):
        model = GPT(config, precision, attention)
    model.to_empty(device=device)
    model.init_weights(seed)
    try:
        _ = model.attention_backend
    except ValueError as error:
        raise BadInput(str(error)) from error
    return model


def load_weights(model: GPT, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into `model`, whatever precision either has.

    Raises:
        BadInput: the checkpoint is of another shape.
    """
    try:
        model.load_state_dict(checkpoint.model())
    except RuntimeError as error:
        detail = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise BadInput(f"{checkpoint.path} does not fit this model: {detail}") from error


def config_of(checkpoint: Checkpoint) -> GPTConfig:
    """The shape of the model in a checkpoint.

    Raises:
        BadInput: it records none that can be built.
    """
    fields: dict[str, Any] = checkpoint.state.get("model_config", {})
    try:
        return GPTConfig(**fields)
    except (TypeError, ValueError) as error:
        raise BadInput(f"{checkpoint.path / 'state.json'} holds no usable model_config: {error}") from error


def check_tokenizer(tokenizer: Tokenizer, checkpoint: Checkpoint) -> None:
    """Refuse a tokenizer other than the one the checkpoint was trained with.

    Raises:
        BadInput: vocabulary size or fingerprint differ.
    """
    saved = checkpoint.state.get("tokenizer", {})
    expected = saved.get("fingerprint")
    size = config_of(checkpoint).vocab_size
    if tokenizer.vocab_size != size or (expected is not None and tokenizer.fingerprint != expected):
        raise BadInput(
            f"the tokenizer ({tokenizer.vocab_size:,} entries, {tokenizer.fingerprint[:12]}) is not the one {checkpoint.path} was trained with "
            f"({size:,} entries, {str(expected)[:12]}): point --tokenizer at the right directory"
        )
