"""Whole runs of a tiny model: what they leave behind, and that interruptions, bad steps and ranks change nothing.

On a GPU the same tests run there, with --deterministic: equal means bit for bit.
"""

import gc
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from safetensors.torch import load_file

from nanochat import ahead, checkpoint, durable, metrics
from nanochat import train as training
from nanochat.dataset import base_dir
from nanochat.errors import BadInput
from nanochat.gpt import GPT
from nanochat.tokenizer import Tokenizer
from nanochat.train import train
from nanochat.train_config import TrainConfig

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
WORDS = ("fast", "small", "kernel", "stream", "tensor", "loss", "step", "scale", "token", "weight", "cast", "norm")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """120 documents of a tiny language, and a tokenizer for it in the base directory."""
    generator = torch.Generator().manual_seed(0)
    texts = []
    for _ in range(120):
        length = int(torch.randint(20, 120, (1,), generator=generator))
        ids = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        texts.append(" ".join(WORDS[i] for i in ids))
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    Tokenizer.train(texts, 300).save(base_dir() / "tokenizer")
    return path


@pytest.fixture
def config(data: Path) -> TrainConfig:
    return TrainConfig(
        data=str(data), depth=2, aspect_ratio=32, head_dim=32, max_seq_len=32, device_batch_size=4, total_batch_size=256,
        num_iterations=8, warmup_steps=2, matrix_lr=0.5, embedding_lr=5, eval_every=4, eval_tokens=512, core_metric_every=-1,
        model_tag="tiny", deterministic=True, precision="bf16" if torch.cuda.is_available() else "auto",
    )  # fmt: skip


def flags(config: TrainConfig) -> list[str]:
    """The command line that says the same."""
    result = []
    for name, value in vars(config).items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            result.append(flag)
        elif value not in (False, None, ""):
            result += [flag, str(value)]
    return result


def runs() -> Path:
    return base_dir() / "base_checkpoints"


def losses(tag: str = "tiny") -> list[float]:
    return [record["loss"] for record in metrics.read(runs() / tag) if record["kind"] == "step"]


def evaluations(tag: str = "tiny") -> list[tuple[int, float]]:
    return [(record["step"], record["bpb"]) for record in metrics.read(runs() / tag) if record["kind"] == "eval"]


def tensors(step: int, tag: str = "tiny") -> dict[str, torch.Tensor]:
    directory = runs() / tag / f"step_{step:06d}"
    return load_file(directory / "model.safetensors") | load_file(directory / "optim_rank0.safetensors")


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_run_learns_and_leaves_what_it_promises(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    train(replace(config, num_iterations=30))
    values = losses()
    assert len(values) == 30 and values[-1] < values[0] - 1
    directory = runs() / "tiny"
    assert {"metrics.jsonl", "report.png", "tensorboard", "step_000030"} <= {path.name for path in directory.iterdir()}
    evaluations = [record["bpb"] for record in metrics.read(directory) if record["kind"] == "eval"]
    assert evaluations[-1] < evaluations[0]
    out = capsys.readouterr().out
    for fragment in ("precision", "attention", "residual stream", "validation", "sample: ", "token frequencies alone", "saved"):
        assert fragment in out
    if not torch.cuda.is_available():
        assert "attention sdpa (fa3: it needs a CUDA device; cudnn: it needs a CUDA device)" in out
    state = checkpoint.find(directory).state
    assert {"model_config", "train_config", "tokenizer", "data", "progress", "rng", "environment", "plan", "layers"} <= state.keys()


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(config: TrainConfig) -> None:
    train(replace(config, save_every=3))
    whole, values = tensors(8), losses()
    for name in ("step_000006", "step_000008"):
        (runs() / "tiny" / name).rename(runs() / f"{name}.away")
    train(replace(config, resume=True))
    assert_equal(tensors(8), whole)
    assert losses() == values
    train(replace(config, resume_from_step=3))
    assert_equal(tensors(8), whole)
    # What came after step 3 was set aside, so --resume cannot jump to the abandoned run.
    assert (runs() / "tiny" / "step_000008.abandoned1").is_dir() and checkpoint.steps(runs() / "tiny") == [3, 8]


def test_resuming_repeats_what_was_due_and_says_what_changed(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    train(replace(config, save_every=4))
    whole = evaluations()
    assert [step for step, _ in whole] == [0, 4, 8]
    (runs() / "tiny" / "step_000008").rename(runs() / "away")
    train(replace(config, resume=True, save_every=2, profile=True))
    assert evaluations() == whole
    assert "changed since it was saved: save_every 4 -> 2\n" in capsys.readouterr().out  # a profile changes no result


def test_wandb_that_is_missing_moves_nothing(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    train(replace(config, num_iterations=2))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(BadInput, match="wandb is not installed"):
        train(replace(config, run="mine"))
    assert checkpoint.find(runs() / "tiny").step == 2


def test_a_bad_value_is_named_where_it_arose(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A NaN of block 0's MLP backward reaches resid_lambdas and the tables too; block 1 and the head stay finite."""
    from nvfp8 import layers

    real, calls = layers.weight_gradient, iter(range(10**6))

    def spoiled(d_out: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        # Backward's fifth matrix: block 1 takes c_proj, c_fc, attention's c_proj and qkv before. Gates read at most 24 channels.
        if x.shape[-1] > 24 and next(calls) == 4:
            d_out.fill_(float("nan"))
        return real(d_out, x, dtype)

    monkeypatch.setattr(ahead, "compile_kernels", lambda *_: None)  # it runs backward too, on a GPU
    monkeypatch.setattr(layers, "weight_gradient", spoiled)
    train(replace(config, num_iterations=1))
    assert "the gradient of transformer.h.0.mlp.c_" in capsys.readouterr().out


def test_a_damaged_newest_checkpoint_is_named_and_skipped(config: TrainConfig, capfd: pytest.CaptureFixture[str]) -> None:
    train(replace(config, save_every=3))
    path = runs() / "tiny" / "step_000008" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    train(replace(config, resume=True))
    assert "skipping a damaged checkpoint" in capfd.readouterr().err
    assert path.stat().st_size == (runs() / "tiny" / "step_000006" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_and_the_run_goes_on(config: TrainConfig, number: signal.Signals) -> None:
    config = replace(config, num_iterations=5000, eval_every=-1)
    process = forked.start(["-m", "scripts.base_train", *flags(config)], os.environ)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 0003"):
            process.send_signal(number)
            break
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    saved = checkpoint.find(runs() / "tiny")
    assert f"stopped by {number.name}: step {saved.step} is saved" in rest and saved.step >= 4
    train(replace(config, resume=True, num_iterations=saved.step + 2))
    assert len(losses()) == saved.step + 2


def test_a_signal_during_an_evaluation_abandons_it_and_resuming_repeats_it(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: GPT, *batch: torch.Tensor) -> torch.Tensor:
        batches.append(self)
        if len(batches) == 3:  # the first of step 4's two, after both of step 0's
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *batch)

    batches: list[GPT] = []
    real, config = GPT.token_losses, replace(config, device_batch_size=1)
    train(replace(config, model_tag="whole"))
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(GPT, "token_losses", interrupted)
        train(config)
    assert exit_.value.code == 128 + signal.SIGTERM and len(batches) == 3
    captured = capfd.readouterr()
    assert captured.err.count("SIGTERM: the run saves and stops at the next chance") == 1
    assert "stopped by SIGTERM: step 4 is saved" in captured.out and [step for step, _ in evaluations()] == [0]
    train(replace(config, resume=True))
    assert evaluations() == evaluations("whole") and losses() == losses("whole")


def test_what_a_run_sets_for_the_process_is_put_back(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def settings() -> tuple[object, ...]:
        memory = torch.utils.deterministic.fill_uninitialized_memory
        workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
        return gc.isenabled(), gc.get_freeze_count() > 0, torch.are_deterministic_algorithms_enabled(), memory, workspace

    def update(self: training.Run, multiplier: float) -> None:
        seen.append(settings())
        if len(seen) == 3:
            raise RuntimeError("a bug")

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    gc.unfreeze()  # torch.compile may have frozen what an earlier test left
    before = (True, False, False, True, None)
    seen: list[tuple[object, ...]] = []
    assert settings() == before
    monkeypatch.setattr(training.Run, "_set_rates", update)
    with pytest.raises(RuntimeError, match="a bug"):
        train(config)
    assert seen[1] == (False, True, True, False, ":4096:8")
    assert settings() == before
    seen.clear()
    train(replace(config, num_iterations=2, deterministic=False))
    assert seen[1] == (False, True, False, True, None)
    assert settings() == before


def test_a_run_without_evaluation_leaves_valid_json_and_resumes(config: TrainConfig) -> None:
    def state(step: int) -> Path:
        return runs() / "tiny" / f"step_{step:06d}" / "state.json"

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    train(replace(config, num_iterations=2, eval_every=-1))
    assert json.loads(state(2).read_text(), parse_constant=refuse)["progress"]["best_bpb"] is None
    # As versions before wrote it.
    manifest = json.loads((state(2).parent / "manifest.json").read_text())
    text = state(2).read_text().replace('"best_bpb": null', '"best_bpb": Infinity')
    manifest["files"]["state.json"] = durable.write(state(2), [text.encode()])
    (state(2).parent / "manifest.json").write_text(json.dumps(manifest))
    train(replace(config, num_iterations=3, eval_every=-1, resume=True))
    assert json.loads(state(3).read_text(), parse_constant=refuse)["progress"]["best_bpb"] is None
    train(replace(config, num_iterations=4, eval_every=4, resume=True))
    assert evaluations() == [(4, json.loads(state(4).read_text(), parse_constant=refuse)["progress"]["best_bpb"])]


def test_a_bad_gradient_is_named_and_its_step_not_applied(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = training.parallel.check_gradients

    def poisoned(parameters: dict[str, torch.Tensor], *more: Any) -> Any:
        if len(seen) == 2:
            parameters["transformer.h.1.mlp.c_fc.weight"].grad.view(-1)[5] = float("inf")
        seen.append(None)
        return real(parameters, *more)

    seen: list[None] = []
    monkeypatch.setattr(training.parallel, "check_gradients", poisoned)
    train(replace(config, num_iterations=3, save_every=2))
    assert "step 2: the gradient of transformer.h.1.mlp.c_fc.weight is not finite" in capsys.readouterr().out
    assert_equal(tensors(3), tensors(2))


def test_too_many_bad_steps_stop_the_run_with_the_last_checkpoint_intact(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward, count = GPT.forward, iter(range(10**6))

    def diverging(self: GPT, *arguments: Any) -> torch.Tensor:
        return forward(self, *arguments) * (float("nan") if next(count) >= 2 * 4 else 1.0)  # two micro-batches a step

    monkeypatch.setattr(GPT, "forward", diverging)
    with pytest.raises(SystemExit) as exit_:
        train(replace(config, save_every=2, max_bad_steps=3, no_cuda_graphs=True))  # a graph would not ask Python for the loss
    assert exit_.value.code == 1
    out = capsys.readouterr().out
    assert "step 4: the loss is not finite" in out
    assert "(3 in a row)" in out and "stopping after 3 such steps" in out
    saved = checkpoint.find(runs() / "tiny")
    assert all(value.isfinite().all() for value in saved.model().values())


def test_accumulation_does_not_change_the_loss(config: TrainConfig) -> None:
    train(replace(config, device_batch_size=8, model_tag="one"))
    train(replace(config, device_batch_size=2, model_tag="four"))
    assert losses("one") == pytest.approx(losses("four"), rel=1e-2 if torch.cuda.is_available() else 1e-5)


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="NCCL needs a GPU for each of two ranks, here is one")
def test_two_ranks_give_the_losses_of_one(config: TrainConfig) -> None:
    """Over gloo on a CPU, over NCCL on two GPUs, where tables' gradients are summed in bf16 in another order."""
    tolerance = 1e-2 if torch.cuda.is_available() else 1e-5
    train(config)
    other = replace(config, model_tag="two", save_every=4)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29571"]
    command = [*torchrun, "-m", "scripts.base_train", "--", *flags(other)]  # else torchrun takes --run for one of its own
    subprocess.run(command, check=True, env=os.environ, stdout=subprocess.DEVNULL)
    assert losses("two") == pytest.approx(losses(), rel=tolerance)
    # Another number of ranks goes on from its checkpoint.
    (runs() / "two" / "step_000008").rename(runs() / "away")
    train(replace(other, resume=True))
    assert losses("two") == pytest.approx(losses(), rel=tolerance)


def test_a_new_run_leaves_an_earlier_one_of_its_name_whole(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    train(replace(config, num_iterations=2))
    train(replace(config, num_iterations=3))
    assert checkpoint.find(runs() / "tiny.1").step == 2 and checkpoint.find(runs() / "tiny").step == 3
    assert "held an earlier run: it is now" in capsys.readouterr().out


def test_a_full_disk_while_saving_stops_with_one_line(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    train(replace(config, num_iterations=2))
    with monkeypatch.context() as patch, pytest.raises(BadInput, match="the disk is full; free space there and resume"):
        patch.setattr(checkpoint.durable, "write", full)
        train(replace(config, resume=True, num_iterations=4))
    train(replace(config, resume=True, num_iterations=4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "--depth is 0"),
        ({"depth": 30, "aspect_ratio": 1, "head_dim": 2}, "reference of depth 12 cannot be built"),
        ({"fp8": True, "precision": "bf16"}, "give the one or the other"),
        ({"num_iterations": -1, "target_param_data_ratio": -1}, "nothing says how long to train"),
        ({"total_batch_size": 200}, "the nearest is --total-batch-size 256"),
        ({"window_pattern": "SX"}, "must consist of S and L"),
        ({"attention": "cudnn"}, "cannot run here"),
        ({"data": "nowhere"}, "no such data 'nowhere'"),
        ({"tokenizer": "nowhere"}, "no tokenizer in nowhere"),
        ({"resume": True}, "no checkpoint"),
        ({"resume_from_step": 7}, "no checkpoint"),
        ({"resume": True, "resume_from_step": 7}, "use one of them"),
        ({"matrix_lr": float("nan")}, "--matrix-lr is nan"),
        ({"warmdown_ratio": 1.5}, "--warmdown-ratio is 1.5"),
        ({"keep": 0}, "--keep is 0"),
        ({"device_type": "tpu"}, "must be cuda or cpu"),
    ],
)
def test_bad_input(config: TrainConfig, change: dict[str, Any], message: str) -> None:
    if change == {"attention": "cudnn"} and torch.cuda.is_available():
        change = {"attention": "plain"}
    with pytest.raises(BadInput, match=message) as error:
        train(replace(config, **change))
    assert "\n" not in str(error.value)
    assert not runs().exists(), "a refused run must leave nothing behind"


def test_resuming_with_another_shape_or_tokenizer_is_refused(config: TrainConfig, data: Path) -> None:
    train(config)
    with pytest.raises(BadInput, match="holds another shape"):
        train(replace(config, resume=True, window_pattern="L"))
    other = base_dir() / "other"
    Tokenizer.train(["".join(reversed(data.read_text()))], 300).save(other)
    with pytest.raises(BadInput, match="is not the one that"):
        train(replace(config, resume=True, tokenizer=str(other)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--depth", "deep"], "invalid int value: 'deep'"),
        (["--precision", "fp4"], "invalid choice: 'fp4'"),
        (["--depth", "0"], "--depth is 0: it must be at least 1"),
        (["--precision", "fp8", "--device-type", "cpu", "--tokenizer", "nowhere"], "--precision fp8: it needs a CUDA device"),
    ],
)
def test_the_command_line_refuses_in_one_line_with_status_2(arguments: list[str], message: str) -> None:
    done = forked.run(["-m", "scripts.base_train", *arguments], os.environ)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and done.stderr.count("\n") == 1
