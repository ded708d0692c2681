"""bicompile: batch-invariant backend for torch.compile.

torch.compile(model, backend="batch_invariant")
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
if not (_here / "passes").is_dir():
    # A source checkout: passes/ and lowering/ lie beside this directory, not in it.
    # In an installed copy they are real sub-directories and nothing happens here.
    __path__.append(str(_here.parent))

from . import testing  # noqa: E402
from .api import batch_invariant  # noqa: E402
from .certificate import Certificate  # noqa: E402
from .eager_mode import eager  # noqa: E402
from .errors import BatchInvarianceError, OptionError, UnsupportedOpError  # noqa: E402
from .explaining import explain  # noqa: E402
from .registration import register  # noqa: E402
from .transformers.registration import register_on_import  # noqa: E402

__all__ = [
    "BatchInvarianceError",
    "Certificate",
    "OptionError",
    "UnsupportedOpError",
    "__version__",
    "batch_invariant",
    "eager",
    "explain",
    "testing",
]
__version__ = "0.1.0"

register()
register_on_import()
