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
Try what is covered, and write what was found into a page. The exit code is 0 only if nothing was wrong.
"""
_OPS = """
Run every op of PyTorch's own test database under batch_invariant on its sample inputs, and say which are exact,
elementwise, lowered or refused; values are compared with stock PyTorch, and the bits of rows with those of the same
rows alone and permuted. The exit code is 0 only if nothing was wrong.
"""
_MODELS = """
Run tiny random models of the architectures of transformers under batch_invariant, inside eager() and compiled: values
against stock PyTorch, rows alone and in company, prefill against decode, padding. The file is written after each model.
With --only it keeps the models that are not named. The exit code is 0 only if nothing was wrong.
"""
_NEEDS = (
    "bicompile map needs pytest and expecttest, which PyTorch's test database imports: pip install 'bicompile[test]'"
)


def add_command(commands: Any) -> None:
    """Add ``map`` to an ``argparse`` collection of sub-commands."""
    parser = commands.add_parser("map", help="find out which ops and models are covered", description=_DESCRIPTION)
    subjects = parser.add_subparsers(metavar="SUBJECT", required=True)
    _add_ops(subjects.add_parser("ops", help="PyTorch's database of ops", description=_OPS))
    _add_models(subjects.add_parser("models", help="architectures of transformers", description=_MODELS))


def _add_ops(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, default=6, help="sample inputs of each op (default: %(default)s)")
    parser.add_argument("--compiled", type=int, default=0, metavar="N", help="compile N ops of each dtype too")
    parser.add_argument("--seed", type=int, default=0, help="which ops are compiled (default: %(default)s)")
    parser.add_argument("--write", type=Path, metavar="DIR", help="write DIR/ops.md and DIR/ops.json")
    parser.set_defaults(run=run_ops)


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", metavar="NAME,...", help="these models, not all")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--quick", action="store_true", help="compile the graph of a batch, not of a row")
    parser.add_argument("--write", type=Path, metavar="DIR", help="write DIR/models.md and DIR/models.json")
    parser.set_defaults(run=run_models)


def run_models(args: argparse.Namespace) -> int:
    """Make the map of models; the exit code."""
    try:
        from tqdm import tqdm

        from . import models, models_page
        from .architectures import SUBJECTS, named
    except ModuleNotFoundError as error:
        print(f"bicompile map models needs transformers: pip install 'bicompile[hf]' ({error})")
        return 2
    compiled = () if args.eager else models.COMPILED if args.quick else models.ALONE
    chosen = [named(name) for name in args.only.split(",")] if args.only else list(SUBJECTS)
    found = models_page.read(args.write) if args.write and args.only else {}
    for subject in (bar := tqdm(chosen, unit="model", disable=None)):
        bar.set_description(subject.name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[subject.name] = models.entry_of(subject, compiled)
        if args.write:
            entries = [found[s.name] for s in SUBJECTS if s.name in found]
            models_page.write(args.write, entries, models_page.made_now())
    made = [found[subject.name] for subject in chosen]
    for entry in made:
        if entry.detail:
            print(f"{entry.model} ({entry.kind}): {'; '.join(entry.detail)}")
    print(f"{models_page.counts(made)}, in {sum(entry.seconds for entry in made):.0f} s")
    return 1 if any(entry.kind == "wrong" for entry in made) else 0


def run_ops(args: argparse.Namespace) -> int:
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
