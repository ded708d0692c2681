"""Make ``backend="batch_invariant"`` known to torch also where the package is imported but not installed."""

from importlib import metadata

_NAME = "batch_invariant"


def register() -> None:
    """Register the backend's name, unless torch will find the entry point of an installed copy by itself."""
    if any(point.name == _NAME for point in metadata.entry_points(group="torch_dynamo_backends")):
        return
    from torch._dynamo.backends import registry

    from .backend import batch_invariant

    # Registering twice raises "duplicate name": a name in _BACKENDS is one that torch itself registers on loading it.
    if _NAME not in registry._BACKENDS:
        registry.register_backend(batch_invariant, name=_NAME)
