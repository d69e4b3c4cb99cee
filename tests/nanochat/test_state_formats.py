"""--state-dtype, --master-weights and --update-early: what they mean, what they refuse, and whole runs with them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nanochat import ahead, checkpoint, metrics
from nanochat.build import build_optimizers
from nanochat.dataset import base_dir
from nanochat.errors import BadInput
from nanochat.gpt import GPT, GPTConfig
from nanochat.parallel import World
from nanochat.param_groups import groups, ownership
from nanochat.state_formats import NANOCHAT, SMALL, StateFormats, default_formats, parse_formats
from nanochat.tokenizer import Tokenizer
from nanochat.train import Run, train
from nanochat.train_config import TrainConfig
from nvfp8 import hardware
from nvfp8.precision import bf16, fp8, fp32, te
from nvfp8.recipe import RECIPES
from nvfp8.state import codec_of, read_weight
from scripts.base_train import _parser

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


def test_one_format_is_for_all_states_and_pairs_are_for_those_they_name() -> None:
    for auto in (NANOCHAT, SMALL):
        assert parse_formats("auto", "auto", auto) == auto
        assert parse_formats("nanochat", "fp32", auto) == StateFormats(master="fp32")
        assert parse_formats("e4m3", "bf16+8", auto) == StateFormats("e4m3", "e4m3", "e4m3", "bf16+8") == SMALL
        assert parse_formats("fp32", "auto", auto) == StateFormats("fp32", "fp32", "fp32", auto.master)
        named = parse_formats("exp_avg=e5m2,momentum=bf16", "auto", auto)
        assert named == StateFormats("e5m2", auto.exp_avg_sq, "bf16", auto.master)
        named = parse_formats("exp_avg=auto,exp_avg_sq=nanochat", "fp32", auto)
        assert named == StateFormats(auto.exp_avg, None, auto.momentum, "fp32")


def test_what_auto_is_goes_by_the_precision() -> None:
    own = fp8(RECIPES["delayed"], emulated=True)
    for precision in (fp32(), bf16(), te(RECIPES["delayed"])):
        assert default_formats(precision) == TrainConfig().formats(precision) == NANOCHAT
    assert default_formats(own) == TrainConfig().formats(own) == SMALL and SMALL.stored_by(own, "cpu") == own
    assert default_formats(own, "te-bf16") == TrainConfig(adamw="te-bf16").formats(own) == NANOCHAT
    assert TrainConfig(state_dtype="nanochat", master_weights="fp32").formats(own) == StateFormats(master="fp32")


@pytest.mark.parametrize(
    ("state", "master", "message"),
    [
        ("fp9", "auto", "there is no 'fp9'; formats are auto, nanochat, fp32, bf16, e4m3, e5m2"),
        ("exp_avg=", "auto", "there is no ''"),
        ("exp_avg=e4m3,e5m2", "auto", "give one format for all, or pairs as in"),
        ("momentum=e4m3,momentum=fp32", "auto", "at most once"),
        ("momentum=auto,momentum=fp32", "auto", "at most once"),
        ("velocity=e4m3", "auto", "each of exp_avg, exp_avg_sq, momentum"),
        ("e4m3", "bf16+4", "there are auto, fp32, bf16, bf16\\+8, bf16\\+16"),
    ],
)
def test_what_does_not_exist_is_refused_in_one_line(state: str, master: str, message: str) -> None:
    with pytest.raises(BadInput, match=message) as error:
        TrainConfig(state_dtype=state, master_weights=master)
    assert "\n" not in str(error.value)


def test_masters_decide_how_a_precision_stores_matrices() -> None:
    engine, quantized = te(RECIPES["delayed"]), te(RECIPES["delayed"], weights="fp8")
    for precision in (fp32(), bf16(), engine, quantized):
        assert NANOCHAT.stored_by(precision, "cpu") == precision == StateFormats(master="fp32").stored_by(precision, "cpu")
    for kept in ("bf16", "bf16+8", "bf16+16"):
        formats = StateFormats(master=kept)
        assert formats.stored_by(bf16(), "cpu") == replace(bf16(), matrix_dtype=torch.bfloat16)
        assert formats.stored_by(engine, "cpu") == engine
        with pytest.raises(
            BadInput, match=r"computes with fp32 matrices, which are whole; it goes with --precision bf16, te or fp8"
        ):
            formats.stored_by(fp32(), "cpu")
        with pytest.raises(BadInput, match="use --te-weights bf16"):
            formats.stored_by(quantized, "cpu")
        with pytest.raises(BadInput, match="goes with --adamw own"):
            formats.stored_by(engine, "cpu", "te-fp8")
    with pytest.raises(BadInput, match="give --state-dtype momentum="):
        StateFormats(exp_avg="e4m3").stored_by(engine, "cpu", "te-bf16")
    assert StateFormats(momentum="e4m3").stored_by(engine, "cpu", "te-bf16") == engine


def test_a_gpu_without_e4m3_is_told_what_it_can_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hardware.unstorable("e4m3", (8, 9)) is None and hardware.unstorable("e5m2", (8, 0)) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    with pytest.raises(BadInput, match=r"^--state-dtype momentum=e4m3: .* 8\.6: use e5m2, bf16 or fp32$"):
        StateFormats(momentum="e4m3").stored_by(bf16(), "cuda")
    StateFormats(momentum="e5m2").stored_by(bf16(), "cuda")


def test_state_of_d24_takes_what_the_documents_say() -> None:
    def sizes(formats: StateFormats) -> tuple[float, float, dict[str, float]]:
        """GiB of state, of what is beside weights, and bytes a parameter of each optimizer with weights and bf16 gradients."""
        precision = formats.stored_by(bf16(), "cpu")
        with torch.device("meta"):
            model = GPT(GPTConfig.from_depth(24), precision)
        made = groups(model, model.config, weight_decay=0.0)
        state, beside, each = 0, 0, {}
        for optimizer in build_optimizers(made, ownership(made, 1), 0, torch.bfloat16, formats=formats):
            entries = {name: value.nbytes for name, value in optimizer.named_state().items()}
            extra = sum(size for name, size in entries.items() if name.endswith(("master", "remainder")))
            state, beside = state + sum(entries.values()) - extra, beside + extra
            parameters = [p for _, p in optimizer.named_parameters()]
            held = sum(entries.values()) + sum(2 * p.nbytes for p in parameters)
            each[optimizer.kind] = held / sum(p.numel() for p in parameters)
        return state / 2**30, beside / 2**30, each

    state, beside, each = sizes(SMALL)
    assert state <= 2.05 and beside == pytest.approx(0.68, abs=0.01)
    assert each["muon"] <= 6.1 and each["adamw"] <= 7.1
    assert sizes(NANOCHAT)[0] == pytest.approx(5.35, abs=0.01) and sizes(NANOCHAT)[1] == 0
    assert state == pytest.approx(2.01, abs=0.01)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """A tiny model on a tiny language, in bf16; a step is one micro-batch."""
    generator = torch.Generator().manual_seed(0)
    words = ("fast", "small", "kernel", "stream", "tensor", "loss", "step", "scale")
    texts = [" ".join(words[i] for i in torch.randint(8, (60,), generator=generator).tolist()) for _ in range(100)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    Tokenizer.train(texts, 290).save(base_dir() / "tokenizer")
    return TrainConfig(
        data=str(tmp_path / "texts.jsonl"), depth=2, aspect_ratio=32, head_dim=32, max_seq_len=32, device_batch_size=4,
        total_batch_size=128, num_iterations=6, warmup_steps=2, eval_every=-1, sample_every=-1, core_metric_every=-1,
        model_tag="tiny", deterministic=True, precision="bf16",
    )  # fmt: skip


FP8 = {"state_dtype": "e4m3", "master_weights": "bf16+8"}


def directory(tag: str, step: int) -> Path:
    return base_dir() / "base_checkpoints" / tag / f"step_{step:06d}"


def tensors(tag: str = "tiny", step: int = 6) -> dict[str, Tensor]:
    path = directory(tag, step)
    return load_file(path / "model.safetensors") | dict(checkpoint.Checkpoint(path).optimizer())


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [
        name for name in one if one[name].dtype != other[name].dtype or not torch.equal(one[name].float(), other[name].float())
    ] == []


def losses(tag: str = "tiny") -> list[float]:
    return [r["loss"] for r in metrics.read(base_dir() / "base_checkpoints" / tag) if r["kind"] == "step"]


def test_a_run_stores_what_was_asked_for_and_says_so(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    train(replace(config, **FP8, num_iterations=25))
    values = losses()
    assert values[-1] < values[0] - 0.5
    out = capsys.readouterr().out
    assert "optimizer state exp_avg e4m3, exp_avg_sq e4m3, momentum e4m3; master weights bf16+8" in out
    saved = tensors(step=25)
    matrix = "transformer.h.0.attn.c_q.weight"
    assert saved[matrix].dtype == saved["lm_head.weight"].dtype == torch.bfloat16
    assert saved[f"{matrix}.momentum"].dtype == saved["lm_head.weight.exp_avg_sq"].dtype == torch.float8_e4m3fn
    assert saved[f"{matrix}.remainder"].dtype == saved["lm_head.weight.remainder"].dtype == torch.int8
    assert saved["transformer.wte.weight.exp_avg"].dtype == torch.float8_e4m3fn
    assert "transformer.wte.weight.remainder" not in saved and saved["resid_lambdas"].dtype == torch.float32
    state = checkpoint.Checkpoint(directory("tiny", 25)).state["train_config"]
    assert (state["state_dtype"], state["master_weights"]) == ("e4m3", "bf16+8")


def test_the_losses_of_fp8_state_are_close_to_those_of_fp32(config: TrainConfig) -> None:
    train(replace(config, num_iterations=20, model_tag="plain"))
    train(replace(config, num_iterations=20, **FP8))
    assert abs(sum(losses()[-5:]) / sum(losses("plain")[-5:]) - 1) < 0.02


@pytest.mark.parametrize("early", [False, True])
def test_it_resumes_bit_for_bit(config: TrainConfig, early: bool) -> None:
    config = replace(config, **FP8, update_early=early)
    train(replace(config, save_every=3))
    whole = tensors()
    directory("tiny", 6).rename(base_dir() / "away")
    train(replace(config, resume=True))
    assert_equal(whole, tensors())


CHANGES = [
    ({}, FP8),
    (FP8, {}),
    (FP8, {"precision": "fp32"}),
    ({"precision": "fp32"}, {"state_dtype": "exp_avg=e5m2,momentum=bf16", "master_weights": "bf16+16"}),
    ({"state_dtype": "e5m2", "master_weights": "bf16"}, {"state_dtype": "fp32", "master_weights": "bf16+8"}),
]


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_it_resumes_in_other_formats(
    config: TrainConfig, before: dict[str, Any], after: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    train(replace(config, **before, num_iterations=3))
    saved = tensors(step=3)
    capsys.readouterr()
    resumed = Run(replace(config, **after, num_iterations=3, resume=True), World(0, 1, torch.device(DEVICE)))
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("changed since it was saved: "))
    assert all(name in line for name in {*before, *after})
    state = {name: value for optimizer in resumed.optimizers for name, value in optimizer.state_tensors().items()}
    matrix = "transformer.h.1.mlp.c_fc.weight"
    was, now = (whole(tensors, matrix).cpu() for tensors in (saved, state | dict(resumed.parameters)))
    bits = {"bf16": 2.0**-7, "bf16+8": 2.0**-15}.get(after.get("master_weights", ""), 0.0)
    assert ((was - now).abs() <= bits * was.abs()).all()
    momentum = codec_of(state[f"{matrix}.momentum"].dtype)
    assert momentum.name == {"e4m3": "e4m3", "exp_avg=e5m2,momentum=bf16": "bf16"}.get(after.get("state_dtype", ""), "fp32")
    resumed.batches.close()
    assert resumed.metrics is not None
    resumed.metrics.close()
    train(replace(config, **after, resume=True))  # and goes on
    assert len(losses()) == 6


def whole(tensors: dict[str, Tensor], name: str) -> Tensor:
    return read_weight(tensors[name].detach(), tensors.get(f"{name}.master", tensors.get(f"{name}.remainder")))


# Updates in the middle of backward


@pytest.mark.parametrize("formats", [{}, FP8])
def test_updated_early_a_run_is_the_same_bit_for_bit(config: TrainConfig, formats: dict[str, str]) -> None:
    train(replace(config, **formats))
    train(replace(config, **formats, update_early=True, model_tag="early"))
    assert_equal(tensors(), tensors("early"))
    assert losses() == losses("early")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_batch_size": 256}, r"must be one micro-batch of one process, this one is 2 micro-batches on 1 ranks"),
        ({"te_weights": "fp8"}, "gradients reach their matrices past autograd.*use --te-weights bf16"),
        ({"adamw": "te-fp32"}, "updates tensor by tensor, --adamw te-fp32 all at once: use --adamw own"),
    ],
)
def test_a_step_that_cannot_be_updated_early_is_refused(config: TrainConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        train(replace(config, update_early=True, **changes))


def test_an_early_update_stops_at_a_gradient_that_is_not_finite(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The head and what else backward reached before are updated, the block that it comes from is not, nor what is behind."""
    name = "transformer.h.1.mlp.c_fc.weight"
    real = Run._backward_and_update

    def poisoned(self: Run, early: Any) -> Any:
        if self.progress.step == 2:
            parameter = self.parameters[name]
            handle = parameter.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0], device=DEVICE), torch.inf))
            result = real(self, early)
            handle.remove()
            return result
        return real(self, early)

    monkeypatch.setattr(Run, "_backward_and_update", poisoned)
    train(replace(config, update_early=True, num_iterations=3, save_every=2))
    out = capsys.readouterr().out
    assert f"step 2: the gradient of {name} is not finite, 2 of " in out and "parameters were updated before it" in out
    before, after = tensors(step=2), tensors(step=3)
    changed = {key.split(".exp_avg")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"lm_head.weight", "backout_lambda", "adamw.steps"}  # no matrix of Muon's was
    straight = replace(config, update_early=True, num_iterations=5, save_every=3, model_tag="straight")
    train(straight)
    expected = tensors("straight", 5)
    train(replace(straight, resume_from_step=3))
    assert_equal(expected, tensors("straight", 5))


def test_a_bad_loss_updates_nothing_early(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward, count = GPT.forward, iter(range(100))

    def diverging(self: GPT, *arguments: Any) -> Tensor:
        return forward(self, *arguments) * (float("nan") if next(count) == 2 else 1.0)

    monkeypatch.setattr(ahead, "compile_kernels", lambda *_: None)  # it calls forward too, on a GPU
    monkeypatch.setattr(GPT, "forward", diverging)
    train(replace(config, update_early=True, num_iterations=3, save_every=2))
    assert "step 2: the loss is not finite, the step is not applied (1 in a row)" in capsys.readouterr().out
    assert_equal(tensors(step=2), tensors(step=3))


# Ranks


@pytest.mark.skipif(DEVICE == "cuda", reason="gloo and CPU tensors")
def test_two_ranks_and_one_store_the_same_and_go_on_from_each_other(
    config: TrainConfig, train_on_two_ranks: Callable[[TrainConfig], None]
) -> None:
    """Ownership decides nothing: not how a tensor is rounded, and not whether a checkpoint can be loaded."""
    config = replace(config, **FP8, total_batch_size=256, num_iterations=2, model_tag="two")
    train_on_two_ranks(config)
    train(replace(config, model_tag="one"))
    assert [(directory(tag, 2) / "optim_rank1.safetensors").exists() for tag in ("one", "two")] == [False, True]
    one, two = tensors("one", 2), tensors("two", 2)
    # Gradients are summed in another order, in bf16, so values may differ by roundings; formats and shapes may not.
    assert {name: (value.dtype, value.shape) for name, value in one.items()} == {n: (v.dtype, v.shape) for n, v in two.items()}
    resumed = Run(replace(config, resume=True), World(0, 1, torch.device(DEVICE)))
    state = {name: value for optimizer in resumed.optimizers for name, value in optimizer.state_tensors().items()}
    assert_equal(state, {name: value for name, value in two.items() if name in state})
    resumed.batches.close()
    assert resumed.metrics is not None
    resumed.metrics.close()


def test_flags_are_those_of_the_configuration() -> None:
    args = _parser().parse_args(["--state-dtype", "e5m2", "--master-weights", "bf16", "--update-early"])
    assert (args.state_dtype, args.master_weights, args.update_early) == ("e5m2", "bf16", True)
    assert TrainConfig(**vars(args)).formats(bf16()) == StateFormats("e5m2", "e5m2", "e5m2", "bf16")
