"""An SVG for each workload: the clients side by side, on each loop."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.report import Report

COLOURS = {
    "aiopgsafe": "#1b6ca8",
    "psycopg": "#8a8a8a",
    "psycopg_pool": "#8a8a8a",
    "asyncpg": "#c7a252",
    "SQLAlchemy": "#b0624a",
}


def plot(report: Report, directory: Path) -> None:
    """Write them, and `index.md`, which shows all."""
    directory.mkdir(parents=True, exist_ok=True)
    # The same figures give the same files.
    mpl.rcParams.update({"svg.hashsalt": "aiopgsafe", "font.size": 9, "svg.fonttype": "none"})
    lines = ["# Plots", "", "Made by `make plots`.", ""]
    for title, loops in report.medians.items():
        name = re.sub(r"\W+", "-", title.lower()).strip("-") + ".svg"
        draw(title, loops, report.units[title], directory / name)
        lines += [f"![{title}]({name})", ""]
    (directory / "index.md").write_text("\n".join(lines))


def draw(title: str, loops: dict[str, dict[str, float]], unit: str, path: Path) -> None:
    """Horizontal bars, a group for each loop."""
    bars = [(loop, client, value) for loop, by in loops.items() for client, value in by.items()]
    figure = Figure(figsize=(6, 0.6 + 0.28 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    at = range(len(bars))
    colours = [COLOURS.get(client, "#d0d0d0") for _, client, _ in bars]
    shown = axes.barh(at, [value for _, _, value in bars], color=colours)
    axes.bar_label(shown, fmt="{:,.4g}", padding=3)
    axes.set_yticks(at, [f"{client}, {loop}" for loop, client, _ in bars])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_title(f"{title} ({unit})", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
