"""The page of a training run says what its metrics.jsonl says."""

import math
import re
from html import unescape
from pathlib import Path

import pytest

from nanochat.errors import BadInput
from nanochat.metrics import Metrics, StepRecord
from nanochat.run_page import write


def record(directory: Path, losses: list[float], *, on_gpu: bool) -> None:
    sink = Metrics(directory, len(losses), {"unigram_bits_per_byte": 2.75, "depth": 12, "data": "a<b"}, console=False)
    sink.message("device: 1 x a GPU; precision te (asked for)")
    for step, loss in enumerate(losses):
        mfu, gib = (0.4, 20.0 + step) if on_gpu else (None, None)
        sink.step(StepRecord(step, loss, 1.0, 0.5, 100, 1000.0 + step, mfu, gib, 1.0, 1, 0.5 if on_gpu else None))
    if on_gpu:
        sink.evaluation(0, 3.5)
        sink.evaluation(3, 1.25)
        sink.sample(1, "an early <sample>")
        sink.sample(3, "a late <sample>")
        sink.memory(
            measured=22.0, predicted=21.5, moment="backward of the last MLP", lines={"weights": 20.0, "states": 1.499, "ids": 0.001}
        )
    sink.close()


def text(html: str) -> str:
    return unescape(re.sub(r"<[^>]*>", " ", html.split("</style>")[1].split("<script>")[0]))


def test_a_run_is_shown_as_recorded(tmp_path: Path) -> None:
    record(tmp_path, [4.0, 3.0, 2.0], on_gpu=True)
    path = write(tmp_path)
    assert path == tmp_path / "report.html"
    html = path.read_text()
    words = " ".join(text(html).split())
    for fragment in (
        "1.2500 bits per byte after 3 steps", "device: 1 x a GPU; precision te", "2.0000 training loss at the end",
        "1.2500 best validation, bits per byte; token frequencies alone 2.750", "300 tokens trained on", "1,001 tokens per second",
        "40.0% MFU", "22.00 GiB peak memory; predicted 21.50", "1.5 s spent in steps", "norm of the gradient",
        "predicted for backward of the last MLP",
        "weights 20.00 states 1.50 1 smaller ones 0.00 predicted in all 21.50 measured 22.00",
        "writes after 3 steps a late <sample>", "depth 12", "data a<b",
    ):  # fmt: skip
        assert fragment in words, fragment
    assert "early" not in words and "<sample>" not in html
    assert html.count("<figure data-x") == 5


def test_what_was_not_recorded_is_not_shown(tmp_path: Path) -> None:
    record(tmp_path, [4.0, math.nan], on_gpu=False)
    words = text(write(tmp_path).read_text())
    assert "2 steps, loss 4.000" in words
    for absent in ("MFU", "GiB", "norm of the gradient", "validation", "writes after"):
        assert absent not in words


def test_nothing_to_show(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"has no metrics\.jsonl"):
        write(tmp_path)
    record(tmp_path, [], on_gpu=False)
    with pytest.raises(BadInput, match="holds no training step yet"):
        write(tmp_path)
    record(tmp_path, [4.0], on_gpu=False)
    (tmp_path / "report.html").mkdir()
    with pytest.raises(BadInput, match=r"cannot write .*report\.html: Is a directory"):
        write(tmp_path)
