"""``SeededSampler``: what it draws follows the row's seed, the position and the scores, and nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import bicompile
from bicompile.sampling import SeededSampler, gumbel, philox
from bicompile.testing import same_bits

SEEDS = st.integers(0, 2**64 - 1)


def _chosen(seeds: list[int], scores: Tensor, position: int = 0, **settings: float) -> list[int]:
    sampler = SeededSampler(seeds, prompt_length=5, **settings)  # type: ignore[arg-type]
    left = sampler(torch.zeros(len(seeds), 5 + position, dtype=torch.long), scores)
    assert (left > float("-inf")).sum(-1).tolist() == [1] * len(seeds)
    return left.argmax(-1).tolist()


def _int64(seed: int) -> int:
    return seed - 2**64 if seed >= 2**63 else seed


def _block(seed: int, position: int, block: int) -> list[int]:
    """Philox4x32-10 in Python's integers."""
    word = 0xFFFFFFFF
    key = [seed & word, seed >> 32]
    counter = [block, 0, position & word, position >> 32]
    for _ in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (second >> 32) ^ counter[1] ^ key[0],
            second & word,
            (first >> 32) ^ counter[3] ^ key[1],
            first & word,
        ]
        key = [(key[0] + 0x9E3779B9) & word, (key[1] + 0xBB67AE85) & word]
    return counter


def test_philox_gives_the_published_numbers():
    """The known answer for counter 0 and key 0 of Random123's test vectors."""
    assert philox(torch.tensor([0]), torch.tensor([0]), 1)[0].tolist() == [
        0x6627E8D5,
        0xE169C58D,
        0xBC57AC4C,
        0x9B00DBD8,
    ]


@given(rows=st.lists(st.tuples(SEEDS, st.integers(0, 2**33)), min_size=1, max_size=4), blocks=st.integers(1, 5))
def test_philox_is_exact_for_every_key_and_counter(rows: list[tuple[int, int]], blocks: int):
    seeds, positions = [_int64(seed) for seed, _ in rows], [position for _, position in rows]
    words = philox(torch.tensor(seeds), torch.tensor(positions), blocks)
    assert words.tolist() == [sum((_block(*row, b) for b in range(blocks)), []) for row in rows]


@given(
    seeds=st.lists(SEEDS, min_size=2, max_size=6),
    vocabulary=st.integers(2, 70),
    position=st.integers(0, 1000),
    settings=st.sampled_from([{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8, "temperature": 1.3}]),
    data=st.data(),
)
def test_row_draws_the_same_token_in_any_batch(seeds, vocabulary, position, settings, data):
    scores = torch.randn(len(seeds), vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    whole = _chosen(seeds, scores, position, **settings)
    row = data.draw(st.integers(0, len(seeds) - 1), label="row")
    order = data.draw(st.permutations(range(len(seeds))), label="order")
    assert _chosen(seeds[row : row + 1], scores[row : row + 1], position, **settings) == [whole[row]]
    moved = _chosen([seeds[i] for i in order], scores[list(order)], position, **settings)
    assert moved == [whole[i] for i in order]


def test_noise_is_the_same_inside_and_outside_of_eager():
    seeds, positions = torch.tensor([1, 2, 3]), torch.tensor([3, 0, 2])
    sampler = [SeededSampler([1, 2, 3], top_p=0.9) for _ in range(2)]
    ids, scores = torch.zeros(3, 5), torch.randn(3, 301)
    plain = sampler[0](ids, scores)
    with bicompile.eager():
        assert same_bits(sampler[1](ids, scores), plain)
        inside = gumbel(seeds, positions, 301)
        assert same_bits(gumbel(seeds[1:2], positions[1:2], 301)[0], inside[1])
        assert same_bits(gumbel(seeds, positions, 77), inside[:, :77])  # a token's noise does not follow the vocabulary


def _frequencies(scores: list[float], draws: int = 40_000, **settings: float) -> Tensor:
    row = torch.tensor(scores).log_softmax(-1)
    drawn = torch.tensor(_chosen(list(range(draws)), row.expand(draws, -1), **settings))
    return torch.bincount(drawn, minlength=len(scores)) / draws


def test_tokens_come_as_often_as_the_softmax_says():
    scores = [0.0, 1.0, 2.0, -1.0, 3.0, -4.0]
    bound = 5 * (0.25 / 40_000) ** 0.5  # five standard deviations of the least certain frequency
    assert (_frequencies(scores) - torch.tensor(scores).softmax(-1)).abs().max() < bound
    colder = torch.tensor(scores).div(0.5).softmax(-1)
    assert (_frequencies(scores, temperature=0.5) - colder).abs().max() < bound
    of_three = torch.tensor([float("-inf"), 1.0, 2.0, float("-inf"), 3.0, float("-inf")]).softmax(-1)
    assert (_frequencies(scores, top_k=3) - of_three).abs().max() < bound
    # 0.63 of the mass on the first, 0.87 on the first two: 0.8 needs the second.
    of_two = torch.tensor([float("-inf"), float("-inf"), 2.0, float("-inf"), 3.0, float("-inf")]).softmax(-1)
    assert (_frequencies(scores, top_p=0.8) - of_two).abs().max() < bound


def test_positions_and_seeds_draw_independently():
    draws = 4000
    scores = torch.zeros(draws, 2)
    first, second = _chosen(list(range(draws)), scores, 0), _chosen(list(range(draws)), scores, 1)
    agree = sum(a == b for a, b in zip(first, second, strict=True)) / draws
    assert abs(agree - 0.5) < 5 * (0.25 / draws) ** 0.5
    assert abs(sum(first) / draws - 0.5) < 5 * (0.25 / draws) ** 0.5


def test_temperature_zero_takes_the_likeliest():
    scores = torch.randn(7, 50)
    assert _chosen(list(range(7)), scores, temperature=0.0) == scores.argmax(-1).tolist()


def test_hidden_tokens_are_never_drawn():
    scores = torch.full((200, 9), float("-inf"))
    scores[:, 4] = -1e4
    assert _chosen(list(range(200)), scores) == [4] * 200


@pytest.mark.parametrize(
    "settings", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}], ids=lambda s: next(iter(s))
)
def test_values_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        SeededSampler([1], **settings)


def test_seeds_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2\\*\\*64"):
        SeededSampler([-1])
    sampler = SeededSampler([1, 2])
    with pytest.raises(ValueError, match="2 rows.*got 3.*repeat it n times"):
        sampler(torch.zeros(3, 4), torch.zeros(3, 8))
    sampler(torch.zeros(2, 4), torch.zeros(2, 8))
    with pytest.raises(ValueError, match="new sampler"):
        sampler(torch.zeros(2, 3), torch.zeros(2, 8))


def test_stock_sampling_follows_the_place_in_the_batch():
    """The control: one generator for the whole batch."""
    scores = torch.zeros(8, 1000).softmax(-1)

    def drawn(rows: int) -> list[int]:
        torch.manual_seed(0)
        return torch.multinomial(scores[-rows:], 1)[:, 0].tolist()

    assert drawn(8)[-1] != drawn(1)[-1]
