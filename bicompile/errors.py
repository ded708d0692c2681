"""The errors that bicompile raises on purpose."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator


class UnsupportedOpError(RuntimeError):
    """An op has no batch-invariant lowering and the user has not allowed it by name."""


class GraphBreakError(RuntimeError):
    """Dynamo would leave code of a compiled function to eager PyTorch, whose bits may follow the batch."""


class BatchInvarianceError(AssertionError):
    """A row's bits moved with its batch.  The message says which output, row, element and situation.

    Attributes (None where they do not apply): ``output`` names the output or gradient, ``row`` its row in the
    whole batch, ``situation`` what was changed around the row, ``index`` the first differing element within the
    row, ``expected`` and ``got`` its two values, ``differing_elements`` and ``differing_bits`` the row's totals,
    ``trial`` the ``bicompile.testing.trials.Trial`` that showed it.
    """

    trial: object = None

    def __init__(
        self,
        message: str,
        *,
        output: str | None = None,
        row: int | None = None,
        situation: str | None = None,
        index: tuple[int, ...] | None = None,
        expected: object = None,
        got: object = None,
        differing_elements: int | None = None,
        differing_bits: int | None = None,
    ) -> None:
        super().__init__(message)
        self.output = output
        self.row = row
        self.situation = situation
        self.index = index
        self.expected = expected
        self.got = got
        self.differing_elements = differing_elements
        self.differing_bits = differing_bits


class OptionError(ValueError):
    """An option is unknown, has a value that makes no sense, or would break a promise."""


@contextlib.contextmanager
def raising_through_dynamo() -> Iterator[None]:
    """Let the errors of a backend reach the user as they are: ``except UnsupportedOpError`` must catch one.

    Inductor and Dynamo wrap what a backend raises, unless it is one of Dynamo's own exceptions.  So take off the
    wrapping, and raise the error in a class that is both.
    """
    from torch._dynamo.exc import ShortenTraceback  # late: Dynamo takes a second to import

    try:
        yield
    except Exception as error:
        own = getattr(error, "inner_exception", error)
        if isinstance(own, ShortenTraceback) or not type(own).__module__.startswith("bicompile."):
            raise
        kind = type(own)
        both = type(kind.__name__, (ShortenTraceback, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})
        raise both(*own.args, first_useful_frame=inspect.currentframe()) from None
