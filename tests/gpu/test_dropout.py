"""Dropout on a GPU: a mask follows what it falls on, forward and backward, and not the batch."""

from __future__ import annotations

import pytest
import torch
from dropping import FORMS, ROWS, in_eager, run

from bicompile.dropout import is_kept, keys_of
from bicompile.testing import same_bits


@pytest.mark.parametrize("form", FORMS)
def test_rows_keep_their_bits(form: str):
    function, shape = FORMS[form]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).cuda()
    compiled = torch.compile(function, backend="batch_invariant", dynamic=True)
    whole = run(compiled, x)
    assert same_bits(whole, in_eager(function, x))
    assert (whole[0] == 0).any() or "alpha" in form
    for rows in ROWS:
        assert same_bits(tuple(t[rows] for t in whole), run(compiled, x[rows]))


def test_generator_is_that_of_the_cpu():
    keys, places = torch.randint(-(2**62), 2**62, (50, 1)), torch.arange(300)
    assert torch.equal(is_kept(keys.cuda(), places.cuda(), 0.4).cpu(), is_kept(keys, places, 0.4))
    compiled = torch.compile(is_kept, backend="batch_invariant")
    assert torch.equal(compiled(keys.cuda(), places.cuda(), 0.4).cpu(), is_kept(keys, places, 0.4))
    x = torch.randn(9, 40, device="cuda")
    torch.manual_seed(0)
    wanted = keys_of(x)
    torch.manual_seed(0)
    assert torch.equal(torch.compile(keys_of, backend="batch_invariant")(x), wanted)
