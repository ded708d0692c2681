"""What users need to test for batch invariance themselves."""

import importlib
from typing import Any

from .bits import Difference, difference, differing_bits, same_bits
from .invariance import assert_batch_invariant
from .layouts import LAYOUTS, lay_out
from .situations import SITUATIONS
from .trees import SummationTree, summation_tree, tree_difference

__all__ = [
    "LAYOUTS",
    "SITUATIONS",
    "Difference",
    "SummationTree",
    "assert_batch_invariant",
    "batches",
    "difference",
    "differing_bits",
    "lay_out",
    "same_bits",
    "search",
    "summation_tree",
    "tree_difference",
]


_NEED_HYPOTHESIS = {"batches": "strategies", "search": "trials"}


def __getattr__(name: str) -> Any:
    """``batches`` and ``search`` on first use: only they need Hypothesis, which the test extra installs."""
    if name not in _NEED_HYPOTHESIS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_NEED_HYPOTHESIS[name]}", __name__), name)
