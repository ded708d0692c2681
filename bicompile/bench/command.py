"""``bicompile bench``: measure one suite, show progress, print the table, keep and draw the figures."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .results import device_name
from .suite import Settings
from .suite import run as measure
from .suites import MODULES, suite
from .table import summary_table, table

_DESCRIPTION = """
Time batch_invariant in turns with what it is held against: stock PyTorch, Inductor, FlashAttention and the like. A
ratio above 1 says that ours is faster. Before a case is timed, its values are checked, and that its rows keep their
bits in other batches: the exit code is 0 only if all of them did.
"""


def add_command(commands: Any) -> None:
    """Add ``bench`` to an ``argparse`` collection of sub-commands."""
    parser = commands.add_parser("bench", help="measure the cost of invariance", description=_DESCRIPTION)
    parser.add_argument("suite", choices=MODULES)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases, shorter")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name has TEXT in it")
    parser.add_argument("--list", action="store_true", help="print the names of the cases, and measure nothing")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no case after that")
    parser.add_argument(
        "--case-seconds",
        type=float,
        metavar="SECONDS",
        help="time for the calls of a case; model on cuda, and compile, have their own",
    )
    parser.add_argument("--threads", type=int, help="of the CPU (default: PyTorch's)")
    parser.add_argument("--layers", type=int, help="of the random language models on which some suites run")
    parser.add_argument("--caches", type=Path, metavar="DIR", help="model on cuda: keep the compilers' caches there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios (needs bicompile[plot])")
    parser.add_argument("--write", action="store_true", help="keep the result in examples/benchmarks/results")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure; the exit code."""
    if args.write and (args.quick or args.only):
        print("bicompile bench: --write keeps whole runs, without --quick and --only")
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = suite(args.suite, Settings(device, args.quick, args.case_seconds, args.layers, args.caches))
    cases = [case for case in chosen.cases() if args.only in str(case)]
    if args.list:
        print("\n".join(map(str, cases)))
        return 0
    if not cases:
        print(f"bicompile bench: no case of {args.suite} has {args.only!r} in its name; --list prints them")
        return 2
    if device == "cuda" and not torch.cuda.is_available():
        print("bicompile bench: PyTorch sees no CUDA device here; bicompile doctor says what is missing")
        return 2
    torch.manual_seed(0)
    report = measure(chosen, cases, _with_progress, args.seconds, args.write)
    print(table(report.rows))
    print()
    print(summary_table(report.summary))
    if args.json:
        args.json.write_text(json.dumps(report.to_json(), indent=1) + "\n")
    if args.plot:
        from .plotting import plot

        plot(f"{report.suite}, {device_name(device)}", report.rows, chosen.sweep, args.plot)
    if args.write:
        print(f"written: {report.write()}")
    return 1 if any(row.same_bits is False for row in report.rows) else 0


def _with_progress(cases: Sequence[Any]) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(cases, unit="case", disable=None) as bar:
        for case in bar:
            bar.set_postfix_str(str(case))
            yield case
