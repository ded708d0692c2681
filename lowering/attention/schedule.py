"""How attention is run on a GPU: tiles of queries or splits of keys over programs, and their sizes.

No schedule can change a bit that admission has not compared: blocks and splits of keys belong to the order.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bicompile.lowering.gpu.device import DeviceKey

from .order import GpuAttentionOrder, gpu_order_for
from .problem import cdiv


@dataclass(frozen=True)
class TileSchedule:
    """One program takes ``rows`` queries of one head over all their keys.

    Attributes:
        rows: queries of one program.
        warps: warps of one program.
        stages: blocks of keys in flight.
        tma: whether keys and values come by TMA (sm_90 and newer).
    """

    rows: int
    warps: int
    stages: int
    tma: bool = False


@dataclass(frozen=True)
class SplitSchedule:
    """One program takes ``rows`` queries, of all heads that share keys, over some splits; another kernel merges.

    Attributes:
        rows: queries times heads of one program.
        warps: warps of one program.
        stages: blocks of keys in flight.
        span: keys that one program takes, a power of two up to 16 of the smallest splits, and one split at least; 0
            for all, and then nothing is left to merge.
        v_programs: programs that share the columns of the values, a power of two; each scores the keys anew.  More than
            one needs a ``span`` above 0.
        tma: whether keys and values come by TMA (sm_90 and newer).
    """

    rows: int
    warps: int
    stages: int
    span: int = 1
    tma: bool = False
    v_programs: int = 1


@dataclass(frozen=True)
class HopperSchedule:
    """``TileSchedule`` of 128 queries by the kernel of sm_90.

    Attributes:
        stages: blocks of keys in flight.
        overlap: whether a group multiplies while it computes the next block's weights.
    """

    stages: int
    overlap: bool


Schedule = TileSchedule | SplitSchedule | HopperSchedule

TABLES = Path(__file__).parent / "tables"

REFERENCE = TileSchedule(rows=16, warps=4, stages=1)

MERGE_WARPS = 2
"""Warps of a program that merges the splits of a row."""


def wants_split(queries: int, group: int, keys: int, programs: int, num_sms: int) -> bool:
    """Whether splits over programs beat tiles of queries.

    Args:
        queries, group, keys: queries of a row, query heads that share keys, keys of a row.
        programs: batch times heads.
        num_sms: multiprocessors of the device.
    """
    if queries * group <= 64:
        return True
    tiles = programs * -(-queries // 128)
    return 2 * tiles <= num_sms and keys > 1024


def tile_schedules(queries: int, widths: tuple[int, int], dtype: torch.dtype, device: DeviceKey) -> list[TileSchedule]:
    """Schedules for tiles, the best first; ``widths`` are the padded depths of keys and values."""
    if dtype.itemsize > 2:
        return [REFERENCE]
    if max(widths) > 128:
        return [TileSchedule(32, 8, 1), REFERENCE]
    # Eight warps: with four, the registers of 64 rows spill.
    small = [TileSchedule(64, 8, 2), TileSchedule(64, 8, 1), REFERENCE]
    if device.capability[0] >= 9 and queries > 64:
        return [TileSchedule(128, 8, 2, tma=True), TileSchedule(128, 8, 2), *small]
    return small


def hopper_schedules(queries: int) -> list[HopperSchedule]:
    """Schedules of the kernel of sm_90, the best first."""
    return [HopperSchedule(stages=2, overlap=True)] if queries > 64 else []


@dataclass(frozen=True)
class Tiles:
    """How one of the two backward kernels is run.

    Attributes:
        own: rows of one program, those whose gradients it computes.
        step: rows of the other side that it takes at a time.
        warps: warps of one program.
        stages: blocks in flight.
    """

    own: int
    step: int
    warps: int
    stages: int


@dataclass(frozen=True)
class BackwardSchedule:
    """The kernel of the queries' gradient, and that of the keys' and values'."""

    queries: Tiles
    keys: Tiles


REFERENCE_BACKWARD = BackwardSchedule(Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1))
PLAIN_BACKWARD = BackwardSchedule(Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 2))
DEEP_BACKWARD = BackwardSchedule(Tiles(64, 32, 8, 1), Tiles(32, 32, 8, 1))
"""For heads deeper than 128."""


@dataclass(frozen=True)
class Table:
    """What was found fastest on one architecture.

    Attributes:
        splits: by ``load_of``, schedules of 16 rows, without their span.
        backward: by the padded depth of the heads up to which it holds, ascending.
    """

    splits: dict[str, SplitSchedule]
    backward: dict[int, BackwardSchedule]


@functools.cache
def read_table(path: Path) -> Table:
    """The table in a file."""
    body = json.loads(path.read_text())
    splits = {load: SplitSchedule(rows=16, **entry) for load, entry in body["splits"].items()}
    backward = {
        int(depth): BackwardSchedule(*(Tiles(**entry[kernel]) for kernel in ("queries", "keys")))
        for depth, entry in body["backward"].items()
    }
    return Table(splits, backward)


@functools.cache
def table_of(device: DeviceKey) -> Table | None:
    """The table of a device's architecture, if there is one."""
    path = TABLES / f"sm_{device.capability[0]}{device.capability[1]}.json"
    return read_table(path) if path.exists() else None


@functools.lru_cache(maxsize=1024)
def split_schedules(
    rows: int, pieces: int, programs: int, masked: bool, widths: tuple[int, int], dtype: torch.dtype, device: DeviceKey
) -> list[SplitSchedule]:
    """Schedules for splits, the best first.

    Args:
        rows: queries times heads of a group.
        pieces: keys in splits of the smallest size.
        programs: batch times heads of keys times tiles of 16 rows.
        masked: whether there is a mask, so that some rows may see fewer keys than others.
        widths: the padded depths of keys and values.
    """
    reference = SplitSchedule(16, 4, 1)
    if dtype.itemsize > 2:
        return [reference]
    if max(widths) > 128:
        return [SplitSchedule(16, 4, 2) if rows <= 16 else SplitSchedule(32, 8, 2), reference]
    if rows > 16:
        return [SplitSchedule(32, 8, 2), reference]
    # The table was measured for one tile of 16 rows, as decoding has it.
    table = table_of(device)
    span, taken, load = share(pieces, programs, masked, gpu_order_for(max(widths), dtype), device.num_sms)
    found = [table.splits[load]] if table and load in table.splits else []
    found += [replace(s, tma=False) for s in found if s.tma]
    found.append(SplitSchedule(16, 4, 2))
    # What one multiprocessor can read in a time limits few programs: half of them had nothing to do.
    v_programs = 2 if span > 0 and widths[1] >= 64 and 2 * taken <= device.num_sms else 1
    return [*(replace(s, span=span, v_programs=v_programs) for s in found), reference]


def share(pieces: int, programs: int, masked: bool, order: GpuAttentionOrder, num_sms: int) -> tuple[int, int, str]:
    """The span with which ``programs`` rows of ``pieces`` pieces end soonest, the programs it makes, and their load.

    Under a mask, rows may see different numbers of keys, and the smallest programs level that.
    """
    choices = [1] if masked else [n for n in (1, 2, 4, 8, 16) if n < pieces] + [pieces]
    if not masked and fills(programs, num_sms):
        choices = [pieces]

    def waves_of(taken: int) -> int:
        return cdiv(cdiv(pieces, taken) * programs, num_sms)

    # The first keys of a program arrive about as late as a quarter of a piece takes (an H100, heads of 128).
    taken = min(choices, key=lambda taken: waves_of(taken) * (taken + 0.25))
    span = 0 if taken == pieces else taken * order.splits[0][1]
    made = cdiv(pieces, taken) * programs
    return span, made, load_of(made, num_sms)


def merged_at_once(splits: int) -> int:
    """How many of ``splits`` splits a program that merges them reads together: a cold program's length is its time."""
    return next((n for n in (4, 8) if splits <= n), 16)


def fills(programs: int, num_sms: int) -> bool:
    """Whether ``programs`` that all take equally long keep nearly all multiprocessors busy to the end."""
    waves = -(-programs // num_sms)
    return programs >= 0.9 * waves * num_sms


def load_of(programs: int, num_sms: int) -> str:
    """How the table names a number of programs of splits."""
    return "few" if programs < 2 * num_sms else "some" if programs < 8 * num_sms else "many"


def backward_schedules(widths: tuple[int, int], dtype: torch.dtype, device: DeviceKey) -> list[BackwardSchedule]:
    """Schedules of the backward kernels, the best first; ``widths`` are the padded depths of keys and values."""
    if dtype.itemsize > 2:
        return [REFERENCE_BACKWARD]
    if max(widths) > 128:
        return [DEEP_BACKWARD, REFERENCE_BACKWARD]
    table = table_of(device)
    preferred = [s for depth, s in table.backward.items() if max(widths) <= depth][:1] if table else []
    return [*preferred, PLAIN_BACKWARD, REFERENCE_BACKWARD]
