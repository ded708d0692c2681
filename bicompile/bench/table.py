"""What was measured, as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .results import Row


def table(rows: Iterable[Row]) -> str:
    """A line for each row."""
    lines = [("case", "against", "ours", "theirs", "", "ratio", "quartiles", "same bits")]
    for row in rows:
        ours, theirs, unit = _measures(row)
        spread = [row.extra[key] for key in ("ratio_low", "ratio_high") if key in row.extra]
        quartiles = " to ".join(f"{value:.2f}" for value in spread)
        same = {True: "yes", False: "NO", None: ""}[row.same_bits]
        lines.append((row.case, row.against, ours, theirs, unit, f"{row.ratio:.3f}", quartiles, same))
    return _aligned(lines)


def summary_table(summary: Mapping[str, Mapping[str, float | None]]) -> str:
    """A line for each headline figure."""
    lines = [("headline", "value", "bar")]
    for name, entry in summary.items():
        value, bar = ("" if number is None else f"{number:.3f}" for number in (entry["value"], entry["bar"]))
        lines.append((name, value, bar))
    return _aligned(lines)


def _measures(row: Row) -> tuple[str, str, str]:
    """Ours, theirs and their unit, of the first pair ``ours_us`` and ``theirs_us`` (or ``_s``, ``_gib``, ...)."""
    for key, ours in row.extra.items():
        unit = key.removeprefix("ours_")
        theirs = row.extra.get(f"theirs_{unit}")
        if unit != key and theirs is not None:
            return f"{ours:.4g}", f"{theirs:.4g}", unit.replace("_per_", "/")
    return "", "", ""


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)
