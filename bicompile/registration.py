"""Make ``backend="batch_invariant"`` known to torch also where the package is imported but not installed."""

from torch._dynamo.backends import registry

from .backend import batch_invariant


def register() -> None:
    """Register the backend's name, unless torch has found the entry point already."""
    # Registering twice raises "duplicate name": a name in _BACKENDS is one that torch itself registers on loading it.
    if "batch_invariant" not in registry._BACKENDS:
        registry.register_backend(batch_invariant, name="batch_invariant")
