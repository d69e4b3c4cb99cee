"""When a GPU waits: the time between a step's first kernel and its last in which no kernel, copy or memset runs on any stream.

Kernels of one stream follow each other within microseconds as long as the host is ahead. A longer gap has a reason: the host
waited for a number from the GPU and had nothing queued, or it launches kernels more slowly than they run. The names around the
longest gap say where in the step to look.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

GAP = 0.010  # ms: what is longer is no mere launch after another


class Span(NamedTuple):
    """What ran from when to when, in milliseconds since any moment."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Idle:
    """Gaps in which nothing ran.

    Attributes:
        whole: milliseconds from the first start to the last end.
        waited: milliseconds of it in which nothing ran.
        gaps: how many are longer than GAP.
        in_gaps: milliseconds that those take.
        longest: milliseconds of the longest gap, 0 where there is none.
        around: what ended last before that, and what started after it.
    """

    whole: float
    waited: float
    gaps: int
    in_gaps: float
    longest: float
    around: tuple[str, str]

    @property
    def busy(self) -> float:
        """Milliseconds in which something ran, once however many streams ran it."""
        return self.whole - self.waited

    def line(self, name: str) -> str:
        """What to print, in the columns of `step_profile.table`."""
        share = self.waited / self.whole if self.whole else 0
        line = f"{name:<26}{self.waited:>10.2f}{share:>8.1%}  of {self.whole:.2f} ms"
        if not self.gaps:
            return f"{line}; no gap above {1e3 * GAP:.0f} µs"
        before, after = (name[:60] for name in self.around)
        line += f"; {self.gaps} gaps above {1e3 * GAP:.0f} µs take {self.in_gaps:.2f}"
        return f"{line}, the longest {self.longest:.3f} between {before} and {after}"


def idle(spans: Iterable[Span]) -> Idle:
    """The gaps between `spans`, which may overlap, in any order; at least one."""
    ordered = sorted(spans, key=lambda span: span.start)
    latest, gaps = ordered[0], list[tuple[float, str, str]]()  # of all that has started, what ends last
    for span in ordered[1:]:
        if span.start > latest.end:
            gaps.append((span.start - latest.end, latest.name, span.name))
        latest = max(latest, span, key=lambda each: each.end)
    long = [length for length, _, _ in gaps if length > GAP]
    longest, before, after = max(gaps, default=(0.0, "", ""))
    return Idle(latest.end - ordered[0].start, sum(gap[0] for gap in gaps), len(long), sum(long), longest, (before, after))


def lines(spans: list[Span], updates_from: float | None) -> list[str]:
    """The lines to print of a step: the whole, and where it is known when the first optimizer began, what comes before and after.

    The gap between the two is in the whole alone: in it the host looks at gradients and queues the first update.
    """
    found = [idle(spans).line("GPU idle")] if spans else []
    if updates_from is not None:
        parts = {
            "  micro-batches": [span for span in spans if span.start < updates_from],
            "  optimizers": [span for span in spans if span.start >= updates_from],
        }
        found += [idle(part).line(name) for name, part in parts.items() if part]
    return found
