"""The script trains, saves what loads, and turns bad flags into one line."""

import json
import sys
from pathlib import Path

import pytest

from nanochat.errors import BadInput
from nanochat.tokenizer import Tokenizer
from scripts.tok_train import first, main


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": f"some words, number {i}\n" * 5}) + "\n" for i in range(60)))
    return path


def call(monkeypatch: pytest.MonkeyPatch, *flags: object) -> None:
    monkeypatch.setattr(sys, "argv", ["tok_train", *map(str, flags)])
    main()


def test_trains_and_saves_where_training_looks(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    call(monkeypatch, "--data", data, "--vocab-size", 300)
    assert Tokenizer.load(tmp_path / "base" / "tokenizer").vocab_size == 300
    said = capsys.readouterr().out
    assert "300 ids, " in said and "bytes per token on" in said


def test_says_when_the_text_has_fewer_merges(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(monkeypatch, "--data", data, "--vocab-size", 5000, "--out", tmp_path / "mine")
    assert Tokenizer.load(tmp_path / "mine").vocab_size < 5000
    assert "(5,000 asked: nothing is left to merge)" in capsys.readouterr().out


def test_limits_cut_the_text() -> None:
    assert list(first(["abcdef", "gh", "ijkl", "mn"], 8, 4)) == ["abcd", "gh", "ij"]
    assert list(first(["abc", "d"], 100, 100)) == ["abc", "d"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-chars", "0"], "at least 1"),
        (["--doc-cap", "0"], "at least 1"),
        (["--data", "nowhere"], "no such data 'nowhere'"),
        (["--vocab-size", "100"], "vocabulary of 100 is too small"),
    ],
)
def test_bad_flags(data: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        call(monkeypatch, "--data", data, *flags)
