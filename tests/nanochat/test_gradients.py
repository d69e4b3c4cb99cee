"""The whole model beside a plain one: the same architecture in ordinary PyTorch with autograd, written only for this test.

In fp32 both must agree. In bf16 both round, in different places: ours must lose no more than plain bf16 autograd does, parameter
by parameter, and less on the whole. On a GPU the same holds of the kernels.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.build import build_model
from nanochat.gpt import GPT, GPTConfig
from nvfp8.precision import Precision, bf16, fp32

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
CONFIG = GPTConfig(sequence_len=256, vocab_size=1000, n_layer=3, n_head=2, n_kv_head=1, n_embd=256, window_pattern="SL")


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    weight = weight.to(x.dtype)
    if x.is_cuda or x.dtype == torch.float32:
        return F.linear(x, weight)
    # Products in bf16 take a CPU so much longer (`nvfp8/matmul.py`). Of widened operands they are rounded once as well, in backward
    # too: there a gradient becomes bf16 where its tensor was widened.
    return F.linear(x.float(), weight.float()).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), -1)


def plain_loss(model: GPT, ids: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """The loss of `model`'s parameters, by the book."""
    config, p = model.config, dict(model.named_parameters())
    (rows, length), heads, kv = ids.shape, config.n_head, config.n_kv_head
    cos, sin = (table[None, :, None].to(dtype) for table in (model.cos, model.sin))
    positions = torch.arange(length, device=ids.device)
    x = norm(F.embedding(ids, p["transformer.wte.weight"]).to(dtype))
    gate = p["smear_lambda"].to(dtype) * torch.sigmoid(linear(x[:, 1:, :24], p["smear_gate.weight"]))
    x = x0 = middle = torch.cat((x[:, :1], x[:, 1:] + gate * x[:, :-1]), 1)
    for i in range(config.n_layer):
        w = {name.removeprefix(f"transformer.h.{i}."): value for name, value in p.items()}
        x = p["resid_lambdas"][i] * x + p["x0_lambdas"][i] * x0
        normed = norm(x)
        q, k, v = (
            linear(normed, w[f"attn.{name}.weight"]).view(rows, length, count, -1)
            for name, count in (("c_q", heads), ("c_k", kv), ("c_v", kv))
        )
        if config.has_value_embedding(i):
            gates = 3 * torch.sigmoid(linear(normed[..., :12], w["attn.ve_gate.weight"]))
            v = v + gates[..., None] * F.embedding(ids, p[f"value_embeds.{i}.weight"]).view_as(v).to(dtype)
        q, k = (norm(rotate(t, cos, sin)) * 1.2 for t in (q, k))
        distance = positions[:, None] - positions
        mask = (distance >= 0) & (distance <= config.window(i))
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask, enable_gqa=True)
        x = x + linear(out.transpose(1, 2).flatten(2), w["attn.c_proj.weight"])
        x = x + linear(F.relu(linear(norm(x), w["mlp.c_fc.weight"])).square(), w["mlp.c_proj.weight"])
        if i == config.n_layer // 2:
            middle = x
    x = norm(x - p["backout_lambda"].to(dtype) * middle)
    logits = linear(x, p["lm_head.weight"])[..., : config.vocab_size].float()
    return F.cross_entropy((15 * torch.tanh(logits / 15)).flatten(0, 1), targets.flatten(), ignore_index=-1)


def gradients(precision: Precision, plain: bool, seed: int = 2) -> dict[str, Tensor]:
    """Loss and every gradient of one random model, by our layers or by the book."""
    model = build_model(CONFIG, precision, DEVICE)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.02 * torch.randn(parameter.shape, generator=generator)).to(DEVICE))
    ids = torch.randint(1000, (1, 256), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    targets = ids.roll(-1, 1)
    targets[0, ::5] = -1
    loss = plain_loss(model, ids, targets, precision.compute_dtype) if plain else model(ids, targets)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def relative(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm())


def test_fp32_is_the_plain_model() -> None:
    ours, plain = gradients(fp32(), plain=False), gradients(fp32(), plain=True)
    assert ours.keys() == plain.keys()
    for name, truth in plain.items():
        assert relative(ours[name], truth) < 2e-5, name


def test_bf16_loses_no_more_than_plain_autograd() -> None:
    # Several models: of a single number, as the loss or λ's gradient is, one of both may hit the truth by luck. With 8 the loss's
    # ratio moves by a third of itself from one set of models to the next; a GPU has time for 32.
    errors: dict[str, list[tuple[float, float]]] = {}
    for seed in range(2, 34 if DEVICE.type == "cuda" else 10):
        truth = gradients(fp32(), plain=True, seed=seed)
        plain, ours = (gradients(bf16(), plain=plain, seed=seed) for plain in (True, False))
        for name, exact in truth.items():
            pair = tuple(float((value[name].double() - exact.double()).norm()) for value in (ours, plain))
            errors.setdefault(name, []).append(pair)
    ratios = {name: math.hypot(*(o for o, _ in pairs)) / math.hypot(*(p for _, p in pairs)) for name, pairs in errors.items()}
    print({name: round(ratio, 2) for name, ratio in ratios.items()})
    assert all(ratio < 1.25 for ratio in ratios.values()), ratios
    assert math.exp(sum(map(math.log, ratios.values())) / len(ratios)) < 1
