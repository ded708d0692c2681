"""Seeded sampling in continuous batching: a request's text follows its own seed, as ``SeededSampler`` draws it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from ..sampling import Drawing


def seed_requests(manager: Any, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> None:
    """Let each request of ``manager`` draw its tokens by a seed of its own.

        manager = model.init_continuous_batching(generation_config=GenerationConfig(do_sample=False, ...))
        seed_requests(manager, temperature=0.7, top_p=0.95)
        manager.start()
        manager.add_request(tokens, seed=11)

    A request's text is that of ``generate`` with ``SeededSampler([11], ...)``.  One without a seed has seed 0.

    Args:
        manager: a ``ContinuousBatchingManager`` that has not been started, for greedy generation.
        temperature: as for ``SeededSampler``.
        top_k: likewise.
        top_p: likewise.

    Raises:
        ValueError: the manager is running or samples by itself, or a value is out of its range.
    """
    if manager.is_running() or manager.generation_config.do_sample:
        raise ValueError("seed_requests: expected a manager that is not yet started and has do_sample=False")
    arguments = [
        _Argument(lambda request: request.state.logit_processor_kwargs.get("seed", 0), {"seed": int}),
        _Argument(lambda request: request.state.logit_processor_kwargs.get("seed", 0) >> 32),
        _Argument(_position),
    ]
    processors = manager.logit_processor
    processors.logits_processor.extend([*arguments, _Draw(arguments, Drawing(temperature, top_k, top_p))])
    processors.tensors_required += len(arguments) + 1
    processors.do_processing = True
    processors._retrieve_processors_kwargs()


def _position(request: Any) -> int:
    """How many tokens of its completion a request has: those before a restart count as part of it."""
    state = request.state
    return state.position_offset - (state._true_initial_tokens or len(state.initial_tokens))


class _Argument(ContinuousBatchingLogitsProcessor):
    """A number below 2**32 for each request, kept where a captured graph finds it: each processor may have one."""

    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, number: Callable[[Any], int], kwargs: dict[str, type] | None = None) -> None:
        self._number = number
        self.supported_kwargs = kwargs or {}
        self.row: Tensor | None = None

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        words = [self._number(request) & 0xFFFFFFFF for request in requests_with_new_token]
        return torch.tensor([word - (word >> 31 << 32) for word in words], dtype=torch.int32, device="cpu")

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        self.row = tensor_arg
        return scores


class _Draw(ContinuousBatchingLogitsProcessor):
    """Leaves one token in each row, by the arguments that the processors before it were given in this step."""

    supported_kwargs: dict[str, type] = {}
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, arguments: list[_Argument], drawing: Drawing) -> None:
        self._arguments, self._drawing = arguments, drawing

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        return torch.zeros(len(requests_with_new_token), dtype=torch.int32, device="cpu")

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        rows = [argument.row for argument in self._arguments]
        low, high, position = (row[: len(scores)].long() for row in rows if row is not None)
        return self._drawing.leave_one(scores, (low & 0xFFFFFFFF) | (high << 32), position)
