"""Tests of the Triton kernels' logic on CPU tensors: ``TRITON_INTERPRET=1 python -m pytest tests/interpreted``.

Triton reads the variable when a kernel is defined, so these need a process of their own, which
``tests/test_interpreted.py`` starts.  The interpreter adds in numpy's order: it shows that indices, masks and data
flow are right, and nothing about the order on a device.
"""

from __future__ import annotations

import os
from pathlib import Path


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave every test file here alone outside the interpreter; None lets the others decide."""
    if collection_path.name.startswith("test_") and os.environ.get("TRITON_INTERPRET") != "1":
        return True
    return None
