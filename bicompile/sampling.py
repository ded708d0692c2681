"""Sampling in which a request's text depends on its seed, and on no other request.

``torch.multinomial`` draws from one generator for the whole batch, so a row's tokens follow its place in the batch and
everything drawn before.  Here each row has a seed of its own, and the random number for a token follows from the
row's seed, the token's position in the completion and its place in the vocabulary, by the counter-based generator
Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).  The token is the one with the
greatest ``score + gumbel noise``, which draws from the softmax of the scores.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .covered import covered

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


@dataclass(frozen=True)
class Drawing:
    """How a token is drawn from scores: see ``SeededSampler``.

    Raises:
        ValueError: a value is out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                "seeded sampling: expected temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got "
                f"temperature={self.temperature}, top_k={self.top_k}, top_p={self.top_p}"
            )

    def leave_one(self, scores: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        """``scores`` ``[rows, vocabulary]`` with -inf for every token but the drawn one of each row, which gets 0.

        ``seeds`` and ``positions`` are ``[rows]``, int64.
        """
        with covered():
            token = self._draw(scores.float(), seeds, positions)
        return torch.full_like(scores, float("-inf")).scatter(1, token, 0.0)

    def _draw(self, scores: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        """The index of each row's token, ``[rows, 1]``."""
        if self.temperature == 0:
            return scores.argmax(-1, keepdim=True)
        scores = scores / self.temperature
        if 0 < self.top_k < scores.shape[1]:
            least = scores.topk(self.top_k, dim=-1).values[:, -1:]
            scores = scores.masked_fill(scores < least, float("-inf"))
        if self.top_p < 1:
            scores = _keep_top_p(scores, self.top_p)
        return (scores + gumbel(seeds, positions, scores.shape[1])).argmax(-1, keepdim=True)


class SeededSampler:
    """A logits processor for transformers' ``generate`` that draws each row's next token by the row's own seed.

        sampler = SeededSampler(seeds=[11, 12, 13], temperature=0.7, top_p=0.95)
        model.generate(**batch_of_3, do_sample=False, logits_processor=LogitsProcessorList([sampler]))

    It leaves one token in each row, so ``generate`` must be greedy, and other processors come before it.  Temperature,
    top-k and top-p are its own because ``generate`` ignores its own without ``do_sample``.  With ``assistant_model``
    the text is the same as without.  Make a new one for each call of ``generate``.

    Args:
        seeds: one for each row of the batch, from 0 to 2**64 - 1.  Two rows of one seed and one prompt say the same.
        temperature: divides the scores; 0 takes the most likely token.
        top_k: draw from the ``top_k`` most likely tokens; 0 for all.
        top_p: draw from the most likely tokens that together have at least this probability.
        prompt_length: tokens in each row before the first that is drawn, padding included; by default what the first
            call brings.

    Raises:
        ValueError: a value is out of its range; when called, the rows are not as many as the seeds.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        prompt_length: int | None = None,
    ) -> None:
        if not all(0 <= seed < 2**64 for seed in seeds):
            raise ValueError(f"SeededSampler: expected seeds from 0 to 2**64 - 1, got {list(seeds)}")
        self.settings = Drawing(temperature, top_k, top_p)
        self.seeds = list(seeds)
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``scores`` ``[rows, vocabulary]`` with -inf for every token but the drawn one of each row, which gets 0.

        ``input_ids``: ``[rows, length]``, of which only the length counts.
        """
        if len(scores) != len(self.seeds):
            raise ValueError(
                f"SeededSampler: expected {len(self.seeds)} rows, one for each seed, got {len(scores)}. For "
                "n answers to a prompt, repeat it n times in the batch, with n seeds; beam search cannot sample."
            )
        if self.prompt_length is None:
            self.prompt_length = input_ids.shape[1]
        position = input_ids.shape[1] - self.prompt_length
        if position < 0:
            raise ValueError(
                f"SeededSampler: expected at least the {self.prompt_length} tokens of the first call, got "
                f"{input_ids.shape[1]}; make a new sampler for each generate()"
            )
        seeds = torch.tensor(_signed(self.seeds), device=scores.device)
        return self.settings.leave_one(scores, seeds, torch.full_like(seeds, position))


def _signed(seeds: Sequence[int]) -> list[int]:
    """The same 64 bits, as torch.int64 has them."""
    return [seed - 2**64 if seed >= 2**63 else seed for seed in seeds]


def _keep_top_p(scores: Tensor, top_p: float) -> Tensor:
    """-inf for the tokens behind those that together have probability ``top_p``."""
    ordered, index = torch.sort(scores, dim=-1, descending=True, stable=True)
    before = F.pad(ordered.softmax(-1).cumsum(-1)[:, :-1], (1, 0))  # the mass of the likelier ones
    behind = before >= top_p
    return scores.masked_fill(behind.scatter(1, index, behind), float("-inf"))


def gumbel(seeds: Tensor, positions: Tensor, vocabulary: int) -> Tensor:
    """Gumbel noise ``[rows, vocabulary]`` in fp32 for one position of each row; both arguments ``[rows]``, int64.

    Numerics: the bits below are exact on every device; the logarithms are those of the device's lowering.
    """
    # Integers need no lowering, and a dispatch mode would cost more than they do.
    with contextlib.nullcontext() if torch.compiler.is_compiling() else _disable_current_modes():
        words = philox(seeds, positions, -(-vocabulary // 4))[:, :vocabulary]
    # (2 w + 1) / 2**33, in (0, 1): fp32 is finest near 0, which is where the greatest noise comes from.
    uniform = ((2 * words + 1).float() * 2.0**-33).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def philox(seeds: Tensor, positions: Tensor, blocks: int) -> Tensor:
    """Philox4x32-10 words, ``[rows, 4 * blocks]``, each a number below 2**32 in int64.

    The key is the row's seed (low word first), the counter is (block, 0, low and high word of the row's position).
    """
    block = torch.arange(blocks, device=seeds.device).expand(len(seeds), -1)
    is_first = torch.arange(2, device=seeds.device).view(2, 1, 1) == 0  # constants without a copy to the device
    factors, steps = torch.where(is_first, *_MULTIPLIERS), torch.where(is_first, *_KEY_STEPS)
    key = torch.stack([seeds & _WORD, (seeds >> 32) & _WORD]).unsqueeze(-1)  # [2, rows, 1]
    low, high = ((positions >> shift & _WORD).unsqueeze(1).expand_as(block) for shift in (0, 32))
    # Words 0 and 2 of the counter, which a round multiplies, and words 1 and 3: [2, rows, blocks].
    multiplied, other = torch.stack([block, low]), torch.stack([torch.zeros_like(block), high])
    for _ in range(_ROUNDS):
        product = multiplied * factors  # modulo 2**64, as torch.int64 multiplies
        multiplied = ((product >> 32) & _WORD).flip(0) ^ other ^ key
        other = (product & _WORD).flip(0)
        key = (key + steps) & _WORD
    return torch.stack([multiplied, other], dim=-1).permute(1, 2, 0, 3).flatten(1)
