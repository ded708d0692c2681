"""What users need to test for batch invariance themselves."""

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
    "summation_tree",
    "tree_difference",
]


def __getattr__(name: str) -> Any:
    """``batches`` on first use: only the strategies need Hypothesis, which the test extra installs."""
    if name != "batches":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .strategies import batches

    return batches
