"""Decoding with a cache gives the logits of the whole forward, and sampling obeys its arguments."""

import pytest
import torch

from nanochat.generate import KVCache, generate
from nanochat.gpt import GPT, GPTConfig
from nvfp8.precision import fp32

CONFIG = GPTConfig(sequence_len=300, vocab_size=50, n_layer=4, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SL")


@pytest.fixture(scope="module")
def model() -> GPT:
    model = GPT(CONFIG, fp32())
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    return model


@pytest.mark.parametrize("pieces", [[300], [1] * 20, [7, 1, 1, 200, 1, 30], [160, *[1] * 30]])
def test_cached_logits_equal_the_full_forward(model: GPT, pieces: list[int]) -> None:
    """Windows of 128 are crossed, prefill comes in pieces, smear reaches over the seams."""
    ids = torch.randint(50, (2, sum(pieces)), generator=torch.Generator().manual_seed(1))
    cache = KVCache(model, 2, sum(pieces))
    outputs = [model.logits(part, cache) for part in ids.split(pieces, 1)]
    torch.testing.assert_close(torch.cat(outputs, 1), model.logits(ids), rtol=1e-5, atol=2e-5)


def test_greedy_generation_is_the_argmax_of_the_full_forward(model: GPT) -> None:
    prompt = [3, 1, 4]
    tokens = list(generate(model, prompt, 12, temperature=0))
    text = list(prompt)
    for token in tokens:
        assert token == int(model.logits(torch.tensor([text]))[0, -1].argmax())
        text.append(token)


def test_sampling_is_seeded_and_top_k_one_is_greedy(model: GPT) -> None:
    first, again, other = (list(generate(model, [1], 20, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert list(generate(model, [1], 20, top_k=1)) == list(generate(model, [1], 20, temperature=0))


def test_a_full_context_ends_the_text(model: GPT) -> None:
    assert len(list(generate(model, [1] * 295, 50, temperature=0))) == 5
    assert len(list(generate(model, [1] * 500, 50, temperature=0))) == 1


def test_cache_overflow_is_an_error(model: GPT) -> None:
    with pytest.raises(ValueError, match="holds 4 positions, 5 are needed"):
        model.logits(torch.zeros(1, 5, dtype=torch.long), KVCache(model, 1, 4))
