"""Training in FP8 of our own, emulated where no unit has it: beside bf16, resumed, with parts left in bf16; what is refused."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nanochat import ahead, metrics
from nanochat.build import EngineOptions, build_model, choose_precision, load_model
from nanochat.checkpoint import find
from nanochat.dataset import base_dir
from nanochat.errors import BadInput
from nanochat.gpt import GPT, GPTConfig
from nanochat.param_groups import groups
from nanochat.plan import make_plan
from nanochat.train import train
from nanochat.train_config import TrainConfig
from nvfp8.precision import bf16, fp8
from nvfp8.quantize import Projection
from nvfp8.recipe import RECIPES, parse_recipe
from nvfp8.scaling import Scaling

SHAPE = GPTConfig(64, 512, 4, 2, 2, 64, "SL")
HAS_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
PRECISION = "fp8" if HAS_FP8 else "fp8-emulated"
# Runs take the GPU where there is one.
on_device = [pytest.mark.gpu] if torch.cuda.is_available() else []


# --------------------------------------------------------------------------------------------------- what is chosen, refused


def test_without_an_fp8_unit_one_line_names_the_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="--precision fp8: it needs a CUDA device; --precision fp8-emulated has the same numerics"):
        choose_precision("fp8", "cpu", EngineOptions())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    with pytest.raises(BadInput, match=r"FP8 units came with 8\.9 .* 8\.6; --precision fp8-emulated"):
        choose_precision("fp8", "cuda", EngineOptions())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    assert choose_precision("fp8", "cuda", EngineOptions())[0].name == "fp8"
    with pytest.raises(BadInput, match=r"--precision fp8: recipe blockwise: block scaling .* 8\.9; use --recipe delayed"):
        choose_precision("fp8", "cuda", EngineOptions("blockwise"))
    assert choose_precision("fp8-emulated", "cpu", EngineOptions())[0].name == "fp8-emulated"
    with pytest.raises(BadInput, match="--recompute-mlp goes with --precision fp8"):
        choose_precision("te", "cuda", EngineOptions(recompute_mlp=True))
    with pytest.raises(BadInput, match="recipe rowwise keeps relu² in bf16: it is made again with one scale a tensor only"):
        choose_precision("fp8-emulated", "cpu", EngineOptions("rowwise", recompute_mlp=True))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            EngineOptions("mxfp8"),
            "--precision fp8-emulated: recipe mxfp8: our own FP8 layers have delayed, current, e4m3, rowwise",
        ),
        (EngineOptions("fp9"), "unknown recipe 'fp9'"),
        (EngineOptions("delayed:bf17=h.0"), "'bf17' cannot be set; what can: margin, .*, bf16"),
        (EngineOptions(layers="separate"), "the --te flags and --norm-weight go with --precision te, not with fp8-emulated"),
    ],
)
def test_what_cannot_be_had_is_refused(options: EngineOptions, line: str) -> None:
    with pytest.raises(BadInput, match=line):
        choose_precision("fp8-emulated", "cpu", options)


def test_transformer_engine_leaves_nothing_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    from nvfp8 import te

    with pytest.raises(ValueError, match=r"it leaves no layer in bf16 \(bf16=h.0\): --precision fp8 does"):
        te._kind(parse_recipe("delayed:bf16=h.0"))


def test_a_layer_that_is_not_there_is_refused() -> None:
    precision = choose_precision("fp8-emulated", "cpu", EngineOptions("delayed:bf16=h.3+h.4.mlp"))[0]
    with pytest.raises(
        BadInput, match=r"bf16=h\.4\.mlp is no part of this model, whose layers are h\.0\.attn\.c_proj, h\.0\.attn\.qkv"
    ):
        build_model(SHAPE, precision, torch.device("cpu"))


def test_a_micro_batch_that_fp8_gemms_do_not_take_is_refused() -> None:
    config = TrainConfig(depth=4, device_batch_size=3, max_seq_len=40, total_batch_size=120, num_iterations=1)
    with torch.device("meta"):
        model = GPT(SHAPE, fp8(RECIPES["delayed"]))
    with pytest.raises(BadInput, match="recipe delayed needs a multiple of 16 tokens a micro-batch, not 120: change"):
        make_plan(config, model, 1)


def test_nanochats_flag() -> None:
    config = TrainConfig(fp8=True)
    assert (config.precision, config.recipe) == ("fp8", "delayed") and replace(config, depth=4).fp8
    assert TrainConfig(fp8=True, fp8_recipe="rowwise").recipe == "rowwise"
    with pytest.raises(BadInput, match="give the one or the other"):
        TrainConfig(fp8=True, precision="bf16")


def test_names_are_those_of_bf16_and_casts_have_names() -> None:
    with torch.device("meta"):
        model, plain = GPT(SHAPE, fp8(parse_recipe("delayed:bf16=h.3+h.*.attn.c_proj+h.1.mlp.c_fc"))), GPT(SHAPE, bf16())
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    assert model.parameter_counts() == plain.parameter_counts() and model.flop_counts() == plain.flop_counts()
    scaling = model.scaling
    assert isinstance(scaling, Scaling)
    layers = [
        f"transformer.h.{i}.{part}" for i in range(3) for part in (("attn.qkv", "mlp.c_proj") if i == 1 else ("attn.qkv", "mlp"))
    ]
    assert list(scaling.layers) == [*layers, "lm_head"]
    assert scaling.names[:4] == [
        "the input of transformer.h.0.attn.qkv", "the weight of transformer.h.0.attn.qkv",
        "the gradient that reaches transformer.h.0.attn.qkv", "the input of transformer.h.0.mlp.c_fc",
    ]  # fmt: skip
    assert model.precision.describe()["GEMMs left in bf16"] == "h.3, h.*.attn.c_proj, h.1.mlp.c_fc (24 of 51 GEMMs)"


def test_initial_values_are_those_of_bf16_rounded() -> None:
    ours, plain = GPT(SHAPE, fp8(RECIPES["delayed"])), GPT(SHAPE, bf16())
    ours.init_weights(7), plain.init_weights(7)
    theirs = dict(plain.named_parameters())
    assert all(torch.equal(p, theirs[name].to(p.dtype)) for name, p in ours.named_parameters())


def test_evaluation_and_decoding_take_any_number_of_tokens() -> None:
    model = GPT(SHAPE, fp8(RECIPES["delayed"], emulated=True))
    model.init_weights()
    plain = GPT(SHAPE, bf16())
    plain.load_state_dict(model.state_dict())
    ids = torch.randint(512, (1, 13))
    assert float((model.logits(ids) - plain.logits(ids)).abs().max()) < 0.05
    assert not any(getattr(model.scaling, "seen"))  # noqa: B009


# ------------------------------------------------------------------------------------------------------------------ runs


@pytest.fixture
def config(torch_texts: str) -> TrainConfig:
    return TrainConfig(
        data=torch_texts, depth=3, aspect_ratio=32, head_dim=32, max_seq_len=64, device_batch_size=16, total_batch_size=1024,
        num_iterations=30, warmup_steps=5,
        matrix_lr=0.1, embedding_lr=1.0, unembedding_lr=0.03, scalar_lr=0.5,  # so small a batch divides them by 22
        eval_every=-1, eval_tokens=1024, sample_every=-1, core_metric_every=-1,
        precision=PRECISION, recipe="delayed", model_tag="own",
    )  # fmt: skip


def losses(tag: str) -> list[float]:
    return [record["loss"] for record in metrics.read(base_dir() / "base_checkpoints" / tag) if record["kind"] == "step"]


def messages(tag: str) -> str:
    return "\n".join(str(record.get("text", record)) for record in metrics.read(base_dir() / "base_checkpoints" / tag))


def saved(tag: str, step: int) -> dict[str, Tensor]:
    directory = base_dir() / "base_checkpoints" / tag / f"step_{step:06d}"
    return {f"{path.name}:{k}": v for path in sorted(directory.glob("*.safetensors")) for k, v in load_file(path).items()}


class TestRuns:
    pytestmark = on_device

    def test_heads_in_their_projections_gemm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In a whole model, fewer heads for k and v and value embeddings included: as by two kernels, but for a rounding."""
        device = torch.device("cuda" if HAS_FP8 else "cpu")
        ids = torch.randint(512, (2, 65), generator=torch.Generator().manual_seed(1)).to(device)
        results = []
        for sizes in ((64,), ()):
            monkeypatch.setattr("nvfp8.fp8_layers.FUSED_HEADS", sizes)
            precision = fp8(RECIPES["delayed"], emulated=not HAS_FP8)
            model = build_model(GPTConfig(64, 512, 4, 4, 2, 256, "SL"), precision, device)
            for block in model.blocks:  # zeros would let nothing come back to the heads
                torch.nn.init.eye_(block.attn.c_proj.weight)
            for _ in range(2):  # the second with a history
                model.zero_grad()
                loss = model(ids[:, :-1], ids[:, 1:])
                loss.backward()
                assert model.scaling.update() == []
            watched = {name: p for name, p in model.named_parameters() if ".attn.c_" in name or "value_embeds" in name}
            results.append({"loss": loss.detach()} | {name: p.grad.float() for name, p in watched.items()})
            assert bool(model.logits(ids[:, :-1]).isfinite().all()), "outside of FP8"
        fused, apart = results
        errors = {key: float((fused[key] - apart[key]).norm() / apart[key].norm()) for key in apart}
        assert len(errors) == 1 + 4 * 4 + 2 and errors["transformer.h.0.attn.c_k.weight"] > 0
        # A rounding to bf16 moves casts behind it to the next code now and then: less than FP8's own noise, 17 dB.
        assert max(errors.values()) < 0.14 and errors["loss"] < 2.0**-9, errors

    def test_thirty_steps_beside_bf16(self, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        # At its own rate, which does not shrink with the batch, backout_lambda passes at step 20 the point where nothing is left
        # of the stream in front of the head. The loss jumps by 1 then, in fp32 too, and roundings decide in which step.
        def slow_backout(*arguments: Any, **more: Any) -> list[dict[str, Any]]:
            result = groups(*arguments, **more)
            next(group for group in result if group["name"] == "smear_backout").update(lr=0.002, initial_lr=0.002)
            return result

        monkeypatch.setattr("nanochat.train.groups", slow_backout)
        train(replace(config, precision="bf16", recipe="auto", model_tag="plain"))
        plain = torch.tensor(losses("plain"))
        for name in ("delayed", "current", "e4m3", "rowwise", "delayed:bf16=h.0+h.*.mlp.c_proj:wgrad"):
            tag = name.replace(":", "-").replace("*", "x")
            train(replace(config, recipe=name, model_tag=tag))
            ours = torch.tensor(losses(tag))
            assert ours[-5:].mean() < ours[0] - 0.5
            gap = ((ours - plain).abs() / plain).max()
            print(f"{name}: largest gap to bf16 {gap:.2%}, last losses {ours[-1]:.4f} and {plain[-1]:.4f}")
            assert gap < 0.02, (name, gap)
        kept = "h.0, h.*.mlp.c_proj:wgrad (14 of 39 GEMMs; 2 layers with some of theirs in FP8 are not fused)"
        assert f"GEMMs left in bf16 {kept}" in messages(tag)
        state = json.loads((find(base_dir() / "base_checkpoints" / tag, None).path / "state.json").read_text())
        assert state["layers"]["GEMMs left in bf16"] == kept

    @pytest.mark.parametrize(("name", "early"), [("delayed", False), ("delayed", True), ("current", False)])
    def test_a_resumed_run_equals_the_uninterrupted_one(
        self, config: TrainConfig, name: str, early: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        casts: list[Projection] = []
        original = Projection._cast
        monkeypatch.setattr(Projection, "_cast", lambda self: casts.append(self) or original(self))
        monkeypatch.setattr(ahead, "compile_kernels", lambda *_: None)  # its miniature casts weights too, on a GPU
        config = replace(config, aspect_ratio=40, recipe=name, num_iterations=6, deterministic=True, save_every=3, keep=5)
        config = replace(config, update_early=early)
        train(replace(config, model_tag="whole"))
        # Optimizers write the copies of 4 projections a block, of which 2 begin with zeros, and of the head, once there is a
        # history: updates within backward come before the first step's entry.
        written = name == "delayed" and (HAS_FP8 or not torch.cuda.is_available())
        assert len(casts) == ((1 + early) * (3 * 4 + 1) + 3 * 2 if written else 6 * (3 * 4 + 1))
        train(replace(config, model_tag="parts"))
        for step in (6,):
            for path in (base_dir() / "base_checkpoints" / "parts").glob(f"step_{step:06d}"):
                path.rename(path.with_suffix(".moved"))
        train(replace(config, model_tag="parts", resume=True))
        one, other = saved("whole", 6), saved("parts", 6)
        assert one.keys() == other.keys()
        assert ("scaling.safetensors:transformer.h.0.mlp.scale" in one) == (name == "delayed")
        assert [key for key in one if not torch.equal(one[key], other[key])] == []
        assert losses("whole") == losses("parts")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="gloo and CPU tensors")
    def test_two_ranks_see_what_one_sees(self, config: TrainConfig, train_on_two_ranks: Callable[[TrainConfig], None]) -> None:
        """A step's amaxes do not depend on how its rows are cut into micro-batches and ranks."""
        config = replace(config, total_batch_size=2048, num_iterations=1, model_tag="two")
        train_on_two_ranks(config)
        train(replace(config, deterministic=True, model_tag="one"))
        one, two = ({k: v for k, v in saved(tag, 1).items() if k.startswith("scaling")} for tag in ("one", "two"))
        assert one.keys() == two.keys() and len(one) == 2 * (3 * config.depth + 1)
        assert [key for key in one if not torch.equal(one[key], two[key])] == []

    def test_a_history_of_another_length_is_refused(self, config: TrainConfig) -> None:
        train(replace(config, num_iterations=2))
        with pytest.raises(BadInput, match=r"amax_history is \(16, 3\), \(4, 3\) is needed"):
            train(replace(config, num_iterations=4, recipe="delayed:amax_history_len=4", resume=True))

    def test_checkpoints_move_between_precisions(self, config: TrainConfig) -> None:
        config = replace(config, num_iterations=4)
        train(config)
        train(replace(config, precision="bf16", recipe="auto", num_iterations=6, resume=True))
        train(replace(config, num_iterations=8, resume=True))
        values = losses("own")
        assert len(values) == 8 and values[-1] < values[0]
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        ids = torch.randint(512, (2, 64), device=device)
        results = [load_model("own", None, device, name)[0].logits(ids) for name in (PRECISION, "bf16", "fp32")]
        ours, plain = ((logits - results[2]).norm() / results[2].norm() for logits in results[:2])
        assert ours < 1.2 * plain < 0.1, (ours, plain)

    def test_a_cast_that_was_not_finite_refuses_the_step(self, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is cast saturates, so an overflow may leave all gradients finite: it is named, and the weights stay."""
        update = Scaling.update

        def overflow(self: Scaling) -> list[str]:
            assert self.amax is not None
            if calls.append(0) or len(calls) == 2:
                self.amax[7] = math.inf
            return update(self)

        calls: list[int] = []
        monkeypatch.setattr(Scaling, "update", overflow)
        train(replace(config, num_iterations=3, save_every=1, keep=5))
        line = "step 1: the input of transformer.h.0.attn.qkv, cast to FP8, is not finite, the step is not applied"
        name = next(line for line in messages("own").splitlines() if "is not finite" in line)
        assert name.startswith("step 1: the ") and "cast to FP8, is not finite, the step is not applied (1 in a row)" in name, line
        before, after = (saved("own", step) for step in (1, 2))
        assert [key for key in before if not torch.equal(before[key], after[key])] == []
