"""A graph break is an error: the code that Dynamo leaves to eager PyTorch is not ours, and may follow the batch.

Dynamo has a switch for it, ``torch._dynamo.error_on_graph_break``, which is set around each call of a function that is
compiled with our backend.  Not inside ``bicompile.eager()``, which covers what a break leaves, and not where the user
allows ``graph_break`` by name.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from torch._dynamo import error_on_graph_break, eval_frame
from torch._dynamo.exc import Unsupported

from .interception import is_intercepting

NAME = "graph_break"
"""What ``options={"allow": [...]}`` calls them."""

_ADVICE = (
    "bicompile: what Dynamo leaves to eager PyTorch may follow the batch. Take the graph break out of the compiled "
    "function, call it inside bicompile.eager(), which covers such code too, or take responsibility for it with "
    f"options={{'allow': [{NAME!r}]}}."
)


class Unbroken:
    """Around one call of a compiled function: what Dynamo compiles meanwhile is whole, or raises ``Unsupported``."""

    def __init__(self) -> None:
        self._switch = error_on_graph_break(not is_intercepting())

    def __enter__(self) -> None:
        self._switch.__enter__()

    def __exit__(self, *_: object) -> None:
        self._switch.__exit__(None, None, None)
        error = sys.exc_info()[1]  # Dynamo does not hand it over
        if isinstance(error, Unsupported) and _ADVICE not in str(error):
            error.args = (f"{error}\n\n{_ADVICE}", *error.args[1:])


def refuse_graph_breaks(backend: Any) -> None:
    """Let Dynamo enter :class:`Unbroken` around what is compiled with ``backend``, whichever options it is given.

    Dynamo looks for a context in what ``get_compiler_fn`` returns; ``torch.compile`` hides the backend's own from it.
    """
    stock = eval_frame.get_compiler_fn

    @functools.wraps(stock)
    def get_compiler_fn(compiler_fn: Any) -> Any:
        found = stock(compiler_fn)
        wrapped = getattr(found, "_torchdynamo_orig_backend", None)
        options = getattr(wrapped, "kwargs", {}).get("options", {})
        if getattr(wrapped, "compiler_fn", wrapped) is backend and NAME not in options.get("allow", ()):
            found.backend_ctx_ctor = Unbroken  # type: ignore[attr-defined]
        return found

    eval_frame.get_compiler_fn = get_compiler_fn
