"""Walk and rebuild nested values: lists, tuples, mappings, dataclasses and plain objects such as a key-value cache."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# Where a leaf lies inside nested containers: keys, indices and attribute names, outermost first.
Path = tuple[object, ...]


def leaves(value: Any, path: Path = (), _inside: tuple[int, ...] = ()) -> Iterator[tuple[Path, Any]]:
    """Every leaf of a nested value with its path.  An object that holds itself is entered once."""
    if id(value) in _inside:
        return
    children = _children(value)
    if children is None:
        yield path, value
        return
    for key, child in children:
        yield from leaves(child, (*path, key), (*_inside, id(value)))


def map_tensors(fn: Callable[[Path, Tensor], Tensor], value: Any, path: Path = ()) -> Any:
    """A copy of ``value`` with ``fn`` applied to each path and tensor; containers are new, other leaves the same."""
    if isinstance(value, Tensor):
        return fn(path, value)
    children = _children(value)
    if children is None:
        return value
    mapped = {key: map_tensors(fn, child, (*path, key)) for key, child in children}
    if isinstance(value, list):
        return list(mapped.values())
    if isinstance(value, tuple):
        as_tuple = tuple(mapped.values())
        return type(value)(*as_tuple) if hasattr(value, "_fields") else as_tuple
    if type(value) is dict:
        return mapped
    made = copy.copy(value)
    for key, child in mapped.items():
        if isinstance(value, Mapping):
            made[key] = child
        else:
            object.__setattr__(made, key, child)
    return made


def path_name(root: str, path: Path) -> str:
    """``root`` with ``path`` written as one would write it in Python: ``output[0]['logits']``."""
    return root + "".join(f"[{key!r}]" for key in path)


def _children(value: Any) -> list[tuple[Any, Any]] | None:
    """The parts of a container with their keys; None for a leaf."""
    if isinstance(value, Tensor | torch.nn.Module | torch.Size | type):
        return None
    if isinstance(value, Mapping):  # a transformers ModelOutput is one
        return list(value.items())
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    if hasattr(value, "__dict__") and not callable(value):  # a key-value cache, say
        return list(vars(value).items())
    return None
