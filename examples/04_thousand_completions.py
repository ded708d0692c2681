"""Ask one question a thousand times, sampled, in batches of random size and company.  How many answers come back?

    python examples/04_thousand_completions.py                                  # SmolLM2 if installed, on the CPU
    python examples/04_thousand_completions.py --device cuda --dtype bfloat16 --write

Every request for the question has one of a few seeds, and each seed has one right answer.  The neighbours have
questions and seeds of their own.  Prints, for stock transformers and ``batch_invariant``, the number of different
answers.
"""

import argparse
import contextlib
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

QUESTION = PROMPTS[0]
Request = tuple[str, int]  # a text and the seed of its answer


def batches(requests: int, seeds: int, largest: int) -> list[list[Request]]:
    """Batches of 1 to ``largest`` requests, of which ``requests`` ask the question, each with one of ``seeds``."""
    rng, drawn, asked = random.Random(0), [], 0
    while asked < requests:
        of_question = rng.randint(1, min(largest, requests - asked))
        others = rng.randint(0, largest - of_question)
        batch = [(QUESTION, (asked + i) % seeds) for i in range(of_question)]
        batch += [(text, rng.getrandbits(64)) for text in rng.choices(NEIGHBOURS, k=others)]
        rng.shuffle(batch)
        drawn.append(batch)
        asked += of_question
    return drawn


@torch.inference_mode()
def ask(model: PreTrainedModel, subject: Subject, batch: list[Request], tokens: int) -> list[tuple[int, ...]]:
    """The sampled answers to the question, each behind its seed."""
    rows = [subject.encode(text) for text, _ in batch]
    width = max(map(len, rows))
    ids = torch.tensor([[subject.pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    sampler = SeededSampler([seed for _, seed in batch], temperature=0.8, top_p=0.95)
    settings = {"max_new_tokens": tokens, "pad_token_id": subject.pad}
    out = model.generate(ids, attention_mask=mask, logits_processor=LogitsProcessorList([sampler]), **settings)
    said = out[:, width:].tolist()
    return [(seed, *answer) for (text, seed), answer in zip(batch, said, strict=True) if text == QUESTION]


def both(
    model: PreTrainedModel, subject: Subject, drawn: list[list[Request]], tokens: int
) -> tuple[list[Counter], list[float]]:
    """How often each answer came, and the seconds it took: of stock and of ours, which take turns."""
    counts, seconds = [Counter(), Counter()], [0.0, 0.0]
    for batch in drawn:
        for who, attention in enumerate(("sdpa", "batch_invariant")):
            model.set_attn_implementation(attention)
            start = time.perf_counter()
            with bicompile.eager() if who else contextlib.nullcontext():
                counts[who].update(ask(model, subject, batch, tokens))
            seconds[who] += time.perf_counter() - start
    return counts, seconds


def main() -> None:
    """Ask both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000, help="how often the question is asked")
    parser.add_argument("--seeds", type=int, default=10, help="how many seeds they have")
    parser.add_argument("--largest", type=int, default=8, help="rows in the largest batch")
    parser.add_argument("--tokens", type=int, default=24, help="length of an answer")
    parser.add_argument("--model", choices=("auto", "smollm2", "random"), default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", action="store_true", help="keep the result in examples/benchmarks/results")
    args = parser.parse_args()
    chosen = subject(args.model, print)
    model = chosen.load(getattr(torch, args.dtype)).to(args.device)
    drawn = batches(args.requests, args.seeds, args.largest)
    asked = f"different answers to {args.requests} requests with {args.seeds} seeds"

    (stock, ours), (stock_seconds, seconds) = both(model, chosen, drawn, args.tokens)
    print(f"{'stock':>16}: {len(stock)} {asked} in {stock_seconds:.0f} s")
    print(f"{'batch_invariant':>16}: {len(ours)} {asked} in {seconds:.0f} s")

    if args.write:
        case = (
            f"{chosen.name}, {args.dtype}, {args.requests} sampled requests of {args.tokens} tokens, {args.seeds} seeds"
        )
        extra = {"ours_unique": len(ours), "stock_unique": len(stock), "seeds": args.seeds, "batches": len(drawn)}
        extra |= {"ours_s": seconds, "stock_s": stock_seconds}
        report = Report("completions", args.device)
        report.rows.append(Row(case, "stock transformers", stock_seconds / seconds, len(ours) == args.seeds, extra))
        report.summarise("seeds / different answers", args.seeds / len(ours), bar=1.0)
        print(report.write())


if __name__ == "__main__":
    main()
