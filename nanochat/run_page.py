"""A training run as one page: curves, memory predicted and measured, samples, log and full configuration.

Like the picture (`nanochat/report.py`) it is made from metrics.jsonl alone, so any run can be shown again,
while it goes or long after.
"""

import math
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from nanochat import metrics, page
from nanochat.errors import BadInput
from nanochat.report import smooth

HTML = "report.html"
Record = dict[str, Any]


def write(directory: Path) -> Path:
    """Write report.html of the run recorded in `directory` beside its metrics.jsonl, and return that path.

    Raises:
        BadInput: no metrics.jsonl, a damaged one, none with a training step, or a directory that cannot be written.
    """
    path = directory / HTML
    text = render(directory.name, metrics.read(directory), directory)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}") from error
    return path


def render(name: str, records: list[Record], directory: Path) -> str:
    """The page.

    Args:
        name: of the run.
        records: of its metrics.jsonl.
        directory: that it is in, for the message.

    Raises:
        BadInput: no record of a training step.
    """
    kinds: dict[str, list[Record]] = {}
    for record in records:
        kinds.setdefault(record["kind"], []).append(record)
    steps, evaluations = kinds.get("step", []), kinds.get("eval", [])
    if not steps:
        raise BadInput(f"{directory / metrics.JSONL} holds no training step yet: nothing to show")
    config = kinds["run"][-1]["config"] if "run" in kinds else {}
    memory = kinds["memory"][-1] if "memory" in kinds else None
    best = min((bits for bits in _values(evaluations, "bpb")[1] if math.isfinite(bits)), default=None)
    losses = _values(steps, "loss")[1]
    smoothed = smooth(losses, 1 - 1 / max(1.0, len(losses) / 100))
    count = f"{len(steps):,} step{'s'[: len(steps) > 1]}"
    title = f"{count}, loss {smoothed[-1]:.3f}" if best is None else f"{best:.4f} bits per byte after {count}"
    introduction = [record["text"] for record in kinds.get("event", []) if record["text"].startswith("device: ")]
    parts = [page.heading(f"training run {name}", title)] + [page.note(text) for text in introduction[-1:]]
    parts.append(page.cards(_facts(steps, smoothed[-1], best, config, memory)))
    parts += ["<h2>Curves</h2>", page.grid(*_charts(steps, smoothed, evaluations, config, memory))]
    if memory is not None:
        parts += ["<h2>Memory at its peak, GiB</h2>", *_memory(memory)]
    if samples := kinds.get("sample", []):
        newest = [record["text"] for record in samples if record["step"] == samples[-1]["step"]]
        parts += [f"<h2>What the model writes after {samples[-1]['step']:,} steps</h2>"]
        parts += [f"<pre>{escape(text)}</pre>" for text in newest]
    log = "\n".join(f"{record['step']:>7}  {record['text']}" for record in kinds.get("event", []))
    settings = [[key, str(value)] for key, value in config.items()]
    parts += ["<h2>How</h2>", page.details("full configuration", page.table(settings, words=True))]
    parts.append(page.details("log", f"<pre>{escape(log)}</pre>"))
    return page.page(f"{name}: {title}", *parts)


def _values(records: list[Record], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of the records that have one under `name`."""
    known = [record for record in records if record.get(name) is not None]
    return [record["step"] for record in known], [float(record[name]) for record in known]


def _facts(
    steps: list[Record], loss: float, best: float | None, config: Record, memory: Record | None
) -> list[tuple[str, str]]:  # fmt: skip
    """Figures and their words, those that are known."""
    rates, mfus, gibs = (_values(steps, name)[1] for name in ("tokens_per_second", "mfu", "memory_gib"))
    facts = [(f"{loss:.4f}", "training loss at the end, nats per token, smoothed")]
    if best is not None:
        floor = config.get("unigram_bits_per_byte")
        facts.append(
            (f"{best:.4f}", "best validation, bits per byte" + (f"; token frequencies alone {floor:.3f}" if floor else ""))
        )
    facts.append((f"{sum(record['tokens'] for record in steps):,}", "tokens trained on"))
    facts.append((f"{median(rates):,.0f}", "tokens per second, median"))
    if mfus:
        facts.append((f"{median(mfus):.1%}", "MFU, of the bf16 peak"))
    if gibs:
        predicted = f"; predicted {memory['predicted_gib']:.2f}" if memory else ""
        facts.append((f"{max(gibs):.2f} GiB", f"peak memory{predicted}"))
    return [*facts, (_duration(sum(record["seconds"] for record in steps)), "spent in steps")]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _charts(
    steps: list[Record], smoothed: list[float], evaluations: list[Record], config: Record, memory: Record | None
) -> list[str]:  # fmt: skip
    """Curves over the steps, of what was recorded."""
    xs, losses = _values(steps, "loss")
    drawn = [
        page.chart(
            "training loss, nats per token",
            [page.Curve("each step", xs, losses, None), page.Curve("smoothed", xs, smoothed)],
            lambda y: f"{y:.4g}",
        )
    ]
    if evaluations:
        floor = config.get("unigram_bits_per_byte")
        level = None if floor is None else ("token frequencies alone", floor)
        curve = page.Curve("validation", *_values(evaluations, "bpb"))
        drawn.append(page.chart("validation, bits per byte", [curve], lambda y: f"{y:.4g}", level=level))
    rate = page.Curve("tokens per second", *_values(steps, "tokens_per_second"))
    drawn.append(page.chart("tokens per second", [rate], lambda y: f"{y:,.0f}", zero=True))
    norms, gibs = _values(steps, "grad_norm"), _values(steps, "memory_gib")
    if norms[0]:
        drawn.append(page.chart("norm of the gradient", [page.Curve("norm", *norms)], lambda y: f"{y:.3g}", zero=True))
    if gibs[0]:
        level = ("predicted", memory["predicted_gib"]) if memory else None
        curve = page.Curve("peak so far", *gibs)
        drawn.append(page.chart("peak memory, GiB", [curve], lambda y: f"{y:.3g}", zero=True, level=level))
    return drawn


def _memory(memory: Record) -> list[str]:
    """What the predicted peak consists of, the largest first, and what was measured."""
    lines = sorted(memory["lines"].items(), key=lambda item: -item[1])
    rows = [[what, f"{gib:.2f}"] for what, gib in lines if gib >= 0.005]
    rows.append([f"{len(lines) - len(rows)} smaller ones", f"{sum(gib for _, gib in lines if gib < 0.005):.2f}"])
    rows += [["predicted in all", f"{memory['predicted_gib']:.2f}"], ["measured", f"{memory['measured_gib']:.2f}"]]
    return [page.note(f"The peak is predicted for {memory['moment']}."), page.table(rows)]
