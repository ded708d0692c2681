"""The order of a norm: that of a reduction for its statistics and the sums of its gradients; the rest is pointwise."""

from bicompile.lowering.reduction.order import ReductionOrder, order_for

__all__ = ["ReductionOrder", "order_for"]
