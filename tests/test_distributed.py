"""Several processes: reductions across them in the order of their ranks, by gloo on the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

RANKS = 3  # of two, every order gives the same bits
WORKER = Path(__file__).with_name("distributed_worker.py")


def test_reductions_and_gradients_are_added_in_the_order_of_the_ranks(tmp_path: Path):
    """Functional collectives compiled and not, DistributedDataParallel with the hook, and fully sharded modules."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(RANKS), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        done = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, (out, err)) in enumerate(zip(processes, done, strict=True)):
        assert process.returncode == 0, f"rank {rank}: {out}\n{err[-3000:]}"
        assert out.count("passed") == 4
