"""Gradients of ``DistributedDataParallel``, which are reduced outside of every graph, in one order of the ranks."""

# No annotations as strings here: register_comm_hook compares them with the types.

from typing import Any

import torch
import torch.distributed as dist
from torch._dispatch.python import no_python_dispatcher
from torch.utils._python_dispatch import _disable_current_modes

from .lowering.reduction import op as _registers_mean  # noqa: F401


def mean_in_rank_order(group: dist.ProcessGroup | None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """A communication hook: the mean of the ranks' gradients, added in one order of the ranks.

        model = DistributedDataParallel(torch.compile(model, backend="batch_invariant"))
        model.register_comm_hook(None, mean_in_rank_order)

    The bits of a gradient are then a function of the ranks' gradients, and not of the backend's algorithm or of how
    parameters are put into buckets.  Each rank receives the gradients of all others: as many bytes as by default,
    times half the number of ranks.

    Args:
        group: the process group, ``register_comm_hook``'s ``state``; None for the default group.
        bucket: the gradients of some parameters, flat.
    """
    among = dist.group.WORLD if group is None else group
    assert among is not None, "DistributedDataParallel has a process group"
    flat = bucket.buffer()
    with _disable_current_modes(), no_python_dispatcher():  # this moves numbers only: see bicompile.eager_mode
        parts = flat.new_empty(among.size(), flat.numel())
        work = dist.all_gather(list(parts.unbind()), flat, group=among, async_op=True)
    assert work is not None

    def mean(_: Any) -> torch.Tensor:
        return torch.ops.bicompile.mean(parts, [0], False, flat.dtype)

    return work.get_future().then(mean)


__all__ = ["mean_in_rank_order"]
