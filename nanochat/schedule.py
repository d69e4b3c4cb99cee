"""How long to train, with what batch, and what learning rate, momentum and weight decay at each step.

Pure functions of numbers, nanochat's rules. D is the horizon in tokens that the ratio asks for, D = ratio · N, with N
the scaling parameters (block matrices and lm_head); D_ref is the same at depth 12. Only D/D_ref = N/N_ref enters the
batch and the weight decay, so a run whose ratio is -1 has them too, given another horizon. Steps count from 0.

Each number by itself was checked by `TrainConfig`; what only shows when they meet is refused here.
"""

import math

from nanochat.errors import BadInput

REFERENCE_BATCH = 2**19  # tokens: the best batch at depth 12
_MOMENTUM_START, _MOMENTUM_PEAK, _MOMENTUM_END, _MOMENTUM_RAMP = 0.85, 0.97, 0.90, 400


def lr_multiplier(
    step: int,
    num_iterations: int,
    warmup_steps: int = 40,
    warmdown_ratio: float = 0.65,
    final_lr_frac: float = 0.05,
) -> float:
    """Return what every initial learning rate is multiplied by: linear up, constant, linear down to `final_lr_frac`."""
    warmdown = round(warmdown_ratio * num_iterations)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if step <= num_iterations - warmdown:
        return 1.0
    progress = (num_iterations - step) / warmdown
    return progress + (1 - progress) * final_lr_frac


def muon_momentum(step: int, num_iterations: int, warmdown_ratio: float = 0.65) -> float:
    """Return Muon's momentum: 0.85 to 0.97 over 400 steps, then to 0.90 through the warm-down; the ramp goes first."""
    warmdown = round(warmdown_ratio * num_iterations)
    start = num_iterations - warmdown
    if step < _MOMENTUM_RAMP:
        return _MOMENTUM_START + (_MOMENTUM_PEAK - _MOMENTUM_START) * step / _MOMENTUM_RAMP
    if step < start or warmdown == 0:
        return _MOMENTUM_PEAK
    return _MOMENTUM_PEAK + (_MOMENTUM_END - _MOMENTUM_PEAK) * (step - start) / warmdown


def muon_weight_decay(step: int, num_iterations: int, initial: float) -> float:
    """Return Muon's weight decay at `step`: a cosine from `initial` to 0."""
    return initial * 0.5 * (1 + math.cos(math.pi * step / num_iterations))


def scaled_weight_decay(weight_decay: float, batch_tokens: int, scaling_params: int, reference_params: int) -> float:
    """Return weight_decay · √(B/B_ref) · D_ref/D, which keeps the averaging time B/(lr·wd·D) (arXiv 2405.13698)."""
    return weight_decay * math.sqrt(batch_tokens / REFERENCE_BATCH) * reference_params / scaling_params


def batch_lr_scale(batch_tokens: int) -> float:
    """Return √(B/B_ref), the factor of learning rates."""
    return math.sqrt(batch_tokens / REFERENCE_BATCH)


def batch_tokens(scaling_params: int, reference_params: int) -> int:
    """Return B_ref·(D/D_ref)^0.383 to the nearest power of two, the batch in tokens (arXiv 2505.13738)."""
    return 1 << round(math.log2(REFERENCE_BATCH * (scaling_params / reference_params) ** 0.383))


def accumulation_steps(batch_tokens: int, device_batch_size: int, sequence_len: int, world: int) -> int:
    """Return how many micro-batches make a batch.

    Args:
        batch_tokens: of one optimizer step, all processes together.
        device_batch_size: rows of one micro-batch on one process.
        sequence_len: tokens of a row.
        world: processes.

    Raises:
        BadInput: a batch below 1, or no whole number of micro-batches; the message names the nearest.
    """
    if batch_tokens < 1:
        raise BadInput(f"--total-batch-size must be 1 or more tokens, or -1 to have it chosen; not {batch_tokens}")
    micro = device_batch_size * sequence_len * world
    if batch_tokens % micro:
        nearest = max(1, math.floor(batch_tokens / micro + 0.5)) * micro
        each = f"{device_batch_size} rows x {sequence_len} tokens" + (f" x {world} processes" if world > 1 else "")
        raise BadInput(
            f"a batch of {batch_tokens:,} tokens is no whole number of micro-batches of {micro:,} ({each}); "
            f"the nearest is --total-batch-size {nearest}, or change --device-batch-size"
        )
    return batch_tokens // micro


def horizon(
    *,
    num_iterations: int,
    target_flops: float,
    ratio: float,
    scaling_params: int,
    flops_per_token: int,
    batch_tokens: int,
) -> int:
    """Return the number of optimizer steps: `num_iterations` if positive, else by FLOPs, else by tokens a parameter.

    Args:
        num_iterations: steps, or -1.
        target_flops: of the whole run, or -1.
        ratio: tokens per scaling parameter, or -1.
        scaling_params: parameters of the block matrices and lm_head.
        flops_per_token: of one training step, forward and backward.
        batch_tokens: tokens of one step.

    Raises:
        BadInput: nothing sets the horizon, or it is shorter than one step.
    """
    if num_iterations > 0:
        return num_iterations
    if target_flops > 0:
        if not math.isfinite(target_flops):
            raise BadInput(f"--target-flops must be a finite number, not {target_flops}")
        steps = round(target_flops / (flops_per_token * batch_tokens))
        asked, needed = "--target-flops", f"{flops_per_token * batch_tokens:.3g} FLOPs"
    elif ratio > 0:
        if not math.isfinite(ratio):
            raise BadInput(f"--target-param-data-ratio must be a finite number, not {ratio}")
        steps = int(ratio * scaling_params) // batch_tokens
        asked, needed = "--target-param-data-ratio", f"a ratio of {batch_tokens / scaling_params:.3g}"
    else:
        raise BadInput(
            "nothing says how long to train; give one of --num-iterations, --target-flops, --target-param-data-ratio "
            "a positive value"
        )
    if steps < 1:
        raise BadInput(
            f"{asked} asks for less than one step of {batch_tokens:,} tokens, which takes {needed}; "
            f"raise it, lower --total-batch-size, or give --num-iterations"
        )
    return steps
