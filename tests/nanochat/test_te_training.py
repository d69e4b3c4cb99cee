"""Training through Transformer Engine: beside bf16, resumed, moved to other precisions; and what is refused, on any machine."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nanochat import build, metrics
from nanochat.build import EngineOptions, choose_precision, load_model
from nanochat.dataset import base_dir
from nanochat.errors import BadInput
from nanochat.gpt import GPT, GPTConfig
from nanochat.param_groups import groups
from nanochat.plan import make_plan
from nanochat.train import train
from nanochat.train_config import TrainConfig
from nvfp8 import te
from nvfp8.precision import bf16
from nvfp8.precision import te as te_precision
from nvfp8.recipe import RECIPES

needs_engine = [pytest.mark.gpu, pytest.mark.skipif(te.unavailable() is not None, reason=str(te.unavailable()))]
SHAPE = GPTConfig(64, 512, 4, 2, 2, 64, "SL")


# ------------------------------------------------------------------------------------------------------- on any machine


@pytest.mark.parametrize("layers", ["fused", "separate"])
@pytest.mark.parametrize("head", [False, True])
def test_no_matrix_is_fp32_and_names_are_those_of_bf16(layers: str, head: bool) -> None:
    with torch.device("meta"):
        model, plain = GPT(SHAPE, te_precision(RECIPES["delayed"], layers=layers, te_head=head)), GPT(SHAPE, bf16())
    wide = [name for name, p in model.named_parameters() if p.ndim == 2 and p.dtype != torch.bfloat16]
    assert wide == []
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    assert model.parameter_counts() == plain.parameter_counts() and model.flop_counts() == plain.flop_counts()


def test_learned_norm_scales_are_parameters_of_their_own_group() -> None:
    from nanochat.param_groups import groups

    with torch.device("meta"):
        model = GPT(SHAPE, te_precision(RECIPES["delayed"], norm_weight=True))
    found = {group["name"]: group["param_names"] for group in groups(model, SHAPE, weight_decay=0.1)}
    assert len(found["norm_weights"]) == 2 + 2 * SHAPE.n_layer and "ln_f.norm_weight" in found["norm_weights"]


def test_initial_values_are_those_of_bf16_rounded() -> None:
    ours, plain = GPT(SHAPE, te_precision(RECIPES["delayed"], norm_weight=True)), GPT(SHAPE, bf16())
    ours.init_weights(7), plain.init_weights(7)
    theirs = dict(plain.named_parameters())
    for name, p in ours.named_parameters():
        assert torch.equal(p, torch.ones_like(p) if name.endswith("norm_weight") else theirs[name].to(p.dtype)), name


@pytest.mark.skipif(te.unavailable() is None, reason="Transformer Engine is usable here")
def test_without_the_engine_one_line_says_what_to_do() -> None:
    with pytest.raises(BadInput, match=r"--precision te: .*, or --precision bf16"):
        choose_precision("te", "cuda" if torch.cuda.is_available() else "cpu", EngineOptions())


def test_engine_flags_need_the_engine() -> None:
    for options, line in (
        (EngineOptions("current"), "--recipe goes with --precision te, fp8 or fp8-emulated, not with bf16"),
        (EngineOptions(head="te"), "the --te flags and --norm-weight go with --precision te, not with bf16"),
        (EngineOptions(recompute_mlp=True), "--recompute-mlp goes with --precision fp8 or fp8-emulated, not with bf16"),
    ):
        with pytest.raises(BadInput, match=line):
            choose_precision("bf16", "cpu", options)


def test_auto_leaves_no_flag_out_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_precision("auto", "cpu", EngineOptions())[0].name == "fp32"
    for options, line in (
        (EngineOptions("blockwise"), "--recipe goes with .*fp8.*, and auto can take neither: it needs a CUDA device"),
        (EngineOptions(weights="fp8"), "the --te flags .*, and auto can take neither: it needs a CUDA device"),
        (EngineOptions(recompute_mlp=True), "--recompute-mlp goes with .*fp8.*, and auto can take neither: it needs a CUDA device"),
    ):
        with pytest.raises(BadInput, match=line):
            choose_precision("auto", "cpu", options)
    pretend(monkeypatch, (9, 0), {})
    for options, taken in (
        (EngineOptions("current"), "fp8"), (EngineOptions(recompute_mlp=True), "fp8"), (EngineOptions(norm_weight=True), "te"),
    ):  # fmt: skip
        assert choose_precision("auto", "cuda", options)[0].name == taken


@pytest.mark.parametrize(
    ("recipe", "line"),
    [
        ("delayed:interval=2", "interval 2"),
        ("delayed:margin=x", "takes a whole number"),
        ("delayed:history=3", "'history' cannot be set"),
        ("fp9", "unknown recipe 'fp9'"),
    ],
)
def test_recipes_that_are_none_are_refused(recipe: str, line: str) -> None:
    with pytest.raises(BadInput, match=line):
        choose_precision("te", "cpu", EngineOptions(recipe=recipe))


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], refusal: dict[str, str]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(build.te, "unavailable", lambda: None)
    monkeypatch.setattr(build.te, "unsupported", lambda recipe: refusal.get(recipe.name))


@pytest.mark.parametrize(
    ("capability", "best"),
    [((8, 9), "delayed"), ((9, 0), "delayed"), ((10, 0), "mxfp8"), ((12, 0), "current"), ((12, 1), "current")],
)
def test_the_engine_takes_the_recipe_of_the_chip(capability: tuple[int, int], best: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, capability, {})
    assert choose_precision("te", "cuda", EngineOptions())[0].describe()["recipe"].startswith(best + ":")


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), (12, 0), (12, 1)])
def test_auto_takes_our_own_layers_wherever_there_is_fp8(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, capability, {})
    precision, why = choose_precision("auto", "cuda", EngineOptions())
    assert precision.name == "fp8" and precision.describe()["recipe"].startswith("delayed:") and "our own layers" in why


def test_auto_takes_the_engine_for_what_it_alone_has(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (10, 0), {})
    precision, why = choose_precision("auto", "cuda", EngineOptions("mxfp8"))
    assert precision.name == "te" and "by Transformer Engine; --precision fp8: recipe mxfp8: our own FP8 layers have" in why


def test_a_recipe_that_the_chip_lacks_names_another(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (12, 1), {"mxfp8": "MXFP8 (for all gemm layouts) is not supported on 12.0+ architectures yet."})
    with pytest.raises(
        BadInput, match=r"recipe mxfp8: MXFP8 .* not supported on 12\.0\+.*; use --recipe current here, or --precision bf16"
    ):
        choose_precision("te", "cuda", EngineOptions(recipe="mxfp8"))


def test_auto_takes_bf16_where_there_is_no_fp8_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (8, 0), {})
    precision, why = choose_precision("auto", "cuda", EngineOptions())
    assert precision.name == "bf16" and "no FP8: FP8 units came with 8.9" in why


def test_where_both_refuse_auto_says_what_each_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0), {"delayed": "CublasLt 12.1.3 or newer required"})
    both = EngineOptions(recipe="delayed", norm_weight=True)
    with pytest.raises(BadInput, match=r"neither: .*not with fp8; --precision te: recipe delayed: CublasLt"):
        choose_precision("auto", "cuda", both)


def test_auto_takes_bf16_for_a_micro_batch_that_fp8_gemms_do_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0), {})
    assert choose_precision("auto", "cuda", EngineOptions(), (128, 64))[0].name == "fp8"
    precision, why = choose_precision("auto", "cuda", EngineOptions(), (120, 64))
    assert precision.name == "bf16" and "multiple of 16 tokens" in why
    with pytest.raises(BadInput, match="multiple of 16 tokens"):
        choose_precision("auto", "cuda", EngineOptions(recipe="current"), (120, 64))


def test_evaluation_does_not_ask_for_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0), {})
    assert choose_precision("auto", "cuda")[0].name == "bf16"


def test_a_micro_batch_that_fp8_gemms_do_not_take_is_refused() -> None:
    config = TrainConfig(depth=4, device_batch_size=3, max_seq_len=40, total_batch_size=120, num_iterations=1)
    with torch.device("meta"):
        model = GPT(SHAPE, te_precision(RECIPES["delayed"]))
    with pytest.raises(BadInput, match="recipe delayed needs a multiple of 16 tokens a micro-batch, not 120: change"):
        make_plan(config, model, 1)


# ------------------------------------------------------------------------------------------------ with the engine, on a GPU


@pytest.fixture
def config(torch_texts: str) -> TrainConfig:
    return TrainConfig(
        data=torch_texts, depth=4, aspect_ratio=64, head_dim=64, max_seq_len=128, device_batch_size=8, total_batch_size=2048,
        num_iterations=50, warmup_steps=40,
        eval_every=25, eval_tokens=2048, sample_every=-1, core_metric_every=-1,
        precision="te", model_tag="te",
    )  # fmt: skip


def losses(tag: str) -> list[float]:
    return [record["loss"] for record in metrics.read(base_dir() / "base_checkpoints" / tag) if record["kind"] == "step"]


def saved(tag: str, step: int) -> dict[str, Tensor]:
    directory = base_dir() / "base_checkpoints" / tag / f"step_{step:06d}"
    return {f"{path.name}:{k}": v for path in sorted(directory.glob("*.safetensors")) for k, v in load_file(path).items()}


class TestRuns:
    pytestmark = needs_engine

    @pytest.mark.parametrize("weights", ["bf16", "fp8"])
    def test_fifty_steps_beside_bf16(self, config: TrainConfig, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
        # At its own rate, which does not shrink with the batch, backout_lambda passes at step 20 the point where nothing is left
        # of the stream in front of the head. The loss jumps by 1 then, in fp32 too, and roundings decide in which step.
        def slow_backout(*arguments: Any, **more: Any) -> list[dict[str, Any]]:
            result = groups(*arguments, **more)
            next(group for group in result if group["name"] == "smear_backout").update(lr=0.002, initial_lr=0.002)
            return result

        monkeypatch.setattr("nanochat.train.groups", slow_backout)
        train(replace(config, precision="bf16", model_tag="plain"))
        plain = torch.tensor(losses("plain"))
        for name in ("delayed", "current", "blockwise"):
            train(replace(config, recipe=name, model_tag=name, te_weights=weights))
            ours = torch.tensor(losses(name))
            assert ours[-5:].mean() < ours[0] - 0.5
            # FP8 rounds gradients to 1.7 digits; a loss that is a mean over 2,048 tokens feels a hundredth of that.
            gap = ((ours - plain).abs() / plain).max()
            print(f"{name} {weights}: largest gap to bf16 {gap:.2%}, last losses {ours[-1]:.4f} and {plain[-1]:.4f}")
            assert gap < 0.02, (name, gap)
        train(replace(config, recipe="delayed", model_tag="head", te_head="chunked", te_weights="bf16"))
        assert ((torch.tensor(losses("head")) - plain).abs() / plain).max() < 0.02

    @pytest.mark.parametrize("name", ["delayed", "current"])
    def test_a_resumed_run_equals_the_uninterrupted_one(self, config: TrainConfig, name: str) -> None:
        config = replace(config, recipe=name, num_iterations=8, eval_every=3, deterministic=True, save_every=4, keep=5)
        train(replace(config, model_tag="whole"))
        train(replace(config, model_tag="parts"))
        for step in (5, 8):
            for path in (base_dir() / "base_checkpoints" / "parts").glob(f"step_{step:06d}"):
                path.rename(path.with_suffix(".moved"))
        train(replace(config, model_tag="parts", resume=True))
        one, other = saved("whole", 8), saved("parts", 8)
        assert one.keys() == other.keys()
        assert ("scaling.safetensors:transformer.h.0.mlp.scale_bwd" in one) == (name == "delayed")
        assert [key for key in one if not torch.equal(one[key], other[key])] == []

    def test_checkpoints_move_between_precisions(self, config: TrainConfig) -> None:
        config = replace(config, num_iterations=6, eval_every=-1)
        train(config)
        train(replace(config, precision="bf16", num_iterations=9, resume=True))
        train(replace(config, precision="te", num_iterations=12, resume=True))
        values = losses("te")
        assert len(values) == 12
        # Masters and momentum came along: the loss goes on falling, where a fresh optimizer would start its warm-up's slope anew.
        assert values[6] < values[5] and values[9] < values[8]
        ids = torch.randint(512, (2, 64), device="cuda")
        results = [load_model("te", None, torch.device("cuda"), name)[0].logits(ids) for name in ("te", "bf16", "fp32")]
        # One set of weights, bf16 matrices: both compute in bf16, and stray from fp32 by as much.
        engine, plain = ((ours - results[2]).norm() / results[2].norm() for ours in results[:2])
        assert engine < 1.2 * plain < 0.1, (engine, plain)
