"""Scaled dot product attention: keys in blocks that start at a row's first visible key."""
