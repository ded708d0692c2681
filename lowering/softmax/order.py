"""The order of a softmax: that of a reduction for its sum and for those of its gradient; the rest is pointwise."""

from bicompile.lowering.reduction.order import ReductionOrder, order_for

__all__ = ["ReductionOrder", "order_for"]
