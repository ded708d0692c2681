"""The CPU kernels are compiled when something needs them, and held against their references before they are used."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bicompile
from bicompile.lowering import loading, native
from bicompile.lowering.matmul import reference

ROOT = Path(__file__).resolve().parent.parent


def test_table_names_what_the_sources_register():
    registered = {
        name: set(re.findall(r'm\.impl\("(\w+)"', native.build.source(name).read_text())) for name in native.libraries()
    }
    assert registered == {name: set(ops) for name, ops in loading.KERNELS.items()}


@pytest.mark.parametrize("name", loading.KERNELS)
def test_kernels_pass_their_self_test(name: str):
    (path,) = native.load(name)
    loading.self_test(name, path)
    loading.load(name)
    assert path.with_suffix(".tested").exists()
    assert any(library == name for library, *_ in loading._cases())


def test_another_order_fails_the_self_test(monkeypatch):
    monkeypatch.setattr(reference, "mm", lambda a, b: a @ b)
    with pytest.raises(native.NativeBuildError, match="mm in torch.float32"):
        loading.self_test("matmul", *native.load("matmul"))


_PROGRAM = """
import json, threading, torch, bicompile
from bicompile.lowering import loading
from torch._dynamo.utils import counters
seen = []
x = torch.arange(12.0).view(3, 4)
with bicompile.eager():
    (x.t().contiguous().view(torch.int32) + 1).tolist()  # a result that comes from a GPU, say
seen.append(sorted(loading._loaded))
with bicompile.eager():
    x.sum()
seen.append(sorted(loading._loaded))
threads = [threading.Thread(target=torch.ops.bicompile.cumsum, args=(x, 0, x.dtype)) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
seen.append(sorted(loading._loaded))
result = torch.compile(lambda x: x @ x.t(), backend="batch_invariant")(x)
seen.append(sorted(loading._loaded))
print(json.dumps([seen, result.tolist(), counters["inductor"]["fxgraph_cache_hit"] > 0]))
"""


def test_only_what_is_needed_is_loaded_even_by_a_graph_from_a_cache(tmp_path: Path):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for from_cache in (False, True):
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM], env=environment, cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        seen, result, hit = json.loads(done.stdout)
        assert seen == [[], ["reduction"], ["reduction", "scan"], ["matmul", "reduction", "scan"]]
        assert torch.equal(torch.tensor(result), torch.arange(12.0).view(3, 4) @ torch.arange(12.0).view(3, 4).t())
        assert hit == from_cache


def test_what_no_kernel_takes_is_refused_by_name():
    x = torch.eye(3)
    for _ in range(2):  # before the kernel is loaded, maybe, and after
        with pytest.raises(NotImplementedError, match="bicompile::mm: expected dense.*sparse_coo on cpu"):
            torch.ops.bicompile.mm(x.to_sparse(), x)
    assert bicompile.testing.same_bits(torch.ops.bicompile.mm(x, x), x)


def test_what_loads_a_library_is_not_compiled(monkeypatch: pytest.MonkeyPatch):
    """Where Dynamo gives up a function, it goes on in the functions that this one calls."""
    graphs: list[Any] = []

    def load(name: str) -> None:
        graphs.append(torch.compiler.is_compiling())
        torch.ones(3).sin()

    def backend(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    @torch.compile(backend=backend)
    def fn(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return loading._stub("bicompile::mm")(x, x)

    x = torch.eye(3)
    loading.load("matmul")
    monkeypatch.setattr(loading, "_loaded", set())
    monkeypatch.setattr(loading, "load", load)
    fn(x)
    assert graphs == [False]
