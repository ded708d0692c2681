"""``docs/models.json`` and the page that is made from it."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from .models import KINDS, Entry

FAMILIES = {
    "decoder": "Dense decoders",
    "experts": "Mixtures of experts",
    "recurrent": "State spaces, linear attention and hybrids",
    "encoder": "Encoders",
    "encoder-decoder": "Encoders with decoders",
    "vision": "Vision",
    "audio": "Audio",
    "multimodal": "Pictures and text",
}
_INTRODUCTION = """
Tiny models with random weights of the classes of transformers, float32 on a CPU, in eval mode. Each runs inside
`bicompile.eager()`. Those with a number under *graphs* were compiled too, which takes minutes for some, by
`torch.compile(model, backend="batch_invariant")`, with the batch marked as dynamic, and what lies between graphs still
inside `eager()`.

*passes*: values are those of stock PyTorch up to rounding. Every row has the same bits alone, permuted, in part of the
batch, repeated, among rows of NaN, Inf, huge values and zeros, and at other memory alignments (P1). Where the model
returns a cache, prefilling 200 tokens at once, in chunks of 64 and 7, or all but 8 and then one by one gives the same
bits, and so does padding on the left (P2, inside `eager()`); models without a cache have the same bits with more
padding on the right. *the model lacks* names which of these a model cannot do, whoever computes it: stock PyTorch
raises there too, or its own values differ by more than a thousandth of the largest. Compiled code has the bits of
`eager()`, also permuted, in part of the batch, and among rows of NaN and huge values; where there are two graphs or
more, one is that of a row alone.

*P1 only*: of P2 something does not hold; the last column says what, by which share of the largest value, and by which
share stock PyTorch, in the same code of the model, differs there. Such is attention that a model writes out as a
softmax between two products, with padding on the left and more than the 192 keys that a product adds up at once; ALiBi
counted from the last key (MPT); state spaces and linear attention that cut the tokens of a call into chunks, and have
another formula for a step. *refused*: raises `UnsupportedOpError`, which names
an op. *not run*: transformers raises. *wrong*: other values, or bits that move.

*attention*: models that let attention be chosen are loaded with `attn_implementation="batch_invariant"`. *own*: the
model computes attention, if it has any, in code of its own, which is covered as any other code is. *breaks*: how often
Dynamo breaks the graph.
""".strip()


def counts(entries: Iterable[Entry]) -> str:
    """How many models are of each kind."""
    found = Counter(entry.kind for entry in entries)
    return f"{found.total()} models: " + ", ".join(f"{found[kind]} {kind}" for kind in KINDS)


def as_json(entries: Iterable[Entry], made: dict[str, str]) -> str:
    """What all of it was ``made`` with; then a line for each model: what a later map is held against."""
    lines = []
    for entry in entries:
        fields = {k: v for k, v in dataclasses.asdict(entry).items() if k != "model"}
        lines.append(f"  {json.dumps(entry.model)}: {json.dumps(fields)}")
    return f'{{\n "made": {json.dumps(made)},\n "models": {{\n' + ",\n".join(lines) + "\n }\n}\n"


def from_json(text: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """The entries by name, and what they were made with."""
    read = json.loads(text)
    return {name: Entry(model=name, **fields) for name, fields in read["models"].items()}, read["made"]


def made_now() -> dict[str, str]:
    """What the entries depend on besides our code."""
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


def as_markdown(entries: list[Entry], made: dict[str, str]) -> str:
    """The page: counts, and a table for each family."""
    minutes = sum(entry.seconds for entry in entries) / 60
    first, last = min(entry.date for entry in entries), max(entry.date for entry in entries)
    when = f"on {first}" if first == last else f"from {first} to {last}"
    lines = [
        "# Which models are covered",
        "",
        f"Written by `bicompile map models --write docs` {when} with torch {made['torch']} and transformers "
        f"{made['transformers']} on a CPU, in {minutes:.0f} minutes. Do not edit.",
        "",
        _INTRODUCTION,
        "",
        counts(entries),
    ]
    for family, title in FAMILIES.items():
        lines += ["", f"## {title}", ""]
        lines += ["| model | | attention | of P2 checked | graphs | breaks | |", "|---|---|---|---|---|---|---|"]
        lines += [_row(entry) for entry in entries if entry.family == family]
    return "\n".join(lines) + "\n"


def _row(entry: Entry) -> str:
    compiled = [str(entry.graphs), str(entry.breaks)] if entry.graphs else ["", ""]
    lacking = [f"the model lacks {what}" for what in entry.lacking]
    detail = "; ".join([*entry.detail, *lacking]).replace("|", "/")
    cells = [entry.model, entry.kind, entry.attention, ", ".join(entry.sequence), *compiled, detail]
    return f"| {' | '.join(cells)} |"


def write(directory: Path, entries: list[Entry], made: dict[str, str]) -> None:
    """Write ``models.json`` and ``models.md``."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "models.json").write_text(as_json(entries, made))
    (directory / "models.md").write_text(as_markdown(entries, made))


def read(directory: Path) -> dict[str, Entry]:
    """The entries of an earlier map in ``directory`` that was made with what is installed now; none if there is none.

    Raises:
        ValueError: it was made with other versions.
    """
    file = directory / "models.json"
    if not file.exists():
        return {}
    entries, made = from_json(file.read_text())
    if made != made_now():
        raise ValueError(f"{file} was made with {made}, installed are {made_now()}: make the whole map, without --only")
    return entries
