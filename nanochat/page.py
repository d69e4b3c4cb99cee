"""Parts of a page that is one file: no server, no library, no font or script from elsewhere.

Charts are inline SVG, a few hundred pixels wide in their own units, so that their text stays legible where a phone shows one beside
nothing and a desktop three side by side. Colours are CSS variables with a light and a dark value, and curves differ by their dashes
too. Twenty lines of JavaScript show the values under the pointer or finger; without them the page says the same but that.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 14, 30
POINTS = 500  # of a curve; more are drawn as means of neighbours
DASHES = ("", "7 4", "2 3", "9 3 2 3", "4 2", "1 3")

_STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#17212b;--soft:#5b6874;--line:#dde2e8;--good:#167a42;--bad:#c2281d;
--c0:#1769aa;--c1:#c25e00;--c2:#1d8348;--c3:#8e3fb0;--c4:#b3245c;--c5:#5d6d1e}
@media(prefers-color-scheme:dark){:root{--bg:#0f1419;--card:#182028;--ink:#e6ebf0;--soft:#9aa8b5;--line:#2c3844;--good:#4cc38a;
--bad:#ff7b72;--c0:#6cb6ff;--c1:#ffa657;--c2:#5fd38d;--c3:#d2a8ff;--c4:#ff8fb8;--c5:#c5d86d}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 16px 48px}
h1{font-size:clamp(1.5rem,4.5vw,2.4rem);line-height:1.2;margin:.1em 0 .3em;letter-spacing:-.02em;text-wrap:balance}
h2{font-size:1.15rem;margin:2em 0 .6em}
.kicker,.note,figcaption small{color:var(--soft)}.kicker{margin:0}.note{font-size:.9rem}
.grid{display:grid;gap:14px;grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr))}
.cards{display:grid;gap:10px;grid-template-columns:repeat(auto-fit,minmax(min(100%,150px),1fr));margin:10px 0}
.card,figure,.scroll,details,pre{background:var(--card);border:1px solid var(--line);border-radius:12px}
.card{padding:12px 14px}.card b{display:block;font-size:1.45rem;letter-spacing:-.01em}.card span{color:var(--soft);font-size:.85rem}
figure{margin:0;padding:12px 12px 6px}figcaption{font-weight:600;display:flex;flex-wrap:wrap;gap:2px 12px}
figcaption small{font-weight:400}svg{display:block;width:100%;height:auto;touch-action:pan-y}
svg text{font-size:13px;fill:var(--soft);font-family:inherit}svg .axis{stroke:var(--line)}
svg .value{fill:var(--ink);font-weight:600}
output{display:block;min-height:1.6em;color:var(--soft);font-size:.85rem;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{max-width:17em;padding:7px 12px;text-align:right;vertical-align:top;border-top:1px solid var(--line)}
tr:first-child>*{border-top:0}
th:first-child{text-align:left;font-weight:500;color:var(--soft)}td.words{text-align:left}
.good{color:var(--good)}.bad{color:var(--bad)}.verdict{padding:10px 14px;border-left:4px solid var(--good);background:var(--card);
border-radius:6px}.verdict.fails{border-color:var(--bad)}
pre{padding:12px;white-space:pre-wrap;overflow-wrap:anywhere;font-size:.85rem;margin:.5em 0}
details{padding:10px 14px;margin:10px 0}summary{cursor:pointer;font-weight:600}details td,details th{max-width:none;text-align:left;
overflow-wrap:anywhere}
details table{table-layout:fixed}details th{width:16em}@media(max-width:600px){details th{width:10em}}
"""
_SCRIPT = """
for(const f of document.querySelectorAll("figure[data-x]")){const d=JSON.parse(f.dataset.x),s=f.querySelector("svg"),
o=f.querySelector("output"),l=f.querySelector(".at");const at=e=>{const r=s.getBoundingClientRect(),
v=d.lo+((e.clientX-r.left)/r.width*d.w-d.l)/(d.w-d.l-d.r)*(d.hi-d.lo);let x=null;
for(const c of d.c)for(const p of c.p)if(x===null||Math.abs(p[0]-v)<Math.abs(x-v))x=p[0];if(x===null)return;
const k=d.hi>d.lo?(x-d.lo)/(d.hi-d.lo):.5,px=d.l+k*(d.w-d.l-d.r);l.setAttribute("x1",px);l.setAttribute("x2",px);
l.style.visibility="visible";o.textContent=d.u+" "+x+": "+d.c.map(c=>{const p=c.p.find(p=>p[0]===x);
return p?c.n+" "+p[2]:null}).filter(Boolean).join(", ")};s.addEventListener("pointermove",at);s.addEventListener("pointerdown",at);
s.addEventListener("pointerleave",()=>{l.style.visibility="hidden"})}
"""


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        name: in the legend.
        xs: in rising order.
        ys: as many; what is not finite leaves a gap.
        color: 0 to 5, with its dashes; None is a faint line behind the others, which the legend leaves out.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    color: int | None = 0


def page(title: str, *parts: str) -> str:
    """A whole page; `parts` are HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,'
        f'initial-scale=1"><title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n'
        + "\n".join(parts)
        + f"\n</main><script>{_SCRIPT}</script></body></html>\n"
    )


def heading(kicker: str, title: str) -> str:
    """The page's first lines."""
    return f'<p class="kicker">{escape(kicker)}</p><h1>{escape(title)}</h1>'


def cards(facts: Iterable[tuple[str, str]]) -> str:
    """Figures that stand out, each with the words below it."""
    inner = "".join(f'<div class="card"><b>{escape(figure)}</b><span>{escape(what)}</span></div>' for figure, what in facts)
    return f'<div class="cards">{inner}</div>'


def grid(*parts: str) -> str:
    """Parts side by side where there is room."""
    return f'<div class="grid">{"".join(parts)}</div>'


def note(text: str) -> str:
    """A paragraph in small print."""
    return f'<p class="note">{escape(text)}</p>'


def table(rows: Iterable[Sequence[str]], *, words: bool = False) -> str:
    """Rows of cells, of which the first names the row; `words` align to the left."""
    kind = ' class="words"' if words else ""
    lines = (
        f"<tr><th>{escape(row[0])}</th>" + "".join(f"<td{kind}>{escape(cell)}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def details(summary: str, inner: str) -> str:
    """HTML that opens on demand."""
    return f"<details><summary>{escape(summary)}</summary>{inner}</details>"


def thin(xs: Sequence[float], ys: Sequence[float], most: int = POINTS) -> tuple[list[float], list[float]]:
    """At most `most` points: each the mean of its neighbours at the last of them; one that is not finite shows as a gap."""
    size = math.ceil(len(xs) / most) or 1
    starts = range(0, len(xs), size)
    means = [sum(ys[i : i + size]) / len(ys[i : i + size]) for i in starts]
    return [xs[min(i + size, len(xs)) - 1] for i in starts], means


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`: steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.999 * raw)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def chart(
    title: str, curves: Sequence[Curve], form: Callable[[float], str], *, unit: str = "step", zero: bool = False,
    limits: tuple[float, float] | None = None, level: tuple[str, float] | None = None,
) -> str:  # fmt: skip
    """Curves over steps.

    Args:
        title: above it.
        curves: drawn in order; at least one point of all must be finite, or the chart says that there is none.
        form: of values, on the axis and under the pointer.
        unit: of x.
        zero: whether the axis begins at 0.
        limits: of the values; None takes what the curves have.
        level: words and height of a horizontal line.
    """
    thinned = [(curve, *thin(curve.xs, curve.ys)) for curve in curves]
    finite = [y for _, _, ys in thinned for y in ys if math.isfinite(y)]
    if not finite:
        return f"<figure><figcaption>{escape(title)}</figcaption>{note('no finite value')}</figure>"
    low, high = limits or _limits([*finite, *([level[1]] if level else [])], zero)
    xs = [x for _, own, _ in thinned for x in own]
    first, last = min(xs), max(xs)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first) if last > first else 0.5
        up = (min(max(y, low), high) - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    drawn = [_grid_line(place(first, y)[1], form(y)) for y in ticks(low, high)]
    for x in dict.fromkeys(round(x) for x in (ticks(first, last, 4) if last > first else [first])):
        anchor = "end" if x == last else "middle"
        drawn.append(f'<text x="{place(x, low)[0]:.1f}" y="{HEIGHT - 10}" text-anchor="{anchor}">{x:,}</text>')
    if level:
        y = place(first, level[1])[1]
        drawn.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--soft)" stroke-dasharray="6 4"/>'
        )
        drawn.append(f'<text x="{WIDTH - RIGHT}" y="{y - 5:.1f}" text-anchor="end">{escape(level[0])}</text>')
    drawn += [
        _path(curve, [place(x, y) if math.isfinite(y) else None for x, y in zip(own, ys, strict=True)])
        for curve, own, ys in thinned
    ]
    drawn.append(f'<line class="at" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="var(--soft)" visibility="hidden"/>')
    named = [(curve, own, ys) for curve, own, ys in thinned if curve.color is not None]
    points = [
        {"n": curve.name, "p": [[x, round(y, 6), form(y)] for x, y in zip(own, ys, strict=True) if math.isfinite(y)]}
        for curve, own, ys in named
    ]
    data = {"lo": first, "hi": last, "w": WIDTH, "l": LEFT, "r": RIGHT, "u": unit, "c": points}
    legend = "".join(_key(curve) for curve, _, _ in named) if len(named) > 1 else ""
    return (
        f'<figure data-x="{escape(json.dumps(data))}"><figcaption>{escape(title)} {legend}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(drawn)}</svg>'
        "<output>point at it or touch it to read values</output></figure>"
    )


def _limits(values: Sequence[float], zero: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return (0.0 if zero else low - margin), high + margin


def _grid_line(y: float, text: str) -> str:
    line = f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return line + f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>'


def _look(curve: Curve) -> str:
    if curve.color is None:
        return 'stroke="var(--soft)" stroke-opacity=".45" stroke-width="1.4"'
    return f'stroke="var(--c{curve.color})" stroke-width="2.2" stroke-dasharray="{DASHES[curve.color]}"'


def _key(curve: Curve) -> str:
    line = f'<line x1="0" x2="26" y1="6" y2="6" {_look(curve)}/>'
    return f'<small><svg viewBox="0 0 26 12" style="display:inline;width:26px">{line}</svg> {escape(curve.name)}</small>'


def _path(curve: Curve, points: Sequence[tuple[float, float] | None]) -> str:
    """A line with gaps; points by themselves, which a line cannot show, as dots."""
    commands, dots = [], []
    for i, point in enumerate(points):
        if point is None:
            continue
        alone = (i == 0 or points[i - 1] is None) and (i == len(points) - 1 or points[i + 1] is None)
        if alone:
            color = "var(--soft)" if curve.color is None else f"var(--c{curve.color})"
            dots.append(f'<circle cx="{point[0]:.1f}" cy="{point[1]:.1f}" r="3" fill="{color}"/>')
        commands.append(f"{'M' if i == 0 or points[i - 1] is None else 'L'}{point[0]:.1f} {point[1]:.1f}")
    return f'<path d="{"".join(commands)}" fill="none" stroke-linejoin="round" {_look(curve)}/>' + "".join(dots)


def bars(title: str, values: Sequence[tuple[str, float, str, int]], under: str = "") -> str:
    """Horizontal bars from 0: name, value, its words, colour."""
    most, height = max(value for _, value, _, _ in values), 46
    drawn = []
    for i, (name, value, words, color) in enumerate(values):
        y, width = i * height, 0.68 * WIDTH * value / most if most > 0 else 0
        drawn.append(f'<text x="0" y="{y + 14}">{escape(name)}</text>')
        drawn.append(f'<rect x="0" y="{y + 20}" width="{width:.1f}" height="16" rx="3" fill="var(--c{color})"/>')
        drawn.append(f'<text class="value" x="{width + 8:.1f}" y="{y + 33}">{escape(words)}</text>')
    body = f'<svg viewBox="0 0 {WIDTH} {height * len(values)}" role="img" aria-label="{escape(title)}">{"".join(drawn)}</svg>'
    return f"<figure><figcaption>{escape(title)}</figcaption>{body}{note(under) if under else ''}</figure>"
