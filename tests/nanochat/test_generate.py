"""Decoding with a cache gives the logits of the whole forward, and sampling obeys its arguments.

In fp32 both agree to fp32's rounding. In bf16 they round in different places, so both are held against the fp32 forward of the
same weights: neither may err by more than bf16's rounding explains, and the cache not notably more than the whole forward.
"""

import pytest
import torch
from torch import Tensor

from nanochat.build import build_model
from nanochat.generate import KVCache, continuations, generate, room
from nanochat.gpt import GPT, GPTConfig
from nvfp8.precision import Precision, bf16, fp32

CONFIG = GPTConfig(sequence_len=300, vocab_size=50, n_layer=4, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SL")
# A value is rounded about 15 times in a block (norms, rotary, GEMM operands and results, residual sums), each time by at most
# 2⁻⁹ of itself; roundings are independent, so their squares add up.
BF16_ERROR = 2**-9 * (15 * CONFIG.n_layer) ** 0.5
CASES = [
    ("cpu", fp32()),
    ("cpu", bf16()),
    pytest.param(("cuda", fp32()), marks=pytest.mark.gpu),
    pytest.param(("cuda", bf16()), marks=pytest.mark.gpu),
]


def randomized(device: str, precision: Precision) -> GPT:
    model = build_model(CONFIG, precision, torch.device(device))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            parameter.add_(0.1 * noise.to(device))
    return model


def in_fp32(model: GPT) -> GPT:
    """The same weights in fp32: what a rounding of bf16 is measured against."""
    exact = build_model(CONFIG, fp32(), model.cos.device)
    exact.load_state_dict(model.state_dict())
    return exact


def relative(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm())


@pytest.fixture(scope="module")
def model() -> GPT:
    return randomized("cpu", fp32())


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1].name}")
def any_model(request: pytest.FixtureRequest) -> GPT:
    return randomized(*request.param)


@pytest.mark.parametrize("pieces", [[300], [1] * 20, [7, 1, 1, 200, 1, 30], [160, *[1] * 30]])
def test_cached_logits_equal_the_full_forward(any_model: GPT, pieces: list[int]) -> None:
    """Windows of 128 are crossed, prefill comes in pieces, smear reaches over the seams."""
    ids = torch.randint(50, (2, sum(pieces)), generator=torch.Generator().manual_seed(1)).to(any_model.cos.device)
    cache = KVCache(any_model, 2, sum(pieces))
    cached = torch.cat([any_model.logits(part, cache) for part in ids.split(pieces, 1)], 1)
    full = any_model.logits(ids)
    if any_model.precision.name == "fp32":
        torch.testing.assert_close(cached, full, rtol=1e-5, atol=2e-5)
    else:
        truth = in_fp32(any_model).logits(ids)
        assert relative(full, truth) < BF16_ERROR
        assert relative(cached, truth) < 1.25 * relative(full, truth)


def test_greedy_generation_is_the_argmax_of_the_full_forward(any_model: GPT) -> None:
    """In bf16, of logits closer than the error of both together (six standard deviations) either may win."""
    text = [3, 1, 4]
    for token in list(generate(any_model, text, 12, temperature=0)):
        logits = any_model.logits(torch.tensor([text], device=any_model.cos.device))[0, -1]
        close = 0.0 if any_model.precision.name == "fp32" else 6 * 2**0.5 * BF16_ERROR * float(logits.square().mean().sqrt())
        assert logits[token] >= logits.max() - close
        text.append(token)
    assert len(text) == 15


def test_sampling_is_seeded_and_top_k_one_is_greedy(model: GPT) -> None:
    first, again, other = (list(generate(model, [1], 20, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert list(generate(model, [1], 20, top_k=1)) == list(generate(model, [1], 20, temperature=0))


def test_a_full_context_ends_the_text(model: GPT) -> None:
    assert room(model, [1] * 295) == 5
    assert len(list(generate(model, [1] * 295, 50, temperature=0))) == 5
    assert len(list(generate(model, [1] * 299, 50, temperature=0))) == 1


@pytest.mark.parametrize("length", [0, 300, 500])
def test_a_prompt_that_does_not_fit_is_refused_not_cut(model: GPT, length: int) -> None:
    with pytest.raises(ValueError, match=f"{length} tokens, it must have 1 to 299: the context holds 300"):
        next(generate(model, [1] * length, 5))


def test_a_run_whose_context_is_too_short_for_a_prompt_says_so(model: GPT) -> None:
    class Letters:
        bos_id = 0

        def encode(self, text: str, bos: bool) -> list[int]:
            return [1] * len(text)

        def decode(self, ids: list[int]) -> str:
            return "." * len(ids)

    long = "x" * 299
    short, refused = continuations(model, Letters(), ["ab", long])  # type: ignore[arg-type]
    assert short.startswith("ab")
    assert refused == f"{long} [300 tokens: no room in a context of 300]"


def test_cache_overflow_is_an_error(model: GPT) -> None:
    with pytest.raises(ValueError, match="holds 4 positions, 5 are needed"):
        model.logits(torch.zeros(1, 5, dtype=torch.long), KVCache(model, 1, 4))
