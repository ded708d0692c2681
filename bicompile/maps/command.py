"""``bicompile map``: try everything, show progress, and write what was found into ``docs/``."""

from __future__ import annotations

import argparse
import datetime
import json
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_DESCRIPTION = """
Run every op of PyTorch's own test database under batch_invariant on its sample inputs, and say which are exact,
elementwise, lowered or refused; values are compared with stock PyTorch, and the bits of rows with those of the same
rows alone and permuted. The exit code is 0 only if nothing was wrong.
"""
_NEEDS = (
    "bicompile map needs pytest and expecttest, which PyTorch's test database imports: pip install 'bicompile[test]'"
)


def add_command(commands: Any) -> None:
    """Add ``map`` to an ``argparse`` collection of sub-commands."""
    parser = commands.add_parser("map", help="find out which ops are covered", description=_DESCRIPTION)
    parser.add_argument("subject", choices=["ops"], help="what to go through")
    parser.add_argument("--samples", type=int, default=6, help="sample inputs of each op (default: %(default)s)")
    parser.add_argument("--compiled", type=int, default=0, metavar="N", help="compile N ops of each dtype too")
    parser.add_argument("--seed", type=int, default=0, help="which ops are compiled (default: %(default)s)")
    parser.add_argument("--write", type=Path, metavar="DIR", help="write DIR/ops.md and DIR/ops.json")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make the map; the exit code."""
    try:
        entries = ops_map(args.samples, args.compiled, args.seed)
    except ModuleNotFoundError as error:
        print(f"{_NEEDS} ({error})")
        return 2
    print(counts(entries))
    wrong = [entry for entry in entries if entry.kind == "wrong"]
    for entry in wrong:
        print(f"{entry.op} in {entry.dtype} is wrong: {'; '.join(entry.detail)}")
    if args.write:
        args.write.mkdir(parents=True, exist_ok=True)
        (args.write / "ops.md").write_text(as_markdown(entries, args))
        (args.write / "ops.json").write_text(as_json(entries))
    return 1 if wrong else 0


def ops_map(samples: int, compiled: int, seed: int) -> list[Any]:
    """An :class:`~bicompile.maps.ops.Entry` for every op and dtype."""
    from tqdm import tqdm

    from . import ops

    entries = []
    for name, dtype in ops.DTYPES.items():
        infos = ops.op_infos(dtype)
        chosen = {id(info) for info in ops.sample_of(infos, compiled, seed)}
        for info in tqdm(infos, desc=name, unit="op", disable=None):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # many samples are made to cause one
                entries.append(ops.entry_of(info, dtype, samples, compiled=id(info) in chosen))
    return entries


def counts(entries: Iterable[Any]) -> str:
    """How many ops of each dtype are of each kind, a line for each dtype."""
    from .ops import DTYPES, KINDS

    lines = []
    for dtype in DTYPES:
        found = Counter(entry.kind for entry in entries if entry.dtype == dtype)
        lines.append(f"{dtype}: {found.total()} ops, " + ", ".join(f"{found[kind]} {kind}" for kind in KINDS))
    return "\n".join(lines)


def as_json(entries: Iterable[Any]) -> str:
    """``{op: {dtype: kind}}``: what a later map is held against."""
    kinds: dict[str, dict[str, str]] = {}
    for entry in entries:
        kinds.setdefault(entry.op, {})[entry.dtype] = entry.kind
    lines = (f" {json.dumps(op)}: {json.dumps(found)}" for op, found in sorted(kinds.items()))
    return "{\n" + ",\n".join(lines) + "\n}\n"


def as_markdown(entries: list[Any], args: argparse.Namespace) -> str:
    """The page: counts, and a table with a line for each op."""
    import torch

    by_op: dict[str, dict[str, Any]] = {}
    for entry in entries:
        by_op.setdefault(entry.op, {})[entry.dtype] = entry
    rows = sum(entry.rows > 0 for entry in entries)
    compiled = sum(entry.compiled for entry in entries)
    lines = [
        "# Which ops are covered",
        "",
        f"Written by `bicompile map ops --samples {args.samples} --compiled {args.compiled} --write docs` on "
        f"{datetime.date.today().isoformat()} with torch {torch.__version__} on a CPU. Do not edit.",
        "",
        "Every op of PyTorch's own test database (OpInfo) runs on its sample inputs inside `bicompile.eager()`, which",
        "holds the lowerings of compiled code. *exact*: moves, compares or selects values. *elementwise*: each number",
        "by itself, in code that does not depend on its place. *lowered*: runs our ops. *refused*: raises",
        "`UnsupportedOpError`, which names what is missing. Where an op is not refused, its values are stock PyTorch's",
        "up to rounding, and where its inputs hold rows, every row has the same bits alone, permuted and in part of",
        f"the batch: rows were found and compared in {rows} of {len(entries)} lines of the table. {compiled} were also",
        "compiled, and held against the same.",
        "",
        *(f"* {line}" for line in counts(entries).splitlines()),
        "",
        "| op | float32 | bfloat16 | by |",
        "|---|---|---|---|",
    ]
    for op, found in sorted(by_op.items()):
        kinds = [found[dtype].kind if dtype in found else "" for dtype in ("float32", "bfloat16")]
        detail = ", ".join(dict.fromkeys(part for entry in found.values() for part in entry.detail))
        lines.append(f"| {op} | {' | '.join(kinds)} | {detail.replace('|', '/')} |")
    return "\n".join(lines) + "\n"
