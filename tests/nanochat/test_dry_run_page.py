"""What a dry run shows is what it measured, in the table, on the page and in the picture."""

import math
from pathlib import Path

import pytest
from matplotlib.image import imread

from nanochat.dry_run import Comparison, Measured, Row
from nanochat.dry_run_page import draw, headline, remarks, render, table
from nanochat.train_config import TrainConfig


def measured(losses: list[float], rate: float, gib: float, joules: float | None = 0.002) -> Measured:
    return Measured(
        layers={"head": "bf16 <operands>"}, losses=losses, bad_steps=0, seconds=[9.0] * 3 + [100 / rate] * (len(losses) - 3),
        tokens=100, warm_up=27.0, parameters=1000, bytes_per_parameter=12.0, mfu=0.5, gib=gib, predicted_gib=gib + 1,
        joules_per_token=joules, no_energy="" if joules else "no counter", board_gib=2 * gib if joules else None,
    )  # fmt: skip


LINE = [8.0 - 0.1 * step for step in range(20)]
GPU = Comparison(
    [
        Row("bf16", measured(LINE, 1000, 10.0)), Row("fp8", measured([loss + 0.01 for loss in LINE], 1300, 8.0, 0.0015)),
        Row("te", unavailable="transformer-engine is <not> installed"), Row("fp32", failed="OutOfMemoryError: CUDA out of memory"),
    ],
    "bf16", "cuda", "a GPU", TrainConfig(depth=12, total_batch_size=2**19), {"commit": "abc"}, "today",
)  # fmt: skip


def test_the_table_has_every_figure() -> None:
    cells = {row[0]: row[1:] for row in table(GPU)}
    assert cells[""] == ["bf16", "fp8", "te", "fp32"]
    assert cells["loss, first step"] == ["8.0000", "8.0100", "-", "-"]
    assert cells["largest gap to bf16"] == ["-", "0.0100", "-", "-"]
    assert cells["values not finite"] == ["0 losses, 0 steps"] * 2 + ["-"] * 2
    assert cells["tokens per second"] == ["1,000 (1.00×)", "1,300 (1.30×)", "-", "-"]
    assert cells["MFU, peak of its formats"] == ["50.0%", "50.0%", "-", "-"]
    assert cells["peak memory, allocator, GiB"] == ["10.00 (1.00×)", "8.00 (0.80×)", "-", "-"]
    assert cells["board memory (NVML), GiB"] == ["20.00 (1.00×)", "16.00 (0.80×)", "-", "-"]
    assert cells["bytes per parameter"] == ["12.00", "12.00", "-", "-"]
    assert cells["energy, mJ per token"] == ["2.00", "1.50", "-", "-"]
    assert cells["in short"] == ["the reference", "agrees", "unavailable: transformer-engine is <not> installed", "FAILS"]


def test_a_page_of_a_gpu() -> None:
    html = render(GPU)
    for fragment in (
        "This dry run fails",
        "fp32: OutOfMemoryError",
        "1.30×",
        "&lt;not&gt; installed",
        "&lt;operands&gt;",
        "verdict fails",
    ):
        assert fragment in html, fragment
    assert html.count("<figure data-x") == 4 and "energy, mJ per token</figcaption>" in html  # two losses, gap, speed
    assert headline(Comparison(GPU.rows[:3], "bf16", "cuda", "a GPU", GPU.config, {}, "")) == (
        "fp8 trains 1.30× as fast as bf16, in 0.80× the memory"
    )


def test_a_cpu_says_that_speed_is_not_judged(tmp_path: Path) -> None:
    rows = [Row("fp32", measured(LINE, 1000, 1.0, None)), Row("fp8-emulated", measured([x - 0.02 for x in LINE], 100, 1.0, None))]
    done = Comparison(rows, "fp32", "cpu", "CPU", TrainConfig(), {}, "today")
    assert headline(done) == "fp8-emulated ends 0.020 nats from fp32 after 20 steps"
    assert any("Speed and memory are not judged" in remark for remark in remarks(done))
    assert not any("×)" in cell for row in table(done) for cell in row)
    html = render(done)
    assert "What it costs" not in html and "Every precision that runs here has trained" in html


def test_without_a_board_the_reason_is_told() -> None:
    rows = [Row("bf16", measured(LINE, 1000, 10.0, None)), Row("te", measured(LINE, 1300, 8.0, None))]
    assert "No energy: no counter." in remarks(Comparison(rows, "bf16", "cuda", "a GPU", TrainConfig(), {}, ""))


@pytest.mark.parametrize("losses", [LINE, [math.nan] * 20])
def test_pages_and_pictures_of_few_values(losses: list[float], tmp_path: Path) -> None:
    done = Comparison([Row("bf16", measured(losses, 1000, 10.0))], "bf16", "cuda", "a GPU", TrainConfig(), {}, "today")
    assert render(done).endswith("</html>\n")
    draw(done, tmp_path / "one.png")
    assert imread(tmp_path / "one.png").shape[0] > 400
    draw(GPU, tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "two.png").read_bytes()
