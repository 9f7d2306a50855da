"""Draw docs/speed.png from the committed figures.

python tests/bench/plot_speed.py                  (needs matplotlib, nothing else)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests" / "bench" / "results"
PLOT = ROOT / "docs" / "speed.png"
GIB = 2**30
GRAFT, OTHERS = "#1b7f4d", "#9aa5b1"


def main() -> None:
    """Speeds as bars, losses as curves."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.8), width_ratios=[1.25, 1])
    bars(left, rows_of("h200-llama-2-7b-a"))
    curves(right, rows_of("h200-losses"))
    figure.tight_layout(w_pad=3)
    figure.savefig(PLOT, dpi=110)


def rows_of(name: str) -> list[dict[str, Any]]:
    """The rows of one file of results."""
    rows: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text())
    return rows


def bars(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Real tokens per second, each with the memory that its allocator reserved."""
    speeds = [row["tokens_per_second"] for row in rows]
    colours = [GRAFT if row["row"].startswith("Graft") else OTHERS for row in rows]
    drawn = axes.barh([row["row"] for row in rows], speeds, color=colours)
    labels = [
        f"{row['tokens_per_second']:,.0f}  ({row['memory']['reserved_peak_bytes'] / GIB:.1f} GiB)" for row in rows
    ]
    axes.bar_label(drawn, labels, padding=4, fontsize=9)
    axes.invert_yaxis()
    axes.set(
        xlabel="real tokens per second (GiB reserved)", xlim=(0, 1.4 * max(speeds)), title="7B, attention's products"
    )
    axes.spines[["top", "right"]].set_visible(False)


def curves(axes: Any, rows: list[dict[str, Any]]) -> None:
    """The loss of each update: the reference broad and pale, Graft thin on top of it."""
    for row, colour, width in zip(rows, (OTHERS, GRAFT), (5, 1.2), strict=True):
        losses = row["losses"]
        axes.plot(range(1, len(losses) + 1), losses, color=colour, linewidth=width, label=row["row"])
    axes.set(xlabel="optimizer step", ylabel="training loss, nats per token", title="1B, the same batches, no dropout")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
