"""How long and with what batch a run trains: nanochat's scaling rules applied to a model's shape."""

from dataclasses import dataclass

import torch

from nanochat import schedule
from nanochat.errors import BadInput
from nanochat.gpt import GPT, GPTConfig
from nanochat.train_config import TrainConfig
from nvfp8.precision import fp32

# Hyperparameters were tuned at this depth; batch and weight decay are scaled from it.
REFERENCE_DEPTH = 12


@dataclass(frozen=True)
class Plan:
    """What follows from flags and shape.

    Attributes:
        steps: optimizer steps of the whole run.
        batch_tokens: tokens of one step, all ranks together.
        accumulation: micro-batches of one step on each rank.
        weight_decay: Muon's, scaled, before its schedule.
    """

    steps: int
    batch_tokens: int
    accumulation: int
    weight_decay: float

    def describe(self, config: TrainConfig, ranks: int) -> str:
        """What a run says of it at its start."""
        batch = f"{self.accumulation} x {config.device_batch_size} rows x {config.max_seq_len} tokens x {ranks} ranks"
        return f"{self.steps:,} steps of {self.batch_tokens:,} tokens ({batch}), Muon's weight decay {self.weight_decay:.4g}"


def _scaling_parameters(model: GPT) -> int:
    counts = model.parameter_counts()
    return counts["transformer_matrices"] + counts["lm_head"]


def make_plan(config: TrainConfig, model: GPT, world: int) -> Plan:
    """Plan a run of `model` on `world` ranks.

    Raises:
        BadInput: nothing sets the horizon, or micro-batches do not divide the batch or suit the precision.
    """
    try:
        shape = GPTConfig.from_depth(
            REFERENCE_DEPTH, aspect_ratio=config.aspect_ratio, head_dim=config.head_dim, sequence_len=config.max_seq_len,
            vocab_size=model.config.vocab_size, window_pattern=config.window_pattern,
        )  # fmt: skip
    except ValueError as error:
        raise BadInput(f"the scaling rules' reference of depth {REFERENCE_DEPTH} cannot be built: {error}") from error
    with torch.device("meta"):
        reference = _scaling_parameters(GPT(shape, fp32()))
    refusal = model.precision.refuses(config.device_batch_size * config.max_seq_len, model.config.n_embd)
    if refusal is not None:
        raise BadInput(f"{refusal}: change --device-batch-size, --max-seq-len or the width, or use --precision bf16")
    scaling = _scaling_parameters(model)
    batch = config.total_batch_size if config.total_batch_size != -1 else schedule.batch_tokens(scaling, reference)
    accumulation = schedule.accumulation_steps(batch, config.device_batch_size, config.max_seq_len, world)
    steps = schedule.horizon(
        num_iterations=config.num_iterations, target_flops=config.target_flops, ratio=config.target_param_data_ratio,
        scaling_params=scaling, flops_per_token=model.flops_per_token(), batch_tokens=batch,
    )  # fmt: skip
    return Plan(steps, batch, accumulation, schedule.scaled_weight_decay(config.weight_decay, batch, scaling, reference))
