"""The passes between AOTAutograd's graphs and Inductor, in their order."""

from __future__ import annotations

from collections.abc import Callable

from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from bicompile.lowering.gpu.early import plan_early
from bicompile.lowering.loading import load_for

from . import (
    fuse_rms_norms,
    lower_matmuls,
    lower_reductions,
    lower_samples,
    lower_scans,
    lower_scatters,
    lower_selections,
    lower_softmax,
    share_mask_rows,
)
from .certify import Certification, certify_pass
from .rewriting import Rule

PIPELINE: tuple[Callable[[GraphModule], PassResult], ...] = (
    lower_softmax.lower_softmax_pass,
    lower_matmuls.lower_matmuls_pass,
    lower_reductions.lower_reductions_pass,  # may look through elementwise producers, which no other pass changes
    fuse_rms_norms.fuse_rms_norms_pass,  # starts from the mean square that the reductions' pass makes
    lower_scans.lower_scans_pass,
    lower_scatters.lower_scatters_pass,
    lower_selections.lower_selections_pass,
    lower_samples.lower_samples_pass,
    share_mask_rows.share_mask_rows_pass,
)

# What the passes do to one op, for bicompile.eager(), which has no graph to walk.
RULES: dict[OpOverload, Rule] = {
    **lower_softmax.RULES,
    **lower_matmuls.RULES,
    **lower_reductions.RULES,
    **lower_scans.RULES,
    **lower_scatters.RULES,
    **lower_selections.RULES,
    **lower_samples.RULES,
}


class Pipeline(CustomGraphPass):
    """Runs ``PIPELINE``, certifies, and sees to the kernels; as an Inductor pass, on every graph and nested graph.

    Args:
        certification: what is allowed, and where the classification goes.
        salt: everything that must change the cache key: options, sources, versions.
    """

    def __init__(self, certification: Certification, salt: str) -> None:
        self.certification = certification
        self.salt = salt

    def __call__(self, graph: Graph) -> None:
        gm = graph.owning_module
        assert isinstance(gm, GraphModule)
        for lower in PIPELINE:
            lower(gm)
        certify_pass(gm, self.certification)
        load_for(gm)
        plan_early(gm)

    def uuid(self) -> str:
        """The salt.  PyTorch's own keys know neither our decompositions nor our kernels."""
        return self.salt
