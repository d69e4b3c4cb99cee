"""What only a GPU can show of the whole model: nanochat's logits in bf16, backends that agree, memory that is bounded."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
from safetensors.torch import load_file

from nanochat.build import build_model
from nanochat.dataset import base_dir
from nanochat.generate import generate
from nanochat.gpt import GPT, GPTConfig
from nanochat.interchange import import_model
from nanochat.tokenizer import Tokenizer
from nanochat.train import Run, train
from nanochat.train_config import TrainConfig
from nvfp8.hardware import missing
from nvfp8.precision import bf16, fp8, fp32
from nvfp8.recipe import RECIPES

pytestmark = pytest.mark.gpu
FIXTURE = Path(__file__).parents[1] / "fixtures" / "nanochat_tiny"


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.parametrize("attention", ["cudnn", "sdpa"])
def test_nanochats_logits_to_bf16_rounding(attention: str) -> None:
    config, weights, _ = import_model(FIXTURE)
    recorded = load_file(FIXTURE / "logits.safetensors")
    errors = {}
    for precision in (fp32(), bf16()):
        backend = attention if precision.name == "bf16" else "sdpa"
        model = build_model(GPTConfig(**config), precision, torch.device("cuda"), backend)
        model.load_state_dict(weights)
        errors[precision.name] = relative(model.logits(recorded["tokens"].cuda()).cpu(), recorded["logits"])
    assert errors["fp32"] < 1e-5
    assert errors["bf16"] < 2e-2  # roundings of three layers; with bf16's own epsilon in the norms it would be 7e-2


def test_a_micro_batch_keeps_what_the_layers_say() -> None:
    """20 bytes a token and channel of each block, plus what stands outside the blocks, and no logits."""
    config = GPTConfig.from_depth(8, sequence_len=1024, window_pattern="L")

    def kept(layers: int) -> int:
        shape = GPTConfig(1024, 32768, layers, config.n_head, config.n_kv_head, config.n_embd, "L")
        model: GPT = build_model(shape, bf16(), torch.device("cuda"))
        ids = torch.randint(32768, (8, 1024), device="cuda")
        model(ids, ids).backward()  # kernels, handles and gradients are there
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        loss = model(ids, ids)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated() - before
        del loss
        return held

    channels = 8 * 1024 * config.n_embd
    # Two layers more: one has a value embedding. 1/rms, log-sum-exp and gates are the few per cent above 20.
    assert (kept(8) - kept(6)) / 2 / channels < 20.6


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_evaluation_and_generation_make_no_second_copy_of_the_weights(precision: str) -> None:
    if reason := missing(precision, torch.cuda.get_device_capability()):
        pytest.skip(reason)
    made = {"bf16": bf16(), "fp8": fp8(RECIPES["delayed"])}[precision]
    model = build_model(GPTConfig.from_depth(8, sequence_len=256), made, torch.device("cuda"))
    ids = torch.randint(32768, (1, 64), device="cuda")
    square = torch.ones(64, 64, dtype=torch.bfloat16, device="cuda")
    square @ square  # cuBLAS's workspace for bf16 is there
    for _ in range(3):
        model(ids, ids).backward()
        assert model.scaling.update() == []
        model.zero_grad(set_to_none=True)
    tables = ("wte", "value_embeds")
    weights = sum(p.nbytes for name, p in model.named_parameters() if p.ndim == 2 and not any(part in name for part in tables))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model.token_losses(ids, ids)
    assert len(list(generate(model, [1, 2, 3], 4))) == 4
    torch.cuda.synchronize()
    # At its peak one matrix in bf16 where it is kept in fp32, lm_head's at most: 1/5 of all bytes; and 64 rows of logits.
    assert torch.cuda.max_memory_allocated() - before < weights / 2
    assert torch.cuda.memory_allocated() - before < weights / 8


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_after_two_steps_nothing_is_compiled_again(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learning rate, momentum and weight decay change every step; evaluation, samples and a checkpoint come in between.

    Kernels are Triton's, and Triton says which it has built (or found on disk) because of a dtype, a constant, or a number that
    16 divides or that is 1. Graphs of torch.compile there are none, and if there were, they would count.
    """
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if reason := missing(precision, torch.cuda.get_device_capability()):
        pytest.skip(reason)
    texts = [f"the loss of step {i} is {i * i}" for i in range(200)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    Tokenizer.train(texts, 290).save(base_dir() / "tokenizer")
    counters, real = dynamo.utils.counters, Run.step
    built: list[str] = []
    steps: list[tuple[int, int]] = []  # how long `built` was before and after each

    def step(self: Run) -> None:
        before = len(built)
        real(self)
        steps.append((before, len(built)))

    def listen(*, key: str, fn: Any, **others: object) -> None:
        built.append(f"{fn.name} {key}")

    monkeypatch.setattr(Run, "step", step)
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", listen)
    # As in a process that has just begun: what other tests compiled would hide what is compiled here.
    for module in [module for name, module in sys.modules.items() if name.startswith("nvfp8.kernels.")]:
        for kernel in vars(module).values():
            if isinstance(kernel, triton.JITFunction):
                kernel.device_caches.clear()
    counters.clear()
    train(
        TrainConfig(
            data=str(tmp_path / "texts.jsonl"), depth=4, aspect_ratio=32, head_dim=64, max_seq_len=32, device_batch_size=4,
            total_batch_size=256, num_iterations=8, warmup_steps=3, eval_every=3, sample_every=4, save_every=5,
            core_metric_every=-1, model_tag="compiled", precision=precision,
        )
    )  # fmt: skip
    assert len(steps) == 8 and any("_adamw" in kernel for kernel in built[: steps[0][1]])
    assert [built[before:after] for before, after in steps[2:]] == [[]] * 6, "after two steps another builds nothing"
    assert built[steps[4][0] :] == [], "nor do an evaluation and a sample that are not the first"
    assert counters["stats"]["unique_graphs"] == 0
