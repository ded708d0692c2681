"""Ask one question a thousand times, sampled, in batches of random size and company.  How many answers come back?

    python examples/04_thousand_completions.py                                  # SmolLM2 if installed, on the CPU
    python examples/04_thousand_completions.py --device cuda --dtype bfloat16 --write

Every request for the question has the same seed, so there is one right answer.  Its neighbours have questions and
seeds of their own.  Prints, for stock transformers and ``batch_invariant``, the number of different answers.
"""

import argparse
import random
import time
from collections import Counter

import torch
from transformers import LogitsProcessorList, PreTrainedModel

import bicompile
from bicompile.bench import Report, Row
from bicompile.demo.models import Subject, subject
from bicompile.demo.trials import NEIGHBOURS, PROMPTS
from bicompile.sampling import SeededSampler

QUESTION, SEED = PROMPTS[0], 1234


def batches(requests: int, largest: int) -> list[list[str]]:
    """Batches of 1 to ``largest`` texts, in which the question stands ``requests`` times at random places."""
    rng, drawn = random.Random(0), []
    while requests:
        asked = rng.randint(1, min(largest, requests))
        others = rng.randint(0, largest - asked)
        batch = [QUESTION] * asked + rng.choices(NEIGHBOURS, k=others)
        rng.shuffle(batch)
        drawn.append(batch)
        requests -= asked
    return drawn


@torch.inference_mode()
def ask(model: PreTrainedModel, subject: Subject, texts: list[str], tokens: int, step: int) -> list[tuple[int, ...]]:
    """The sampled answers to the question among ``texts``."""
    rows = [subject.encode(text) for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([[subject.pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    # The same seed for every request of the question, another one for every neighbour.
    seeds = [SEED if text == QUESTION else 1000 * step + i for i, text in enumerate(texts)]
    sampler = SeededSampler(seeds, temperature=0.8, top_p=0.95)
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=tokens,
        pad_token_id=subject.pad,
        logits_processor=LogitsProcessorList([sampler]),
    )
    said = out[:, width:].tolist()
    return [tuple(answer) for answer, text in zip(said, texts, strict=True) if text == QUESTION]


def answers(model: PreTrainedModel, subject: Subject, drawn: list[list[str]], tokens: int) -> tuple[Counter, float]:
    """How often each answer came, and the seconds it took."""
    start = time.perf_counter()
    counts = Counter(a for step, texts in enumerate(drawn) for a in ask(model, subject, texts, tokens, step))
    return counts, time.perf_counter() - start


def main() -> None:
    """Ask both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000, help="how often the question is asked")
    parser.add_argument("--largest", type=int, default=8, help="rows in the largest batch")
    parser.add_argument("--tokens", type=int, default=24, help="length of an answer")
    parser.add_argument("--model", choices=("auto", "smollm2", "random"), default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", action="store_true", help="keep the result in examples/benchmarks/results")
    args = parser.parse_args()
    chosen = subject(args.model, print)
    model = chosen.load(getattr(torch, args.dtype)).to(args.device)
    drawn = batches(args.requests, args.largest)

    stock, stock_seconds = answers(model, chosen, drawn, args.tokens)
    print(f"{'stock':>16}: {len(stock)} different answers to {args.requests} requests in {stock_seconds:.0f} s")
    model.set_attn_implementation("batch_invariant")
    with bicompile.eager():
        ours, seconds = answers(model, chosen, drawn, args.tokens)
    print(f"{'batch_invariant':>16}: {len(ours)} different answers to {args.requests} requests in {seconds:.0f} s")
    print(f"{chosen.decode(list(ours.most_common(1)[0][0]))!r}")

    if args.write:
        case = f"{chosen.name}, {args.dtype}, {args.requests} sampled requests of {args.tokens} tokens"
        extra = {"ours_unique": len(ours), "stock_unique": len(stock), "batches": len(drawn)}
        extra |= {"ours_s": seconds, "stock_s": stock_seconds, "stock_most_common": stock.most_common(1)[0][1]}
        report = Report("completions", args.device)
        report.rows.append(Row(case, "stock transformers", stock_seconds / seconds, len(ours) == 1, extra))
        report.summarise("share of requests with the one answer", ours.most_common(1)[0][1] / args.requests, bar=1.0)
        print(report.write())


if __name__ == "__main__":
    main()
