"""The tuners' command line."""

from __future__ import annotations

import argparse
import sys

from . import attention, matmul

TUNERS = {"attention": attention, "matmul": matmul}


def main(arguments: list[str] | None = None) -> int:
    """Run the tuner that is named; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bicompile.tuning", description="Write tables of fast schedules.")
    commands = parser.add_subparsers(dest="family", required=True)
    for name, tuner in TUNERS.items():
        tuner.add_arguments(commands.add_parser(name, help=(tuner.__doc__ or "").splitlines()[0]))
    given = parser.parse_args(arguments)
    return TUNERS[given.family].run(given)


if __name__ == "__main__":
    sys.exit(main())
