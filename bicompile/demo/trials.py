"""Ask the same prompts in many batches, and compare what comes back with the answer given alone."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .models import Subject

PROMPTS = (
    "The history of the Roman Empire began when a small town on the Tiber",
    "My favourite recipe for vegetable soup starts with",
    "Write a short story about a robot who learns to paint:",
    "To be, or not to be, that is the question: whether it is nobler in the mind to suffer",
)
NEIGHBOURS = (
    "Hi",
    "The three primary colours are red,",
    "def fibonacci(n):\n    ",
    "Dear Sir or Madam, I am writing to you because I have recently found out that my order was lost in the post and",
    "Photosynthesis is the process by which green plants",
)


@dataclass(frozen=True)
class Plan:
    """How much the demo does: how many prompts, tokens a completion, and batch sizes beyond 1."""

    prompts: int
    tokens: int
    sizes: tuple[int, ...]
    dtypes: tuple[str, ...] = ("bfloat16", "float32")


FULL = Plan(prompts=4, tokens=24, sizes=(2, 3, 4, 5, 6, 8, 2, 4))
QUICK = Plan(prompts=2, tokens=10, sizes=(2, 5))


@dataclass(frozen=True)
class Batch:
    """Texts asked together (prompts by their number, neighbours after them), and padding beyond the longest."""

    texts: tuple[int, ...]
    padding: int


def batches(plan: Plan) -> list[Batch]:
    """Each prompt alone, which is the reference; each alone behind some padding; then among others, in any order."""
    rng = random.Random(0)
    drawn = [Batch((prompt,), 0) for prompt in range(plan.prompts)]
    drawn += [Batch((prompt,), 1 + prompt % 3) for prompt in range(plan.prompts)]
    everything = range(plan.prompts + len(NEIGHBOURS))
    for size in plan.sizes:
        texts = rng.sample(everything, min(size, len(everything)))
        if min(texts) >= plan.prompts:
            texts[rng.randrange(len(texts))] = rng.randrange(plan.prompts)
        drawn.append(Batch(tuple(texts), rng.randrange(4)))
    return drawn


@dataclass
class Answer:
    """One completion, the logits of each of its steps (``[tokens, vocabulary]``), and the time the batch took."""

    tokens: list[int]
    logits: Tensor
    seconds: float


@dataclass
class Row:
    """One line of the table: a mode, and how far its answers depended on the batch."""

    dtype: str
    mode: str
    runs: int = 0
    unique_completions: list[int] = field(default_factory=list)  # for each prompt
    first_divergence: int | None = None  # in tokens; None where every completion was the same
    differing_logits: float = 0.0  # share, over the steps before and at the first divergence
    prefill_equals_decode: bool = True
    prefill_differing_logits: float = 0.0
    tokens_per_second: float = 0.0
    warm_up_seconds: float = 0.0  # for batch_invariant: compiling
    distance_from_stock: float = 0.0  # largest difference of a logit, relative to the largest logit
    completions: list[list[str]] = field(default_factory=list)  # for each prompt, the different ones

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def one_completion_each(self) -> bool:
        return all(count == 1 for count in self.unique_completions)


class Asker:
    """Runs a model on batches of texts through ``generate``, greedily, for a fixed number of tokens."""

    def __init__(self, subject: Subject, model: Any, plan: Plan) -> None:
        self.subject, self.model, self.plan = subject, model, plan
        self.ids = [subject.encode(text) for text in (*PROMPTS[: plan.prompts], *NEIGHBOURS)]

    @torch.inference_mode()
    def ask(self, batch: Batch, tokens: int | None = None) -> dict[int, Answer]:
        """The answers to ``batch``, by text; left-padded to its longest text and ``batch.padding`` more."""
        rows = [self.ids[text] for text in batch.texts]
        width = max(map(len, rows)) + batch.padding
        ids = torch.tensor([[self.subject.pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        start = time.perf_counter()
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=tokens or self.plan.tokens,
            pad_token_id=self.subject.pad,
            return_dict_in_generate=True,
            output_logits=True,
        )
        seconds = time.perf_counter() - start
        logits = torch.stack(out.logits, dim=1)
        said = out.sequences[:, width:].tolist()
        return {text: Answer(said[i], logits[i], seconds) for i, text in enumerate(batch.texts)}

    @torch.inference_mode()
    def prefill(self, prompt: int, answer: Answer) -> Tensor:
        """The logits of every step of ``answer``, from one pass over prompt and answer together."""
        from transformers import DynamicCache

        ids = torch.tensor([self.ids[prompt] + answer.tokens[:-1]])
        cache = DynamicCache(config=self.model.config)
        logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        return logits[0, len(self.ids[prompt]) - 1 :].float()


def measure(asker: Asker, row: Row, step: Callable[[], None], stock: dict[int, Answer] | None) -> dict[int, Answer]:
    """Fill ``row``; call ``step`` after each batch.

    Returns:
        The reference answers: each prompt alone, by prompt.
    """
    start = time.perf_counter()
    for batch in (Batch((0,), 0), Batch((0, 1), 1)):
        asker.ask(batch, tokens=3)
    row.warm_up_seconds = time.perf_counter() - start
    step()

    alone: dict[int, Answer] = {}
    said: dict[int, dict[tuple[int, ...], None]] = {prompt: {} for prompt in range(asker.plan.prompts)}
    differing, compared, seconds, tokens = 0, 0, 0.0, 0
    for batch in batches(asker.plan):
        answers = asker.ask(batch)
        row.runs += 1
        seconds += next(iter(answers.values())).seconds
        tokens += len(answers) * asker.plan.tokens
        for prompt in set(answers) & set(said):
            answer = answers[prompt]
            said[prompt][tuple(answer.tokens)] = None
            reference = alone.setdefault(prompt, answer)
            if reference is answer:
                continue
            at = _first_difference(reference.tokens, answer.tokens)
            if at is not None:
                row.first_divergence = min(at, row.first_divergence if row.first_divergence is not None else at)
            # From the first other token on the questions differ, so the logits may.
            same_question = slice(None if at is None else at + 1)
            differing += _differing_bits(reference.logits[same_question], answer.logits[same_question])
            compared += reference.logits[same_question].numel()
        step()
    row.unique_completions = [len(completions) for completions in said.values()]
    row.completions = [[asker.subject.decode(list(c)) for c in completions] for completions in said.values()]
    row.differing_logits = differing / max(compared, 1)
    row.tokens_per_second = tokens / seconds
    _compare_prefill(asker, row, alone)
    if stock is not None:
        row.distance_from_stock = max(_distance(stock[p].logits[0], alone[p].logits[0]) for p in alone)
    step()
    return alone


def steps(plan: Plan) -> int:
    """How often :func:`measure` calls ``step``."""
    return len(batches(plan)) + 2


def _compare_prefill(asker: Asker, row: Row, alone: dict[int, Answer]) -> None:
    differing, compared = 0, 0
    for prompt, answer in alone.items():
        differing += _differing_bits(asker.prefill(prompt, answer), answer.logits)
        compared += answer.logits.numel()
    row.prefill_differing_logits = differing / compared
    row.prefill_equals_decode = differing == 0


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    def different() -> Iterator[int]:
        return (i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)

    return next(different(), None)


def _differing_bits(a: Tensor, b: Tensor) -> int:
    """How many elements of two fp32 tensors differ in any bit."""
    return int((a.contiguous().view(torch.int32) != b.contiguous().view(torch.int32)).sum())


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())
