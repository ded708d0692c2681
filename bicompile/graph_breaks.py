"""A graph break is an error: the code that Dynamo leaves to eager PyTorch is not ours, and may follow the batch.

Dynamo has a switch for it, ``torch._dynamo.error_on_graph_break``, which is set while it converts a frame for our
backend.  Not inside ``bicompile.eager()``, which covers what a break leaves, and not where the user allows
``graph_break`` by name.  Beneath a dispatch mode, such as a counter of operations, Dynamo compiles nothing at all.
"""

from __future__ import annotations

import functools
from typing import Any

from torch._dynamo import error_on_graph_break
from torch._dynamo.convert_frame import CatchErrorsWrapper
from torch._dynamo.eval_frame import innermost_backend
from torch._dynamo.exc import Unsupported
from torch.utils._python_dispatch import is_in_any_mode_without_ignore_compile_internals

from .errors import GraphBreakError, raising_through_dynamo
from .interception import is_intercepting

NAME = "graph_break"
"""What ``options={"allow": [...]}`` calls them."""

_ADVICE = (
    "bicompile: what Dynamo leaves to eager PyTorch may follow the batch. Take the graph break out of the compiled "
    "function, call it inside bicompile.eager(), which covers such code too, or take responsibility for it with "
    f"options={{'allow': [{NAME!r}]}}."
)


def refuse_graph_breaks(backend: Any) -> None:
    """Raise ``GraphBreakError`` where Dynamo breaks the graph of what is compiled with ``backend``."""
    stock = CatchErrorsWrapper.__call__

    @functools.wraps(stock)
    def convert(self: CatchErrorsWrapper, *args: Any, **kwargs: Any) -> Any:
        if is_intercepting() or not _refuses(self, backend):
            return stock(self, *args, **kwargs)
        with raising_through_dynamo():
            if is_in_any_mode_without_ignore_compile_internals():
                raise GraphBreakError(f"Dynamo compiles nothing beneath a torch dispatch mode.\n\n{_ADVICE}")
            try:
                with error_on_graph_break(True):
                    return stock(self, *args, **kwargs)
            except Unsupported as error:
                raise GraphBreakError(f"{error}\n\n{_ADVICE}") from None

    CatchErrorsWrapper.__call__ = convert  # type: ignore[method-assign]


def _refuses(converter: CatchErrorsWrapper, backend: Any) -> bool:
    """Whether frames are converted for ``backend``, and breaks are not allowed."""
    wanted = innermost_backend(converter)
    options = getattr(wanted, "kwargs", {}).get("options", {})  # of torch.compile, whose wrapping it is in
    return getattr(wanted, "compiler_fn", wanted) is backend and NAME not in options.get("allow", ())
