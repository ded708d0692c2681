"""The suites, by name and device; a module is imported when its suite is asked for."""

from __future__ import annotations

import importlib

from ..suite import Settings, Suite

MODULES = {
    "matmul": {"cpu": "matmul_cpu", "cuda": "matmul_gpu"},
    "attention": {"cpu": "attention_cpu", "cuda": "attention_gpu"},
    "reduction": {"cpu": "reduction_cpu", "cuda": "reduction_gpu"},
    "scatter": {"cpu": "scatter", "cuda": "scatter"},
    "convolution": {"cpu": "convolution", "cuda": "convolution"},
    "size": {"cpu": "size", "cuda": "size"},
    "model": {"cpu": "model_cpu", "cuda": "model_gpu"},
    "compile": {"cpu": "compile_cpu", "cuda": "compile_gpu"},
    "training": {"cpu": "training", "cuda": "training"},
}
"""Each module has one class ``Measured``, a :class:`Suite`."""


def suite(name: str, settings: Settings) -> Suite:
    """The suite of that name for the device of ``settings``."""
    module = importlib.import_module(f".{MODULES[name][settings.device]}", __name__)
    found: Suite = module.Measured(settings)
    return found
