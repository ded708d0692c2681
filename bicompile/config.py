"""Inductor's settings under our backend, the options a user may give, and the salt of the caches."""

from __future__ import annotations

import difflib
import functools
import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options

from .errors import OptionError
from .lowering import native
from .lowering.elementwise.codegen_cpu import CONTRACT_FLAG
from .lowering.elementwise.codegen_cpu import signature as cpu_signature
from .lowering.elementwise.codegen_gpu import signature as gpu_signature

# Each of these, set otherwise, lets the batch size, a timing or a fusion decision into the bits.
_PINNED: dict[str, Any] = {
    # Round half-precision intermediates wherever eager does, fused or not; turns FMA contraction off on GPUs.
    "emulate_precision_casts": True,
    "eager_numerics.division_rounding": True,
    "use_fast_math": False,
    "cpp.enable_unsafe_math_opt_flag": False,
    "cpp.enable_floating_point_contract_flag": CONTRACT_FLAG,
    # Rewrites that depend on shapes or on what stands next to an op.
    "pattern_matcher": False,
    "joint_graph_constant_folding": False,
    "shape_padding": False,
    "freezing": False,
    "b2b_gemm_pass": False,
    "efficient_conv_bn_eval_fx_passes": False,
    "online_softmax": False,
    # Choices by timing.
    "max_autotune": False,
    "max_autotune_gemm": False,
    "max_autotune_pointwise": False,
    "coordinate_descent_tuning": False,
    "triton.multi_kernel": 0,
    # Reductions of Inductor's own; none in floating point is left to it, but fail closed.
    "split_reductions": False,
    "triton.cooperative_reductions": False,
    "triton.mix_order_reduction": False,
    "dynamic_scale_rblock": False,
    "unroll_reductions_threshold": 1,
    "deterministic": True,
    "batch_invariant": True,
    # Random numbers as eager draws them; certify refuses them unless they are allowed by name.
    "fallback_random": True,
    # Hooks that the pipeline needs for itself.
    "post_grad_custom_post_pass": None,
    "cpp_wrapper": False,
}

_OWN_OPTIONS = ("allow", "on_refused")
_MODES = ("default", "reduce-overhead")


@dataclass(frozen=True)
class Options:
    """What a user asked for, validated.

    Attributes:
        allow: op names that the user takes responsibility for.
        on_refused: what an unproven op does: ``error`` or ``warn``.
        inductor: further Inductor settings, none of which undoes a pinned one.
    """

    allow: frozenset[str]
    on_refused: Literal["error", "warn"]
    inductor: Mapping[str, Any]


def parse_options(mode: str | None, options: Mapping[str, Any] | None) -> Options:
    """Validate what ``torch.compile`` passed.

    Args:
        mode: ``"default"`` or ``"reduce-overhead"``.
        options: ``allow`` (a list of op names such as ``"aten.mode"``, and ``"graph_break"``), ``on_refused``
            (``"error"`` or ``"warn"``) and names from ``torch._inductor.config``.

    Raises:
        OptionError: an unknown name, a value of the wrong kind, or a setting that would break a promise.
    """
    if mode not in (None, *_MODES):
        raise OptionError(
            f"mode={mode!r}: expected one of {', '.join(_MODES)}. The max-autotune modes choose kernels by timing, "
            "which lets the machine's load into the bits."
        )
    options = dict(options or {})
    allow = options.pop("allow", ())
    if isinstance(allow, str) or not all(isinstance(name, str) for name in allow):
        raise OptionError(f"options['allow']: expected a list of op names such as ['aten.mode'], got {allow!r}")
    on_refused = options.pop("on_refused", "error")
    if on_refused not in ("error", "warn"):
        raise OptionError(f"options['on_refused']: expected 'error' or 'warn', got {on_refused!r}")
    inductor = dict(list_mode_options(mode)) if mode else {}
    for name, wanted in options.items():
        inductor[_checked_name(name)] = wanted
        if name in _PINNED and wanted != _PINNED[name]:
            raise OptionError(
                f"options[{name!r}]={wanted!r} would let bits depend on the batch, a timing or a fusion decision; "
                f"batch_invariant needs {_PINNED[name]!r}. Leave it out."
            )
    return Options(frozenset(allow), on_refused, inductor)


def _checked_name(name: str) -> str:
    known = set(inductor_config.get_config_copy())
    if name in known:
        return name
    close = difflib.get_close_matches(name, [*_OWN_OPTIONS, *known], n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise OptionError(
        f"options[{name!r}]: not an option of batch_invariant ({', '.join(_OWN_OPTIONS)}) nor a setting of "
        f"torch._inductor.config.{hint}"
    )


def pinned_settings() -> dict[str, Any]:
    """The pinned settings that this torch has; a release without one has nothing to pin."""
    known = set(inductor_config.get_config_copy())
    return {name: value for name, value in _PINNED.items() if name in known and value is not None}


def cache_salt(options: Options) -> str:
    """What must change the key of Inductor's and AOTAutograd's caches: sources, versions, instruction set, options."""
    wanted = sorted(options.allow), options.on_refused, sorted((k, repr(v)) for k, v in options.inductor.items())
    generated = cpu_signature(), gpu_signature()
    return hashlib.sha256(f"{_sources_hash()} {native.isa()} {generated} {wanted}".encode()).hexdigest()


@functools.cache
def _sources_hash() -> str:
    package = Path(__file__).resolve().parent
    native_dir = Path(native.__file__).resolve().parent
    digest = hashlib.sha256(f"{torch.__version__} {sys.version}".encode())
    for root in (package, native_dir.parents[1] / "passes", native_dir.parent):
        for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".cpp", ".h")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
