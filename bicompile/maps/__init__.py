"""Maps of what is covered, found out by trying: ``ops`` of PyTorch's own database, ``models`` of transformers."""

from .command import add_command

__all__ = ["add_command"]
