"""What the workers of pytest-xdist share."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def once(work: Callable[[], None], name: str) -> None:
    """Do ``work`` in the first worker of a run that asks for ``name``, while others wait; always without workers."""
    if (run := os.environ.get("PYTEST_XDIST_TESTRUNUID")) is None:
        work()
        return
    done = Path(tempfile.gettempdir()) / f"bicompile-{run}-{name}"
    with done.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            work()
            done.touch()
