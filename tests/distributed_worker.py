"""One of several processes for tests/test_distributed.py: checks, each by its name, and writes what failed.

python tests/distributed_worker.py RANK RANKS STORE
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import bicompile
from bicompile.distributed import mean_in_rank_order
from bicompile.testing import same_bits

RANK, RANKS = int(sys.argv[1]), int(sys.argv[2])


def part(rank: int, *shape: int) -> Tensor:
    """What ``rank`` has; over many binades, so that every order of adding gives other bits."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(shape, generator=generator)
    return x * torch.exp2(torch.randint(-6, 7, shape, generator=generator))


WEIGHTS = part(100, 16, 40), part(101, 40, 8)


class Model(nn.Module):
    """Two products, of which Inductor generates no code."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(weight.clone()) for weight in WEIGHTS)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.up @ self.down


def reductions(x: Tensor) -> tuple[Tensor, ...]:
    group = dist.group.WORLD
    every = [functional.all_reduce(x, op, group) for op in ("sum", "avg", "max")]
    own = functional.reduce_scatter_single(x, "sum", 0, group)
    return (*every, own, functional.all_gather_single(own, 0, group), functional.broadcast(x, 1, group))


def with_one_in_place(x: Tensor) -> tuple[Tensor, ...]:
    y = x.clone()
    dist.all_reduce(y)
    return (y, *reductions(x))


def ordered(stacked: Tensor) -> tuple[Tensor, ...]:
    """What ``reductions`` is to give, from the parts of all ranks."""
    whole = stacked.sum(0)
    return whole, stacked.mean(0), stacked.amax(0), whole.chunk(RANKS)[RANK], whole, stacked[1]


def check_collectives() -> None:
    x = part(RANK, 4 * RANKS, 50)
    stacked = torch.stack([part(rank, 4 * RANKS, 50) for rank in range(RANKS)])
    with bicompile.eager():
        expected = ordered(stacked)
        assert not same_bits(ordered(stacked.roll(1, 0))[0], expected[0]), "another order would not show"
        assert same_bits(reductions(x), expected), "eager()"
        assert same_bits(functional.all_reduce(x.long(), "sum", dist.group.WORLD), stacked.long().sum(0)), "integers"
    compiled = torch.compile(with_one_in_place, backend="batch_invariant", fullgraph=True)
    assert same_bits(compiled(x), (expected[0], *expected)), "compiled"


def check_refusal_outside_of_functional_collectives() -> None:
    x = part(RANK, 3)
    for reduce in (lambda: dist.all_reduce(x), lambda: dist.reduce(x, 0)):
        with bicompile.eager():
            try:
                reduce()
            except bicompile.UnsupportedOpError as error:
                assert "c10d" in str(error)
            else:
                raise AssertionError("not refused")


def local_gradients(rank: int) -> tuple[Tensor, list[Tensor]]:
    model, x = Model(), part(rank, 5, 16)
    with bicompile.eager():
        y = model(x)
        return y.detach(), list(torch.autograd.grad(y.square().sum(), list(model.parameters())))


def check_data_parallel() -> None:
    stacks = zip(*(local_gradients(rank)[1] for rank in range(RANKS)), strict=True)
    with bicompile.eager():
        expected = [torch.stack(parts).mean(0) for parts in stacks]
    x = part(RANK, 5, 16)

    def gradients(wrap: Callable[[nn.Module], Any], mode: Any, megabytes: float) -> list[Tensor | None]:
        model = Model()
        parallel = DistributedDataParallel(wrap(model), bucket_cap_mb=megabytes)
        parallel.register_comm_hook(None, mean_in_rank_order)
        with mode:
            parallel(x).square().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    compiled = gradients(lambda model: torch.compile(model, backend="batch_invariant"), nullcontext(), 25.0)
    assert same_bits(compiled, expected), "compiled"
    for megabytes in (25.0, 1e-4):  # all parameters in one bucket; each in its own
        ours = gradients(lambda model: model, bicompile.eager(), megabytes)
        assert same_bits(ours, expected), f"buckets of {megabytes} MB"


def check_fully_sharded() -> None:
    y, _ = local_gradients(RANK)
    model = fully_shard(torch.compile(Model(), backend="batch_invariant"))
    ours = model(part(RANK, 5, 16))
    assert same_bits(ours.detach(), y), "forward"
    ours.square().sum().backward()
    every = [local_gradients(rank)[1] for rank in range(RANKS)]
    for parameter, parts in zip(model.parameters(), zip(*every, strict=True), strict=True):
        mean = torch.stack(parts).mean(0)
        assert (parameter.grad.full_tensor() - mean).norm() <= 1e-6 * mean.norm()


def main() -> None:
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=RANK, world_size=RANKS)
    checks: list[Callable[[], Any]] = [
        check_collectives,
        check_refusal_outside_of_functional_collectives,
        check_data_parallel,
        check_fully_sharded,
    ]
    for check in checks:
        check()
        print("passed", check.__name__, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
