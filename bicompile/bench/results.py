"""Result files of the benchmarks: ``examples/benchmarks/results/<device>/<suite>.json``.

A file has ``meta`` (what was measured on what), ``rows`` (one for each case and baseline) and ``summary`` (name to
``{"value", "bar"}``: the headline figures and what they are asked to reach).  ``ratio`` is above 1 where we are
faster.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import bicompile
from bicompile.lowering.native import build

_INTEL = {
    79: "broadwell", 85: "skylake", 106: "ice-lake", 108: "ice-lake", 143: "sapphire-rapids", 173: "granite-rapids",
    174: "granite-rapids", 207: "emerald-rapids",
}  # fmt: skip
"""Server processors of family 6 by model; 85 are Cascade Lake and Cooper Lake too."""
_ROOT = Path(__file__).resolve().parents[2]
_KEPT = "examples/benchmarks/results"
RESULTS = _ROOT / _KEPT


@dataclass(frozen=True)
class Row:
    """One comparison: a case, the baseline it is held against, and how much faster we are."""

    case: str
    against: str
    ratio: float
    same_bits: bool | None = None
    """Whether our bits stayed the same across batches in this case; ``None`` where that was not checked."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further keys of the row, such as ``ours_us`` and ``theirs_us``."""

    def to_json(self) -> dict[str, Any]:
        """The row as it stands in the file."""
        fixed = {"case": self.case, "against": self.against, "ratio": _short(self.ratio), "same_bits": self.same_bits}
        return fixed | {key: _short(value) for key, value in self.extra.items()}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Row:
        """The row that stands so in a file."""
        extra = dict(row)
        case, against, ratio, same_bits = map(extra.pop, ("case", "against", "ratio", "same_bits"))
        return cls(case, against, ratio, same_bits, extra)


@dataclass
class Report:
    """What one suite measured on one device."""

    suite: str
    device: str = "cpu"
    rows: list[Row] = field(default_factory=list)
    summary: dict[str, dict[str, float | None]] = field(default_factory=dict)

    def summarise(self, name: str, value: float, bar: float | None = None) -> None:
        """Add a headline figure and the bar it is held to, if there is one."""
        self.summary[name] = {"value": _short(value), "bar": bar}

    @property
    def missed(self) -> list[str]:
        """The headline figures below their bar."""
        below = ((name, entry["value"], entry["bar"]) for name, entry in self.summary.items())
        return [name for name, value, bar in below if value is not None and bar is not None and value < bar]

    @property
    def path(self) -> Path:
        """Where :meth:`write` puts the file."""
        return RESULTS / device_slug(self.device) / f"{self.suite}.json"

    def to_json(self) -> dict[str, Any]:
        """What stands in the file."""
        return {"meta": meta(self.device), "rows": [row.to_json() for row in self.rows], "summary": self.summary}

    def write(self) -> Path:
        """Write the file, replacing that of an earlier run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.to_json(), indent=1) + "\n")
        return self.path


def meta(device: str = "cpu") -> dict[str, Any]:
    """Device, driver, versions, threads, the machine's load (processes that want a core), date, commit and command."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version_of("triton"),
        "bicompile": bicompile.__version__,
        "compiler": _first_line([build.compiler(), "--version"]),
    }
    return {
        "device": device_name(device),
        "driver": None if device == "cpu" else _driver(),
        "versions": versions,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "command": _command(sys.argv),
    }


def device_name(device: str = "cpu") -> str:
    """The processor's or the GPU's own name for itself."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    facts = _cpu_facts()
    return f"{facts.get('model name', platform.processor() or platform.machine())} ({_generation(facts)})"


def device_slug(device: str = "cpu") -> str:
    """The device's name as a directory name, such as ``cpu-amd-epyc-zen4``."""
    name = device_name(device).lower()
    if device == "cpu":
        name = "cpu " + re.sub(r"\((r|tm)\)|\b(processor|cpu|\d+-core)\b|@.*ghz", " ", name)
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def _cpu_facts() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    first = text.split("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first)}


def _generation(facts: dict[str, str]) -> str:
    """The core's generation: cloud machines hide the model's number, and a Zen 3 times unlike a Zen 4."""
    if not {"vendor_id", "cpu family", "model"} <= facts.keys():
        return platform.machine()
    family, model = int(facts["cpu family"]), int(facts["model"])
    if facts["vendor_id"] == "AuthenticAMD":
        if family == 26:
            return "zen5"
        if family == 25:
            return "zen4" if model & 0xF0 in (0x10, 0x60, 0x70, 0xA0) else "zen3"
    if facts["vendor_id"] == "GenuineIntel" and family == 6 and model in _INTEL:
        return _INTEL[model]
    return f"family-{family}-model-{model}"


def _driver() -> str | None:
    return _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])


def _commit() -> str | None:
    """The commit that was measured, with a ``+`` where the code was changed since; ``None`` outside a checkout."""
    commit = _first_line(["git", "-C", str(_ROOT), "rev-parse", "--short=12", "HEAD"])
    others = [".", f":!{_KEPT}"]  # a run writes there itself
    changed = _first_line(["git", "-C", str(_ROOT), "status", "--porcelain", "--untracked-files=no", "--", *others])
    return f"{commit}+" if commit and changed else commit


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _first_line(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(iter(done.stdout.splitlines()), None)


def _command(arguments: Sequence[str]) -> str:
    """The command line, with paths below the checkout said from its root."""
    program, *rest = (argument.removeprefix(f"{_ROOT}/") for argument in arguments)
    is_ours = Path(program).name == "bicompile" or program.endswith("bicompile/__main__.py")
    return " ".join(["bicompile" if is_ours else f"python {program}", *rest])


def _short(value: Any) -> Any:
    """Floats to four significant digits: the fifth is noise."""
    return float(f"{value:.4g}") if isinstance(value, float) else value
