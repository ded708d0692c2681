"""Make ``attn_implementation="batch_invariant"`` known to transformers, without importing it."""

from __future__ import annotations

import functools
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAME = "batch_invariant"
# The module that holds transformers' table of attention functions; every model imports it.
_TABLES = "transformers.modeling_utils"


def register() -> None:
    """Register attention, masks and paged attention; imports transformers.  Calling it again changes nothing.

    Raises:
        ImportError: transformers is not installed, or older than 5.
    """
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface, PreTrainedModel

    from .attention import attention_forward
    from .paged import paged_attention_forward

    AttentionInterface.register(NAME, attention_forward)
    # generate_batch() puts "paged|" before the name, and makes no mask for names that it does not know.
    AttentionInterface.register(f"paged|{NAME}", paged_attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    _check_models(PreTrainedModel)


def _check_models(base: Any) -> None:
    """Refuse our name, as transformers refuses ``sdpa``, to models that compute attention in code of their own.

    They would be given a boolean mask, and add it to their scores.
    """
    check = base.get_correct_attn_implementation
    if hasattr(check, "__wrapped__"):
        return

    @functools.wraps(check)
    def checked(self: Any, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        ours = requested_attention is not None and requested_attention.rpartition("|")[2] == NAME
        if ours and _has_attention_of_its_own(self):
            raise ValueError(
                f"{type(self).__name__} computes attention, if any, in code of its own, which knows no implementation "
                f'called "{NAME}". Leave attn_implementation out: torch.compile(backend="batch_invariant") and '
                "bicompile.eager() cover that code too."
            )
        return check(self, requested_attention, *args, **kwargs)

    base.get_correct_attn_implementation = checked


def _has_attention_of_its_own(model: Any) -> bool:
    """Whether it does not ask transformers' table: it has no other attention, or a table of classes (Falcon)."""
    if model._supports_attention_backend:
        return False
    homes = [sys.modules[kind.__module__] for kind in type(model).__mro__]
    own_table = any(name.endswith("ATTENTION_CLASSES") for home in homes for name in vars(home))
    return own_table or not model._supports_sdpa


def register_on_import() -> None:
    """Register now if transformers is loaded, else as soon as it is; do nothing where it never is."""
    if _TABLES in sys.modules:
        _register_or_warn()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def _register_or_warn() -> None:
    """An older transformers must stay importable beside us."""
    try:
        register()
    except ImportError as error:
        warnings.warn(
            f'attn_implementation="{NAME}" is not available, because transformers is older than 5: {error}',
            stacklevel=2,
        )


class _Watcher(MetaPathFinder):
    """Waits for one module to be imported, then leaves ``sys.meta_path``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TABLES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            _register_after(spec)
        return spec


def _register_after(spec: ModuleSpec) -> None:
    """Run :func:`register` when the module of ``spec`` has been executed."""
    loader = spec.loader
    assert loader is not None
    execute = loader.exec_module

    def execute_and_register(module: ModuleType) -> None:
        del loader.exec_module  # the class's own method again
        execute(module)
        _register_or_warn()

    loader.exec_module = execute_and_register  # type: ignore[method-assign]
