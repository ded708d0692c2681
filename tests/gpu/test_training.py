"""Training on a GPU: twenty steps give the same losses and weights each time, in code compiled once or twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from training_tasks import TRAININGS, Training, is_falling

from bicompile.testing import same_bits

pytest.importorskip("transformers")


def compiled(training: Training) -> Any:
    return torch.compile(training.module, backend="batch_invariant")


@pytest.mark.parametrize("name, dtype", [("llama", torch.bfloat16), ("llama", torch.float32), ("vit", torch.float32)])
def test_training_gives_the_same_weights_three_times(name: str, dtype: torch.dtype):
    training = TRAININGS[name]("cuda", dtype)
    start = [parameter.detach().clone() for parameter in training.module.parameters()]
    model = compiled(training)
    weights, losses = first = training.run(model)
    assert losses.isfinite().all() and is_falling(losses), losses
    assert not any(map(same_bits, weights, start))
    assert same_bits(training.run(model), first)
    torch._dynamo.reset()
    assert same_bits(training.run(compiled(training)), first)
