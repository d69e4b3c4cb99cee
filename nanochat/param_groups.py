"""Which optimizer and which hyperparameters each parameter gets: nanochat's table, and nothing else.

AdamW's rates for tables and the head follow 1/√width (tuned at 768), and all rates but those of the smear/backout group
follow √batch (the caller gives that factor, `schedule.batch_lr_scale`). Muon's own factor √max(1, rows/cols) depends on
the shape of a matrix, so it is Muon's business. With several processes each matrix and table belongs to one of them:
`ownership` decides, `owned` cuts the groups down to one process's share.
"""

import sys
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import nn

from nanochat.parallel import owners

_EPS = 1e-10
_TABLES = ("wte", "value_embeds")  # bf16 with bf16 moments, nanochat's choice: they are their own masters


class _Config(Protocol):
    @property
    def n_embd(self) -> int: ...


def _group_of(name: str) -> str | None:
    """Return the group that the parameter called `name` belongs to; None if the table has no row for it."""
    if name.endswith("norm_weight"):
        return "norm_weights"
    if name.startswith("transformer.h."):
        return "matrices"
    if name.startswith("value_embeds."):
        return "value_embeds"
    return {
        "lm_head.weight": "lm_head",
        "transformer.wte.weight": "wte",
        "resid_lambdas": "resid_lambdas",
        "x0_lambdas": "x0_lambdas",
        "smear_gate.weight": "smear_backout",
        "smear_lambda": "smear_backout",
        "backout_lambda": "smear_backout",
    }.get(name)


def groups(
    model: nn.Module,
    config: _Config,
    *,
    embedding_lr: float = 0.3,
    unembedding_lr: float = 0.008,
    matrix_lr: float = 0.02,
    scalar_lr: float = 0.5,
    weight_decay: float,
    batch_lr_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """Return the parameter groups: name, kind ("adamw" or "muon"), params, param_names, lr, initial_lr and the kind's own.

    Args:
        model: with nanochat's parameter names.
        config: its `n_embd` gives AdamW's factor (n_embd / 768)^-½.
        embedding_lr: of `wte`; value embeddings take half of it.
        unembedding_lr: of `lm_head`.
        matrix_lr: of every matrix in `transformer.h`.
        scalar_lr: of `x0_lambdas`; `resid_lambdas` take a hundredth of it, and so do learnable norm scales, which are ours.
        weight_decay: Muon's, already scaled to batch and horizon (`schedule.scaled_weight_decay`).
        batch_lr_scale: √(B / 2^19), on every rate but that of smear and backout.

    Raises:
        ValueError: a parameter fits no group; the message names it.
    """
    width = (config.n_embd / 768) ** -0.5
    scale = batch_lr_scale
    # name: lr, betas, weight decay
    adamw: dict[str, tuple[float, tuple[float, float], float]] = {
        "lm_head": (unembedding_lr * width * scale, (0.8, 0.96), 0.01),
        "wte": (embedding_lr * width * scale, (0.8, 0.995), 0.001),
        "value_embeds": (0.5 * embedding_lr * width * scale, (0.8, 0.995), 0.01),
        "resid_lambdas": (0.01 * scalar_lr * scale, (0.8, 0.95), 0.05),
        "x0_lambdas": (scalar_lr * scale, (0.96, 0.95), 0.0),
        "smear_backout": (0.2, (0.8, 0.95), 0.0),
        "norm_weights": (0.01 * scalar_lr * scale, (0.8, 0.95), 0.0),
    }
    result: dict[str, dict[str, Any]] = {
        name: {"kind": "adamw", "lr": lr, "betas": betas, "eps": _EPS, "weight_decay": decay, "master": name not in _TABLES}
        for name, (lr, betas, decay) in adamw.items()
    }
    result["matrices"] = {
        "kind": "muon", "lr": matrix_lr * scale, "momentum": 0.85, "beta2": 0.9, "weight_decay": weight_decay
    }  # fmt: skip
    for name, group in result.items():
        group.update(name=name, params=[], param_names=[], initial_lr=group["lr"])
    for name, parameter in model.named_parameters():
        key = _group_of(name)
        if key is None:
            raise ValueError(f"the parameter {name} belongs to no optimizer group")
        result[key]["params"].append(parameter)
        result[key]["param_names"].append(name)
    if not result["norm_weights"]["params"]:  # only Transformer Engine's norms have any, and only where asked for
        del result["norm_weights"]
    return list(result.values())


def backward_position(name: str) -> int:
    """Where backward reaches a parameter: head, blocks from last to first (MLP, attention), then what feeds the first."""
    if name.startswith("lm_head."):
        return -sys.maxsize
    if name.startswith("transformer.h."):
        return -2 * int(name.split(".")[2]) - (".mlp." in name)
    return -sys.maxsize + 1 if name.startswith("ln_f.") else 1


def set_hyperparameters(
    groups: Iterable[dict[str, Any]], *, lr_multiplier: float, muon_momentum: float, muon_weight_decay: float
) -> None:
    """Set this step's values in the groups an optimizer holds (`optimizer.param_groups`); AdamW's decay is constant."""
    for group in groups:
        group["lr"] = group["initial_lr"] * lr_multiplier
        if group["kind"] == "muon":
            group.update(momentum=muon_momentum, weight_decay=muon_weight_decay)


def ownership(groups: Iterable[dict[str, Any]], world: int) -> dict[str, int]:
    """Return the owning rank of every parameter by name, each optimizer's elements spread evenly.

    The two kinds are spread apart from each other: a Muon matrix costs far more time an element than an AdamW table.
    """
    sizes: dict[str, dict[str, int]] = {}
    for group in groups:
        by_name = {name: p.numel() for name, p in zip(group["param_names"], group["params"], strict=True)}
        sizes.setdefault(group["kind"], {}).update(by_name)
    return {name: rank for of_kind in sizes.values() for name, rank in owners(of_kind, world).items()}


def owned(groups: Iterable[dict[str, Any]], kind: str, owner: Mapping[str, int], rank: int) -> list[dict[str, Any]]:
    """Return copies of the groups of one `kind`, holding only the parameters of `rank`; a group may come out empty."""
    result = []
    for group in groups:
        if group["kind"] == kind:
            mine = [i for i, name in enumerate(group["param_names"]) if owner[name] == rank]
            result.append({**group, **{key: [group[key][i] for i in mine] for key in ("params", "param_names")}})
    return result
