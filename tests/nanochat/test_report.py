import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from nanochat.errors import BadInput
from nanochat.metrics import Metrics, StepRecord
from nanochat.report import draw, smooth


def record(directory: Path, losses: list[float], *, on_gpu: bool = True, evaluations: dict[int, float] | None = None) -> None:
    sink = Metrics(directory, len(losses), {"unigram_bits_per_byte": 2.75}, console=False)
    for step, loss in enumerate(losses):
        mfu, memory = (0.4, 20.0 + step) if on_gpu else (None, None)
        sink.step(StepRecord(step, loss, 1.0, 0.1, 100, 1000.0 + step, mfu, memory, 1.0, 1))
    for step, bits in (evaluations or {}).items():
        sink.evaluation(step, bits)
    sink.close()


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> dict[str, Axes]:
    """The panels of the figure that `draw` saves, by their titles; filled as it saves."""
    found: dict[str, Axes] = {}
    save = Figure.savefig

    def spy(figure: Figure, path: Path) -> None:
        found.update({axes.get_title(loc="left"): axes for axes in figure.axes})
        save(figure, path)

    monkeypatch.setattr(Figure, "savefig", spy)
    return found


def line(axes: Axes, number: int = 0) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in axes.lines[number].get_xydata()]


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_a_run_is_drawn_as_recorded(tmp_path: Path, panels: dict[str, Axes]) -> None:
    record(tmp_path, [4.0, 3.0, 2.0], evaluations={0: 3.5, 3: 1.25})
    path = draw(tmp_path)
    assert path == tmp_path / "report.png"
    image = imread(path)
    assert image.shape[0] >= 600 and image.shape[1] >= 900
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 50  # something is drawn on it
    loss, validation, throughput, memory = panels.values()
    assert line(loss) == [(0, 4), (1, 3), (2, 2)]
    assert line(validation) == [(0, 3.5), (3, 1.25)]
    assert line(throughput) == [(0, 1000), (1, 1001), (2, 1002)]
    assert line(memory) == [(0, 20), (1, 21), (2, 22)]
    assert list(panels) == [
        "training loss, nats per token",
        "validation, bits per byte",
        "tokens per second, median 1,001, MFU 40.0%",
        "peak memory, GiB",
    ]
    assert texts(validation) == ["1.2500"] and texts(memory) == ["22.0"]
    assert [text.get_text() for text in validation.get_legend().get_texts()] == ["token frequencies alone 2.750"]


def test_one_step_on_a_cpu_without_evaluation(tmp_path: Path, panels: dict[str, Axes]) -> None:
    record(tmp_path, [4.0], on_gpu=False)
    assert draw(tmp_path).stat().st_size > 10_000
    loss, validation, throughput, memory = panels.values()
    assert loss.lines[0].get_marker() == "o"  # a line through one point would be invisible
    assert [tick for tick in loss.get_xticks() if -0.5 <= tick <= 0.5] == [0]
    assert texts(validation) == ["no evaluation in this run"]
    assert texts(memory) == ["not measured in this run"]
    assert throughput.get_title(loc="left") == "tokens per second, median 1,000"


def test_values_that_are_not_finite_leave_gaps(tmp_path: Path, panels: dict[str, Axes]) -> None:
    record(tmp_path, [4.0, math.nan, math.inf, 3.0])
    draw(tmp_path)
    loss = panels["training loss, nats per token"]
    values = [y for _, y in line(loss)]
    assert math.isnan(values[1]) and math.isinf(values[2]) and values[3] == 3.0
    low, high = loss.get_ylim()
    assert 2.5 < low < 3.0 and 4.0 < high < 4.5


def test_all_losses_not_finite(tmp_path: Path) -> None:
    record(tmp_path, [math.nan, math.nan], evaluations={2: math.nan})
    assert draw(tmp_path).exists()


def test_drawing_again_replaces_the_picture(tmp_path: Path) -> None:
    record(tmp_path, [4.0, 3.0])
    first = draw(tmp_path).read_bytes()
    record(tmp_path, [4.0, 3.0, 1.0])
    assert draw(tmp_path).read_bytes() != first


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"has no metrics\.jsonl"):
        draw(tmp_path)
    record(tmp_path, [])
    with pytest.raises(BadInput, match=r"metrics\.jsonl holds no training step yet"):
        draw(tmp_path)
    assert not (tmp_path / "report.png").exists()


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    record(tmp_path, [4.0])
    (tmp_path / "report.png").mkdir()
    with pytest.raises(BadInput, match=r"cannot write .*report\.png: Is a directory"):
        draw(tmp_path)


def test_smoothing_against_values_by_hand() -> None:
    assert smooth([4.0, 2.0], 0.5) == pytest.approx([4.0, 8 / 3])  # (0.5·0.5·4 + 0.5·2) / (1 − 0.5²)
    assert smooth([4.0, 2.0], 0.0) == [4.0, 2.0]
    constant = smooth([3.0] * 50, 0.9)
    assert constant == pytest.approx([3.0] * 50)
    assert smooth([], 0.5) == []


def test_smoothing_skips_what_is_not_finite() -> None:
    values = smooth([math.nan, 4.0, math.inf, 4.0], 0.5)
    assert math.isnan(values[0]) and values[1:] == pytest.approx([4.0] * 3)


def test_predicted_memory_is_a_line_and_a_title(tmp_path: Path, panels: dict[str, Axes]) -> None:
    record(tmp_path, [4.0, 3.0])
    sink = Metrics(tmp_path, 2, {}, console=False, start_step=2)
    sink.memory(measured=21.0, predicted=24.5, moment="backward of the last MLP", lines={"weights": 24.5})
    sink.close()
    draw(tmp_path)
    memory = panels["peak memory, GiB; predicted 24.5"]
    assert [y for _, y in line(memory, 1)] == [24.5, 24.5]
    assert memory.get_ylim()[1] > 24.5
