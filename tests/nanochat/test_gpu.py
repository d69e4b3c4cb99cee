"""What only a GPU can show of the whole model: nanochat's logits in bf16, backends that agree, memory that is bounded."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch._dynamo as dynamo
from safetensors.torch import load_file

from nanochat import optimizer
from nanochat.build import build_model
from nanochat.dataset import base_dir
from nanochat.gpt import GPT, GPTConfig
from nanochat.interchange import import_model
from nanochat.tokenizer import Tokenizer
from nanochat.train import Run, train
from nanochat.train_config import TrainConfig
from nvfp8.precision import bf16, fp32

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


def test_after_two_steps_nothing_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learning rate, momentum and weight decay change every step; evaluation, samples and a checkpoint come in between.

    A graph that is compiled anew raises; one compiled for the first time, or a break, is counted.
    """
    texts = [f"the loss of step {i} is {i * i}" for i in range(200)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    Tokenizer.train(texts, 290).save(base_dir() / "tokenizer")
    counters, real = dynamo.utils.counters, Run.step
    graphs: list[int] = []

    def step(self: Run) -> None:
        with dynamo.config.patch(error_on_recompile=self.progress.step >= 2):
            real(self)
        graphs.append(counters["stats"]["unique_graphs"])

    monkeypatch.setattr(Run, "step", step)
    # As in a process that has just begun: what other tests compiled would hide what is compiled here, or make it "again".
    dynamo.reset()
    optimizer.compiled.cache_clear()
    counters.clear()
    train(
        TrainConfig(
            data=str(tmp_path / "texts.jsonl"), depth=4, aspect_ratio=32, head_dim=32, max_seq_len=32, device_batch_size=4,
            total_batch_size=256, num_iterations=8, warmup_steps=3, eval_every=3, sample_every=4, save_every=5,
            core_metric_every=-1, model_tag="compiled", precision="bf16",
        )
    )  # fmt: skip
    assert len(graphs) == 8 and graphs[1] > 0
    assert graphs[1:] == [graphs[1]] * 7
    assert counters["graph_break"] == Counter()
