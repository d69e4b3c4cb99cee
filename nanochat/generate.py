"""Text from a trained model: a KV cache, sampling, and the loop that joins them.

The cache holds keys and values of each layer, and the last un-smeared embedding, which the next token's smear reads.
With it a step costs one token's forward, and its logits equal those of a forward over the whole text.

A text, prompt and continuation together, is at most one context long (the rotary tables' length): a continuation ends there,
and a prompt that leaves no room for one more token is refused, never cut. Its beginning would be what the model no longer sees.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nvfp8.attention import band_mask, causal_attention, masked_attention

if TYPE_CHECKING:
    from nanochat.gpt import GPT
    from nanochat.tokenizer import Tokenizer

# What a run's samples begin with, and how far they go.
PROMPTS = ("", "The ", "def ", "import ")
SAMPLE_TOKENS = 32
# Queries at a time that look back into the cache, so that their mask grows with the text, not with its square.
QUERY_BLOCK = 128


class KVCache:
    """Keys and values (layers, B, capacity, K, E) of the tokens seen so far."""

    def __init__(self, model: "GPT", batch: int, capacity: int):
        """Allocate room for `capacity` positions on the model's device, in its stream's dtype."""
        config = model.config
        shape = (config.n_layer, batch, capacity, config.n_kv_head, config.head_dim)
        self.keys = torch.empty(shape, dtype=model.cos.dtype, device=model.cos.device)
        self.values = torch.empty_like(self.keys)
        self.length = 0
        self._embedding: Tensor | None = None

    def swap_embedding(self, last: Tensor) -> Tensor | None:
        """Keep the newest un-smeared embedding (B, 1, D); return the one kept before, None at the start."""
        previous, self._embedding = self._embedding, last
        return previous

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """Store k and v (B, T, K, E) at the cache's end and attend with q (B, T, H, E) over all it holds."""
        end = self.length + q.shape[1]
        if end > self.keys.shape[2]:
            raise ValueError(f"the KV cache holds {self.keys.shape[2]} positions, {end} are needed")
        self.keys[layer, :, self.length : end] = k
        self.values[layer, :, self.length : end] = v
        if self.length == 0:
            return causal_attention(q, k, v, window, "sdpa")  # a prompt of any length
        positions = torch.arange(end, device=q.device)
        outputs: list[Tensor] = []
        for block in q.split(QUERY_BLOCK, 1):
            first = self.length + QUERY_BLOCK * len(outputs)
            last, seen = first + block.shape[1], max(0, first - window)  # earlier keys are out of sight
            mask = band_mask(positions[first:last], positions[seen:last], window)
            outputs.append(masked_attention(block, self.keys[layer, :, seen:last], self.values[layer, :, seen:last], mask))
        return torch.cat(outputs, 1)

    def advance(self, tokens: int) -> None:
        """Count `tokens` more positions, after every layer has stored them."""
        self.length += tokens


def room(model: "GPT", prompt: Sequence[int]) -> int:
    """How many tokens can follow `prompt` before the context is full; below 1 the prompt is too long."""
    return model.cos.shape[0] - len(prompt)


@torch.inference_mode()
def generate(
    model: "GPT", prompt: list[int], max_tokens: int, *, temperature: float = 1.0, top_k: int = 0, seed: int = 42,
    stop: int | None = None,
) -> Iterator[int]:  # fmt: skip
    """Sample a continuation, token by token.

    Args:
        model: the model.
        prompt: token ids, at least one, and fewer than the context holds.
        max_tokens: how many to produce at most; fewer are where the context is full (`room`).
        temperature: 0 takes the likeliest token.
        top_k: sample among the k likeliest; 0 among all.
        seed: of the sampler alone.
        stop: a token that ends the text, such as the next document's first; it is not part of it.

    Yields:
        The sampled ids.

    Raises:
        ValueError: the prompt is empty or leaves no room; at the first token that is asked for.
    """
    device, context = model.cos.device, model.cos.shape[0]
    if not 0 < len(prompt) < context:
        raise ValueError(f"the prompt has {len(prompt)} tokens, it must have 1 to {context - 1}: the context holds {context}")
    tokens = min(max_tokens, room(model, prompt))
    cache = KVCache(model, 1, len(prompt) + tokens)
    generator = torch.Generator(device).manual_seed(seed)
    ids = torch.tensor([prompt], device=device)
    for _ in range(tokens):
        logits = model.logits(ids, cache, last=True)[0, -1]
        if temperature == 0:
            token = logits.argmax()
        else:
            if top_k:
                logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = float("-inf")
            token = torch.multinomial((logits / temperature).softmax(0), 1, generator=generator)[0]
        if int(token) == stop:
            return
        yield int(token)
        ids = token.view(1, 1)


def continuations(model: "GPT", tokenizer: "Tokenizer", prompts: Sequence[str]) -> Iterator[str]:
    """Each prompt with its likeliest continuation of up to SAMPLE_TOKENS tokens, or why there is none, as runs print them."""
    for prompt in prompts:
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt, bos=False)]
        if room(model, ids) < 1:  # a run with a tiny context must not fail for its samples
            yield f"{prompt} [{len(ids)} tokens: no room in a context of {model.cos.shape[0]}]"
            continue
        sampled = generate(model, ids, SAMPLE_TOKENS, temperature=0, stop=tokenizer.bos_id)
        yield prompt + tokenizer.decode(list(sampled))
