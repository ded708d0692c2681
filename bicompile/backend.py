"""The ``torch.compile`` backend: our decompositions and passes, Inductor for the rest.

    torch.compile(model, backend="batch_invariant")

Linear layers whose many scores only a cross entropy asks for become one op with it.  AOTAutograd traces forward and
backward with our decomposition table and our attention; the pipeline of ``bicompile.passes`` lowers and certifies each
graph; Inductor, with pinned numerics, generates what is left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._inductor import compile_fx as inductor
from torch.fx import GraphModule

from .config import Options, cache_salt, parse_options, pinned_settings
from .decompositions import decomposition_table
from .errors import raising_through_dynamo
from .graph_breaks import refuse_graph_breaks
from .interception import intercept_composites
from .lowering.elementwise.codegen_cpu import materialise_headers, pinned_cpu_codegen
from .lowering.elementwise.codegen_gpu import pinned_gpu_codegen
from .lowering.elementwise.codegen_sizes import pinned_sizes
from .lowering.gpu.early import early_plans
from .lowering.gpu.sites import direct_calls
from .passes.certify import Certification
from .passes.fuse_linear_cross_entropy import fuse_linear_cross_entropy_pass
from .passes.pipeline import Pipeline

InnerCompile = Callable[..., Any]


def batch_invariant(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Compile a Dynamo graph so that a row's bits do not depend on the rows beside it.

    Called by ``torch.compile(..., backend="batch_invariant")``, which passes ``mode`` and ``options`` on.

    Raises:
        GraphBreakError: Dynamo would leave code to eager PyTorch; raised before this is called.
        OptionError: an option is unknown or would break a promise.
        UnsupportedOpError: the graph holds an op that is not proven and not allowed.
        NativeBuildError: the graph computes on the CPU and the CPU kernels cannot be built.
    """
    with raising_through_dynamo():
        _refuse_silent_eager()
        parsed = parse_options(mode, options)
        certification = Certification(parsed.allow, parsed.on_refused)
        return compile_graph(gm, example_inputs, parsed, certification, inner_compile=_inner_compile)


def reset() -> None:
    """Forget captured CUDA graphs; ``torch._dynamo.reset()`` calls this."""
    if torch.cuda.is_available():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


batch_invariant.reset = reset  # type: ignore[attr-defined]
refuse_graph_breaks(batch_invariant)


def compile_graph(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    certification: Certification,
    inner_compile: InnerCompile,
) -> Any:
    """Trace, lower and certify ``gm``, and hand each finished graph to ``inner_compile``."""
    fuse_linear_cross_entropy_pass(gm)
    pipeline = Pipeline(certification, cache_salt(options))
    settings = {**options.inductor, **pinned_settings(), "post_grad_custom_post_pass": pipeline}
    with intercept_composites(), _decomposing_our_way():
        return inductor.compile_fx(gm, list(example_inputs), inner_compile=inner_compile, config_patches=settings)


def _inner_compile(gm: GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
    """Inductor's own, generating our elementwise functions; also for a backward compiled later than its forward."""
    materialise_headers()
    with pinned_cpu_codegen(), pinned_gpu_codegen(), pinned_sizes(), direct_calls(), early_plans():
        return inductor.compile_fx_inner(gm, example_inputs, **kwargs)


@contextlib.contextmanager
def _decomposing_our_way() -> Iterator[None]:
    """Our table in the place of Inductor's, for one call.

    Passing it as ``decompositions=`` would switch both caches off.  Dynamo compiles under a lock of its own, so nobody
    else looks here meanwhile.
    """
    stock = inductor.select_decomp_table
    inductor.select_decomp_table = decomposition_table
    try:
        yield
    finally:
        inductor.select_decomp_table = stock


def _refuse_silent_eager() -> None:
    """Make Dynamo raise where it would run eager code silently: after too many recompilations of one function."""
    dynamo = torch._dynamo.config
    if not dynamo.suppress_errors:
        dynamo.fail_on_recompile_limit_hit = True
