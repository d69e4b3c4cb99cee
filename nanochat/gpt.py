"""nanochat's GPT: rotary, QK norm, relu², value embeddings, smear, residual lambdas, backout, softcapped untied head.

The architecture and every parameter name are karpathy/nanochat's (commit 92d63d4), so checkpoints move both ways. The
layers come from a `Precision`; this file says how they are joined and what values they start from, and names no dtype.

Letters: B batch, T sequence, D width, H query heads, K key/value heads, E head dimension.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from nanochat.generate import KVCache
from nvfp8.attention import causal_attention, choose_backend, passed_over, project_heads
from nvfp8.embedding import TokenOrder, embedding, token_order
from nvfp8.gates import smeared, value_gate
from nvfp8.layers import Pending, mix, settled
from nvfp8.precision import Precision

ROTARY_BASE = 100_000
SOFTCAP = 15.0
SMEAR_CHANNELS = 24
GATE_CHANNELS = 12
VOCAB_MULTIPLE = 64


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model; nanochat's fields and defaults."""

    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    window_pattern: str = "SSSL"

    def __post_init__(self) -> None:
        """Raise ValueError for a shape that cannot be built, saying what to change."""
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:  # from a file it may be anything, True included
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        if self.n_embd % self.n_head or self.n_head % self.n_kv_head:
            sizes = f"n_embd {self.n_embd}, n_head {self.n_head}, n_kv_head {self.n_kv_head}"
            raise ValueError(f"each must be a multiple of the next: {sizes}")
        if self.head_dim % 2:
            raise ValueError(f"head dimension {self.head_dim} is odd: rotary needs two halves")
        if self.n_embd < SMEAR_CHANNELS:
            raise ValueError(f"n_embd {self.n_embd} is too small: the smear gate reads {SMEAR_CHANNELS} channels")
        if not isinstance(self.window_pattern, str) or not re.fullmatch("[SLsl]+", self.window_pattern):
            raise ValueError(f"window_pattern must consist of S and L, not {self.window_pattern!r}")

    @staticmethod
    def from_depth(
        depth: int, *, aspect_ratio: int = 64, head_dim: int = 128, sequence_len: int = 2048,
        vocab_size: int = 32768, window_pattern: str = "SSSL",
    ) -> "GPTConfig":  # fmt: skip
        """The model of a given depth: width depth·aspect_ratio, rounded up to whole heads.

        Raises:
            ValueError: a number below 1, or a shape that cannot be built.
        """
        for name, value in (("depth", depth), ("aspect ratio", aspect_ratio), ("head dim", head_dim)):
            if value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")
        heads = -(-depth * aspect_ratio // head_dim)
        return GPTConfig(sequence_len, vocab_size, depth, heads, heads, heads * head_dim, window_pattern)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding tables and the head: the vocabulary rounded up to a multiple of 64."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def window(self, layer: int) -> int:
        """How many earlier positions `layer` sees: all (L, and the last layer), or a quarter rounded up to 128 (S)."""
        kind = self.window_pattern.upper()[layer % len(self.window_pattern)]
        if kind == "L" or layer == self.n_layer - 1:
            return self.sequence_len
        return -(-self.sequence_len // 4 // 128) * 128

    def has_value_embedding(self, layer: int) -> bool:
        """Every second layer, the last included."""
        return layer % 2 == (self.n_layer - 1) % 2


class Attention(nn.Module):
    """Norm, projections, rotary, windowed attention and output projection."""

    def __init__(self, config: GPTConfig, layer: int, precision: Precision):
        """Allocate the projections, and the gate where the layer has a value embedding."""
        super().__init__()
        self.heads = config.n_head, config.n_kv_head
        self.window = config.window(layer)
        kv_width = config.n_kv_head * config.head_dim
        joined = precision.at("qkv")  # one GEMM
        self.c_q = joined.linear(config.n_embd, config.n_embd)
        self.c_k = joined.linear(config.n_embd, kv_width)
        self.c_v = joined.linear(config.n_embd, kv_width)
        self.c_proj = precision.at("c_proj").linear(config.n_embd, config.n_embd)
        if config.has_value_embedding(layer):
            self.ve_gate = precision.gate(GATE_CHANNELS, config.n_kv_head)
        self.qkv = joined.norm_linear(self.c_q, self.c_k, self.c_v, head_size=config.head_dim)

    def forward(
        self, x: Tensor | Pending, x0: Tensor, lambdas: Tensor, rotary: tuple[Tensor, Tensor], ids: Tensor,
        table: Tensor | None, order: TokenOrder | None, backend: str, cache: KVCache | None, layer: int,
    ) -> tuple[Pending, Tensor]:  # fmt: skip
        """Attend; what is to be added to the stream is left to the MLP, which reads both.

        Args:
            x: (B, T, D) stream, or the two parts of it.
            x0: (B, T, D) stream after the embedding.
            lambdas: (2,) factors of x and x0.
            rotary: cos and sin, (T, E/2) each.
            ids: (B, T) token ids, rows of the value embedding.
            table: (V, K·E) value embedding, None where the layer has none.
            order: of ids, shared by all tables' gradients; None where no gradient will be asked for.
            backend: attention backend where there is no cache.
            cache: earlier keys and values, None in training.
            layer: index of the block, for the cache.

        Returns:
            The stream (B, T, D) and attention's branch, and x0 for the next block.
        """
        stream, x0, gate_input, qkv = self.qkv(x, x0, lambdas, GATE_CHANNELS)
        gate = None if table is None else value_gate(gate_input, self.ve_gate.weight)
        q, k, v = project_heads(qkv, *rotary, self.heads, gate, table, ids, order)
        if cache is None:
            out = causal_attention(q, k, v, self.window, backend)
        else:
            out = cache.attend(layer, q, k, v, self.window)
        return Pending(stream, self.c_proj(out.flatten(2))), x0


class Block(nn.Module):
    """Attention, then the MLP, each adding to the stream."""

    def __init__(self, config: GPTConfig, layer: int, precision: Precision):
        """Allocate both halves; `GPT` calls them, since a block keeps nothing between them."""
        super().__init__()
        self.attn = Attention(config, layer, precision.at("attn"))
        self.mlp = precision.at("mlp").mlp(config.n_embd, 4 * config.n_embd)


class GPT(nn.Module):
    """The model. Build it under `torch.device("meta")` for shapes only, or anywhere and call `init_weights`."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig, precision: Precision, attention: str = "auto"):
        """Allocate all parameters, uninitialized.

        Args:
            config: the shape.
            precision: makes the layers.
            attention: attention backend, resolved for the parameters' device when first used.

        Raises:
            ValueError: the precision's recipe names a layer that this model has not.
        """
        super().__init__()
        self.config, self.precision, self.attention = config, precision, attention
        layers = range(config.n_layer)
        self.transformer = nn.ModuleDict(
            {
                "wte": precision.embedding(config.padded_vocab, config.n_embd),
                "h": nn.ModuleList([Block(config, layer, precision.at(f"h.{layer}")) for layer in layers]),
            }
        )
        self.ln_embed = precision.norm(config.n_embd)
        self.ln_f = precision.norm(config.n_embd)
        self.lm_head = precision.head(config.n_embd, config.vocab_size, config.padded_vocab, SOFTCAP)
        self.resid_lambdas = nn.Parameter(torch.empty(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.empty(config.n_layer))
        self.smear_gate = precision.gate(SMEAR_CHANNELS, 1)
        self.smear_lambda = nn.Parameter(torch.empty(1))
        self.backout_lambda = nn.Parameter(torch.empty(1))
        kv_width = config.n_kv_head * config.head_dim
        self.value_embeds = nn.ModuleDict(
            {str(i): precision.embedding(config.padded_vocab, kv_width) for i in layers if config.has_value_embedding(i)}
        )
        cos, sin = self._rotary_tables(config.sequence_len)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.scaling = precision.scaling(self)  # no module: scales are not among the weights

    def _rotary_tables(self, length: int) -> tuple[Tensor, Tensor]:
        """Return cos and sin (length, E/2) in the stream's dtype, computed in fp32."""
        weight = self.wte.weight
        channels = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32, device=weight.device)
        frequencies = ROTARY_BASE ** -(channels / self.config.head_dim)
        angles = torch.outer(torch.arange(length, dtype=torch.float32, device=weight.device), frequencies)
        return angles.cos().to(weight.dtype), angles.sin().to(weight.dtype)

    @torch.no_grad()
    def init_weights(self, seed: int = 42) -> None:
        """Give every parameter its initial value: the one initializer, the same on every rank.

        Args:
            seed: seeds a generator of the parameters' device; the global generators stay as they are.
        """
        generator = torch.Generator(self.resid_lambdas.device).manual_seed(seed)
        bound = (3 / self.config.n_embd) ** 0.5  # uniform with standard deviation 1/√D

        def uniform(weight: Tensor, low: float, high: float) -> None:
            weight.copy_(torch.empty_like(weight, dtype=wide(weight)).uniform_(low, high, generator=generator))

        def normal(weight: Tensor, std: float) -> None:
            weight.copy_(torch.empty_like(weight, dtype=wide(weight)).normal_(0, std, generator=generator))

        def wide(weight: Tensor) -> torch.dtype:
            """Drawn in fp32, so that every precision starts from the same values, rounded."""
            return torch.promote_types(weight.dtype, torch.float32)

        normal(self.wte.weight, 0.8)
        normal(self.lm_head.weight, 0.001)
        for block in self.blocks:
            for projection in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                uniform(projection.weight, -bound, bound)
            uniform(block.mlp.c_fc.weight, -0.4 * bound, 0.4 * bound)
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
            if hasattr(block.attn, "ve_gate"):
                uniform(block.attn.ve_gate.weight, 0, 0.02)
        for table in self.value_embeds.values():
            uniform(cast(nn.Embedding, table).weight, -bound, bound)
        uniform(self.smear_gate.weight, 0, 0.02)
        layers, device = self.config.n_layer, self.resid_lambdas.device
        position = torch.arange(layers, device=device) / max(layers - 1, 1)
        self.resid_lambdas.copy_(1.15 - 0.10 * position)
        self.x0_lambdas.copy_(0.20 - 0.15 * position)
        self.smear_lambda.zero_()
        self.backout_lambda.fill_(0.2)
        for name, parameter in self.named_parameters():
            if name.endswith("norm_weight"):
                parameter.fill_(1)
        self.reset_rotary()

    def reset_rotary(self, length: int | None = None) -> None:
        """Recompute the rotary tables (not part of a checkpoint) on the parameters' device, for `length` positions."""
        self.cos, self.sin = self._rotary_tables(length or self.config.sequence_len)

    @property
    def blocks(self) -> list[Block]:
        """The transformer blocks in order."""
        return cast(list[Block], list(cast(nn.ModuleList, self.transformer["h"])))

    @property
    def wte(self) -> nn.Embedding:
        """The token embedding."""
        return cast(nn.Embedding, self.transformer["wte"])

    @property
    def attention_backend(self) -> str:
        """The attention backend that runs a whole context on this device in this precision."""
        return self._attention_backend(self.config.sequence_len)

    def _attention_backend(self, length: int) -> str:
        """Return the backend for a text of `length`: a shorter one than the context may want another, or be refused."""
        return choose_backend(self.cos.device.type, self.cos.dtype, self.config.head_dim, length, self.attention)

    def describe_attention(self) -> str:
        """The backend of a whole context, and where "auto" took it, why no better one: "sdpa (fa3: …; cudnn: …)"."""
        if self.attention != "auto":
            return self.attention_backend
        shape = self.config.head_dim, self.config.sequence_len
        better = passed_over(self.cos.device.type, self.cos.dtype, *shape)
        reasons = "; ".join(f"{name}: {reason}" for name, reason in better.items())
        return f"{self.attention_backend} ({reasons})" if reasons else self.attention_backend

    def _stream(self, ids: Tensor, cache: KVCache | None) -> Tensor:
        """(B, T) token ids -> (B, T, D), the normalized stream before the head."""
        start = 0 if cache is None else cache.length
        end = start + ids.shape[1]
        if end > self.cos.shape[0]:
            tables = f"the rotary tables of {self.cos.shape[0]}"
            raise ValueError(f"position {end} is beyond {tables}: call reset_rotary({end})")
        rotary = self.cos[start:end], self.sin[start:end]
        # A cache attends by itself, over lengths that a backend may refuse.
        backend = self._attention_backend(ids.shape[1]) if cache is None else ""
        order = token_order(ids) if torch.is_grad_enabled() else None
        embedded = self.ln_embed(embedding(self.wte.weight, ids, order))
        previous = None if cache is None else cache.swap_embedding(embedded[:, -1:])
        x, x0 = smeared(embedded, previous, self.smear_gate.weight, self.smear_lambda)
        lambdas = torch.stack((self.resid_lambdas, self.x0_lambdas), 1).unbind()
        middle = x  # replaced by the stream after the middle block
        for layer, block in enumerate(self.blocks):
            name = str(layer)
            table = cast(nn.Embedding, self.value_embeds[name]).weight if name in self.value_embeds else None
            x, x0 = block.attn(x, x0, lambdas[layer], rotary, ids, table, order, backend, cache, layer)
            x = block.mlp(x, settle=False)
            if layer == self.config.n_layer // 2:
                x = middle = settled(x)
        if cache is not None:
            cache.advance(ids.shape[1])
        backout = torch.cat((torch.ones_like(self.backout_lambda), -self.backout_lambda))
        return self.ln_f(mix(x, middle, backout)[0])

    def forward(self, ids: Tensor, targets: Tensor, scale: float = 1.0) -> Tensor:
        """Training loss.

        Args:
            ids: (B, T) int64.
            targets: (B, T) int64, −1 ignored.
            scale: factor of the loss, known beforehand (1 / accumulation steps / ranks).

        Returns:
            0-d fp32: mean cross-entropy in nats, times `scale`; its backward may run once.
        """
        with self.precision.autocast(scale / ids.numel()):
            x = self._stream(ids, None)
            return self.lm_head.loss(x.flatten(0, 1), targets.flatten(), scale)

    @torch.no_grad()
    def token_losses(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each token (B, T) fp32 in nats, 0 where the target is −1; no gradient."""
        x = self._stream(ids, None)
        return self.lm_head.token_losses(x.flatten(0, 1), targets.flatten()).view_as(targets)

    @torch.no_grad()
    def logits(self, ids: Tensor, cache: KVCache | None = None, last: bool = False) -> Tensor:
        """Softcapped logits in fp32, without padding; for generation and comparison, not for training.

        Args:
            ids: (B, T) int64; with a cache, the tokens that follow those it holds.
            cache: keys and values of the tokens before, extended by this call.
            last: only the last position.

        Returns:
            (B, T, V), or (B, 1, V) with `last`.
        """
        x = self._stream(ids, cache)
        return self.lm_head.logits(x[:, -1:] if last else x)

    def scaling_state(self) -> dict[str, Tensor]:
        """What FP8 layers remember of their tensors' magnitudes, `<layer>.<what>` -> tensor; empty where nothing is."""
        return self.scaling.state()

    def load_scaling_state(self, saved: Mapping[str, Tensor]) -> None:
        """Take over what `scaling_state` returned, of the same precision.

        Raises:
            ValueError: it is of another precision; the message says what differs.
        """
        self.scaling.load(saved)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by group and in total; depends on the shape alone, whatever the precision."""
        counts = dict.fromkeys(("wte", "value_embeds", "lm_head", "transformer_matrices", "scalars"), 0)
        groups = {"transformer.h": "transformer_matrices", "transformer.wte": "wte"}
        groups |= {name: name for name in ("value_embeds", "lm_head")}
        for name, parameter in self.named_parameters():
            group = next((group for prefix, group in groups.items() if name.startswith(prefix + ".")), "scalars")
            counts[group] += parameter.numel()
        counts["total"] = sum(counts.values())
        return counts

    def flop_counts(self) -> dict[str, int]:
        """Forward and backward FLOPs of one token by group and in total, whatever the precision.

        6 per parameter of a matmul and 12·H·E·window per layer of attention: the count of PaLM (arXiv 2204.02311), with
        a window in place of the sequence where it is shorter. Lookups cost none.
        """
        parameters = self.parameter_counts()
        windows = [min(self.config.window(layer), self.config.sequence_len) for layer in range(self.config.n_layer)]
        counts = {name: 6 * parameters[name] for name in ("transformer_matrices", "lm_head")}
        counts["smear_gate"] = 6 * self.smear_gate.weight.numel()
        counts["attention"] = 12 * self.config.n_embd * sum(windows)
        counts["total"] = sum(counts.values())
        return counts

    def flops_per_token(self) -> int:
        """Forward and backward FLOPs of one token, all groups together."""
        return self.flop_counts()["total"]
