"""``generate`` says the same in any company, with any cache, in chunks, with an assistant, compiled or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from torch import Tensor
from torch._functorch.aot_autograd import make_boxed_func
from torch.fx import GraphModule
from transformers_zoo import CAUSAL, Causal, t5, tokens

import bicompile
from bicompile.backend import compile_graph
from bicompile.config import parse_options
from bicompile.passes.certify import Certification
from bicompile.sampling import SeededSampler
from bicompile.testing import same_bits
from bicompile.transformers import cover, seed_requests

NEW = 13  # with the prompts, more than the window of the sliding layers
PROMPTS = [tokens(1, n, seed=n)[0] for n in (12, 5, 30)]
MIXED = (2, 0, 1)  # the prompts in another order, for company

some_models = pytest.mark.parametrize(
    "model", [CAUSAL[n] for n in ("llama", "gemma3", "gpt-oss")], ids=lambda m: m.name
)


def _batch(rows: Sequence[int], padding: int = 0) -> dict[str, Tensor]:
    """The prompts ``rows``, left-padded to the longest and ``padding`` more."""
    width = max(len(PROMPTS[row]) for row in rows) + padding
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(PROMPTS[row]) :] = PROMPTS[row]
        mask[i, width - len(PROMPTS[row]) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _answers(module: Any, rows: Sequence[int], padding: int = 0, **settings: Any) -> tuple[Tensor, Tensor]:
    """New tokens ``[rows, NEW]`` and the logits they were chosen from ``[rows, NEW, vocabulary]``."""
    batch = _batch(rows, padding)
    fixed = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        out = module.generate(**batch, **{**fixed, **settings})
    said = out.sequences[:, batch["input_ids"].shape[1] :]
    return said, torch.stack(out.logits, dim=1) if out.logits is not None else torch.empty(0)


def _alone(module: Any, **settings: Any) -> list[tuple[Tensor, Tensor]]:
    return [_answers(module, [row], **settings) for row in range(len(PROMPTS))]


def _assert_as_alone(answers: tuple[Tensor, Tensor], alone: list[tuple[Tensor, Tensor]], rows: Sequence[int]) -> None:
    said, logits = answers
    for i, row in enumerate(rows):
        assert said[i].tolist() == alone[row][0][0].tolist(), f"{row=}"
        assert same_bits(logits[i], alone[row][1][0]), f"{row=}"


@some_models
def test_any_cache_and_company_give_the_logits_of_the_prompt_alone(model: Causal):
    module = model.build()
    ways: list[dict[str, Any]] = [
        {},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 4},
        {"prefill_chunk_size": 7, "cache_implementation": "static", "disable_compile": True},
        {"use_cache": False},
    ]
    with bicompile.eager():
        alone = _alone(module)
        assert len(set(alone[0][0][0].tolist())) > 3  # a model that repeats one token shows nothing
        for settings in ways:
            _assert_as_alone(_answers(module, MIXED, padding=3, **settings), alone, MIXED)


def test_other_cache_sizes_do_not_matter():
    """Trap 6: splits follow the number of keys in no way; a static cache of 64 is one of 300."""
    module = CAUSAL["llama"].build()
    with bicompile.eager():
        alone = _alone(module)
        for size in (64, 200, 300):
            cache = transformers.StaticCache(config=module.config, max_cache_len=size)
            answers = _answers(module, MIXED, past_key_values=cache, disable_compile=True)
            _assert_as_alone(answers, alone, MIXED)


@some_models
def test_an_assistant_changes_nothing(model: Causal):
    """M = 1 is M = k + 1: a token that was verified among k others has the logits of one that was decoded."""
    module, assistant = model.build(), model.build(seed=5)
    with bicompile.eager():
        alone = _alone(module)
        for settings in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
            for row in (0, 1):
                _assert_as_alone(_answers(module, [row], **settings), alone, [row] * 1)


def test_beam_search_finds_the_same_in_any_company():
    module = CAUSAL["llama"].build()
    settings = {"num_beams": 3, "output_logits": False}
    with bicompile.eager():
        alone = [_answers(module, [row], **settings)[0] for row in range(len(PROMPTS))]
        together, _ = _answers(module, MIXED, padding=2, **settings)
    assert [said.tolist() for said in together] == [alone[row][0].tolist() for row in MIXED]


def test_t5_says_the_same_beside_longer_questions():
    module, longest = t5(), max(map(len, PROMPTS))

    def answers(rows: Sequence[int], padding: int = 0, **settings: Any) -> Tensor:
        ids = torch.zeros(len(rows), longest + padding, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(PROMPTS[row])] = PROMPTS[row]
        ids = ids[:, : max(len(PROMPTS[row]) for row in rows) + padding]
        fixed = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
        out = module.generate(
            ids, attention_mask=(ids != 0).long(), return_dict_in_generate=True, output_logits=True, **fixed, **settings
        )
        return torch.stack(out.logits, dim=1)

    with torch.no_grad(), bicompile.eager():
        alone = [answers([row])[0] for row in range(len(PROMPTS))]
        for settings in ({}, {"cache_implementation": "static", "disable_compile": True}):
            together = answers(MIXED, padding=3, **settings)
            for i, row in enumerate(MIXED):
                assert same_bits(together[i], alone[row]), f"{row=} {settings=}"


def test_sampled_text_does_not_depend_on_company_padding_or_assistant():
    module, assistant = CAUSAL["llama"].build(), CAUSAL["llama"].build(seed=5)

    def sampled(rows: Sequence[int], padding: int = 0, **settings: Any) -> list[list[int]]:
        sampler = SeededSampler([100 + row for row in rows], temperature=0.8, top_p=0.9)
        processors = transformers.LogitsProcessorList([sampler])
        return _answers(module, rows, padding, logits_processor=processors, **settings)[0].tolist()

    with bicompile.eager():
        alone = [sampled([row])[0] for row in range(len(PROMPTS))]
        assert sampled(MIXED, padding=3) == [alone[row] for row in MIXED]
        assert sampled([1], assistant_model=assistant, max_new_tokens=8) == [alone[1][:8]]
        greedy = [said[0].tolist() for said, _ in _alone(module)]
    assert alone != greedy


def test_several_answers_to_a_prompt_are_those_of_their_seeds_alone():
    module, batch = CAUSAL["llama"].build(), _batch([1])

    def sampled(seeds: Sequence[int]) -> list[list[int]]:
        processors = transformers.LogitsProcessorList([SeededSampler(seeds, temperature=0.8)])
        repeated = {name: t.repeat_interleave(len(seeds), 0) for name, t in batch.items()}
        return module.generate(**repeated, max_new_tokens=8, do_sample=False, logits_processor=processors).tolist()

    with torch.no_grad(), bicompile.eager():
        answers = sampled([1, 2, 3])
        assert answers == [sampled([seed])[0] for seed in (1, 2, 3)]
    assert len(set(map(tuple, answers))) == 3


def test_sampling_by_generate_itself_is_refused_with_a_way_out():
    module = CAUSAL["llama"].build()
    with bicompile.eager(), pytest.raises(bicompile.UnsupportedOpError, match="SeededSampler"):
        module.generate(**_batch([1]), max_new_tokens=2, do_sample=True)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt-oss"])
def test_continuous_batching_says_what_generate_says(name: str):
    """Its paged cache, chunked prefills and steps that mix requests; Mistral and gpt-oss have sliding layers."""
    module = CAUSAL[name].build()
    with bicompile.eager():
        alone = _alone(module)
    cover(module)  # its loop runs in a thread of its own, so the context goes around the model, not around the call
    greedy = transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    for tokens_of_a_step in (256, 16):
        settings = transformers.ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=tokens_of_a_step)
        answers = module.generate_batch(
            inputs=[prompt.tolist() for prompt in PROMPTS],
            generation_config=greedy,
            continuous_batching_config=settings,
            progress_bar=False,
        )
        said = [answer.generated_tokens for answer in answers.values()]
        assert said == [tokens[0].tolist() for tokens, _ in alone], f"{tokens_of_a_step=}"


def test_continuous_batching_samples_by_the_seed_of_each_request():
    """What ``generate`` samples with that seed, in steps that mix requests, and with seeds beyond 32 bits."""
    module = CAUSAL["llama"].build()
    seeds, how = [3, 2**63 + 5, 77], {"temperature": 0.8, "top_p": 0.9}
    with bicompile.eager():
        alone = []
        for row, seed in enumerate(seeds):
            processors = transformers.LogitsProcessorList([SeededSampler([seed], **how)])
            alone.append(_answers(module, [row], logits_processor=processors)[0][0].tolist())
    greedy = transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    settings = transformers.ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=16)
    manager = cover(module).init_continuous_batching(greedy, settings)
    seed_requests(manager, **how)
    manager.start()
    try:
        wanted = [manager.add_request(PROMPTS[row].tolist(), seed=seeds[row]) for row in MIXED]
        said = [manager.get_result(request, timeout=120).generated_tokens for request in wanted]
    finally:
        manager.stop(block=True)
    assert said == [alone[row] for row in MIXED]


def test_manager_that_samples_by_itself_is_refused():
    sampled = transformers.GenerationConfig(do_sample=True, eos_token_id=-1)
    manager = CAUSAL["llama"].build().init_continuous_batching(sampled)
    with pytest.raises(ValueError, match="do_sample=False"):
        seed_requests(manager)


def test_paged_attention_outside_of_generate_batch_says_what_to_do():
    module = CAUSAL["llama"].build(attention="paged|batch_invariant")
    with torch.no_grad(), pytest.raises(ValueError, match="generate_batch"):
        module(tokens(1, 4))


# Compiled.


GRAPHS: dict[str, tuple[list[tuple[tuple[int, ...], int]], list[int]]] = {
    # Batches (which prompts, new tokens), and the graphs that there are after each.
    "llama": ([(MIXED, 4), ((0, 1, 2, 2, 1), 6), ((2,), 4), ((0,), 4)], [2, 2, 4, 4]),
    # Its window fills in the first batch, and is shorter than the prompts of the second.
    "mistral": ([((0, 0, 0), 9), (MIXED, 4)], [5, 6]),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_of_a_growing_cache_are_few(name: str):
    """A prefill's keys come out as a step's do, so all steps share a graph.  Dynamo compiles for sizes of 1 apart.

    The graphs are made and not compiled.
    """

    def traced(gm: GraphModule, inputs: Sequence[Any]) -> Any:
        options = parse_options(None, None)
        return compile_graph(gm, inputs, options, Certification(), lambda gm, _, **__: make_boxed_func(gm.forward))

    module, compiles = CAUSAL[name].build(), torch._dynamo.utils.counters["stats"]
    module.forward = torch.compile(module.forward, backend=traced, dynamic=True)
    (batches, expected), before, graphs = GRAPHS[name], compiles["unique_graphs"], []
    for rows, new_tokens in batches:
        _answers(module, rows, max_new_tokens=new_tokens)
        graphs.append(compiles["unique_graphs"] - before)
    assert graphs == expected


def test_one_graph_serves_the_decode_steps_of_every_batch_with_a_static_cache():
    """With ``compile_config``, generate compiles the decode steps only: ``cover`` sees to the prefill."""
    module, compiles = cover(CAUSAL["llama"].build()), torch._dynamo.utils.counters["stats"]
    settings = transformers.CompileConfig(backend="batch_invariant", dynamic=True)
    settings._compile_all_devices = True  # by default it skips the CPU
    alone = _alone(module, max_new_tokens=4)
    before, graphs = compiles["unique_graphs"], []
    for rows, padding in ((MIXED, 0), ((0, 1, 2, 2, 1), 3), ((2,), 0), ((1, 0), 40)):
        how = {"cache_implementation": "static", "compile_config": settings, "max_new_tokens": 4}
        _assert_as_alone(_answers(module, rows, padding, **how), alone, rows)
        graphs.append(compiles["unique_graphs"] - before)
    assert graphs == [1, 1, 2, 2]


def test_covering_twice_changes_nothing_and_gradients_flow():
    module = CAUSAL["llama"].build()
    forward = cover(module).forward
    assert cover(module).forward is forward
    embedded = module.get_input_embeddings()(tokens(2, 5)).requires_grad_()
    module(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad is not None


def test_a_compiled_model_says_what_an_eager_one_says():
    """One compiled forward for prefill and decode, with a cache that grows, and slides from the second step on."""
    module = CAUSAL["mistral"].build()
    with bicompile.eager():
        alone = _alone(module, max_new_tokens=6)
    module.forward = torch.compile(module.forward, backend="batch_invariant", dynamic=True)
    _assert_as_alone(_answers(module, MIXED, padding=3, max_new_tokens=6), alone, MIXED)
