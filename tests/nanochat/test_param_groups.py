"""The group table: who is in which group, with which values; and how groups are shared out."""

from typing import Any

import pytest
import torch
from torch import nn

from nanochat.adamw import AdamW
from nanochat.gpt import GPT, GPTConfig
from nanochat.muon import Muon
from nanochat.param_groups import groups, owned, ownership, set_hyperparameters
from nvfp8.precision import fp32


class Config:
    n_embd = 192  # (192 / 768)^-½ = 2


class StandIn(nn.Module):
    """nanochat's parameter names around tensors of no consequence."""

    def __init__(self) -> None:
        super().__init__()
        attn = nn.ModuleDict({k: nn.Linear(4, 4, bias=False) for k in ("c_q", "c_k", "c_v", "c_proj", "ve_gate")})
        mlp = nn.ModuleDict({"c_fc": nn.Linear(4, 16, bias=False), "c_proj": nn.Linear(16, 4, bias=False)})
        block = nn.ModuleDict({"attn": attn, "mlp": mlp})
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(8, 4), "h": nn.ModuleList([block])})
        self.lm_head = nn.Linear(4, 8, bias=False)
        self.value_embeds = nn.ModuleDict({"0": nn.Embedding(8, 4)})
        self.smear_gate = nn.Linear(24, 1, bias=False)
        for name in ("resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda"):
            setattr(self, name, nn.Parameter(torch.ones(1)))


def table(**kwargs: Any) -> dict[str, dict[str, Any]]:
    return {g["name"]: g for g in groups(StandIn(), Config(), weight_decay=0.28, **kwargs)}


def test_the_table_of_values() -> None:
    values = {name: (g["kind"], g["lr"], g.get("betas"), g.get("eps"), g["weight_decay"]) for name, g in table().items()}
    assert values == {
        "lm_head": ("adamw", 0.016, (0.8, 0.96), 1e-10, 0.01),
        "wte": ("adamw", 0.6, (0.8, 0.995), 1e-10, 0.001),
        "value_embeds": ("adamw", 0.3, (0.8, 0.995), 1e-10, 0.01),
        "resid_lambdas": ("adamw", 0.005, (0.8, 0.95), 1e-10, 0.05),
        "x0_lambdas": ("adamw", 0.5, (0.96, 0.95), 1e-10, 0.0),
        "smear_backout": ("adamw", 0.2, (0.8, 0.95), 1e-10, 0.0),
        "matrices": ("muon", 0.02, None, None, 0.28),
    }
    assert table()["matrices"]["beta2"] == 0.9
    assert all(g["initial_lr"] == g["lr"] for g in table().values())


def test_the_batch_scales_every_rate_but_smear_and_backout() -> None:
    plain, scaled = table(), table(batch_lr_scale=2.0)
    for name, g in scaled.items():
        assert g["lr"] == g["initial_lr"] == plain[name]["lr"] * (1 if name == "smear_backout" else 2)


def test_the_table_of_names() -> None:
    names = {name: g["param_names"] for name, g in table().items()}
    block = "transformer.h.0."
    assert names == {
        "lm_head": ["lm_head.weight"],
        "wte": ["transformer.wte.weight"],
        "value_embeds": ["value_embeds.0.weight"],
        "resid_lambdas": ["resid_lambdas"],
        "x0_lambdas": ["x0_lambdas"],
        "smear_backout": ["smear_lambda", "backout_lambda", "smear_gate.weight"],
        "matrices": [
            *(f"{block}attn.{m}.weight" for m in ("c_q", "c_k", "c_v", "c_proj", "ve_gate")),
            *(f"{block}mlp.{m}.weight" for m in ("c_fc", "c_proj")),
        ],
    }
    model = StandIn()
    by_name = dict(model.named_parameters())
    for g in groups(model, Config(), weight_decay=0.0):
        assert all(p is by_name[name] for name, p in zip(g["param_names"], g["params"], strict=True))


def test_a_parameter_without_a_group_is_named() -> None:
    model = StandIn()
    model.extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="the parameter extra belongs to no optimizer group"):
        groups(model, Config(), weight_decay=0.0)


def test_hyperparameters_of_a_step() -> None:
    made = groups(StandIn(), Config(), weight_decay=0.28)
    for multiplier in (0.5, 0.25):  # of the initial rate, not of the last
        set_hyperparameters(made, lr_multiplier=multiplier, muon_momentum=0.95, muon_weight_decay=0.1)
    for g in made:
        assert g["lr"] == 0.25 * g["initial_lr"]
        if g["kind"] == "muon":
            assert (g["momentum"], g["weight_decay"]) == (0.95, 0.1)
    assert next(g for g in made if g["name"] == "lm_head")["weight_decay"] == 0.01


@pytest.mark.parametrize("world", [1, 2, 3, 50])
def test_ranks_own_every_parameter_once_and_all_groups(world: int) -> None:
    made = groups(StandIn(), Config(), weight_decay=0.28)
    owner = ownership(made, world)
    seen: list[str] = []
    for rank in range(world):
        shares = owned(made, "adamw", owner, rank), owned(made, "muon", owner, rank)
        assert [len(s) for s in shares] == [6, 1]
        for g in (*shares[0], *shares[1]):
            assert len(g["param_names"]) == len(g["params"])
            assert all(owner[name] == rank for name in g["param_names"])
            seen += g["param_names"]
        AdamW(shares[0]), Muon(shares[1], torch.float32)
    assert sorted(seen) == sorted(name for g in made for name in g["param_names"])


def test_each_kind_is_spread_evenly() -> None:
    made = groups(StandIn(), Config(), weight_decay=0.28)
    owner = ownership(made, 2)
    for kind, largest in (("adamw", 32), ("muon", 64)):
        loads = [sum(p.numel() for g in owned(made, kind, owner, rank) for p in g["params"]) for rank in range(2)]
        assert min(loads) > 0
        assert abs(loads[0] - loads[1]) <= largest


def test_the_real_model_has_a_group_for_every_parameter_and_learns() -> None:
    torch.manual_seed(0)
    config = GPTConfig(sequence_len=16, vocab_size=40, n_layer=4, n_head=2, n_kv_head=2, n_embd=32, window_pattern="SL")
    model = GPT(config, fp32())
    model.init_weights(42)
    made = groups(model, config, weight_decay=0.0)
    sizes = {g["name"]: sum(p.numel() for p in g["params"]) for g in made}
    counts = model.parameter_counts()
    assert sizes["matrices"] == counts["transformer_matrices"]
    assert (sizes["wte"], sizes["value_embeds"], sizes["lm_head"]) == (
        counts["wte"], counts["value_embeds"], counts["lm_head"]
    )  # fmt: skip
    assert sum(sizes.values()) == counts["total"]
    owner = ownership(made, 1)
    optimizers = AdamW(owned(made, "adamw", owner, 0)), Muon(owned(made, "muon", owner, 0), torch.float32)
    ids = torch.randint(40, (4, 17))
    losses = []
    for _ in range(8):
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        losses.append(loss.item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
