"""What the demo found: a table, a JSON file, and an exit code."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .trials import PROMPTS, Row

# How far the first logits may lie from stock's, relative to the largest: rounding, and no more.
_NEAR = {"bfloat16": 0.1, "float16": 0.02, "float32": 1e-3}
_HEADINGS = ("", "runs", "completions", "first\ndivergence", "differing\nlogits", "prefill\n= decode?", "tokens/s")


@dataclass(frozen=True)
class Result:
    """All rows, the model they are about, and the seconds they took together."""

    model: str
    rows: list[Row]
    seconds: float

    @property
    def ours(self) -> list[Row]:
        return [row for row in self.rows if row.mode == "batch_invariant"]

    def failures(self) -> list[str]:
        """Why the demo fails; empty where ``batch_invariant`` gave one completion for every prompt."""
        found = [] if self.ours else ["batch_invariant was not run"]
        for row in self.ours:
            if not row.unique_completions or not row.one_completion_each:
                found.append(f"{row.dtype}: more than one completion of a prompt: {row.unique_completions}")
            if not row.distance_from_stock <= _NEAR[row.dtype]:
                found.append(f"{row.dtype}: logits far from stock's, by {row.distance_from_stock:.2g} of the largest")
        return found

    def as_json(self) -> dict[str, Any]:
        meta = {
            "model": self.model,
            "torch": torch.__version__,
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "seconds": round(self.seconds, 1),
        }
        return {"meta": meta, "ok": not self.failures(), "rows": [row.as_json() for row in self.rows]}

    def __str__(self) -> str:
        title = f"{self.model}, {torch.get_num_threads()} threads, {self.seconds:.0f} s"
        lines = [title, "", *_table([_HEADINGS, *(_cells(row) for row in self.rows)]), ""]
        if example := _example(self.rows):
            lines += [*example, ""]
        lines += self.failures() or ["batch_invariant: one completion for every prompt, whatever the batch."]
        return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    prompts = len(row.unique_completions)
    first = "none" if row.first_divergence is None else f"token {row.first_divergence + 1}"
    prefill = "yes" if row.prefill_equals_decode else f"no ({row.prefill_differing_logits:.0%} differ)"
    return (
        f"{row.dtype} {row.mode}",
        str(row.runs),
        f"{sum(row.unique_completions)} of {prompts} prompts",
        first,
        f"{row.differing_logits:.1%}" if row.differing_logits else "none",
        prefill,
        f"{row.tokens_per_second:.0f}",
    )


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell; the first row is the heading and may have two lines."""
    tall = [cell.split("\n") for cell in rows[0]]
    heads = [[lines[-2] if len(lines) > 1 else "" for lines in tall], [lines[-1] for lines in tall]]
    body = [*heads, *rows[1:]]
    widths = [max(len(line[column]) for line in body) for column in range(len(rows[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in body]
    return [*text[:2], "-" * (sum(widths) + 2 * (len(widths) - 1)), *text[2:]]


def _example(rows: Sequence[Row]) -> list[str]:
    """Two answers of stock PyTorch to one prompt, if it gave two."""
    for row in rows:
        for prompt, completions in enumerate(row.completions):
            if row.mode != "batch_invariant" and len(completions) > 1:
                said = [
                    f"  {'alone:' if i == 0 else 'in a batch:':<12}{text!r}" for i, text in enumerate(completions[:2])
                ]
                return [f"Stock PyTorch, {row.dtype}, on {PROMPTS[prompt]!r}:", *said]
    if any(row.differing_logits for row in rows if row.mode != "batch_invariant"):
        return ["Stock PyTorch gave the same words each time here; its logits differ, as the table says."]
    return []


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
