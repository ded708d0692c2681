"""bicompile: batch-invariant backend for torch.compile.

torch.compile(model, backend="batch_invariant")
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

_here = Path(__file__).resolve().parent
if not (_here / "passes").is_dir():
    # A source checkout: passes/ and lowering/ lie beside this directory, not in it.
    # In an installed copy they are real sub-directories and nothing happens here.
    __path__.append(str(_here.parent))

from .registration import register  # noqa: E402
from .transformers.registration import register_on_import  # noqa: E402

if TYPE_CHECKING:
    from . import testing
    from .api import batch_invariant
    from .certificate import Certificate
    from .eager_mode import eager
    from .errors import BatchInvarianceError, GraphBreakError, OptionError, UnsupportedOpError
    from .explaining import explain
    from .losses import linear_cross_entropy

__all__ = [
    "BatchInvarianceError",
    "Certificate",
    "GraphBreakError",
    "OptionError",
    "UnsupportedOpError",
    "__version__",
    "batch_invariant",
    "eager",
    "explain",
    "linear_cross_entropy",
    "testing",
]
__version__ = "0.1.0"

# The module that each name comes from, on first use: importing them all imports torch and half of its compiler.
_HOMES = {
    "BatchInvarianceError": "errors",
    "Certificate": "certificate",
    "GraphBreakError": "errors",
    "OptionError": "errors",
    "UnsupportedOpError": "errors",
    "batch_invariant": "api",
    "eager": "eager_mode",
    "explain": "explaining",
    "linear_cross_entropy": "losses",
}


def __getattr__(name: str) -> Any:
    if name == "testing":
        return import_module(f"{__name__}.testing")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
register_on_import()
