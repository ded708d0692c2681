"""Draw the ratios of a report: over the size that the suite sweeps, or as bars."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .results import Report, Row


def plot(report: Report, sweep: str | None, path: Path) -> None:
    """Write a picture of ``report``: ``sweep`` names the rows' further key that the horizontal axis has."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    swept = [row for row in report.rows if sweep is not None and sweep in row.extra]
    figure = plt.figure(figsize=(10, 5), layout="constrained")
    if sweep is not None and swept:
        _lines(figure, swept, sweep)
    else:
        _bars(figure, report.rows)
    figure.suptitle(f"{report.suite}: their time / our time (above 1: ours is faster)")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _lines(figure: Any, rows: Sequence[Row], sweep: str) -> None:
    """A panel for each group; a thin line for each series, and a thick one for the geometric mean of a baseline."""
    groups = list(dict.fromkeys(row.extra["group"] for row in rows))
    baselines = list(dict.fromkeys(row.against for row in rows))
    columns = min(3, len(groups))
    down = math.ceil(len(groups) / columns)
    figure.set_size_inches(4 * columns + 2, 3 * down + 1)
    panels = figure.subplots(down, columns, sharey=True, squeeze=False).flat
    for unused in panels[len(groups) :]:
        unused.set_axis_off()
    for panel, group in zip(panels, groups, strict=False):
        for number, against in enumerate(baselines):
            series: dict[str, dict[int, float]] = {}
            for row in rows:
                if row.extra["group"] == group and row.against == against:
                    series.setdefault(row.extra["series"], {})[row.extra[sweep]] = row.ratio
            if not series:
                continue
            color = f"C{number}"
            for points in series.values():
                panel.plot(*zip(*sorted(points.items()), strict=True), color=color, linewidth=0.6, alpha=0.5)
            sizes = sorted({size for points in series.values() for size in points})
            means = [statistics.geometric_mean(p[size] for p in series.values() if size in p) for size in sizes]
            panel.plot(sizes, means, color=color, linewidth=2, marker=".", label=against)
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set(title=group, xlabel=sweep)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter("{x:g}")
        panel.legend(fontsize="x-small")


def _bars(figure: Any, rows: Sequence[Row]) -> None:
    figure.set_size_inches(10, 1.5 + 0.25 * len(rows))
    panel = figure.subplots()
    panel.barh([f"{row.case} against {row.against}" for row in rows], [row.ratio for row in rows])
    panel.axvline(1, color="black", linewidth=0.8)
    panel.tick_params(axis="y", labelsize="x-small")
    panel.invert_yaxis()
