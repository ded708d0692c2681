"""Admission: a schedule is used on a device only after it gave, on that device, the bits of the reference schedule.

Nothing is assumed of hardware or compiler.  The first time a schedule is wanted, it and the reference schedule of its
family run on probe inputs that expose the order of additions, and their bits are compared.  The verdict is kept on
disk, keyed by device, versions and kernel sources.  A schedule that fails, or does not compile, is dropped, and
``bicompile doctor`` names it.  Dropping one costs speed and changes no bit: the reference is always there.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bicompile.lowering.native import cache_dir

from .device import DeviceKey, device_key

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Verdict:
    """Whether one schedule may be used on one device.

    Attributes:
        family: the op family, such as ``matmul``.
        schedule: the schedule and what it computes, as text.
        admitted: whether it gave the reference's bits on every probe.
        reason: for a dropped one, the first probe that differed, or why it did not run.
    """

    family: str
    schedule: str
    admitted: bool
    reason: str = ""


class Admission:
    """The verdicts of one op family.

    Args:
        family: its name.
        sources: the files whose change makes every verdict void, as does a change of what launches kernels.
    """

    def __init__(self, family: str, sources: Sequence[Path]) -> None:
        self.family = family
        self.lock = threading.RLock()  # of the one thread that holds kernels of this family against references
        self._sources = (*(Path(__file__).with_name(name) for name in ("launch.py", "driver.py", "plans.py")), *sources)
        self._known: dict[int, dict[str, Verdict]] = {}
        _FAMILIES[family] = self

    def allows(
        self,
        schedule: object,
        device: int,
        run: Callable[[], Iterable[Tensor]],
        reference: Callable[[], Iterable[Tensor]],
    ) -> bool:
        """Whether ``schedule`` may be used on CUDA device ``device``.

        Args:
            schedule: anything whose ``repr`` says the schedule, and the dtype or layout it is used for.
            run: the schedule's results on the probes, in order.
            reference: the reference schedule's results on the same probes.

        Without a verdict, and while a CUDA graph is being captured, the answer is no: probing would synchronise.
        """
        verdict = self.verdict(schedule, device)
        if verdict is None:
            if torch.cuda.is_current_stream_capturing():
                return False
            with self.lock, torch.cuda.device(device), torch.no_grad():
                if (verdict := self.verdict(schedule, device)) is None:  # nor has another thread found one meanwhile
                    try:
                        verdict = self._judge(str(schedule), run, reference)
                    except torch.OutOfMemoryError:  # no room for the probes now; the schedule is not to blame
                        return False
                    self._keep(device, verdict)
        return verdict.admitted

    def verdict(self, schedule: object, device: int) -> Verdict | None:
        """The verdict on ``schedule``, or None where it was never tried on this device."""
        return self._of(device).get(str(schedule))

    def verdicts(self, device: int) -> list[Verdict]:
        """Every verdict of this family on ``device``, in the order of their names."""
        return sorted(self._of(device).values(), key=lambda verdict: verdict.schedule)

    def _judge(
        self, name: str, run: Callable[[], Iterable[Tensor]], reference: Callable[[], Iterable[Tensor]]
    ) -> Verdict:
        try:
            wanted = list(reference())
            for number, (ours, theirs) in enumerate(zip(run(), wanted, strict=True)):
                if not equal_bits(ours, theirs):
                    share = (bits_of(ours) != bits_of(theirs)).double().mean().item()
                    return Verdict(self.family, name, False, f"probe {number}: {share:.2%} of elements differ")
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # out of shared memory, a compiler that fails: the schedule cannot be used here
            return Verdict(self.family, name, False, f"{type(error).__name__}: {str(error).strip()[:200]}")
        return Verdict(self.family, name, True)

    def _of(self, device: int) -> dict[str, Verdict]:
        if device not in self._known:
            with self.lock:
                if device not in self._known:
                    self._known[device] = self._read(self._file(device_key(device)))
        return self._known[device]

    def _keep(self, device: int, verdict: Verdict) -> None:
        known = self._of(device)
        path = self._file(device_key(device))
        known |= {name: found for name, found in self._read(path).items() if name not in known}
        known[verdict.schedule] = verdict
        with contextlib.suppress(OSError):  # a cache that cannot be written costs the next process a probe
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as new:
                json.dump([asdict(v) for v in known.values()], new, indent=1)
            os.replace(new.name, path)

    def _file(self, key: DeviceKey) -> Path:
        digest = hashlib.sha256(f"{key} {sources_hash(self._sources)}".encode()).hexdigest()[:16]
        return cache_dir() / "admitted" / f"{self.family}-{digest}.json"

    @staticmethod
    def _read(path: Path) -> dict[str, Verdict]:
        try:
            rows: list[dict[str, Any]] = json.loads(path.read_text())
            return {row["schedule"]: Verdict(**row) for row in rows}
        except (OSError, ValueError, TypeError, KeyError):  # none yet, or one that was cut off: probe again
            return {}


_FAMILIES: dict[str, Admission] = {}


def known_families() -> dict[str, Admission]:
    """The admissions of all families whose kernels have been imported, by name."""
    return dict(_FAMILIES)


@functools.cache
def sources_hash(sources: tuple[Path, ...]) -> str:
    """A hash of the contents of ``sources``."""
    digest = hashlib.sha256()
    for path in sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def bits_of(x: Tensor) -> Tensor:
    """``x`` as integers of its width."""
    return x.contiguous().view(_INTEGER[x.element_size()])


def equal_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits; any NaN equals any other."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    same = bits_of(a) == bits_of(b)
    return bool(same.all()) or bool((same | (a.isnan() & b.isnan())).all())
