"""The command line: ``bicompile COMMAND`` or ``python -m bicompile COMMAND``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from . import __version__, bench, demo, doctor, explain_command, maps

# Each adds its sub-command to the parser and names, as ``run``, the function that returns its exit code.
COMMANDS = (
    demo.add_command,
    explain_command.add_command,
    doctor.add_command,
    maps.add_command,
    bench.add_command,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: this process's); return the exit code."""
    parser = argparse.ArgumentParser(prog="bicompile", description="Batch-invariant backend for torch.compile.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add_command in COMMANDS:
        add_command(commands)
    args = parser.parse_args(argv)
    if argv is None:
        _let_idle_threads_sleep()
    return args.run(args)


def _let_idle_threads_sleep() -> None:
    """Start this process again with ``OMP_WAIT_POLICY=PASSIVE``, which OpenMP reads once, when torch is imported.

    Idle threads that spin take the cores from those that work: ten times slower where other programs run too.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


if __name__ == "__main__":
    sys.exit(main())
