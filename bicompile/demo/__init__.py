"""The demo: one prompt, many batches, and how many different answers come back."""

from .command import add_command

__all__ = ["add_command"]
