"""Draw ``docs/prefill.svg`` from ``results/prefill-h100.json``: every implementation over the memory floor.

python benchmarks/plots.py
"""

from __future__ import annotations

from matplotlib import rc_context
from matplotlib.figure import Figure
from tables import ROOT, load, source

STYLES = {"flashkda_ops": ("o", "C3"), "cudnn": ("^", "C2"), "flash_kda": ("s", "C0"), "fla": ("D", "C7")}


def prefill() -> Figure:
    record = load("prefill-h100")
    regimes = list(dict.fromkeys(row["regime"] for row in record["rows"]))
    shapes = list(dict.fromkeys(row["shape"] for row in record["rows"]))
    figure = Figure(figsize=(10, 2.6 * len(regimes) + 1), layout="constrained")
    axes = figure.subplots(len(regimes), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for ax, regime in zip(axes, regimes, strict=True):
        for impl, (marker, color) in STYLES.items():
            over = {
                row["shape"]: row.get("graph_us", row["eager_us"]) / row["floor_us"]
                for row in record["rows"]
                if row["regime"] == regime and row["impl"] == impl and "eager_us" in row
            }
            if over:
                ax.plot([shapes.index(shape) for shape in over], list(over.values()), marker, color=color, label=impl)
        ax.set(yscale="log", ylabel=f"{regime} gates\ntime over the floor")
        ax.axhline(1, color="black", linewidth=0.8)
        ax.grid(axis="y", which="both", alpha=0.3)
    axes[0].legend(ncols=len(STYLES), loc="upper left")
    axes[-1].set_xticks(range(len(shapes)), shapes, rotation=60, ha="right")
    axes[-1].set_xlabel(source(record).strip())
    return figure


if __name__ == "__main__":
    with rc_context({"svg.hashsalt": "flashkda_ops"}):  # the same file from the same results
        prefill().savefig(ROOT / "docs" / "prefill.svg", metadata={"Date": None})
