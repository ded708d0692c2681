"""Tests of the Triton kernels' logic on CPU tensors: ``TRITON_INTERPRET=1 python -m pytest tests/interpreted``.

Triton reads the variable when a kernel is defined, so these need a process of their own, which
``tests/test_interpreted.py`` starts.  The interpreter adds in numpy's order: it shows that indices, masks and data
flow are right, and nothing about the order on a device.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave every test file here alone outside the interpreter; None lets the others decide."""
    if collection_path.name.startswith("test_") and os.environ.get("TRITON_INTERPRET") != "1":
        return True
    return None


def _let_tensors_count() -> None:
    """Let ``range`` take a kernel's tensors of one element, which Triton 3.6's interpreter cannot with numpy 2.4."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if os.environ.get("TRITON_INTERPRET") == "1":
    _let_tensors_count()
