"""bicompile: batch-invariant backend for torch.compile."""

from pathlib import Path

_here = Path(__file__).resolve().parent
if not (_here / "passes").is_dir():
    # A source checkout: passes/ and lowering/ lie beside this directory, not in it.
    # In an installed copy they are real sub-directories and nothing happens here.
    __path__.append(str(_here.parent))

__version__ = "0.1.0"
