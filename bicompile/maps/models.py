"""The model map: what becomes of the architectures of transformers, on the CPU in float32.

Each model runs inside ``bicompile.eager()`` first, which needs no compiling, and then compiled for any batch, with
what lies between graphs still inside ``eager()``.  Its values are those of stock PyTorch.  Every row has the same bits
alone, permuted, in part of the batch, among rows of huge values and NaN (P1), compiled or not (P3).  Where there is a
cache, one-shot prefill is chunked prefill is decode, and padding makes no difference (P2).
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from .. import eager_mode
from ..errors import BatchInvarianceError, UnsupportedOpError
from ..testing import assert_batch_invariant, same_bits
from .ops import Stock, distance, refused_op
from .subjects import FIRST_WORD, VOCABULARY, Inputs, Subject, takes, words

KINDS = ("passes", "P1 only", "refused", "not run", "wrong")
"""From the best to the worst."""

SITUATIONS = ("again", "alone", "permuted", "sub-batch", "duplicated", "nan", "inf", "huge", "zero", "offset")
COMPILED = ("permuted", "sub-batch", "nan", "huge")  # in one graph
ALONE = ("alone", *COMPILED)  # in two: a batch of 1 has a graph of its own
_CACHES = ("past_key_values", "cache_params", "state")
_LENGTH = 200  # more than a block of 192 keys
_PADDINGS = (1, 40)
_SEEN = 1e-3  # a difference of this share of the largest value is not one of rounding


@dataclass
class Entry:
    """What became of one model.

    Attributes:
        model: its name in the map.
        family: under which heading it is listed.
        kind: one of ``KINDS``.
        attention: the implementation that it was loaded with.
        sequence: which checks of P2 it went through.
        lacking: which it cannot go through, as stock PyTorch with the same code raises or gives other values there.
        graphs: how many graphs were compiled; 0 where it was not compiled.
        breaks: how many graph breaks there were; what lies between graphs runs inside ``eager()``.
        seconds: how long all of it took.
        date: when.
        detail: what is refused or wrong, or what of P2 does not hold.
    """

    model: str
    family: str
    kind: str = "passes"
    attention: str = ""
    sequence: list[str] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)
    graphs: int = 0
    breaks: int = 0
    seconds: float = 0.0
    date: str = ""
    detail: list[str] = field(default_factory=list)

    def note(self, kind: str, detail: str) -> None:
        """Make the entry at least as bad as ``kind``; the details are those of the worst kind met."""
        if KINDS.index(kind) > KINDS.index(self.kind):
            self.kind, self.detail = kind, []
        if kind == self.kind and detail not in self.detail:
            self.detail.append(detail)


class _Run:
    """One model, made twice: ours, and stock with the attention that transformers writes out."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.stock = subject.build("eager")
        self.model, self.attention = _with_our_attention(subject)
        self.inputs = subject.inputs(self.model.config)

    def results(self, model: Any, inputs: Inputs) -> dict[str, Tensor]:
        """The outputs that are looked at."""
        outputs, chosen = model(**inputs), self.subject.outputs
        return {k: v for k, v in outputs.items() if isinstance(v, Tensor) and (k in chosen or not chosen)}

    def seen(self, results: dict[str, Tensor]) -> list[Tensor]:
        """The results without those of padding, whose values are nobody's."""
        mask = None if self.is_pair else self.inputs.get("attention_mask")
        if mask is None:
            return list(results.values())
        return [v[mask.bool()] if v.shape[:2] == mask.shape else v for v in results.values()]

    @property
    def is_pair(self) -> bool:
        """Whether there is an encoder, and a decoder which has tokens of its own."""
        return "decoder_input_ids" in self.inputs

    @property
    def tokens(self) -> str:
        """Under which name a decoder is given its tokens."""
        return "decoder_input_ids" if self.is_pair else "input_ids"


def _with_our_attention(subject: Subject) -> tuple[Any, str]:
    try:
        return subject.build("batch_invariant"), "batch_invariant"
    except (ValueError, KeyError):  # attention, if any, is code of the model's own
        model = subject.build(None)
        return model, "sdpa" if model.config._attn_implementation == "sdpa" else "own"


def entry_of(subject: Subject, compiled: Sequence[str] = ALONE) -> Entry:
    """Try one model inside ``eager()``, and compiled in the situations of ``compiled``, if there are any."""
    entry, start = Entry(subject.name, subject.family, date=datetime.date.today().isoformat()), time.perf_counter()
    torch._dynamo.reset()
    with torch.no_grad():
        try:
            run = _Run(subject)
            expected = run.results(run.stock, run.inputs)
        except Exception as error:
            entry.note("not run", f"transformers raises {_summary(error)}")
        else:
            _check(entry, run, expected, compiled)
    torch._dynamo.reset()
    entry.seconds = round(time.perf_counter() - start, 1)
    return entry


def _check(entry: Entry, run: _Run, expected: dict[str, Tensor], compiled: Sequence[str]) -> None:
    stock = _stock(run, expected)
    entry.attention = run.attention
    with _faults_into(entry), eager_mode.eager():
        ours = run.results(run.model, run.inputs)
    if entry.kind != "passes":
        return
    with _faults_into(entry):
        stock.compare(run.seen(ours), torch.float32)
    with _faults_into(entry), eager_mode.eager():
        _check_rows(run, run.model, SITUATIONS)
    with _faults_into(entry):
        _check_sequence(entry, run)
    if compiled and entry.kind in ("passes", "P1 only"):
        with _faults_into(entry):
            _check_compiled(entry, run, ours, compiled)


def _stock(run: _Run, expected: dict[str, Tensor]) -> Stock:
    """Stock's values, and how far they are from those of float64."""
    values = run.seen(expected)
    try:
        wide = {k: v.double() if v.is_floating_point() else v for k, v in run.inputs.items()}
        exact = run.seen(run.results(run.subject.build("eager").double(), wide))
        errors = [distance(a, b) for a, b in zip(values, exact, strict=True)]
    except Exception:  # not a model of float64
        errors = [0.0] * len(values)
    return Stock(values, errors)


def _check_rows(run: _Run, model: Any, situations: Sequence[str]) -> None:
    """P1: raise unless every row keeps its bits in other company."""
    has_words = "input_ids" in run.inputs
    if has_words and "pixel_values" in run.inputs:  # a row of zeros does not say where its picture is
        situations = tuple(name for name in situations if name != "zero")
    assert_batch_invariant(lambda inputs: run.results(model, inputs), run.inputs, situations=situations)
    if not has_words:
        return
    with _poison(run.model) as tokens:
        whole = run.results(model, run.inputs)
        for row, token in itertools.product((0, len(run.inputs["input_ids"]) - 1), tokens):
            for name, got in run.results(model, _beside(run.inputs, row, token)).items():
                if len(got) == len(whole[name]) and not same_bits(got[row], whole[name][row]):
                    raise BatchInvarianceError(f"{name}, row {row}, has other bits beside rows of token {token}")


@contextlib.contextmanager
def _poison(model: Any) -> Iterator[tuple[int, int]]:
    """Let the last token of the vocabulary be NaN, and the one before it huge."""
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m.num_embeddings == VOCABULARY]
    before = [table.weight[-2:].clone() for table in tables]
    for table in tables:
        table.weight[-1], table.weight[-2] = float("nan"), 1e30
    try:
        yield VOCABULARY - 1, VOCABULARY - 2
    finally:
        for table, rows in zip(tables, before, strict=True):
            table.weight[-2:] = rows


def _beside(inputs: Inputs, row: int, token: int) -> Inputs:
    """The inputs, with ``token`` for every word of every other row."""
    changed = dict(inputs)
    for name in changed.keys() & {"input_ids", "decoder_input_ids"}:
        ids = torch.where(inputs[name] < FIRST_WORD, inputs[name], token)
        ids[row] = inputs[name][row]
        changed[name] = ids
    return changed


def _check_compiled(entry: Entry, run: _Run, ours: dict[str, Tensor], situations: Sequence[str]) -> None:
    """Raise unless compiled code gives the bits of ``eager()``, in any company."""
    counters.clear()
    compiled = torch.compile(run.model, backend="batch_invariant")

    def of_any_batch(**inputs: Tensor) -> Any:
        for t in inputs.values():
            torch._dynamo.maybe_mark_dynamic(t, 0)
        return compiled(**inputs)

    try:
        with eager_mode.eager():  # covers what lies between graphs
            for name, value in run.results(of_any_batch, run.inputs).items():
                if not same_bits(value, ours[name]):
                    raise BatchInvarianceError(f"{name} has other bits compiled than in eager()")
            _check_rows(run, of_any_batch, situations)
    finally:
        entry.graphs = counters["stats"]["unique_graphs"]
        entry.breaks = sum(counters["graph_break"].values())
    assert entry.graphs, "nothing was compiled"


def _check_sequence(entry: Entry, run: _Run) -> None:
    """P2: note what of prefill, chunks, decode and padding does not hold."""
    checks: dict[str, Callable[[Any], tuple[Tensor, Tensor]]] = {}
    has_cache = bool(_caches(run.stock(**run.inputs)))
    if has_cache:
        whole = _longer(run, 0, _LENGTH)
        checks["chunks"] = lambda model: (_in_pieces(run, model, whole, 64, 7), model(**whole).logits)
        checks["decode"] = lambda model: (_in_pieces(run, model, whole, _LENGTH - 8, 1), model(**whole).logits)
    if "attention_mask" in run.inputs and has_cache and not run.is_pair:
        padded = [_longer(run, padding, _LENGTH) for padding in _PADDINGS]
        checks["left padding"] = lambda model: (
            torch.cat([model(**batch).logits[:, -_LENGTH:] for batch in padded]),
            torch.cat([model(**whole).logits] * len(padded)),
        )
    elif "attention_mask" in run.inputs:
        checks["right padding"] = lambda model: _with_and_without_padding(run, model)
    for name, check in checks.items():
        try:
            with eager_mode.eager():
                ours = check(run.model)
        except UnsupportedOpError:
            raise
        except Exception:
            if not (reason := _lacks(check, run.stock)):
                raise
        else:
            reason = "" if same_bits(*ours) else _lacks(check, run.stock)
        if reason:
            entry.lacking.append(f"{name}: {reason}")
            continue
        entry.sequence.append(name)
        if not same_bits(*ours):
            shares = f"{_share(*ours):.0e} (stock PyTorch: by {_share(*check(run.stock)):.0e})"
            entry.note("P1 only", f"{name} differs by {shares}")


def _lacks(check: Callable[[Any], tuple[Tensor, Tensor]], stock: Any) -> str:
    """Why the model cannot go through ``check``, whoever computes it; empty if it can."""
    try:
        a, b = check(stock)
    except Exception as error:
        return f"transformers raises {_summary(error)}"
    if a.shape != b.shape:
        return "other shapes"
    return f"differs by {_share(a, b):.0e}" if _share(a, b) > _SEEN else ""


def _share(a: Tensor, b: Tensor) -> float:
    """By how much the values differ, as a share of the largest."""
    return float((a - b).abs().max() / b.abs().max())


def _longer(run: _Run, padding: int, length: int) -> Inputs:
    """The inputs, answered, with ``length`` tokens in every row, for a decoder alone ``padding`` more on the left."""
    inputs = dict(run.inputs)
    ids = inputs[run.tokens]
    answer = length - ids.shape[1]
    ids = torch.cat([ids, words(len(ids), answer, seed=5)], dim=1)
    if not run.is_pair:
        mask = torch.ones_like(ids)
        ids, mask = (torch.cat([t.new_zeros(len(t), padding), t], dim=1) for t in (ids, mask))
        if "attention_mask" in inputs:
            inputs["attention_mask"] = mask
        if "token_type_ids" in inputs:
            types = F.pad(inputs["token_type_ids"], (padding, 0))
            inputs["token_type_ids"] = F.pad(types, (0, answer), value=run.subject.answer_type)
        if takes(run.model, "position_ids"):
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    inputs[run.tokens] = ids
    return inputs


def _with_and_without_padding(run: _Run, model: Any) -> tuple[Tensor, Tensor]:
    """All results of inputs with more padding on the right, which is left out again, and of the inputs as they are."""
    total = run.inputs["input_ids"].shape[1]
    plain = torch.cat([t.flatten() for t in run.seen(run.results(model, run.inputs))])
    padded = []
    for padding in _PADDINGS:
        inputs = dict(run.inputs)
        for name in ("input_ids", "attention_mask"):
            inputs[name] = torch.cat([inputs[name], inputs[name].new_zeros(len(inputs[name]), padding)], dim=1)
        results = run.results(model, inputs)
        cut = {k: v[:, :total] if v.dim() > 2 and v.shape[1] == total + padding else v for k, v in results.items()}
        padded += [t.flatten() for t in run.seen(cut)]
    return torch.cat(padded), torch.cat([plain] * len(_PADDINGS))


def _in_pieces(run: _Run, model: Any, inputs: Inputs, first: int, then: int) -> Tensor:
    """The logits of ``inputs``, whose tokens are fed in pieces, with the cache that the model returns.

    A decoder's mask is left out: it hides nothing here, and Mamba takes one of the piece, others of all tokens so far.
    """
    of_words = {run.tokens} if run.is_pair else {"input_ids", "position_ids", "token_type_ids"}
    left_out = of_words if run.is_pair else {*of_words, "attention_mask"}
    rest: dict[str, Any] = {name: value for name, value in inputs.items() if name not in left_out}
    encoded = model.get_encoder()(**rest) if run.is_pair else None
    logits, total = [], inputs[run.tokens].shape[1]
    cache: dict[str, Any] = {}
    for start, stop in itertools.pairwise([0, *range(first, total, then), total]):
        step = {name: inputs[name][:, start:stop] for name in of_words & inputs.keys()}
        outputs = model(**rest, **step, **cache, use_cache=True)
        logits.append(outputs.logits)
        cache = _caches(outputs)
        rest = {}  # a picture is seen once
        if run.is_pair:
            rest = {name: inputs[name] for name in inputs.keys() & {"attention_mask"}}
            rest["encoder_outputs"] = encoded
    return torch.cat(logits, dim=1)


def _caches(outputs: Any) -> dict[str, Any]:
    return {name: outputs[name] for name in _CACHES if outputs.get(name) is not None}


@contextlib.contextmanager
def _faults_into(entry: Entry) -> Iterator[None]:
    """Note what is raised as a refusal, or, whatever it is, as a fault of ours."""
    try:
        yield
    except UnsupportedOpError as error:
        entry.note("refused", f"{refused_op(str(error))} at {_place(error)}")
    except Exception as error:
        entry.note("wrong", _summary(error))


def _summary(error: Exception) -> str:
    return f"{type(error).__name__} at {_place(error)}: {' '.join(str(error).split())[:300]}"


def _place(error: Exception) -> str:
    """The innermost line of transformers that an error went through, or of anything."""
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((f for f in reversed(frames) if "/transformers/models/" in f.filename), frames[-1])
    return f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
