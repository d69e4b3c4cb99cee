"""Whole models: what is converted, what is left and why, what is refused; an encoder of torch.nn and a Llama train."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nvfp8
from nvfp8 import convert
from nvfp8.converted import ConvertedLinear
from nvfp8.recipe import BF16, RECIPES, Gemm, Operand, Recipe

ROOT = Path(__file__).parents[2]


class Tied(nn.Module):
    """Embedding, a layer, and a head that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(128, 64), nn.Linear(64, 64), nn.Linear(64, 128, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.table(ids)))


class OwnLinear(nn.Linear):
    pass


def odds_and_ends() -> nn.ModuleDict:
    """A layer for each reason to stay as it is, and one to convert."""
    return nn.ModuleDict({
        "good": nn.Linear(64, 32),
        "narrow": nn.Linear(24, 32),
        "logits": nn.Linear(64, 50_257, device="meta"),
        "wide": nn.Linear(64, 32, dtype=torch.float64),
        "own": OwnLinear(64, 32),
        "lazy": nn.LazyLinear(32),
        "attention": nn.MultiheadAttention(64, 2),
        "table": nn.Embedding(128, 64),
        "blocks": nn.ModuleList(nn.ModuleDict({"a": nn.Linear(64, 32), "b": nn.Linear(32, 64)}) for _ in range(3)),
    })  # fmt: skip


def test_the_report_accounts_for_every_matrix() -> None:
    model = odds_and_ends()
    report = convert(model, "current", skip=("blocks.*.b", "blocks.1"), emulate=True)
    assert report.converted == ["good", "blocks.0.a", "blocks.2.a"]
    assert report.left == {
        "narrow": "in_features 24 is no multiple of 16",
        "logits": "out_features 50257 is no multiple of 16",
        "wide": "float64 weights",
        "own": "OwnLinear, which computes in its own way",
        "lazy": "LazyLinear, which computes in its own way",
        "attention.in_proj_weight": "MultiheadAttention, no nn.Linear",
        "attention.out_proj": "nn.MultiheadAttention reads its weight without calling it",
        "table.weight": "Embedding, no nn.Linear",
        "blocks.0.b": "skipped (blocks.*.b)",
        "blocks.1.a": "skipped (blocks.1)",
        "blocks.1.b": "skipped (blocks.*.b)",
        "blocks.2.b": "skipped (blocks.*.b)",
    }
    converted = [name for name, module in model.named_modules() if isinstance(module, ConvertedLinear)]
    assert converted == report.converted
    matrices = {name for name, p in model.named_parameters() if not isinstance(p, nn.UninitializedParameter) and p.ndim > 1}
    assert {row.name.removesuffix(".weight") for row in report.rows} == {it.removesuffix(".weight") for it in matrices} | {"lazy"}
    lines = str(report).splitlines()
    assert lines[0] == f"current, emulated: {RECIPES['current'].describe()}"
    assert ["blocks.*.a", "×2", "32×64", "FP8"] in [line.split() for line in lines]
    assert lines[-1].startswith("3 layers in FP8: 6,144 of ")


def test_a_table_for_people() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 2, 128, batch_first=True), 2, enable_nested_tensor=False)
    assert (
        str(convert(model, emulate=True))
        == """\
delayed, emulated: fprop e4m3×e4m3 delayed, fast accumulation; dgrad e5m2×e4m3 delayed, fast accumulation; wgrad e5m2×e4m3 delayed
layers.*.self_attn.in_proj_weight ×2  192×64  float32  MultiheadAttention, no nn.Linear
layers.*.self_attn.out_proj ×2        64×64   float32  nn.MultiheadAttention reads its weight without calling it
layers.*.linear1 ×2                   128×64  FP8
layers.*.linear2 ×2                   64×128  FP8
4 layers in FP8: 32,768 of 65,536 parameters in matrices, 50%"""
    )


def test_a_layer_by_itself_is_converted_too() -> None:
    layer = nn.Linear(64, 32)
    assert convert(layer, emulate=True).converted == [""]
    assert isinstance(layer, ConvertedLinear) and layer(torch.randn(3, 64)).shape == (3, 32)


def test_tied_weights_are_refused_unless_skipped() -> None:
    model = Tied()
    with pytest.raises(ValueError, match=r"table.weight and head.weight are one parameter.*skip=\('head',\)"):
        convert(model, emulate=True)
    assert type(model.body) is nn.Linear  # as it was
    assert convert(model, skip="head", emulate=True).converted == ["body"]
    model(torch.arange(5)).sum().backward()
    assert model.head.weight is model.table.weight and model.table.weight.grad is not None


def test_a_layer_that_two_modules_share_is_one_layer() -> None:
    layer = nn.Linear(64, 64)
    model = nn.Sequential(layer, nn.GELU(), layer)
    assert convert(model, emulate=True).converted == ["0"]
    model(torch.randn(5, 64)).sum().backward()


@pytest.mark.parametrize(("how", "message"), [
    ({"recipe": "blockwise"}, "recipe blockwise: convert has delayed, current, e4m3 and rowwise"),
    ({"recipe": "nvfp4"}, "convert has delayed, current, e4m3 and rowwise"),
    ({"recipe": "fast"}, "unknown recipe 'fast'"),
    ({"recipe": Recipe("mixed", *[Gemm(Operand("e4m3", "delayed"), Operand("e4m3", "current"))] * 2,
                       Gemm(Operand("e4m3", "current"), Operand("e4m3", "current")))}, "casts a tensor once for all GEMMs"),
    ({"recipe": Recipe("bf16", *[Gemm(BF16, BF16)] * 3)}, "convert has"),
    ({"skip": "layers.9"}, r"skip='layers.9' is no part of this model, whose linear layers are layers.0.self_attn.out_proj"),
    ({"recipe": "delayed:bf16=head"}, "skip='head' is no part of this model"),
    ({"recipe": "delayed:bf16=layers.0:wgrad"}, r"'layers.0:wgrad': convert leaves whole layers, not single GEMMs such as wgrad"),
    ({"skip": "layers.0.linear1:dgrad"}, r"convert leaves whole layers, not single GEMMs such as dgrad: leave 'layers.0.linear1'"),
    ({"skip": "layers"}, r"no layer of this TransformerEncoder can be converted: layers.0.self_attn.in_proj_weight: Multihead"),
])  # fmt: skip
def test_what_cannot_be_meant_is_refused(how: dict[str, Any], message: str) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 2, 128), 2, enable_nested_tensor=False)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        convert(model, **{"emulate": True, **how})
    assert [type(module) for module in model.modules()] == before


def test_the_recipe_can_name_what_it_leaves() -> None:
    report = convert(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), "delayed:bf16=1,margin=2", emulate=True)
    assert report.converted == ["0"] and report.recipe.margin == 2


def test_a_second_call_finds_nothing_to_do() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    convert(model, emulate=True)
    with pytest.raises(ValueError, match="0: is FP8 already, by an earlier call"):
        convert(model, emulate=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without FP8 units")
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_without_fp8_units_emulation_must_be_asked_for(device: str) -> None:
    with pytest.raises(ValueError, match=f"recipe delayed does not run on {device}, .* no FP8 units: emulate=True computes"):
        convert(nn.Linear(64, 64, device=device))


def test_the_package_stays_light_and_its_name_is_the_function() -> None:
    code = """
import sys, nvfp8
assert "torch" not in sys.modules
import nvfp8.conversion, nvfp8.converted
from nvfp8 import convert
assert convert is nvfp8.convert is nvfp8.conversion.convert
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    with pytest.raises(AttributeError, match="no attribute 'covert'"):
        nvfp8.covert  # noqa: B018


# Models that train


def fit(model: nn.Module, step_loss: Any, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for step in range(steps):
        loss = step_loss(model, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def shifted(step: int, vocabulary: int) -> Tensor:
    """Sequences that count upwards from a random beginning: learnt in a few steps."""
    first = torch.randint(vocabulary, (8, 1), generator=torch.Generator().manual_seed(step))
    return (first + torch.arange(17)) % vocabulary


@pytest.mark.parametrize("recipe", ["delayed", "current", "rowwise"])
def test_an_encoder_of_torch_nn_learns_what_it_learns_in_fp32(recipe: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, norm_first=True)
    plain = nn.Sequential(nn.Embedding(32, 64), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(64, 32))
    model = copy.deepcopy(plain)
    assert len(convert(model, recipe, emulate=True).converted) == 5

    def loss(it: nn.Module, step: int) -> Tensor:
        ids = shifted(step, 32)
        return F.cross_entropy(it(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    ours, theirs = fit(model, loss, 40), fit(plain, loss, 40)
    assert theirs[-1] < theirs[0] / 4
    assert abs(ours[-1] - theirs[-1]) < 0.1 * theirs[0] and ours[-1] < theirs[0] / 4
    # In evaluation the encoder's fast path reads weights without calling layers: bit for bit the unconverted model's.
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(shifted(0, 32)), plain.eval()(shifted(0, 32)))


def test_a_llama_of_transformers_learns() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[dev]'")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    plain = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"embed_tokens.weight and lm_head.weight are one parameter"):
        convert(model, emulate=True)
    report = convert(model, skip=("lm_head",), emulate=True)
    assert len(report.converted) == 14 and report.left.keys() == {"model.embed_tokens.weight", "lm_head"}

    def loss(it: nn.Module, step: int) -> Tensor:
        return it(input_ids=(ids := shifted(step, 64)), labels=ids).loss

    model.activation_checkpointing_enable()
    ours, theirs = fit(model, loss, 60), fit(plain, loss, 60)
    assert ours[-1] < ours[0] / 2 and abs(ours[-1] - theirs[-1]) < 0.1 * theirs[0]
    plain.load_state_dict(model.state_dict())
    prompt = shifted(0, 64)[:1, :5]
    for it in (model.eval(), plain.eval()):
        it.activation_checkpointing_disable()
    generated = [it.generate(prompt, max_new_tokens=5, do_sample=False) for it in (model, plain)]
    assert torch.equal(*generated)
