"""The optimizers' step in a CUDA graph updates what single launches do; when it is captured, and when dropped."""

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanochat import checkpoint, metrics
from nanochat.adamw import AdamW
from nanochat.build import build_model, build_optimizers
from nanochat.dataset import base_dir
from nanochat.gpt import GPT, GPTConfig
from nanochat.micro_batches import MicroBatches
from nanochat.optimizer import NamedOptimizer
from nanochat.param_groups import groups, ownership, set_hyperparameters
from nanochat.process import make_deterministic, restored
from nanochat.state_formats import StateFormats
from nanochat.train import Run, train
from nanochat.train_config import TrainConfig
from nanochat.updates import Updates
from nvfp8 import copies
from nvfp8.optim.update import Replayed
from nvfp8.precision import Precision, bf16, fp8
from nvfp8.recipe import RECIPES
from nvfp8.scaling import Scaling

SHAPE = GPTConfig(32, 256, 2, 2, 2, 128, "SL")
FORMATS = [StateFormats("fp32", "fp32", "fp32", "fp32"), StateFormats("e4m3", "e4m3", "e4m3", "bf16+8")]


class Steps:
    """A model with its optimizers, a step at a time, on fixed tokens, by a schedule that changes every step."""

    def __init__(self, precision: Precision, device: str, formats: StateFormats, singly: str | None, shape: GPTConfig = SHAPE):
        precision = formats.stored_by(precision, device)
        self.model: GPT = build_model(shape, precision, torch.device(device))
        every = groups(self.model, shape, weight_decay=0.1)
        self.optimizers = build_optimizers(every, ownership(every, 1), 0, precision.compute_dtype, formats=formats)
        self.micro_batches = MicroBatches(self.model, singly)
        self.updates = Updates(self.optimizers, self.micro_batches)
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(shape.vocab_size, (8, 2, shape.sequence_len + 1), generator=generator).to(device)
        self.done = 0

    def set_rates(self) -> None:
        for optimizer in self.optimizers:
            set_hyperparameters(
                optimizer.param_groups, lr_multiplier=0.3 / (1 + self.done), muon_momentum=0.85 + 0.01 * self.done,
                muon_weight_decay=0.1 / (1 + self.done),
            )  # fmt: skip

    def step(self, count: int = 2, prepare: bool = False, refuse: bool = False) -> list[float]:
        """A step, which `prepare` prepares while its outcome is open, and `refuse` does not apply."""
        self.set_rates()
        losses = []
        self.micro_batches.begin()
        for i in range(count):
            tokens = self.tokens[(self.done * count + i) % len(self.tokens)]
            losses.append(self.micro_batches.run(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), 1 / count).clone())
        if prepare:
            self.updates.prepare()
        if refuse:
            self.model.scaling.forget()
        else:
            assert self.model.scaling.update() == []
            self.updates.step()
        self.model.zero_grad(set_to_none=True)
        self.done += 1
        return torch.stack(losses).tolist()

    def everything(self) -> dict[str, Tensor]:
        found = {name: p.detach() for name, p in self.model.named_parameters()}
        for optimizer in self.optimizers:
            found |= optimizer.state_tensors()
        return {**found, **self.model.scaling_state()}


def assert_equal(one: Steps, other: Steps) -> None:
    for (name, x), (_, y) in zip(one.everything().items(), other.everything().items(), strict=True):
        assert x.dtype == y.dtype and torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8)), name


# ------------------------------------------------------------------------------------------------------- on any machine


class Pretended(MicroBatches):
    """Micro-batches that claim to be graphs: gradients stay where they are, and what is captured is launched again."""

    captures = 0

    def run(self, inputs: Tensor, targets: Tensor, scale: float) -> Tensor:
        loss: Tensor = self.model(inputs, targets, scale)
        loss.backward()
        parameters = list(self.model.parameters())
        if self.replaying:
            self._gradients = self._gradients or [p.grad for p in parameters]
            for p, place in zip(parameters, self._gradients, strict=True):
                if p.grad is not place:
                    assert p.grad is not None and place is not None
                    p.grad = place.copy_(p.grad)
        return loss.detach()

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        return launch


def pretending(precision: Precision, formats: StateFormats) -> tuple[Steps, Pretended]:
    it = Steps(precision, "cpu", formats, None)
    pretended = Pretended(it.model, None)
    pretended.capturing = True
    it.micro_batches, it.updates = pretended, Updates(it.optimizers, pretended)
    return it, pretended


EMULATED = fp8(RECIPES["delayed"], emulated=True)


@pytest.mark.parametrize("formats", FORMATS, ids=lambda f: f.momentum)
def test_replayed_steps_update_all_that_single_ones_do(formats: StateFormats) -> None:
    """Copies of weights and their scales included: the losses of the next step would show it, and casts anew would end it.

    A step that is not applied in between leaves the graph as it is.
    """
    one, (other, pretended) = Steps(EMULATED, "cpu", formats, "to compare with"), pretending(EMULATED, formats)
    behind = []
    for step in range(7):
        if step == 5:
            assert one.step(1, refuse=True) == other.step(1, refuse=True)
        assert one.step(1) == other.step(1)
        behind.append(pretended.behind)
    assert_equal(one, other)
    assert behind[:3] == [None] * 3 and isinstance(behind[3], Replayed) and behind[3:] == [behind[3]] * 4
    assert pretended.captures == 1
    assert all(int(state["step"]) == 7 for optimizer in other.optimizers for state in optimizer.state.values())


@pytest.mark.parametrize("formats", FORMATS, ids=lambda f: f.momentum)
def test_prepared_steps_are_steps(formats: StateFormats, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is prepared once, whoever does it; one that is then not applied leaves nothing to the next, prepared or not."""
    calls: list[str] = []

    def noted(on: type, name: str) -> None:
        real = getattr(on, name)
        monkeypatch.setattr(on, name, lambda self: [calls.append(name), real(self)][1])

    noted(Replayed, "prepare"), noted(Updates, "step")
    one, (other, pretended) = Steps(EMULATED, "cpu", formats, "to compare with"), pretending(EMULATED, formats)
    for _ in range(4):
        assert one.step(1) == other.step(1, prepare=True)
    assert calls == ["step"] * 8 + ["prepare"] and pretended.captures == 1  # until then there is nothing to prepare
    kept = pretended.behind
    for ahead, refused in [(True, False), (False, False), (True, True), (False, False), (True, True), (True, True), (True, False)]:
        before = [(p, p._version, p.clone()) for p in other.model.parameters()]
        expected = one.step(1, refuse=refused)
        calls.clear()
        assert other.step(1, prepare=ahead, refuse=refused) == expected
        assert calls == [*["prepare"] * ahead, *["step"] * (not refused), *["prepare"] * (not ahead)]
        if refused:
            assert all(p._version == version and torch.equal(p, value) for p, version, value in before)
            assert other.model.scaling.fixed() == pretended._fixed, "copies of weights count as before"
        assert_equal(one, other)
    assert pretended.behind is kept and pretended.captures == 1
    assert {int(state["step"]) for optimizer in other.optimizers for state in optimizer.state.values()} == {4 + 4}


def test_steps_are_prepared_with_the_counts_that_were_set() -> None:
    one, (other, pretended) = Steps(EMULATED, "cpu", FORMATS[1], "to compare with"), pretending(EMULATED, FORMATS[1])
    for _ in range(5):
        assert one.step(1) == other.step(1, prepare=True)
    for it in (one, other):
        for optimizer in it.optimizers:
            optimizer.steps = 77
    for _ in range(2):
        assert one.step(1) == other.step(1, prepare=True)
    assert_equal(one, other)
    assert isinstance(pretended.behind, Replayed) and other.optimizers[1].steps == 79


def test_what_was_moved_before_is_prepared_in_vain() -> None:
    one, (other, pretended) = Steps(EMULATED, "cpu", FORMATS[0], "to compare with"), pretending(EMULATED, FORMATS[0])
    for _ in range(5):
        assert one.step(1) == other.step(1, prepare=True)
    for it in (one, other):
        muon = it.optimizers[1]
        state = muon.state[muon.param_groups[0]["params"][0]]
        state["momentum"] = state["momentum"] + 1
    assert one.step(1) == other.step(1, prepare=True)
    assert pretended.behind is None and pretended.captures == 1
    for _ in range(2):
        assert one.step(1) == other.step(1, prepare=True)
    assert isinstance(pretended.behind, Replayed) and pretended.captures == 2
    assert_equal(one, other)


def test_what_is_prepared_keeps_no_copies_beyond_its_step() -> None:
    """They are their layers', who cast them anew when a weight has been changed by somebody, and free the others before."""
    other, pretended = pretending(EMULATED, FORMATS[0])
    for _ in range(5):
        other.step(1)
    weight = other.model.blocks[1].attn.c_proj.weight
    held = weakref.ref(copies._HELD[id(weight)])
    other.step(1, prepare=True, refuse=True)
    assert isinstance(pretended.behind, Replayed) and pretended.prepared is not None
    with torch.no_grad():
        weight.mul_(2)
    pretended.begin()
    pretended.run(other.tokens[0][:, :-1].contiguous(), other.tokens[0][:, 1:].contiguous(), 1.0)
    assert held() is None


def test_what_somebody_moves_is_launched_singly_and_captured_anew() -> None:
    formats = FORMATS[0]
    one, (other, pretended) = Steps(EMULATED, "cpu", formats, "to compare with"), pretending(EMULATED, formats)
    for _ in range(5):
        assert one.step(1) == other.step(1)
    before = pretended.behind
    assert isinstance(before, Replayed)
    for it in (one, other):  # state put elsewhere: Muon copies it back
        muon = it.optimizers[1]
        state = muon.state[muon.param_groups[0]["params"][0]]
        state["momentum"] = state["momentum"] + 1
    assert one.step(1) == other.step(1)
    assert pretended.behind is None
    assert one.step(1) == other.step(1)
    assert isinstance(pretended.behind, Replayed) and pretended.behind is not before and pretended.captures == 2
    for it in (one, other):  # a weight: its copies are cast anew, elsewhere
        with torch.no_grad():
            it.model.blocks[1].attn.c_k.weight.mul_(2)
    assert one.step(1) == other.step(1)
    assert pretended.behind is None
    for _ in range(3):
        assert one.step(1) == other.step(1)
    assert pretended.captures == 3
    assert_equal(one, other)


def test_what_is_said_of_it() -> None:
    model = build_model(SHAPE, bf16(), torch.device("cpu"))
    every = groups(model, SHAPE, weight_decay=0.1)
    own = build_optimizers(every, ownership(every, 1), 0, torch.bfloat16)

    class Foreign(NamedOptimizer):
        def __init__(self) -> None:
            """Nothing."""

    graphs = Pretended(model, None)
    assert Updates(own, graphs).how == graphs.how
    graphs.capturing, graphs.how = True, "CUDA graphs"  # as on a GPU
    assert Updates(own, graphs).how == "CUDA graphs"
    foreign: list[NamedOptimizer] = [Foreign(), own[1]]
    assert Updates(foreign, graphs).how == "launched kernel by kernel: Transformer Engine's AdamW decides on the host"
    graphs = Pretended(model, "--no-cuda-graphs")
    assert Updates(foreign, graphs).how == graphs.how == "launched kernel by kernel: --no-cuda-graphs"


# ------------------------------------------------------------------------------------------------------------ on a GPU


def on_gpu() -> Precision:
    return fp8(RECIPES["delayed"], emulated=torch.cuda.get_device_capability() < (8, 9))


WIDE = GPTConfig(256, 512, 4, 2, 2, 256, "SL")
# On Hopper its matrices go by "half" and "gram", and a gate by "small".
LARGE = GPTConfig(128, 512, 2, 6, 6, 768, "L")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [WIDE, LARGE], ids=["256", "768"])
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("formats", FORMATS, ids=lambda f: f.momentum)
def test_graphs_update_what_single_launches_do(formats: StateFormats, kind: str, shape: GPTConfig) -> None:
    if formats.momentum == "e4m3" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no instruction converts E4M3 here")
    with restored():
        make_deterministic()
        precision = bf16() if kind == "bf16" else on_gpu()
        one = Steps(precision, "cuda", formats, "to compare with", shape)
        other = Steps(precision, "cuda", formats, None, shape)
        for step in range(9):  # some prepared, some of those not applied
            prepare, refuse = step in (1, 4, 5, 7, 8), step in (5, 7)
            assert one.step(prepare=prepare, refuse=refuse) == other.step(prepare=prepare, refuse=refuse)
        assert isinstance(other.micro_batches.behind, Replayed) and one.micro_batches.behind is None
        assert_equal(one, other)
        with torch.no_grad():
            for it in (one, other):  # seen, and so are its copies
                it.model.blocks[1].mlp.c_fc.weight.mul_(1.5)
        for _ in range(5):
            assert one.step() == other.step(prepare=True)
        assert isinstance(other.micro_batches.behind, Replayed)
        assert_equal(one, other)


@pytest.mark.gpu
def test_preparing_does_not_wait_for_the_gpu() -> None:
    it = Steps(on_gpu(), "cuda", FORMATS[0], None, WIDE)
    for _ in range(6):
        it.step(prepare=True)
    it.set_rates()
    it.micro_batches.begin()
    it.micro_batches.run(it.tokens[0][:, :-1].contiguous(), it.tokens[0][:, 1:].contiguous(), 0.5)
    torch.cuda._sleep(10**9)  # cycles, half a second
    done = torch.cuda.Event()
    done.record()
    it.updates.prepare()
    assert it.micro_batches.prepared is not None and not done.query()


@pytest.mark.gpu
def test_a_graph_that_is_dropped_gives_its_memory_back() -> None:
    it = Steps(on_gpu(), "cuda", FORMATS[0], None, WIDE)
    for _ in range(5):
        it.step()
    torch.cuda.synchronize()
    graphs = torch.cuda.memory_reserved()
    assert it.micro_batches.behind is not None
    it.micro_batches._drop()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < graphs


@pytest.mark.gpu
@pytest.mark.parametrize("formats", FORMATS, ids=lambda f: f.momentum)
def test_muons_workspace_lies_in_the_activations_memory(formats: StateFormats) -> None:
    """In a process of its own: cuBLAS's workspaces of tests before would count. Muon's, 0.21 GiB, came on top before."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("predicted are activations in FP8")
    command = [sys.executable, "-m", "benchmarks.step", "--depth", "12", "--batch", "8", "--accumulation", "2", "--steps", "3"]
    command += ["--precision", "fp8", "--state-dtype", str(formats.momentum), "--master-weights", str(formats.master)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["micro_batches"] == found["optimizers"] == "CUDA graphs"
    assert abs(found["peak_GiB"] - found["predicted_GiB"]) < 0.1


@pytest.fixture
def config(torch_texts: str) -> TrainConfig:
    return TrainConfig(
        data=torch_texts, depth=3, aspect_ratio=128, head_dim=128, max_seq_len=128, device_batch_size=8, total_batch_size=2048,
        num_iterations=10, warmup_steps=2, eval_every=-1, sample_every=-1, core_metric_every=-1,
        deterministic=True,
    )  # fmt: skip


@pytest.mark.gpu
def test_a_step_is_prepared_before_and_recorded_while_the_gpu_updates(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The update, here half a second long, counts to the next step."""
    update, record = Updates.step, Run._record
    ends, ahead, over = list[torch.cuda.Event](), list[bool](), list[bool]()

    def slowed(self: Updates) -> None:
        ahead.append(self._micro_batches.prepared is not None)
        update(self)
        torch.cuda._sleep(10**9)  # cycles
        ends.append(torch.cuda.Event())
        ends[-1].record()

    def noted(self: Run, *given: Any) -> None:
        over.append(ends[-1].query())
        record(self, *given)

    monkeypatch.setattr(Updates, "step", slowed)
    monkeypatch.setattr(Run, "_record", noted)
    train(replace(config, precision="bf16", model_tag="slowed"))
    assert ahead == [False] * 2 + [True] * 8  # the second is captured
    assert over == [False] * 10
    steps = [each for each in metrics.read(base_dir() / "base_checkpoints" / "slowed") if each["kind"] == "step"]
    assert min(each["seconds"] for each in steps[1:]) > 0.3


def losses_of(directory: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in metrics.read(directory) if record["kind"] == "step"}


@pytest.mark.gpu
@pytest.mark.parametrize("formats", FORMATS, ids=lambda f: f.momentum)
def test_a_run_resumes_bit_for_bit(formats: StateFormats, config: TrainConfig) -> None:
    """From a checkpoint that was saved between two replayed steps, into steps that are launched and then replayed."""
    stored: dict[str, Any] = {"state_dtype": formats.momentum, "master_weights": formats.master}
    config = replace(config, precision="fp8", save_every=6, **stored)
    found = {name: base_dir() / "base_checkpoints" / name for name in ("whole", "singly")}
    train(replace(config, model_tag="singly", no_cuda_graphs=True))
    for resumed in ({}, {"resume_from_step": 6}):
        train(replace(config, model_tag="whole", **resumed))
        whole, singly = (losses_of(path) for path in found.values())
        assert len(whole) == 10 and whole == singly
    saved = [checkpoint.Checkpoint(checkpoint.find(path, 10).path) for path in found.values()]
    for kind in ("model", "optimizer"):
        one, other = (getattr(each, kind)() for each in saved)
        assert set(one) == set(other)
        for name in one:
            assert torch.equal(one[name].reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8)), name


def test_adamw_is_the_first_and_muon_the_last() -> None:
    """Which of them has the stream of the capture, and so the pool's memory for its workspace."""
    it = Steps(bf16(), "cpu", FORMATS[0], "to compare with")
    assert isinstance(it.optimizers[0], AdamW) and it.optimizers[-1].kind == "muon"
    assert not isinstance(it.model.scaling, Scaling)
