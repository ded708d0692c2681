"""Maps of what is covered, found out by trying: ``ops`` goes through PyTorch's own database of ops."""

from .command import add_command

__all__ = ["add_command"]
