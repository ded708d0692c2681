"""The order of a norm: that of a reduction for its statistics and the sums of its gradients; the rest is pointwise."""

import dataclasses

import torch

from bicompile.lowering.reduction.order import ReductionOrder, order_for

__all__ = ["ReductionOrder", "group_parameters_order_for", "order_for"]


def group_parameters_order_for(n: int, dtype: torch.dtype) -> ReductionOrder:
    """The order, on the CPU, of the gradients of a group norm's parameters: sums of ``n`` numbers, in float64."""
    return dataclasses.replace(order_for(n, dtype), compute=torch.float64)
