"""The model as a whole: names, gradients by finite differences, counts, windows, initial values, bad shapes."""

import pytest
import torch

from nanochat.generate import KVCache
from nanochat.gpt import GPT, GPTConfig
from nvfp8 import attention
from nvfp8.precision import Precision, bf16, fp32

TINY = GPTConfig(sequence_len=16, vocab_size=50, n_layer=3, n_head=2, n_kv_head=1, n_embd=32, window_pattern="SL")


def randomized(config: GPTConfig, precision: Precision) -> GPT:
    """A model in which no parameter is zero, so every path carries a gradient."""
    model = GPT(config, precision)
    model.init_weights()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def batch(config: GPTConfig, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(config.vocab_size, (rows, config.sequence_len), generator=generator)
    targets = torch.randint(-1, config.vocab_size, ids.shape, generator=generator)
    return ids, targets


def test_every_gradient_by_finite_differences() -> None:
    """In fp64, <gradient, direction> equals the slope of the loss along a random direction, for each parameter."""
    model = randomized(TINY, Precision("fp64", torch.float64)).double()
    ids, targets = batch(TINY)
    model(ids, targets, scale=0.5).backward()
    for name, parameter in model.named_parameters():
        direction = torch.randn_like(parameter)
        slope = 0.0
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * 1e-5)
                slope += sign * float(0.5 * model.token_losses(ids, targets).sum() / (targets >= 0).sum()) / 2e-5
                parameter.sub_(direction, alpha=sign * 1e-5)
        expected = float((parameter.grad * direction).sum())
        assert slope == pytest.approx(expected, rel=1e-4, abs=1e-7), name


def test_names_and_shapes_are_nanochats() -> None:
    model = GPT(TINY, fp32())
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    block = {
        "attn.c_q.weight": (32, 32), "attn.c_k.weight": (16, 32), "attn.c_v.weight": (16, 32), "attn.c_proj.weight": (32, 32),
        "mlp.c_fc.weight": (128, 32), "mlp.c_proj.weight": (32, 128),
    }  # fmt: skip
    expected = {f"transformer.h.{i}.{name}": shape for i in range(3) for name, shape in block.items()}
    expected |= {f"transformer.h.{i}.attn.ve_gate.weight": (1, 12) for i in (0, 2)}
    expected |= {f"value_embeds.{i}.weight": (64, 16) for i in (0, 2)}
    expected |= {
        "transformer.wte.weight": (64, 32), "lm_head.weight": (64, 32), "resid_lambdas": (3,), "x0_lambdas": (3,),
        "smear_gate.weight": (1, 24), "smear_lambda": (1,), "backout_lambda": (1,),
    }  # fmt: skip
    assert shapes == expected


def test_counts_do_not_depend_on_the_precision() -> None:
    models = [GPT(TINY, precision()) for precision in (fp32, bf16)]
    assert models[0].parameter_counts() == models[1].parameter_counts()
    counts = models[0].parameter_counts()
    assert counts["total"] == sum(p.numel() for p in models[0].parameters())
    assert counts["scalars"] == 3 + 3 + 24 + 1 + 1
    matmul = counts["transformer_matrices"] + counts["lm_head"] + 24
    assert models[0].flops_per_token() == 6 * matmul + 12 * 32 * 3 * 16  # every window covers 16 positions
    flops = models[0].flop_counts()
    assert flops == models[1].flop_counts()
    assert flops["total"] == sum(count for name, count in flops.items() if name != "total")
    assert flops["attention"] == 12 * 32 * 3 * 16 and flops["lm_head"] == 6 * counts["lm_head"]


def test_sizes_of_the_named_depths() -> None:
    sizes = {depth: (c.n_embd, c.n_head) for depth in (12, 20, 24, 26) for c in [GPTConfig.from_depth(depth)]}
    assert sizes == {12: (768, 6), 20: (1280, 10), 24: (1536, 12), 26: (1664, 13)}
    with torch.device("meta"):
        model = GPT(GPTConfig.from_depth(24), bf16())
    # Both numbers are what karpathy/nanochat's own code reports for d24, SSSL.
    assert model.parameter_counts()["total"] == 1_384_122_122
    assert model.flops_per_token() == 4_775_225_616


def test_windows() -> None:
    config = GPTConfig.from_depth(6, window_pattern="SSSL")
    assert [config.window(i) for i in range(6)] == [512, 512, 512, 2048, 512, 2048]
    assert GPTConfig(sequence_len=1000, n_layer=2, window_pattern="S").window(0) == 256


def test_initial_values() -> None:
    model = GPT(GPTConfig.from_depth(4, vocab_size=1000), fp32())
    model.init_weights()
    width = model.config.n_embd
    attention, mlp = model.blocks[0].attn, model.blocks[0].mlp
    bound = (3 / width) ** 0.5
    for weight, limit in ((attention.c_q.weight, bound), (attention.c_v.weight, bound), (mlp.c_fc.weight, 0.4 * bound)):
        assert 0.99 * limit < weight.abs().max() <= limit
    assert (attention.c_proj.weight == 0).all() and (mlp.c_proj.weight == 0).all()
    assert model.transformer["wte"].weight.std().item() == pytest.approx(0.8, rel=0.01)
    assert model.lm_head.weight.std().item() == pytest.approx(0.001, rel=0.01)
    torch.testing.assert_close(model.resid_lambdas.detach(), torch.linspace(1.15, 1.05, 4))
    torch.testing.assert_close(model.x0_lambdas.detach(), torch.linspace(0.20, 0.05, 4))
    assert model.smear_lambda == 0 and model.backout_lambda.item() == pytest.approx(0.2)
    other = GPT(model.config, fp32())
    other.init_weights()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_meta_construction_allocates_nothing() -> None:
    with torch.device("meta"):
        model = GPT(TINY, bf16())
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    model.init_weights()
    assert model(*batch(TINY)).isfinite()


def test_bf16_follows_fp32() -> None:
    single, half = randomized(TINY, fp32()), randomized(TINY, bf16())
    half.load_state_dict(single.state_dict())
    losses = [float(model(*batch(TINY)).detach()) for model in (single, half)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, "depth is 0"),
        ({"depth": 2, "aspect_ratio": 0}, "aspect ratio is 0"),
        ({"depth": 2, "head_dim": 3}, "odd"),
        ({"depth": 2, "window_pattern": "SXL"}, "must consist of S and L, not 'SXL'"),
        ({"depth": 2, "window_pattern": ""}, "must consist of S and L, not ''"),
        ({"depth": 1, "aspect_ratio": 8, "head_dim": 8}, "too small"),
        ({"depth": 2, "sequence_len": 0}, "sequence_len must be a positive integer, not 0"),
    ],
)
def test_impossible_shapes(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig.from_depth(**arguments)


def test_heads_must_divide() -> None:
    with pytest.raises(ValueError, match="each must be a multiple of the next: n_embd 100, n_head 3"):
        GPTConfig(n_embd=100, n_head=3, n_kv_head=3)


def test_attention_is_chosen_for_the_shape_and_says_what_it_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def why_not(backend: str, *shape: object) -> str | None:
        asked.append(shape)
        return {"fa3": "not here", "cudnn": "not for that"}.get(backend)

    monkeypatch.setattr(attention, "why_not", why_not)
    model = randomized(TINY, fp32())
    assert model.describe_attention() == "sdpa (fa3: not here; cudnn: not for that)"
    assert set(asked) == {("cpu", torch.float32, 16, 16)}
    asked.clear()
    model.logits(torch.zeros(1, 5, dtype=torch.long))
    assert set(asked) == {("cpu", torch.float32, 16, 5)}
    model.attention = "sdpa"
    assert model.describe_attention() == "sdpa"


def test_a_backend_asked_for_by_name_is_refused_for_what_it_cannot_run() -> None:
    model = randomized(TINY, fp32())
    model.attention = "cudnn"
    ids = torch.zeros(1, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="'cudnn' cannot run here"):
        model.logits(ids)
    model.logits(ids, KVCache(model, 1, 5))  # a cache attends by itself
