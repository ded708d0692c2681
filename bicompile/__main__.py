"""The command line: ``bicompile COMMAND`` or ``python -m bicompile COMMAND``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import __version__, demo

# Each adds its sub-command to the parser and names, as ``run``, the function that returns its exit code.
COMMANDS = (demo.add_command,)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: this process's); return the exit code."""
    parser = argparse.ArgumentParser(prog="bicompile", description="Batch-invariant backend for torch.compile.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add_command in COMMANDS:
        add_command(commands)
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
