"""The gradient of scores on a GPU: elementwise, so Inductor's code for it, compiled by the same backend.

Compiled code that keeps all scores computes the gradient so, and the bits are to be the same.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .cross_entropy import gradient_of_scores


def log_probability_backward(grad: Tensor, x: Tensor, index: Tensor, shift: Tensor, log_total: Tensor) -> Tensor:
    """``(one_hot - exp((x - shift) - log_total)) * grad`` of scores ``x`` [N, C], in their dtype; the others are [N].

    The first call with another dtype compiles, which takes some seconds.
    """
    if x.numel() == 0:
        return torch.empty_like(x)
    with _disable_current_modes(), torch.no_grad():
        return compiled(x.dtype)(*(t.detach() for t in (grad.contiguous(), x, index, shift, log_total)))


@functools.cache
def compiled(dtype: torch.dtype) -> Callable[..., Tensor]:
    """The function for scores of ``dtype`` and any sizes."""

    def gradient(grad: Tensor, x: Tensor, index: Tensor, shift: Tensor, log_total: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            raise RuntimeError(
                "bicompile::log_probability_backward: it is compiled for the GPU, but compiling is switched off "
                "(TORCHDYNAMO_DISABLE or torch.compiler.set_stance). Switch it on."
            )
        logs = (x.to(shift.dtype) - shift.unsqueeze(1)) - log_total.unsqueeze(1)
        return gradient_of_scores(grad, logs, index, 1).to(x.dtype)

    # Dynamo counts recompilations by code object, so each dtype gets one of its own.
    own = types.FunctionType(gradient.__code__.replace(co_name=f"gradient_{dtype}"), gradient.__globals__)
    return torch.compile(own, backend="batch_invariant", fullgraph=True, dynamic=True)
