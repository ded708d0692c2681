"""Draw the ratios of a report, over the size that the suite sweeps or as bars, and what the examples found.

python -m bicompile.bench.plotting      # every result file again, each beside its file
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .results import RESULTS, Row
from .suite import Settings
from .suites import suite


def plot(title: str, rows: Sequence[Row], sweep: str | None, path: Path) -> None:
    """Write a picture of ``rows``: ``sweep`` names their further key that the horizontal axis has."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    swept = [row for row in rows if sweep is not None and sweep in row.extra]
    figure = plt.figure(figsize=(10, 5), layout="constrained")
    if sweep is not None and swept:
        _lines(figure, swept, sweep)
    else:
        _bars(figure, rows)
    figure.suptitle(f"{title}: their time / our time (above 1: ours is faster)")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _lines(figure: Any, rows: Sequence[Row], sweep: str) -> None:
    """A panel for each group; a thin line for each series, and a thick one for the geometric mean of a baseline."""
    swept = sorted({row.extra[sweep] for row in rows})
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
        panel.xaxis.set_major_formatter("{x:g}")
        if max(swept) >= 1e6:
            panel.set_xticks(swept, [f"{size / 1e6:.0f}M" for size in swept])
        panel.legend(fontsize="x-small")
    _ratios(figure.axes[0].yaxis, figure.axes[0].set_yscale, figure.axes[0].set_ylim)  # which all panels share


def _bars(figure: Any, rows: Sequence[Row]) -> None:
    """A line for each case, a bar for each baseline, to the right of 1 where ours is faster."""
    rows = [row for row in rows if any(key.startswith("ours_") for key in row.extra)]  # the others are no times
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row.case, []).append(row)
    colors = {against: f"C{number}" for number, against in enumerate(dict.fromkeys(row.against for row in rows))}
    figure.set_size_inches(9, 1.2 + 0.2 * len(cases))
    panel, named = figure.subplots(), set[str]()
    for line, group in enumerate(cases.values()):
        thickness = 0.8 / len(group)
        for number, row in enumerate(group):
            name = f"against {row.against}" if row.against not in named else None
            place = line + (number + 0.5) * thickness - 0.4
            panel.barh(place, row.ratio - 1, thickness, left=1, color=colors[row.against], label=name)
            named.add(row.against)
    panel.axvline(1, color="black", linewidth=0.8)
    panel.set_yticks(range(len(cases)), cases, fontsize="x-small")
    panel.margins(y=0.01)
    panel.invert_yaxis()
    _ratios(panel.xaxis, panel.set_xscale, panel.set_xlim)
    panel.grid(axis="x", linewidth=0.3)
    panel.legend(fontsize="x-small")


def _ratios(axis: Any, set_scale: Callable[..., None], set_limits: Callable[[float, float], object]) -> None:
    """A logarithmic axis from a half to two at least, with plain numbers on it."""
    from matplotlib.ticker import LogLocator, NullLocator

    set_scale("log", base=2)
    low, high = axis.get_view_interval()
    low, high = min(low, 0.5), max(high, 2.0)
    set_limits(low, high)
    axis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.25, 1.5, 1.75) if high / low < 8 else (1.0,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def counts(rows: Sequence[Row], path: Path) -> None:
    """Write a picture of a determinism result: how many different answers each mode gave, and how many are right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(row.case for row in rows))
    figure, panels = plt.subplots(1, len(cases), figsize=(5 * len(cases), 3), layout="constrained", squeeze=False)
    for panel, case in zip(panels.flat, cases, strict=True):
        shown = [row for row in rows if row.case == case]
        right = shown[0].extra["right"]
        names = [row.against.replace(" batch", "\nbatch") for row in shown]
        panel.bar_label(panel.barh(names, [row.extra["unique"] for row in shown]))
        panel.axvline(right, color="black", linewidth=0.8)
        panel.set(title=f"{case.rpartition(', ')[2]}: {right} right", xlabel="different answers")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.margins(x=0.1)
        panel.invert_yaxis()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def curves(rows: Sequence[Row], path: Path) -> None:
    """Write a picture of a reinforcement learning result: reward and KL of each mode over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    (row,) = rows
    figure, (reward, kl) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for mode in ("stock", "batch_invariant"):
        reward.plot(row.extra[f"{mode}_rewards"], label=mode)
        kl.plot([abs(x) for x in row.extra[f"{mode}_kls"]], label=mode)
    reward.set(xlabel="step", ylabel="reward")
    kl.set(xlabel="step", ylabel="|KL(sampler || trainer)|, nats a token")
    kl.set_yscale("symlog", linthresh=1e-12)
    for axis in (reward.xaxis, kl.xaxis):
        axis.get_major_locator().set_params(integer=True)
    reward.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


EXAMPLES = {"determinism": counts, "on_policy_rl": curves, "trl": curves}
"""The results that examples write, and what draws them."""


def main() -> None:
    """Draw them all."""
    for path in sorted(RESULTS.glob("*/*.json")):
        result, picture = json.loads(path.read_text()), path.with_suffix(".png")
        rows = [Row.from_json(row) for row in result["rows"]]
        if path.stem in EXAMPLES:
            EXAMPLES[path.stem](rows, picture)
        else:
            sweep = suite(path.stem, Settings("cpu" if path.parent.name.startswith("cpu-") else "cuda")).sweep
            plot(f"{path.stem}, {result['meta']['device']}", rows, sweep, picture)
        print(picture.relative_to(RESULTS))


if __name__ == "__main__":
    main()
