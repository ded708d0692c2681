"""Draw the pictures of the documentation, ``docs/images/*.svg``.

    python docs/tools/draw.py

The bits in ``order.svg`` are computed, and the figures in ``speed.svg`` and ``kl.svg`` are read from the result files
of the benchmarks, so the pictures cannot say anything else.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"
RESULTS = ROOT / "examples" / "benchmarks" / "results"

# Each picture has its own ground, so it can be read on a light page and on a dark one.
_STYLE = """<style>
  text { font: 13px system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; fill: var(--ink) }
  .title { font-weight: 600; font-size: 15px }
  .faint { fill: var(--faint) }
  .mono { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 13px }
  .end { text-anchor: end } .mid { text-anchor: middle }
  .ground { fill: var(--ground); stroke: var(--line) } .panel { fill: var(--panel) }
  .line { stroke: var(--line); fill: none } .edge { stroke: var(--ink); fill: none }
  .mark { fill: var(--mark) } .marked { stroke: var(--mark); fill: none; stroke-width: 1.6 }
  .other { fill: var(--other) } .bad { fill: var(--bad) } .good { fill: var(--good) } .strong { font-weight: 600 }
  svg { --ink: #1f2430; --faint: #626a7a; --ground: #ffffff; --panel: #f3f5f9; --line: #c5cbd8; --mark: #3f51b5;
        --other: #c9d0e0; --bad: #b3261e; --good: #1b7f3b }
  @media (prefers-color-scheme: dark) {
    svg { --ink: #e4e7ee; --faint: #a2abbd; --ground: #1b1f2a; --panel: #252b39; --line: #475066; --mark: #8fa0ff;
          --other: #4a546d; --bad: #ff8a80; --good: #6fd08c }
  }
</style>"""


def drawings() -> dict[Path, str]:
    """Every picture by its path."""
    return {IMAGES / "order.svg": order(), IMAGES / "speed.svg": speed(), IMAGES / "kl.svg": kl()}


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{title}">'
    ground = f'<rect class="ground" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="10"/>'
    return "\n".join([head, f"<title>{title}</title>", _STYLE, ground, *parts, "</svg>", ""])


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}"' + (f' class="{kind}"' if kind else "") + f">{text}</text>"


def _line(x1: float, y1: float, x2: float, y2: float, kind: str = "line") -> str:
    return f'<line class="{kind}" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"/>'


def _box(x: float, y: float, width: float, height: float, kind: str, radius: float = 2) -> str:
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}"/>'


# -- One order, many schedules ----------------------------------------------------------------------------------------

# Eight float32 numbers: one row of a sum.  They are such that the order shows in the last bits.
ROW = (2.1, 8.5, 8.1, 0.29, 0.24, 4.9, 8.5, 3.4)

Tree = tuple[Any, Any] | int
CHAIN: Tree = (((((((0, 1), 2), 3), 4), 5), 6), 7)
PAIRS: Tree = (((0, 1), (2, 3)), ((4, 5), (6, 7)))


def float32(x: float) -> float:
    """``x`` rounded to float32."""
    return struct.unpack("f", struct.pack("f", x))[0]


def total(tree: Tree) -> float:
    """The sum of ``ROW`` in the order of ``tree``, every addition rounded to float32."""
    if isinstance(tree, int):
        return float32(ROW[tree])
    return float32(total(tree[0]) + total(tree[1]))


def bits(x: float) -> str:
    """The bits of a float32."""
    return f"0x{struct.unpack('I', struct.pack('f', x))[0]:08x}"


def order() -> str:
    """Kernels as usual beside bicompile's, each for a row alone and in a batch: batch, tiles, tree, bits."""
    assert total(PAIRS) != total(CHAIN), "these numbers do not show the order"
    parts = []
    panels = (
        (16, "As usual: the batch picks the order", (PAIRS, CHAIN)),
        (456, "bicompile: one order, many schedules", (CHAIN, CHAIN)),
    )
    for left, title, trees in panels:
        parts += [_box(left, 16, 428, 392, "panel", 8), _text(left + 214, 42, title, "title mid")]
        columns = ((left + 16, 1, trees[0]), (left + 222, 4, trees[1]))
        for x, rows, tree in columns:
            parts += _column(x, rows, tree)
        same = bits(total(trees[0])) == bits(total(trees[1]))
        verdict = ("the same bits", "good strong mid") if same else ("other bits for the same row", "bad strong mid")
        parts.append(_text(left + 214, 396, *verdict))
    parts += [
        _text(
            450, 430, "Top: a batch, in which our row is coloured; outlined, the tiles it is computed in.", "faint mid"
        ),
        _text(
            450, 449, "Below: the order in which the row's numbers are added, and the bits of their sum.", "faint mid"
        ),
    ]
    return _svg(900, 464, "One order, many schedules", parts)


def _column(left: float, rows: int, tree: Tree) -> Iterator[str]:
    """One batch, how it is cut into tiles, the tree of additions of our row, and the bits of its sum."""
    middle = left + 95
    yield _text(middle, 70, "alone" if rows == 1 else f"in a batch of {rows}", "faint mid")
    top = 84 + (4 - rows) * 8
    for row in range(rows):
        ours = row == rows // 2
        for i in range(8):
            yield _box(left + 11 + i * 21, top + row * 18, 18, 13, "mark" if ours else "other")
    # The schedule: a lone row is cut into many narrow tiles, several rows share wide ones.
    width, height = (42, 18) if rows == 1 else (84, 36)
    for x in range(0, 168, width):
        for y in range(0, 18 * rows, height):
            yield _box(left + 9.5 + x, top - 2.5 + y, width, min(height, 18 * rows - y), "edge", 3)
    yield _text(middle, 178, "4 narrow tiles" if rows == 1 else "4 wide tiles", "faint mid")
    marks: list[str] = []
    yield from _tree(tree, lambda i: left + 20 + i * 21, 202, marks)
    yield from marks
    yield _text(middle, 366, bits(total(tree)), "mono mid strong")


def _tree(tree: Tree, place: Callable[[int], float], top: float, marks: list[str]) -> Iterator[str]:
    """Lines from the summands down to their sum, each addition one level below the lower of its parts."""
    step = 18.0 if _depth(tree) > 3 else 42.0

    def draw(part: Tree, lines: list[str]) -> tuple[float, float]:
        if isinstance(part, int):
            marks.append(f'<circle class="mark" cx="{place(part):g}" cy="{top:g}" r="4"/>')
            return place(part), top
        ends = [draw(child, lines) for child in part]
        x, y = sum(end[0] for end in ends) / 2, max(end[1] for end in ends) + step
        lines += [_line(end[0], end[1], x, y, "marked") for end in ends]
        marks.append(f'<circle class="mark" cx="{x:g}" cy="{y:g}" r="2.5"/>')
        return x, y

    lines: list[str] = []
    draw(tree, lines)
    yield from lines


def _depth(tree: Tree) -> int:
    return 0 if isinstance(tree, int) else 1 + max(_depth(tree[0]), _depth(tree[1]))


# -- Speed ------------------------------------------------------------------------------------------------------------

H100 = "nvidia-h100-80gb-hbm3"
ZEN3, ZEN4 = "cpu-amd-epyc-zen3", "cpu-amd-epyc-zen4"
AGAINST_FLASH = "prefill against FlashAttention: geometric mean"
# Heading, then label, result file and key of its summary.
SPEED = (
    (
        "NVIDIA H100",
        (
            ("Llama prefill 1x2048 / Inductor", H100, "model", "prefill 1x2048 / Inductor"),
            ("Llama prefill 8x1024 / Inductor", H100, "model", "prefill 8x1024 / Inductor"),
            ("decode, batch of 1, CUDA graphs / Inductor", H100, "model", "decode B=1, CUDA graphs / Inductor"),
            ("decode, batch of 64, CUDA graphs / Inductor", H100, "model", "decode B=64, CUDA graphs / Inductor"),
            ("training step 4x1024 / Inductor", H100, "training", "training step 4x1024 / Inductor"),
            ("bfloat16 products, mean / cuBLAS", H100, "matmul", "bfloat16: geometric mean"),
            ("bfloat16 products, worst / cuBLAS", H100, "matmul", "bfloat16: lowest"),
            ("attention prefill, mean / FlashAttention", H100, "attention", AGAINST_FLASH),
            ("attention prefill, mean / cuDNN", H100, "attention", "prefill against cuDNN: geometric mean"),
            ("attention decode, mean / PyTorch", H100, "attention", "decode: geometric mean"),
            ("first call / Inductor", H100, "model", "first call: inductor's time / ours (at least 1/2)"),
        ),
    ),
    (
        "CPU, AMD EPYC (two threads)",
        (
            ("float32 linear layers, worst / PyTorch", ZEN4, "matmul", "float32 linear: lowest ratio"),
            ("bfloat16 linear layers, worst / PyTorch", ZEN4, "matmul", "bfloat16 linear: lowest ratio"),
            ("model prefill float32, worst / Inductor", ZEN4, "model", "prefill float32 / inductor, worst batch size"),
            ("model decode float32, worst / Inductor", ZEN4, "model", "decode float32 / inductor, worst batch size"),
            (
                "model prefill bfloat16, worst / Inductor",
                ZEN4,
                "model",
                "prefill bfloat16 / inductor, worst batch size",
            ),
            ("model decode bfloat16, worst / Inductor", ZEN4, "model", "decode bfloat16 / inductor, worst batch size"),
        ),
    ),
)  # fmt: skip
_BAR = {"left": 330, "unit": 300}  # where 0 lies and how long 1 is, in pixels


def result(device: str, suite: str) -> dict[str, Any]:
    """A result file."""
    return json.loads((RESULTS / device / f"{suite}.json").read_text())


def speed() -> str:
    """Our speed as a multiple of the baseline's."""
    parts, y = [], 38
    one = _BAR["left"] + _BAR["unit"]
    parts.append(_text(24, y, "Speed of bicompile, as a multiple of the baseline's (longer is faster)", "title"))
    top = y + 16
    for heading, bars in SPEED:
        y += 36
        parts.append(_text(24, y, heading, "strong"))
        for label, device, suite, key in bars:
            y += 23
            value = result(device, suite)["summary"][key]["value"]
            length = min(value, 1.75) * _BAR["unit"]
            parts += [
                _text(_BAR["left"] - 10, y, label, "end"),
                _box(_BAR["left"], y - 12, length, 15, "mark" if value >= 1 else "other"),
                _text(max(_BAR["left"] + length, one if value > 0.85 else 0) + 6, y, f"{value:.2f}"),
            ]
    parts += [_line(one, top, one, y + 10, "edge"), _text(one, y + 26, "as fast", "faint mid")]
    return _svg(900, y + 42, "Speed as a multiple of the baseline's", parts)


# -- KL of sampler and trainer ----------------------------------------------------------------------------------------


def kl() -> str:
    """KL(sampler || trainer) over the steps of the reinforcement-learning example."""
    (row,) = result(ZEN3, "on_policy_rl")["rows"]
    stock, ours = ([abs(x) for x in row[f"{mode}_kls"]] for mode in ("stock", "batch_invariant"))
    left, right, top, bottom = 110, 860, 66, 236
    highest = max(stock + ours)

    def path(values: Sequence[float]) -> str:
        steps = max(len(values) - 1, 1)
        points = (
            f"{left + (right - left) * i / steps:.1f},{bottom - (bottom - top) * value / highest:.1f}"
            for i, value in enumerate(values)
        )
        return " ".join(points)

    def curve(values: Sequence[float], colour: str) -> str:
        return f'<polyline points="{path(values)}" fill="none" style="stroke: var(--{colour})" stroke-width="2"/>'

    parts = [
        _text(24, 38, "KL(sampler || trainer), nats a token, at each training step", "title"),
        _line(left, top, left, bottom), _line(left, bottom, right, bottom),
        _text(left - 8, top + 5, f"{highest:.2g}", "end faint"), _text(left - 8, bottom + 5, "0", "end faint"),
        _text(left, bottom + 22, "step 0", "faint"), _text(right, bottom + 22, f"step {len(stock) - 1}", "end faint"),
        curve(stock, "bad"), curve(ours, "good"),
        _text(right, top + 6, "stock PyTorch", "bad strong end"),
        _text((left + right) / 2, bottom + 22, f"batch_invariant: at most {max(ours):g}", "good strong mid"),
    ]  # fmt: skip
    return _svg(900, 272, "KL of sampler and trainer", parts)


if __name__ == "__main__":
    for path, text in drawings().items():
        path.write_text(text)
        print(path.relative_to(ROOT))
