"""Micro-batches in CUDA graphs compute what single launches do; when they are captured, and when not."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nanochat import metrics
from nanochat.build import build_model, build_optimizers
from nanochat.dataset import base_dir
from nanochat.gpt import GPT, GPTConfig
from nanochat.memory import Counted, Setup, predict
from nanochat.micro_batches import MicroBatches, refusal
from nanochat.param_groups import groups, ownership
from nanochat.process import make_deterministic, restored
from nanochat.train import train
from nanochat.train_config import TrainConfig
from nvfp8.matmul import fp8_matmul
from nvfp8.precision import Precision, bf16, fp8, te
from nvfp8.quantize import Projection
from nvfp8.recipe import RECIPES, parse_recipe
from nvfp8.scaling import Scaling

SHAPE = GPTConfig(64, 512, 4, 2, 2, 128, "SL")
EMULATED = fp8(RECIPES["delayed"], emulated=True)


class Steps:
    """A model with its optimizers, a step at a time, on fixed tokens."""

    def __init__(self, precision: Precision, device: str, singly: str | None, shape: GPTConfig = SHAPE):
        self.model: GPT = build_model(shape, precision, torch.device(device))
        every = groups(self.model, shape, weight_decay=0.1)
        self.optimizers = build_optimizers(every, ownership(every, 1), 0, precision.compute_dtype)
        self.micro_batches = MicroBatches(self.model, singly)
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(shape.vocab_size, (6, 4, shape.sequence_len + 1), generator=generator).to(device)

    def step(self, count: int = 3) -> list[float]:
        losses = []
        self.micro_batches.begin()
        for tokens in self.tokens[:count]:
            losses.append(self.micro_batches.run(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), 1 / count).clone())
        assert self.model.scaling.update() == []
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return torch.stack(losses).tolist()


def stirred(model: GPT) -> GPT:
    """With values in the output projections, which start at zero: else half of all gradients were zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2 and not p.any():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.05)
    return model


def fixed(model: GPT) -> Any:
    return model.scaling.fixed()


# ------------------------------------------------------------------------------------------------------- on any machine


def test_what_the_host_decides_by_settles_in_two_steps() -> None:
    it = Steps(EMULATED, "cpu", None)
    assert it.micro_batches.how == "launched kernel by kernel: there is no CUDA device"
    assert fixed(it.model) is None  # no scale is on any device
    seen = []
    for _ in range(4):
        it.step()
        seen.append(fixed(it.model))
    assert seen[0] is None  # projections that start at zero had no amax: their next copies will be cast elsewhere
    assert seen[1] is not None and seen[1] == seen[2] == seen[3]


def test_what_a_graph_must_not_go_on_with_is_seen() -> None:
    it = Steps(EMULATED, "cpu", None)
    for _ in range(3):
        it.step()
    before = fixed(it.model)
    with torch.no_grad():
        it.model.blocks[1].attn.c_k.weight.mul_(2)
    assert fixed(it.model) is None  # its copies will be cast anew
    it.step()
    assert fixed(it.model) not in (None, before)  # they lie elsewhere
    scaling = it.model.scaling
    assert isinstance(scaling, Scaling)
    before, scaling.seen[0] = fixed(it.model), not scaling.seen[0]
    assert fixed(it.model) != before
    assert fixed(build_model(SHAPE, bf16(), torch.device("cpu"))) == ()


def check_sums(it: Steps, precision: Precision, device: str, rounding: float = 0.0) -> None:
    """Gradients are autograd's, up to `rounding` of a matrix's norm, and FP8 GEMMs have found something to add to."""
    plain = stirred(build_model(it.model.config, precision, torch.device(device)))
    stirred(it.model)
    it.micro_batches.begin()
    where: list[list[int]] = []
    for tokens in it.tokens[:3]:
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        plain(inputs, targets, 1 / 3).backward()
        it.micro_batches.run(inputs, targets, 1 / 3)
        where.append([p.grad.data_ptr() for p in it.model.parameters() if p.grad is not None])
    assert where[0] == where[1] == where[2] and len(where[0]) == len(list(plain.parameters()))
    for (name, p), q in zip(plain.named_parameters(), it.model.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert float((p.grad - q.grad).norm()) <= rounding * float(p.grad.norm()), name
    assert all(projection.sums() is not None for projection in it.micro_batches._projections)


@pytest.mark.parametrize("precision", [EMULATED, bf16()], ids=["fp8", "bf16"])
def test_gradients_are_summed_as_autograd_sums_them(precision: Precision) -> None:
    check_sums(Steps(precision, "cpu", None), precision, "cpu")


def test_fp8_gemms_add_gradients_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[bool] = []

    def watched(*arguments: Any, out: Tensor | None = None, add: bool = False, **options: Any) -> Tensor:
        added.append(add)
        return fp8_matmul(*arguments, out=out, add=add, **options)

    monkeypatch.setattr("nvfp8.quantize.fp8_matmul", watched)
    it = Steps(EMULATED, "cpu", None)
    stirred(it.model)
    it.micro_batches.begin()
    counts = []
    for tokens in it.tokens[:2]:
        added.clear()
        it.micro_batches.run(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), 0.5)
        counts.append(sum(added))
    assert counts == [0, 4 * it.model.config.n_layer]  # q, k, v in one, c_proj, and two of the MLP
    # Who runs backward by himself gets gradients from autograd, whatever there is.
    added.clear()
    tokens = it.tokens[0]
    weights = [it.model.blocks[0].attn.c_q.weight, it.model.blocks[0].mlp.c_fc.weight]
    before = [weight.grad.clone() for weight in weights if weight.grad is not None]
    gradients = torch.autograd.grad(it.model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), 0.5), weights)
    assert not any(added) and all(gradient.norm() > 0 for gradient in gradients)
    assert all(torch.equal(weight.grad, was) for weight, was in zip(weights, before, strict=True) if weight.grad is not None)


def test_gradients_that_lie_apart_are_added_after_backward() -> None:
    it, plain = Steps(EMULATED, "cpu", None), stirred(build_model(SHAPE, EMULATED, torch.device("cpu")))
    stirred(it.model)
    it.micro_batches.begin()
    (projection,) = it.model.blocks[0].attn.qkv.projections
    (twin,) = plain.blocks[0].attn.qkv.projections
    assert isinstance(projection, Projection) and isinstance(twin, Projection)
    for step in range(2):
        inputs, targets = it.tokens[step][:, :-1].contiguous(), it.tokens[step][:, 1:].contiguous()
        plain(inputs, targets, 0.5).backward()
        there = [weight.grad for weight in projection.weights]
        it.micro_batches.run(inputs, targets, 0.5)
        if step:
            assert all(weight.grad is was for weight, was in zip(projection.weights, there, strict=True))
            continue
        assert projection.sums() is not None
        for weight in projection.weights:
            assert weight.grad is not None
            weight.grad = weight.grad.clone()
        assert projection.sums() is None
    for weight, other in zip(projection.weights, twin.weights, strict=True):
        assert weight.grad is not None and other.grad is not None and torch.equal(weight.grad, other.grad)


def test_refusals_name_their_reason() -> None:
    def model(precision: Precision, shape: GPTConfig = SHAPE) -> GPT:
        with torch.device("meta"):
            return GPT(shape, precision)

    assert refusal(model(bf16())) is None and refusal(model(EMULATED)) is None
    assert refusal(model(bf16()), ranks=2) == "several processes train"
    assert refusal(model(EMULATED), update_early=True) == "updates come in the middle of backward"
    assert refusal(model(te(RECIPES["delayed"]))) == "Transformer Engine decides on the host"
    narrow = GPTConfig(64, 512, 4, 2, 2, 64, "SL")  # of lm_head's rows AdamW takes 128 elements at a time
    assert refusal(model(bf16(), narrow)) is None and refusal(model(EMULATED, narrow)) is not None
    for recipe in ("current", "delayed:bf16=h.1.mlp.c_fc:dgrad"):
        assert (
            refusal(model(fp8(parse_recipe(recipe), emulated=True))) == "not every weight's FP8 copies are written by an optimizer"
        )


def test_optimizers_that_are_not_captured_work_beside_a_graphs_memory() -> None:
    setup = Setup(GPTConfig.from_depth(12, window_pattern="L"), fp8(RECIPES["delayed"]), 32)
    counted = Counted(setup)
    singly, graphs = predict(setup, counted), predict(replace(setup, graphs=True), counted)
    beside = predict(replace(setup, graphs=True, captured_updates=False), counted)
    assert graphs.moments == singly.moments and beside.moment == "the optimizer's step"
    assert graphs.total == singly.total
    assert beside.total == graphs.total + counted.workspace()["Muon's workspace"]
    in_bf16 = replace(setup, precision=bf16())
    more = predict(replace(in_bf16, graphs=True)).total - predict(in_bf16).total
    assert more == 2 * 2**25, "where PyTorch multiplies, a stream has its own workspaces of cuBLAS"


# ------------------------------------------------------------------------------------------------------------ on a GPU


def on_gpu() -> Precision:
    return fp8(RECIPES["delayed"], emulated=torch.cuda.get_device_capability() < (8, 9))


WIDE = GPTConfig(256, 512, 4, 2, 2, 256, "SL")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_graphs_compute_what_single_launches_do(kind: str) -> None:
    with restored():
        make_deterministic()
        precision = bf16() if kind == "bf16" else on_gpu()
        one, other = Steps(precision, "cuda", "to compare with", WIDE), Steps(precision, "cuda", None, WIDE)
        for _ in range(7):
            assert one.step() == other.step()
        assert other.micro_batches.hidden > 0 == one.micro_batches.hidden
        for (name, p), (_, q) in zip(one.model.named_parameters(), other.model.named_parameters(), strict=True):
            assert torch.equal(p, q), name
        # A weight that somebody writes is seen, and so are its copies.
        for it in (one, other):
            with torch.no_grad():
                it.model.blocks[2].mlp.c_fc.weight.mul_(1.5)
        for _ in range(4):
            assert one.step() == other.step()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_gradients_are_summed_on_a_gpu_as_autograd_sums_them(kind: str) -> None:
    with restored():
        make_deterministic()
        precision = bf16() if kind == "bf16" else on_gpu()
        # They are bf16: a GEMM that adds may leave out the product's own rounding, 2^-9, of each of two micro-batches.
        rounding = 2**-7 if kind == "fp8" else 0.0
        check_sums(Steps(precision, "cuda", "to compare with", WIDE), precision, "cuda", rounding)


@pytest.mark.gpu
def test_evaluation_between_steps_changes_nothing() -> None:
    with restored():
        make_deterministic()
        one, other = (Steps(on_gpu(), "cuda", None, WIDE) for _ in range(2))
        for _ in range(6):
            assert one.step() == other.step()
            with torch.no_grad():
                other.model.token_losses(other.tokens[0][:, :-1], other.tokens[0][:, 1:])


@pytest.mark.gpu
def test_another_number_of_micro_batches_needs_no_other_graphs() -> None:
    it = Steps(on_gpu(), "cuda", None, WIDE)
    for count in (3, 3, 3, 3):
        it.step(count)
    with pytest.raises(ValueError, match=r"captured were \(4, 256\) tokens with a loss times 0.33"):
        it.step(2)


@pytest.fixture
def config(torch_texts: str) -> TrainConfig:
    return TrainConfig(
        data=torch_texts, depth=3, aspect_ratio=128, head_dim=128, max_seq_len=128, device_batch_size=8, total_batch_size=2048,
        num_iterations=8, warmup_steps=2, eval_every=-1, sample_every=-1, core_metric_every=-1, deterministic=True,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_a_run_is_the_same_with_and_without(precision: str, config: TrainConfig) -> None:
    losses: dict[bool, list[float]] = {}
    for singly in (False, True):
        train(replace(config, precision=precision, no_cuda_graphs=singly, model_tag=f"singly-{singly}"))
        records = metrics.read(base_dir() / "base_checkpoints" / f"singly-{singly}")
        losses[singly] = [record["loss"] for record in records if record["kind"] == "step"]
    assert losses[True] == losses[False] and len(losses[True]) == 8
