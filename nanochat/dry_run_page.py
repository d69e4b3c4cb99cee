"""What a dry run shows: one table for the terminal, the same and its curves as a page, and the curves as a picture."""

import math
from collections.abc import Callable
from dataclasses import asdict
from html import escape
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nanochat import page
from nanochat.dry_run import BEHIND, Comparison, Measured, Row, behind, learned
from nanochat.train import WARMUP_STEPS

# Of page.py's light scheme, for the picture.
COLORS = ("#1769aa", "#c25e00", "#1d8348", "#8e3fb0", "#b3245c", "#5d6d1e")
_NONE = "-"


def table(done: Comparison) -> list[list[str]]:
    """Rows of cells, of which the first names the row and each other one is of a precision; the first row is their names."""
    lines: list[tuple[str, Callable[[Row, Measured], str]]] = [
        ("loss, first step", lambda _, m: f"{m.losses[0]:.4f}"),
        ("loss, last step", lambda _, m: f"{m.losses[-1]:.4f}"),
        (f"largest gap to {done.reference}", lambda row, _: _form(done.gap(row), "{:.4f}")),
        ("values not finite", lambda _, m: f"{sum(not math.isfinite(loss) for loss in m.losses)} losses, {m.bad_steps} steps"),
        ("tokens per second", lambda row, m: f"{m.tokens_per_second:,.0f}{_ratio(done.speed(row))}"),
        ("MFU, peak of its formats", lambda _, m: _form(m.mfu, "{:.1%}")),
        (f"peak memory, {_what(done)}, GiB", lambda row, m: f"{m.gib:.2f}{_ratio(done.memory(row))}"),
        ("the same, predicted", lambda _, m: _form(m.predicted_gib, "{:.2f}")),
        ("board memory (NVML), GiB", lambda row, m: _form(m.board_gib, "{:.2f}") + _ratio(_board_ratio(done, m))),
        ("bytes per parameter", lambda _, m: f"{m.bytes_per_parameter:.2f}"),
        (f"first {WARMUP_STEPS} steps, s", lambda _, m: f"{m.warm_up:.1f}"),
        ("energy, mJ per token", lambda _, m: _form(None if m.joules_per_token is None else 1e3 * m.joules_per_token, "{:.2f}")),
    ]
    cells = [["", *(row.precision for row in done.rows)]]
    cells += [[name, *(_NONE if row.measured is None else of(row, row.measured) for row in done.rows)] for name, of in lines]
    return [*cells, ["in short", *(_verdict(done, row) for row in done.rows)]]


def _form(value: float | None, form: str) -> str:
    return _NONE if value is None else form.format(value)


def _ratio(value: float | None) -> str:
    return "" if value is None else f" ({value:.2f}×)"


def _what(done: Comparison) -> str:
    return "allocator" if done.device == "cuda" else "process"


def _board_ratio(done: Comparison, measured: Measured) -> float | None:
    base = done.of_reference()
    return measured.board_gib / base.board_gib if base and base.board_gib and measured.board_gib else None


def _verdict(done: Comparison, row: Row) -> str:
    if row.unavailable:
        return f"unavailable: {row.unavailable}"
    if any(problem.startswith(f"{row.precision}: ") for problem in done.problems()):
        return "FAILS"
    return "the reference" if row.precision == done.reference else "agrees"


def remarks(done: Comparison) -> list[str]:
    """What must be known to read the table."""
    config, found = done.config, []
    shape = f"d{config.depth}, {config.num_iterations} steps of {config.total_batch_size:,} tokens"
    found.append(f"{done.device_name}; {shape}, micro-batches of {config.device_batch_size} × {config.max_seq_len}; {done.date}.")
    if done.device == "cpu":
        found.append(
            "Speed and memory are not judged: without a GPU FP8 is emulated, with the same numerics and much more work. "
            "A CPU has no peak, no allocator and no board to ask."
        )
    base = done.of_reference()
    if base is not None and learned(base.losses) > 0:
        found.append(
            f"A precision has diverged where its last quarter of losses lies more than {BEHIND * learned(base.losses):.3f} above "
            f"{done.reference}'s: a third of what that learned, {learned(base.losses):.3f} nats, or a quarter of the run behind."
        )
    if done.device == "cuda":
        reasons = dict.fromkeys(row.measured.no_energy for row in done.rows if row.measured and row.measured.no_energy)
        found += [f"No energy: {reason}." for reason in reasons]
        found.append("Energy is the whole board's, idle power included; board memory is what all programs took more than before.")
    return found


def headline(done: Comparison) -> str:
    """The dry run in one sentence."""
    base = done.of_reference()
    others = [row for row in done.rows if row.measured and row.precision != done.reference]
    if done.problems():
        return "This dry run fails"
    if base is None or not others:
        return f"{done.reference} runs here"
    if done.device == "cpu":
        ends = " and ".join(
            f"{row.precision} ends {abs(behind(row.measured.losses, base.losses)):.3f} nats from {done.reference}"
            for row in others
            if row.measured
        )
        return f"{ends} after {len(base.losses)} steps"
    best = max(others, key=lambda row: done.speed(row) or 0)
    return f"{best.precision} trains {done.speed(best):.2f}× as fast as {done.reference}, in {done.memory(best):.2f}× the memory"


def render(done: Comparison) -> str:
    """The page."""
    colored = [(row, row.measured, i % 6) for i, row in enumerate(done.rows) if row.measured is not None]
    problems, base = done.problems(), done.of_reference()
    verdict = "".join(f'<p class="verdict fails">{escape(problem)}</p>' for problem in problems)
    if not problems:
        verdict = '<p class="verdict">Every precision that runs here has trained: all finite, none diverged.</p>'
    parts = [page.heading(f"dry run · {done.device_name} · {done.date}", headline(done)), verdict]
    parts += [page.cards(facts) for row in done.rows if (facts := _facts(done, row))]
    parts += ["<h2>Loss, nats per token</h2>", page.grid(*_losses(done, colored))]
    others = [entry for entry in colored if entry[0].precision != done.reference]
    if base is not None and others:
        steps = range(len(base.losses))
        gaps = [
            page.Curve(row.precision, steps, [one - other for one, other in zip(m.losses, base.losses, strict=True)], color)
            for row, m, color in others
        ]
        parts += [f"<h2>Gap to {escape(done.reference)}, and speed</h2>"]
        parts.append(
            page.grid(
                page.chart(f"loss less {done.reference}'s", gaps, lambda y: f"{y:+.3g}"),
                page.chart("tokens per second", _rates(colored), lambda y: f"{y:,.0f}", zero=True),
            )
        )
    if done.device == "cuda" and colored:
        parts += ["<h2>What it costs</h2>", page.grid(*_costs(done, colored))]
    parts += ["<h2>All figures</h2>", page.table(table(done))] + [page.note(remark) for remark in remarks(done)]
    layers = [
        page.details(f"what {row.precision} runs in", page.table(list(m.layers.items()), words=True)) for row, m, _ in colored
    ]
    config = {name: str(value) for name, value in asdict(done.config).items() if name != "precision"}
    where = {name: str(value) for name, value in done.environment.items()}
    parts += ["<h2>How</h2>", *layers, page.details("configuration", page.table(list(config.items()), words=True))]
    parts.append(page.details("machine and versions", page.table(list(where.items()), words=True)))
    return page.page(f"dry run: {headline(done)}", *parts)


def _facts(done: Comparison, row: Row) -> list[tuple[str, str]]:
    """What a precision comes to beside the reference, in figures that stand out."""
    base, gap, name = done.of_reference(), done.gap(row), row.precision
    if base is None or row.measured is None or gap is None:
        return []
    facts = [(f"{gap:.4f}", f"{name}: largest gap to {done.reference}, which learned {learned(base.losses):.2f} nats")]
    ratios = {"speed": done.speed(row), "peak memory": done.memory(row), "energy": None}
    if row.measured.joules_per_token is not None and base.joules_per_token:
        ratios["energy"] = row.measured.joules_per_token / base.joules_per_token
    facts += [(f"{ratio:.2f}×", f"{name}: {what}") for what, ratio in ratios.items() if ratio is not None]
    return [
        *facts,
        (f"{row.measured.bytes_per_parameter:.1f} B", f"{name}: a parameter; {done.reference} {base.bytes_per_parameter:.1f}"),
    ]


_Colored = list[tuple[Row, Measured, int]]


def _losses(done: Comparison, colored: _Colored) -> list[str]:
    """A panel a precision, side by side on the same axes, with all the others faint behind it."""
    finite = [loss for _, m, _ in colored for loss in m.losses if math.isfinite(loss)]
    limits = (min(finite) - 0.1, max(finite) + 0.1) if finite else None
    panels = []
    for row, measured, color in colored:
        others = [page.Curve(r.precision, range(len(m.losses)), m.losses, None) for r, m, _ in colored if r is not row]
        own = page.Curve(row.precision, range(len(measured.losses)), measured.losses, color)
        panels.append(page.chart(row.precision, [*others, own], lambda y: f"{y:.4g}", limits=limits))
    return panels


def _rates(colored: _Colored) -> list[page.Curve]:
    return [
        page.Curve(row.precision, range(WARMUP_STEPS, len(m.seconds)), [m.tokens / s for s in m.seconds[WARMUP_STEPS:]], color)
        for row, m, color in colored
    ]


def _costs(done: Comparison, colored: _Colored) -> list[str]:
    def of(title: str, value: Callable[[Row, Measured], float | None], form: Callable[[Row, Measured], str]) -> str:
        known = [(row.precision, v, form(row, m), color) for row, m, color in colored if (v := value(row, m)) is not None]
        return page.bars(title, known) if known else ""

    return [
        of(
            "tokens per second",
            lambda _, m: m.tokens_per_second,
            lambda row, m: f"{m.tokens_per_second:,.0f}{_ratio(done.speed(row))}",
        ),
        of("peak memory, GiB", lambda _, m: m.gib, lambda row, m: f"{m.gib:.1f}{_ratio(done.memory(row))}"),
        of("energy, mJ per token", lambda _, m: m.joules_per_token, lambda _, m: f"{1e3 * (m.joules_per_token or 0):.2f}"),
        of("first steps, s", lambda _, m: m.warm_up, lambda _, m: f"{m.warm_up:.1f}"),
    ]


def draw(done: Comparison, path: Path) -> None:
    """The curves and the gaps as a picture, a PNG."""
    figure = Figure(figsize=(11, 4.2), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(f"{headline(done)} ({done.device_name}, d{done.config.depth})", fontsize=11)
    base = done.of_reference()
    for i, row in enumerate(done.rows):
        if row.measured is None:
            continue
        losses, style = row.measured.losses, {"color": COLORS[i % 6], "label": row.precision, "linewidth": 1.8}
        left.plot(range(len(losses)), losses, linestyle=("-", "--", ":", "-.")[i % 4], **style)
        if base is not None and row.precision != done.reference:
            right.plot(range(len(losses)), [a - b for a, b in zip(losses, base.losses, strict=True)], **style)
    for axes, title in ((left, "loss, nats per token"), (right, f"loss less {done.reference}'s")):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)
