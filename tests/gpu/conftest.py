"""Tests that need an NVIDIA GPU: ``python -m pytest tests/gpu``.  Without one, none of them is collected.

Most of their time is compiling, on one core each: ``-n 12 --dist worksteal`` uses twelve.
"""

from __future__ import annotations

import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before Inductor: one of many workers compiles by itself, as a pool for each would import torch a hundred times.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave every test file here alone where there is no GPU; None lets the others decide."""
    if collection_path.name.startswith("test_") and not torch.cuda.is_available():
        return True
    return None


def pytest_report_header() -> str:
    """Which GPU the tests ran on."""
    if not torch.cuda.is_available():
        return "GPU: none, so tests/gpu is left out"
    return f"GPU: {torch.cuda.get_device_name()}"
