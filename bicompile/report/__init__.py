"""The certificate as a page of HTML: verdict, graphs, source lines, and the tree of each order."""

from .page import page

__all__ = ["page"]
