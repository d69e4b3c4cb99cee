"""The curves of a run in one picture: training loss, validation bits per byte, throughput and memory over the steps.

Drawn from metrics.jsonl alone, so any run can be drawn again, on any machine, while it goes or long after.
"""

import math
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nanochat import metrics
from nanochat.errors import BadInput

PNG = "report.png"
INK, ACCENT, FAINT = "#22303c", "#1769aa", "#a9c7e0"


def draw(directory: Path) -> Path:
    """Draw the run recorded in `directory` into report.png beside its metrics.jsonl, and return that path.

    Values that are not finite leave gaps. A figure made through `Figure` instead of pyplot needs no display and leaves
    no global state behind, so a training process can draw its own.

    Raises:
        BadInput: no metrics.jsonl, a damaged one, none with a training step, or a directory that cannot be written.
    """
    records = metrics.read(directory)
    steps = [record for record in records if record["kind"] == "step"]
    evaluations = [record for record in records if record["kind"] == "eval"]
    if not steps:
        raise BadInput(f"{directory / metrics.JSONL} holds no training step yet: nothing to draw")
    configs = [record["config"] for record in records if record["kind"] == "run"]
    floor = configs[-1].get("unigram_bits_per_byte") if configs else None

    figure = Figure(figsize=(11, 7), dpi=130, layout="constrained")
    (top_left, top_right), (bottom_left, bottom_right) = figure.subplots(2, 2, sharex=True)
    count, tokens = len(steps), sum(record["tokens"] for record in steps)
    figure.suptitle(f"{directory.name}: {count:,} step{'s'[: count > 1]}, {tokens:,} tokens", color=INK)
    _draw_loss(top_left, *_series(steps, "loss"))
    _draw_evaluations(top_right, *_series(evaluations, "bpb"), floor)
    _draw_throughput(bottom_left, *_series(steps, "tokens_per_second"), _series(steps, "mfu")[1])
    predictions = [record for record in records if record["kind"] == "memory"]
    _draw_memory(bottom_right, *_series(steps, "memory_gib"), predictions[-1]["predicted_gib"] if predictions else None)
    for axes in (bottom_left, bottom_right):
        axes.set_xlabel("step", fontsize=9, color=INK)
    last = max(record["step"] for record in steps + evaluations)
    top_left.set_xlim(steps[0]["step"] - 0.5, last + 0.5)  # shared by all; one step must not get ticks of fractions
    path = directory / PNG
    try:
        figure.savefig(path)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}") from error
    return path


def smooth(values: list[float], weight: float) -> list[float]:
    """Exponential moving average, corrected for its start (as Adam's, arXiv 1412.6980); skips what is not finite.

    Args:
        values: in order of time.
        weight: of the past, 0 <= weight < 1.
    """
    total, norm, result = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            total = weight * total + (1 - weight) * value
            norm = weight * norm + (1 - weight)
        result.append(total / norm if norm else math.nan)
    return result


def _series(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the records that have a value (not None) under `name`."""
    known = [record for record in records if record[name] is not None]
    return [record["step"] for record in known], [float(record[name]) for record in known]


def _draw_loss(axes: Axes, steps: list[int], losses: list[float]) -> None:
    _style(axes, "training loss, nats per token")
    smoothed = smooth(losses, 1 - 1 / max(1.0, len(losses) / 100))
    axes.plot(steps, losses, color=FAINT, linewidth=1, **_marker(steps))
    axes.plot(steps, smoothed, color=ACCENT, linewidth=1.8)
    _annotate_last(axes, steps, smoothed, "{:.3f}")


def _draw_evaluations(axes: Axes, steps: list[int], bits: list[float], floor: float | None) -> None:
    _style(axes, "validation, bits per byte")
    if not steps:
        _say(axes, "no evaluation in this run")
        return
    axes.plot(steps, bits, color=ACCENT, linewidth=1.8, marker="o", markersize=4)
    _annotate_last(axes, steps, bits, "{:.4f}")
    if floor is not None:
        label = f"token frequencies alone {floor:.3f}"
        axes.axhline(floor, color=INK, linewidth=1, linestyle="--", alpha=0.6, label=label)
        axes.legend(frameon=False, fontsize=8, loc="upper right")


def _draw_throughput(axes: Axes, steps: list[int], rates: list[float], mfus: list[float]) -> None:
    utilization = f", MFU {100 * median(mfus):.1f}%" if mfus else ""
    _style(axes, f"tokens per second, median {median(rates):,.0f}{utilization}")
    axes.plot(steps, rates, color=ACCENT, linewidth=1.4, **_marker(steps))
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")


def _draw_memory(axes: Axes, steps: list[int], gibs: list[float], predicted: float | None) -> None:
    _style(axes, "peak memory, GiB" + ("" if predicted is None else f"; predicted {predicted:.1f}"))
    if not steps:
        _say(axes, "not measured in this run")
        return
    axes.plot(steps, gibs, color=ACCENT, linewidth=1.8, **_marker(steps))
    if predicted is not None:
        axes.axhline(predicted, color=INK, linewidth=1, linestyle="--")
    axes.set_ylim(0, 1.15 * max(*gibs, predicted or 0) or 1)
    _annotate_last(axes, steps, gibs, "{:.1f}")


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _marker(steps: list[int]) -> dict[str, Any]:
    """A line through one point cannot be seen: short runs get dots."""
    return {"marker": "o", "markersize": 4} if len(steps) < 20 else {}


def _annotate_last(axes: Axes, steps: list[int], values: list[float], form: str) -> None:
    if math.isfinite(values[-1]):
        text, last = form.format(values[-1]), (steps[-1], values[-1])
        axes.annotate(text, last, (-4, 6), textcoords="offset points", ha="right", color=INK, fontsize=9)


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=INK, alpha=0.6)
    axes.set_yticks([])
