"""Batch-invariant lowerings, one folder per op family: order, schedule, reference, op, kernels."""

if __name__ != "bicompile.lowering":
    raise ImportError("import bicompile.lowering, not lowering")

# Importing an op module defines its schemas, which the passes name; loading gives each op what runs until its kernel is
# there.
from . import loading
from .attention import op as attention_op
from .elementwise import op as elementwise_op
from .matmul import op as matmul_op
from .norm import op as norm_op
from .reduction import op as reduction_op
from .scan import op as scan_op
from .scatter import op as scatter_op
from .selection import op as selection_op
from .softmax import op as softmax_op
from .windows import op as windows_op

__all__ = [
    "attention_op",
    "elementwise_op",
    "loading",
    "matmul_op",
    "norm_op",
    "reduction_op",
    "scan_op",
    "scatter_op",
    "selection_op",
    "softmax_op",
    "windows_op",
]
