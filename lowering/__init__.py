"""Batch-invariant lowerings, one folder per op family: order, schedule, reference, op, kernels."""

if __name__ != "bicompile.lowering":
    raise ImportError("import bicompile.lowering, not lowering")

# Importing an op module defines its schemas, which the passes name.
from .attention import op as attention
from .elementwise import op as elementwise
from .matmul import op as matmul
from .norm import op as norm
from .reduction import op as reduction
from .scan import op as scan
from .scatter import op as scatter
from .softmax import op as softmax

__all__ = ["attention", "elementwise", "matmul", "norm", "reduction", "scan", "scatter", "softmax"]
