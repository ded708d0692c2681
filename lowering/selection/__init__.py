"""Choosing elements: nothing is added, but which of equal ones is chosen must not follow the batch."""
