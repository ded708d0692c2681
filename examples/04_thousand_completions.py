"""Ask one question a thousand times, in batches of random size and company.  How many answers come back?

    python examples/04_thousand_completions.py                                  # SmolLM2 if installed, on the CPU
    python examples/04_thousand_completions.py --device cuda --largest 128 --write --plot completions.png

Greedily there is one right answer; sampled, each request has one of a few seeds, and each seed has one right answer.
The neighbours, who come at random, have questions and seeds of their own.  Prints how many different answers there
were, and their first token that differed: for ``batch_invariant``, for stock PyTorch, eager and compiled by Inductor,
and for Inductor's own batch-invariant setting where it has one (it is about Triton's kernels).

``--write`` keeps what was found in each mode as soon as it was found.  A run that was stopped goes on with ``--modes``
and those that the result file does not have yet: rows of the others stay, if they are of the same case and torch.
"""

import argparse
import contextlib
import functools
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch._inductor import config as inductor
from tqdm import tqdm
from transformers import LogitsProcessorList, PreTrainedModel

import bicompile
from bicompile.bench import Report, Row, plotting
from bicompile.bench.results import meta
from bicompile.demo.models import Subject, subject
from bicompile.demo.sharing import one_graph_settings, share_layers
from bicompile.demo.trials import NEIGHBOURS, PROMPTS
from bicompile.sampling import SeededSampler

OURS = "batch_invariant"
MODES = {
    "ours": OURS,
    "eager": "stock eager",
    "inductor": "stock inductor",
    "inductor-setting": "inductor's batch_invariant setting",
}
QUESTION = PROMPTS[1]
"""The one of the demo's prompts to which stock PyTorch on a CPU soon gives two answers in bfloat16."""
Request = tuple[str, int]  # a text and the seed of its answer


@dataclass
class Found:
    """What came back in one mode: the different answers by seed, in the order in which they came."""

    answers: dict[int, list[list[int]]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def unique(self) -> int:
        return sum(map(len, self.answers.values()))

    @property
    def first_divergence(self) -> int | None:
        """The first token, counted from 1, in which an answer differs from the first one of its seed."""
        others = ((first, other) for first, *rest in self.answers.values() for other in rest)
        places = [next(i for i, (a, b) in enumerate(zip(*pair, strict=True), 1) if a != b) for pair in others]
        return min(places, default=None)

    def __str__(self) -> str:
        diverged = f", the first differs at token {self.first_divergence}" if self.first_divergence else ""
        return f"{self.unique} different answers in {self.seconds:.0f} s{diverged}"


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
def ask(model: PreTrainedModel, subject: Subject, batch: list[Request], tokens: int, sampled: bool) -> list[list[int]]:
    """The completions of ``batch``."""
    rows = [subject.encode(text) for text, _ in batch]
    width = max(map(len, rows))
    ids = torch.tensor([[subject.pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    sampler = SeededSampler([seed for _, seed in batch], temperature=0.8 if sampled else 0.0, top_p=0.95)
    settings = {"max_new_tokens": tokens, "pad_token_id": subject.pad}
    out = model.generate(ids, attention_mask=mask, logits_processor=LogitsProcessorList([sampler]), **settings)
    return out[:, width:].tolist()


@contextlib.contextmanager
def running(mode: str, chosen: Subject, dtype: torch.dtype, device: str) -> Iterator[PreTrainedModel]:
    """The model as ``mode`` runs it; compiled, its layers share a graph for all batches."""
    model = chosen.load(dtype).to(device)
    if mode == "stock eager":
        yield model
        return
    torch._dynamo.reset()
    backend, attention = (OURS, "batch_invariant") if mode == OURS else ("inductor", "sdpa")
    share_layers(model, functools.partial(torch.compile, backend=backend, dynamic=True), attention)
    own = inductor.patch(batch_invariant=True) if mode.startswith("inductor's") else contextlib.nullcontext()
    with one_graph_settings(), own:
        yield model


def measure(model: PreTrainedModel, chosen: Subject, drawn: list[list[Request]], tokens: int, sampled: bool) -> Found:
    """Ask everything once."""
    found = Found()
    ask(model, chosen, drawn[0][:2] * 2, 3, sampled)  # compiles
    start = time.perf_counter()
    for batch in tqdm(drawn, unit="batch", disable=None):
        for (text, seed), answer in zip(batch, ask(model, chosen, batch, tokens, sampled), strict=True):
            known = found.answers.setdefault(seed, []) if text == QUESTION else None
            if known is not None and answer not in known:
                known.append(answer)
    found.seconds = time.perf_counter() - start
    return found


def row_of(case: str, mode: str, found: Found, right: int, device: str) -> Row:
    """What was found in a mode; :func:`beside_ours` makes it a comparison."""
    about = meta(device)
    extra = {"unique": found.unique, "right": right, "first_divergence": found.first_divergence}
    extra |= {"theirs_s": found.seconds, "date": about["date"], "commit": about["commit"]}
    return Row(case, mode, 1.0, None, extra)


def beside_ours(rows: Sequence[Row]) -> list[Row]:
    """Each row with our number of answers to the same case, and our time."""
    ours, compared = {row.case: row.extra for row in rows if row.against == OURS}, []
    for row in rows:
        our = ours[row.case]
        extra = row.extra | {"ours_unique": our["unique"], "ours_s": our["theirs_s"]}
        ratio, same = extra["theirs_s"] / extra["ours_s"], our["unique"] == our["right"]
        compared.append(Row(row.case, row.against, ratio, same, extra))
    return compared


def kept(report: Report, case: str, modes: Sequence[str]) -> list[Row]:
    """The rows of the result file that stay in it: of other modes than ``modes``, of the same case, on this torch."""
    if not report.path.exists():
        return []
    file = json.loads(report.path.read_text())
    others = [Row.from_json(row) for row in file["rows"] if row["against"] not in modes]
    same_torch = file["meta"]["versions"]["torch"] == torch.__version__
    rows = [row for row in others if same_torch and row.case.startswith(f"{case}, ")]
    if len(rows) < len(others):
        print(f"{report.path}: {len(others) - len(rows)} rows of another case or torch are not kept")
    return rows


def write(report: Report) -> None:
    """Keep what was found so far; our share of right answers is the figure that is held to 1."""
    for row in report.rows:
        if row.against == OURS:
            way = row.case.rpartition(", ")[2]
            share = row.extra["right"] / row.extra["unique"]
            report.summarise(f"{way}: right answers / different answers", share, bar=1.0)
    print(report.write())


def main() -> None:
    """Ask in every mode."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000, help="how often the question is asked")
    parser.add_argument("--seeds", type=int, default=10, help="how many seeds the sampled requests have")
    parser.add_argument("--largest", type=int, default=8, help="rows in the largest batch")
    parser.add_argument("--tokens", type=int, default=24, help="length of an answer")
    parser.add_argument("--model", choices=("auto", "smollm2", "random"), default="auto")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", action="store_true", help="keep the result in examples/benchmarks/results")
    parser.add_argument("--plot", metavar="FILE", help="draw the counts (needs matplotlib)")
    args = parser.parse_args()
    chosen, modes = subject(args.model, print), [MODES[name] for name in MODES if name in args.modes]
    case = f"{chosen.name}, {args.dtype}, {args.requests} requests of {args.tokens} tokens"
    case += f" in batches of up to {args.largest}"
    report = Report("determinism", args.device)
    report.rows = kept(report, case, modes) if args.write else []
    if OURS not in modes and not any((row.case, row.against) == (f"{case}, sampled", OURS) for row in report.rows):
        parser.error("--modes: the others stand beside ours, which the result file does not have: add ours")
    for mode in modes:
        if mode.startswith("inductor's") and not hasattr(inductor, "batch_invariant"):
            print(f"{mode}: torch {torch.__version__} has none")
            continue
        with running(mode, chosen, getattr(torch, args.dtype), args.device) as model:
            for way, right in (("greedy", 1), ("sampled", args.seeds)):
                drawn = batches(args.requests, right, args.largest)
                found = measure(model, chosen, drawn, args.tokens, sampled=way == "sampled")
                print(f"{mode}, {way} ({right} right): {found}", flush=True)
                report.rows.append(row_of(f"{case}, {way}", mode, found, right, args.device))
                report.rows = beside_ours(report.rows)
                if args.write:
                    write(report)
    if args.plot:
        plotting.counts(report.rows, Path(args.plot))


assert bicompile  # registers the backend's name where the package is not installed

if __name__ == "__main__":
    main()
