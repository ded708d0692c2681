"""Batch-invariant lowerings, one folder per op family: order, schedule, reference, op, kernels."""

if __name__ != "bicompile.lowering":
    raise ImportError("import bicompile.lowering, not lowering")
