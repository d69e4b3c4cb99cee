"""base_eval and sample on a checkpoint of a tiny run, and what they refuse."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import errors
from nanochat.dataloader import BatchLoader
from nanochat.dataset import base_dir
from nanochat.tokenizer import Tokenizer
from nanochat.train import train
from nanochat.train_config import TrainConfig
from scripts import base_eval, sample


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with a tokenizer and a run called tiny."""
    base = tmp_path_factory.mktemp("trained")
    texts = [f"the {word} of step {i} is {i * i}" for i in range(40) for word in ("loss", "norm", "rate")]
    (base / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        Tokenizer.train(texts, 290).save(base_dir() / "tokenizer")
        train(
            TrainConfig(
                data=str(base / "texts.jsonl"),
                depth=1,
                aspect_ratio=32,
                head_dim=16,
                max_seq_len=16,
                device_batch_size=2,
                total_batch_size=32,
                num_iterations=3,
                eval_every=-1,
                core_metric_every=-1,
                model_tag="tiny",
                device_type="cpu",
            )
        )
    return base


def call(main: object, monkeypatch: pytest.MonkeyPatch, base: Path, *arguments: str) -> int:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    with pytest.raises(SystemExit) as exit_:
        errors.run(main)  # type: ignore[arg-type]
    return int(exit_.value.code or 0)


def test_evaluation_prints_both_splits_and_samples(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model-tag", "tiny", "--data", str(trained / "texts.jsonl"), "--device-batch-size", "2", "--device-type", "cpu"]
    assert call(base_eval.main, monkeypatch, trained, *arguments) == 0
    out = capsys.readouterr().out
    for fragment in ("train: ", "val: ", "bits per byte", "token frequencies alone", "sample: "):
        assert fragment in out


SEARCHED_BY_RANK_0 = """
import os, sys
from nanochat import checkpoint, errors
from scripts import base_eval
if os.environ["RANK"] == "1":
    checkpoint.find = None
errors.run(base_eval.main)
"""


def test_two_ranks_find_what_one_finds_and_rank_0_alone_reads_the_checkpoint_through(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], two_ranks: Any
) -> None:
    """The same rows: 2 x 2 a step. Over NCCL where there are two GPUs."""
    device = "cuda" if torch.cuda.device_count() >= 2 else "cpu"
    arguments = ["--model-tag", "tiny", "--data", str(trained / "texts.jsonl"), "--device-type", device, "--device-batch-size"]
    assert call(base_eval.main, monkeypatch, trained, *arguments, "4") == 0
    alone = capsys.readouterr().out
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(trained))
    first, second = (process.communicate(timeout=60) for process in two_ranks("-c", SEARCHED_BY_RANK_0, *arguments, "2"))
    assert first == (alone, "") and second == ("", "")
    ranks = two_ranks("-c", SEARCHED_BY_RANK_0, *arguments, "2", "--step", "9")
    first, second = (process.communicate(timeout=60) for process in ranks)
    assert "has no checkpoint of step 9; it has 3" in first[1] and first[1].count("\n") == 1 and second == ("", "")
    assert [process.returncode for process in ranks] == [2, 2]


def test_the_loader_is_closed_when_evaluation_fails(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise errors.BadInput("no more")

    def close(loader: BatchLoader) -> None:
        closed.append(loader)
        real(loader)

    closed: list[BatchLoader] = []
    real = BatchLoader.close
    monkeypatch.setattr(base_eval, "bits_per_byte", fail)
    monkeypatch.setattr(BatchLoader, "close", close)
    arguments = ["--model-tag", "tiny", "--data", str(trained / "texts.jsonl"), "--device-type", "cpu"]
    assert call(base_eval.main, monkeypatch, trained, *arguments) == 2
    assert capsys.readouterr().err == "error: no more\n" and len(closed) == 1


def test_sampling_continues_the_prompt_and_is_seeded(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model-tag", "tiny", "--prompt", "the loss", "--max-tokens", "8", "--device-type", "cpu"]
    texts = []
    for seed in ("1", "1"):
        assert call(sample.main, monkeypatch, trained, *arguments, "--seed", seed) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("the loss")


def test_a_continuation_that_does_not_fit_says_where_it_ends(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model-tag", "tiny", "--prompt", "\n" * 9, "--device-type", "cpu", "--max-tokens"]
    assert call(sample.main, monkeypatch, trained, *arguments, "6") == 0
    assert capsys.readouterr().err == ""
    assert call(sample.main, monkeypatch, trained, *arguments, "7") == 0
    said = "at most 6 tokens are sampled, not 7: the context of 16 holds 6 after the prompt's 10\n"
    assert capsys.readouterr().err == said


def test_a_path_works_as_well_as_a_tag(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(trained / "base_checkpoints" / "tiny")
    assert call(sample.main, monkeypatch, trained, "--model-tag", path, "--max-tokens", "1", "--device-type", "cpu") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model-tag", "missing"], "no checkpoint"),
        (["--model-tag", "tiny", "--step", "9"], "has no checkpoint of step 9; it has 3"),
        (["--model-tag", "tiny", "--tokenizer", "nowhere"], "no tokenizer in nowhere"),
        (["--model-tag", "tiny", "--max-tokens", "0"], "--max-tokens must be at least 1"),
        (["--model-tag", "tiny", "--prompt", "\n" * 15], "--prompt has 16 tokens, the one that starts a text included, and"),
        (["--model-tag", "tiny", "--prompt", "\n" * 40], "this model's context is 16: shorten it to 15 at most"),
        ([], "the following arguments are required: --model-tag"),
    ],
)
def test_bad_input(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert call(sample.main, monkeypatch, trained, *arguments, "--device-type", "cpu") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_core_is_refused_by_name(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(base_eval.main, monkeypatch, trained, "--model-tag", "tiny", "--eval", "core,bpb") == 2
    assert "CORE is not evaluated here" in capsys.readouterr().err
