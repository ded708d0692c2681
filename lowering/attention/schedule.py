"""How attention is run on a GPU: tiles of queries or splits of keys over programs, and their sizes.

No schedule can change a bit that admission has not compared: blocks and splits of keys belong to the order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bicompile.lowering.gpu.device import DeviceKey


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
    """One program takes ``rows`` queries, of all heads that share keys, over ``parts`` splits; another kernel merges.

    Attributes:
        rows: queries times heads of one program.
        warps: warps of one program.
        stages: blocks of keys in flight.
        parts: splits that one program takes one after the other.
        tma: whether keys and values come by TMA (sm_90 and newer).
    """

    rows: int
    warps: int
    stages: int
    parts: int = 1
    tma: bool = False


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

REFERENCE = TileSchedule(rows=16, warps=4, stages=1)


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
    hopper = device.capability[0] >= 9
    wide = [TileSchedule(128, 8, 2, tma=True), TileSchedule(128, 8, 2)] if hopper else []
    small = [TileSchedule(64, 4, 2), TileSchedule(64, 4, 1)]
    return (wide if queries > 64 else []) + small + [REFERENCE]


def hopper_schedules(queries: int) -> list[HopperSchedule]:
    """Schedules of the kernel of sm_90, the best first."""
    return [HopperSchedule(stages=2, overlap=True)] if queries > 64 else []


def split_schedules(rows: int, widths: tuple[int, int], dtype: torch.dtype, device: DeviceKey) -> list[SplitSchedule]:
    """Schedules for splits, the best first; ``rows`` is queries times heads of a group."""
    if dtype.itemsize > 2:
        return [SplitSchedule(16, 4, 1)]
    tile = 16 if rows <= 16 else 32 if rows <= 32 else 64
    return [SplitSchedule(tile, 4, 2), SplitSchedule(16, 4, 1)]


@dataclass(frozen=True)
class BackwardSchedule:
    """How the two backward kernels are run.

    Attributes:
        queries: queries of one program of the queries' gradient.
        keys: keys of one program of the keys' and values' gradient.
        step: rows of the other side that either takes at a time.
        warps: warps of one program.
        stages: blocks in flight.
    """

    queries: int
    keys: int
    step: int
    warps: int
    stages: int


REFERENCE_BACKWARD = BackwardSchedule(queries=16, keys=16, step=16, warps=4, stages=1)


def backward_schedules(widths: tuple[int, int], dtype: torch.dtype, device: DeviceKey) -> list[BackwardSchedule]:
    """Schedules of the backward kernels, the best first."""
    if dtype.itemsize > 2:
        return [REFERENCE_BACKWARD]
    return [BackwardSchedule(64, 64, 32, 4, 2), REFERENCE_BACKWARD]
