"""Draw docs/steps.png from benchmarks/steps.csv: throughput and peak memory of whole steps, by depth and variant.

Run it as `python -m benchmarks.picture`.
"""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
COLORS = ("#9aa5b1", "#1769aa", "#2e8b57", "#c77800")


def main() -> None:
    """Read the table, draw one panel a depth and quantity, save."""
    rows = list(csv.DictReader((HERE / "steps.csv").read_text().splitlines()))
    depths = sorted({int(row["depth"]) for row in rows})
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    quantities = (("tokens_per_second", 1e-3, "thousand tokens per second"), ("peak_gib", 1, "peak memory, GiB"))
    figure, axes = plt.subplots(1, 2 * len(depths), figsize=(3 * 2 * len(depths), 2.6), layout="constrained")
    panels = [(quantity, depth) for quantity in quantities for depth in depths]
    for axis, ((column, factor, title), depth) in zip(axes, panels, strict=True):
        values = {row["variant"]: float(row[column]) * factor for row in rows if int(row["depth"]) == depth}
        bars = axis.barh(list(values), list(values.values()), color=[COLORS[variants.index(name)] for name in values])
        axis.bar_label(bars, fmt="%.1f", padding=3)
        axis.set_title(f"d{depth}: {title}", fontsize=10, loc="left")
        axis.set_xlim(0, 1.2 * max(values.values()))
        axis.invert_yaxis()
        axis.xaxis.set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    figure.suptitle(f"whole training steps, {rows[0]['gpu']}, {rows[0]['date']}", fontsize=9, color="#555555")
    figure.savefig(HERE.parent / "docs" / "steps.png", dpi=130)


if __name__ == "__main__":
    main()
