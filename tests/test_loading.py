"""The CPU kernels are held against their references before they are used."""

from __future__ import annotations

import pytest

from bicompile.lowering import loading, native
from bicompile.lowering.matmul import reference


def test_kernels_pass_their_self_test():
    loading.self_test(native.load())
    loading.load_cpu()
    assert native.load().with_suffix(".tested").exists()


def test_another_order_fails_the_self_test(monkeypatch):
    monkeypatch.setattr(reference, "mm", lambda a, b: a @ b)
    with pytest.raises(native.NativeBuildError, match="mm in torch.float32"):
        loading.self_test(native.load())
