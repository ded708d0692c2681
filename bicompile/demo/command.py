"""``bicompile demo``: run everything, show progress, print the table."""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_DESCRIPTION = """
Ask a language model the same prompts, greedily, alone and in batches of many sizes, orders and paddings, in stock
PyTorch and compiled with batch_invariant, and count the different answers. The exit code is 0 only if batch_invariant
gave one completion for every prompt.
"""


def add_command(commands: Any) -> None:
    """Add ``demo`` to an ``argparse`` collection of sub-commands."""
    parser = commands.add_parser("demo", help="see stock PyTorch and batch_invariant differ", description=_DESCRIPTION)
    parser.add_argument("--quick", action="store_true", help="fewer prompts, batches and tokens")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures to FILE")
    parser.add_argument("--model", choices=["auto", "smollm2", "random"], default="auto", help="default: %(default)s")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo; the exit code."""
    from ..lowering import loading
    from .models import DemoError, subject
    from .sharing import KERNELS
    from .trials import FULL, QUICK

    try:
        with ThreadPoolExecutor(1) as pool:
            # On the first run one is compiled and the other unpacked, better before the progress bar than inside it.
            kernels = pool.submit(loading.load, *KERNELS)
            asked = subject(args.model, _say)
            kernels.result()
        result = compare(asked, QUICK if args.quick else FULL)
    except DemoError as error:
        _say(str(error))
        return 2
    if args.json:
        args.json.write_text(json.dumps(result.as_json(), indent=2) + "\n")
    print(result)
    return 1 if result.failures() else 0


def compare(subject: Any, plan: Any) -> Any:
    """Stock eager and ``batch_invariant``, in each dtype of ``plan``.

    Returns:
        A :class:`~bicompile.demo.report.Result`.
    """
    import torch
    from tqdm import tqdm

    from .report import Result
    from .sharing import one_graph_settings, share_layers
    from .trials import Asker, Row, measure, steps

    compiler = functools.partial(torch.compile, backend="batch_invariant", dynamic=True, fullgraph=True)
    start = time.perf_counter()
    rows = []
    with tqdm(total=2 * len(plan.dtypes) * steps(plan), unit="batch", disable=None) as bar:
        for dtype in plan.dtypes:
            bar.set_description(f"{dtype} stock eager")
            asker = Asker(subject, subject.load(getattr(torch, dtype)), plan)
            rows.append(Row(dtype, "stock eager"))
            stock = measure(asker, rows[-1], bar.update, stock=None)
            bar.set_description(f"{dtype} batch_invariant")
            share_layers(asker.model, compiler)
            rows.append(Row(dtype, "batch_invariant"))
            with one_graph_settings():
                measure(asker, rows[-1], bar.update, stock)
            torch._dynamo.reset()  # the next dtype's graphs would count as recompilations of these
    return Result(subject.name, rows, time.perf_counter() - start)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
