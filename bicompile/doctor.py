"""``bicompile doctor``: what is installed, what can be used, and what to do about each problem."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import lowering
from .bench import device_name
from .lowering import native
from .lowering.elementwise.codegen_gpu import LIBDEVICE
from .lowering.gpu.admission import known_families
from .lowering.gpu.device import unsupported

_DESCRIPTION = """
Say what bicompile found on this machine: versions, compilers, devices, GPU schedules that were admitted or dropped, and
its caches; and for each problem what to do. The exit code is 0 if there is no problem.
"""


@dataclass(frozen=True)
class Problem:
    """Something that is wrong, and what to do about it."""

    what: str
    remedy: str


@dataclass(frozen=True)
class Device:
    """One processor or GPU.

    Attributes:
        device: ``cpu`` or ``cuda:0``.
        name: its own name.
        details: capability and memory of a GPU, instruction set of a CPU.
        usable: whether lowerings run there.
        schedules: family to ``{"admitted": count, "dropped": {schedule: reason}}``, as far as they were tried.
    """

    device: str
    name: str
    details: str
    usable: bool
    schedules: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Findings:
    """All that ``doctor`` reports."""

    versions: dict[str, str | None]
    compilers: dict[str, str | None]
    devices: list[Device]
    caches: dict[str, dict[str, Any]]
    problems: list[Problem]

    def __str__(self) -> str:
        lines = ["versions"]
        lines += [f"  {name:14s} {version or 'not installed'}" for name, version in self.versions.items()]
        lines += ["compilers"]
        lines += [f"  {name:14s} {found or 'not found'}" for name, found in self.compilers.items()]
        lines += ["devices"]
        for device in self.devices:
            lines.append(
                f"  {device.device:14s} {device.name}, {device.details}{'' if device.usable else ': unusable'}"
            )
            for family, found in device.schedules.items():
                lines.append(f"    {family:12s} {found['admitted']} admitted, {len(found['dropped'])} dropped")
                lines += [f"      dropped {schedule}: {reason}" for schedule, reason in found["dropped"].items()]
            if device.usable and device.device != "cpu" and not device.schedules:
                lines.append("    no schedule was tried yet; they are when a model first runs")
        lines += ["caches"]
        lines += [
            f"  {name:14s} {cache['path']}, {cache['files']} files, {cache['bytes'] / 1e6:.1f} MB"
            for name, cache in self.caches.items()
        ]
        lines += ["problems" if self.problems else "no problems"]
        for problem in self.problems:
            lines += [f"  {problem.what}", f"    {problem.remedy}"]
        return "\n".join(lines)


def add_command(commands: Any) -> None:
    """Add ``doctor`` to an ``argparse`` collection of sub-commands."""
    parser = commands.add_parser("doctor", help="what is installed, what works, what to do", description=_DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Examine, print; 1 if there is a problem."""
    findings = examine()
    print(json.dumps(asdict(findings), indent=2) if args.json else findings)
    return 1 if findings.problems else 0


def examine() -> Findings:
    """Look at this machine.  Builds nothing and runs nothing on a GPU."""
    problems: list[Problem] = []
    return Findings(
        versions=_versions(problems),
        compilers=_compilers(problems),
        devices=[_cpu(), *_gpus(problems)],
        caches=_caches(problems),
        problems=problems,
    )


def _versions(problems: list[Problem]) -> dict[str, str | None]:
    from . import __version__

    known = {"python": platform.python_version(), "bicompile": __version__, "torch": torch.__version__}
    found: dict[str, str | None] = {**known, "CUDA": torch.version.cuda, **{n: _version(n) for n in _PACKAGES}}
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2] if part.isdigit())
    if not (_OLDEST_TORCH <= release < _NEXT_TORCH):
        problems.append(
            Problem(
                f"torch {torch.__version__} is not a release that bicompile knows",
                f"install torch {'.'.join(map(str, _OLDEST_TORCH))} or newer, before {'.'.join(map(str, _NEXT_TORCH))}",
            )
        )
    return found


_PACKAGES = ("triton", "transformers", "numpy")
_OLDEST_TORCH, _NEXT_TORCH = (2, 11), (2, 16)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _compilers(problems: list[Problem]) -> dict[str, str | None]:
    try:
        path: str | None = native.build.compiler()
        native.isa()
    except native.NativeBuildError as error:
        path = None
        problems.append(Problem("the CPU kernels cannot be compiled", str(error)))
    return {"C++": path and f"{path}, {_first_line([path, '--version'])}", "Triton's ptxas": _ptxas()}


def _ptxas() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from triton import knobs

    return f"{knobs.nvidia.ptxas.path}, release {knobs.nvidia.ptxas.version}"


def _first_line(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return next(iter(done.stdout.splitlines()), "no version")


def _cpu() -> Device:
    try:
        names = native.libraries()
        ready = [name for name in names if native.library_path(name).with_suffix(".tested").exists()]
    except native.NativeBuildError:
        return Device("cpu", device_name(), "kernels not built", False)
    state = f"{len(ready)} of {len(names)} kernel libraries built and tested; the others when a model needs them"
    return Device("cpu", device_name(), f"instruction set {native.isa()}, {state}", True)


def _gpus(problems: list[Problem]) -> Iterator[Device]:
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            problems.append(
                Problem(
                    "there is an NVIDIA driver, but this PyTorch sees no GPU",
                    "install a torch for the driver's CUDA version; python -m torch.utils.collect_env shows both",
                )
            )
        return
    _import_kernels(problems)
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(index)
        details = f"sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
        if reason := unsupported(device):
            problems.append(Problem(f"{device} cannot be used", reason))
        yield Device(str(device), properties.name, details, not reason, {} if reason else _schedules(index, problems))


def _import_kernels(problems: list[Problem]) -> None:
    """Import every family's Triton kernels, which makes its admission known."""
    for directory in sorted(Path(lowering.__file__).parent.glob("*/gpu.py")):
        name = directory.parent.name
        try:
            importlib.import_module(f"{lowering.__name__}.{name}.gpu")
        except ImportError as error:
            problems.append(
                Problem(f"the GPU kernels of {name} cannot be imported: {error}", "install Triton 3.6 or newer")
            )


def _schedules(index: int, problems: list[Problem]) -> dict[str, dict[str, Any]]:
    found = {}
    for family, admission in sorted(known_families().items()):
        verdicts = admission.verdicts(index)
        if not verdicts:
            continue
        dropped = {verdict.schedule: verdict.reason for verdict in verdicts if not verdict.admitted}
        found[family] = {"admitted": len(verdicts) - len(dropped), "dropped": dropped}
        if dropped and len(dropped) == len(verdicts):
            problems.append(
                Problem(
                    f"{family}: every schedule was dropped on cuda:{index}, only the slow reference is left",
                    "report it with the output of bicompile doctor --json",
                )
            )
    return found


def _caches(problems: list[Problem]) -> dict[str, dict[str, Any]]:
    own = native.cache_dir()
    if not _writable(own):
        problems.append(
            Problem(
                f"the cache directory {own} cannot be written: kernels are built and schedules tried in every process",
                "set BICOMPILE_CACHE_DIR to a directory that can",
            )
        )
    if os.environ.get("TRITON_INTERPRET") == "1":
        problems.append(Problem("TRITON_INTERPRET=1: GPU kernels are interpreted on the CPU", "unset TRITON_INTERPRET"))
    if (library := os.environ.get(LIBDEVICE)) and not Path(library).is_file():
        problems.append(Problem(f"{LIBDEVICE}={library} is not a file", f"unset {LIBDEVICE}"))
    from torch._inductor.runtime.cache_dir_utils import cache_dir as inductor_cache_dir

    places = {"bicompile": own, "inductor": Path(inductor_cache_dir())}
    return {name: {"path": str(path), **_size(path)} for name, path in places.items()}


def _writable(directory: Path) -> bool:
    existing = next((p for p in (directory, *directory.parents) if p.exists()), None)
    return existing is not None and os.access(existing, os.W_OK)


def _size(directory: Path) -> dict[str, int]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {"files": len(files), "bytes": sum(path.stat().st_size for path in files)}
