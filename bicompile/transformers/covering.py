"""Cover what ``generate`` runs without compiling."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

from torch import nn

from ..covered import covered

Model = TypeVar("Model", bound=nn.Module)


def cover(model: Model) -> Model:
    """Run ``model.forward`` in ``bicompile.eager()`` wherever it is not compiled; changes and returns ``model``.

    With ``compile_config``, ``generate`` compiles decode steps and runs prefills as they are; ``generate_batch`` runs
    the model in a thread that a context around the call does not reach.  Calling it again changes nothing.
    """
    forward = model.forward
    if getattr(forward, "covers", None) is model:
        return model

    @functools.wraps(forward)
    def covered_forward(*args: Any, **kwargs: Any) -> Any:
        with covered():
            return forward(*args, **kwargs)

    covered_forward.covers = model  # type: ignore[attr-defined]
    model.forward = covered_forward
    return model
