"""``bicompile explain``: the certificate of a function or module that is named on the command line."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .certificate import Certificate
from .explaining import explain

_DESCRIPTION = """
Say what batch_invariant does with a function or module: which of its ops it lowers, in which order they add, which are
exact or elementwise, what combines rows of the batch, and what is refused and why. Nothing is compiled. The exit code
is 0 if nothing was refused and no graph break left code uncovered, 1 if something was, 2 if it could not be tried.
"""
_EPILOG = """
TARGET is MODULE:CALLABLE. MODULE is a file (models/mine.py) or a name to import (package.mine); CALLABLE may have
dots. What it names is
  a module (nn.Module)           explained as it is;
  what takes no parameters       a factory: called, and its result explained; so is a class of modules;
  any other function             explained as it is.

SPEC is [NAME=]SIZExSIZE...[:DTYPE[:HIGH]], random and the same for the same --seed:
  4x16                    float32 [4, 16], from a normal distribution
  4x16:bfloat16           the same in bfloat16
  4x7:int64:100           integers from 0 to 99 (to 9 without HIGH)
  4x7:bool                true or false
  input_ids=4x7:int64     given by name, others by place
Dim 0 is the batch, of at least 1 row.

examples:
  bicompile explain examples/02_explain.py:block --input 5x7x32
  bicompile explain torch.nn.functional:softmax --input 4x16 --input dim=1
  bicompile explain mine.py:Net --input 4x3x32x32 --inference --html net.html
"""
_HIGH = 10


class ExplainError(Exception):
    """What was asked cannot be tried; the message says what was expected, what came, and what to do."""


@dataclass(frozen=True)
class InputSpec:
    """One ``--input``: a random tensor, or a plain number, and the name it is passed by."""

    name: str | None
    sizes: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    high: int = _HIGH
    number: float | int | None = None

    def value(self, generator: torch.Generator, dtype: torch.dtype, device: str) -> Any:
        """The tensor, in ``dtype`` unless the spec names its own, or the number."""
        if self.number is not None:
            return self.number
        own = self.dtype or dtype
        if own.is_floating_point or own.is_complex:
            drawn = torch.randn(self.sizes, generator=generator, dtype=torch.complex64 if own.is_complex else None)
        else:
            drawn = torch.randint(2 if own is torch.bool else self.high, self.sizes, generator=generator)
        return drawn.to(device=device, dtype=own)


def add_command(commands: Any) -> None:
    """Add ``explain`` to an ``argparse`` collection of sub-commands."""
    parser = commands.add_parser(
        "explain",
        help="what becomes of a function or module, and what is refused",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="TARGET", help="MODULE:CALLABLE, see below")
    parser.add_argument("--input", action="append", default=[], metavar="SPEC", help="a random input, see below")
    parser.add_argument(
        "--inputs", metavar="MODULE:CALLABLE", help="a function that returns the inputs: a tuple, a dict, or one tensor"
    )
    parser.add_argument("--inference", action="store_true", help="in eval mode and without gradients")
    parser.add_argument("--dtype", help="of weights, else as they are, and of inputs that name none, else float32")
    parser.add_argument("--device", default="cpu", help="where weights and inputs are put (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs and weights (default: %(default)s)")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to FILE, or print it")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a report to look at to FILE")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Explain, print, write; the exit code."""
    try:
        certificate = certificate_of(args)
    except ExplainError as error:
        print(f"bicompile explain: {error}", file=sys.stderr)
        return 2
    if args.json == "-":
        print(certificate.to_json())
    else:
        print(certificate)
        if args.json:
            Path(args.json).write_text(certificate.to_json() + "\n", encoding="utf-8")
    if args.html:
        args.html.write_text(certificate.to_html(), encoding="utf-8")
    return 0 if certificate.ok else 1


def certificate_of(args: argparse.Namespace) -> Certificate:
    """The certificate that the command line asks for.

    Raises:
        ExplainError: something named there cannot be found, made or called.
    """
    specs = [parse_input(text) for text in args.input]
    dtype = dtype_of(args.dtype, "--dtype") if args.dtype else None
    torch.manual_seed(args.seed)
    target = load(args.target, "TARGET")
    with _saying(f"{args.target} cannot be made"):
        fn = target() if is_factory(target) else target
    if not callable(fn):
        raise ExplainError(
            f"TARGET: expected a function, a module or a factory of one, got {type(fn).__name__} from {args.target}"
        )
    generator = torch.Generator().manual_seed(args.seed)
    positional, keyword = _given_inputs(args.inputs) if args.inputs else ([], {})
    with _saying("the inputs cannot be made"):
        for spec in specs:
            made = spec.value(generator, dtype or torch.float32, args.device)
            if spec.name:
                keyword[spec.name] = made
            else:
                positional.append(made)
        positional, keyword = torch.utils._pytree.tree_map_only(
            Tensor, lambda t: t.to(args.device), (positional, keyword)
        )
        if isinstance(fn, nn.Module):
            fn = fn.to(args.device, dtype)
    if not any(isinstance(leaf, Tensor) for leaf in torch.utils._pytree.tree_leaves((positional, keyword))):
        raise ExplainError(
            f"expected an input that holds the batch, got none; give one for each of {_parameters(fn)}, for instance "
            "--input 4x16:float32"
        )
    if args.inference and isinstance(fn, nn.Module):
        fn = fn.eval()
    with torch.set_grad_enabled(not args.inference), _saying(f"{args.target} raised when it was called"):
        return explain(fn, *positional, **keyword)


def is_factory(target: Any) -> bool:
    """Whether ``target`` is called to get what is explained: it takes nothing, or is a class of modules."""
    if isinstance(target, type):
        return issubclass(target, nn.Module)
    if isinstance(target, nn.Module) or not callable(target):
        return False
    try:
        return not inspect.signature(target).parameters
    except ValueError:  # a builtin without a signature
        return False


def parse_input(text: str) -> InputSpec:
    """What an ``--input`` says.

    Raises:
        ExplainError: it is not of the form that ``--help`` gives.
    """
    name, equals, rest = text.rpartition("=")
    if equals and not name.isidentifier():
        raise ExplainError(f"--input {text}: expected the name of a parameter before '=', got {name!r}")
    if name and re.fullmatch(r"[+-]?\d+(\.\d*)?(e[+-]?\d+)?", rest):
        return InputSpec(name, number=int(rest) if re.fullmatch(r"[+-]?\d+", rest) else float(rest))
    sizes, *described = rest.split(":")
    if not re.fullmatch(r"\d+(x\d+)*", sizes) or len(described) > 2 or (described[1:] and not described[1].isdigit()):
        raise ExplainError(
            f"--input {text}: expected [NAME=]SIZExSIZE...[:DTYPE[:HIGH]] such as 4x16:float32, got {rest!r}"
        )
    dtype = dtype_of(described[0], f"--input {text}") if described else None
    return InputSpec(
        name or None, tuple(map(int, sizes.split("x"))), dtype, int(described[1]) if described[1:] else _HIGH
    )


def dtype_of(name: str, option: str) -> torch.dtype:
    """The dtype called ``name``, with or without ``torch.``."""
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ExplainError(f"{option}: expected a dtype such as float32, bfloat16, int64 or bool, got {name!r}")
    return found


def load(text: str, option: str) -> Any:
    """What ``MODULE:CALLABLE`` names.

    Raises:
        ExplainError: there is no such module, it cannot be imported, or it has no such name.
    """
    where, colon, path = text.rpartition(":")
    if not colon or not where or not path:
        raise ExplainError(f"{option}: expected MODULE:CALLABLE such as mine.py:model, got {text!r}")
    with _saying(f"{option}: {where} cannot be imported"):
        found: Any = _module(where, option)
    for part in path.split("."):
        if not hasattr(found, part):
            public = ", ".join(
                name for name in vars(found) if not name.startswith("_") and callable(getattr(found, name))
            )
            raise ExplainError(f"{option}: {where} has no {path!r}; it has {public or 'nothing to call'}")
        found = getattr(found, part)
    return found


def _module(where: str, option: str) -> ModuleType:
    if where.endswith(".py") or os.sep in where:
        path = Path(where).resolve()
        if not path.is_file():
            raise ExplainError(f"{option}: expected a Python file, and there is none at {path}")
        sys.path.insert(0, str(path.parent))  # as Python does for a script, so that it finds its neighbours
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)
        spec.loader.exec_module(module)
        return module
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is None or not (where == error.name or where.startswith(f"{error.name}.")):
            raise
        raise ExplainError(
            f"{option}: expected a file such as mine.py or a name to import, and nothing is called {error.name!r}; "
            "install it, or run the command where it lies"
        ) from None


def _given_inputs(text: str) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments from what ``--inputs`` names."""
    make = load(text, "--inputs")
    with _saying(f"--inputs: {text} raised"):
        made = make()
    if isinstance(made, Mapping):
        return [], dict(made)
    if isinstance(made, Sequence) and not isinstance(made, str):
        return list(made), {}
    if isinstance(made, Tensor):
        return [made], {}
    raise ExplainError(
        f"--inputs: expected a tuple of arguments, a dict of arguments by name, or one tensor from {text}, got "
        f"{type(made).__name__}"
    )


def _parameters(fn: Callable[..., Any]) -> str:
    try:
        return ", ".join(inspect.signature(fn.forward if isinstance(fn, nn.Module) else fn).parameters)
    except ValueError:  # a builtin without a signature
        return "its parameters"


@contextlib.contextmanager
def _saying(what: str) -> Iterator[None]:
    """Show the traceback of whatever the user's code raises, and go on as an error of this command."""
    try:
        yield
    except ExplainError:
        raise
    except Exception as error:
        traceback.print_exc()
        first = next(iter(str(error).strip().splitlines()), "no message")
        raise ExplainError(f"{what}: {type(error).__name__}: {first}") from error
