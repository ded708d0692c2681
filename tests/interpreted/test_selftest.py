"""What kernels are tested with on a device, before their first use, passes where they are right."""

from __future__ import annotations

import pytest
import torch

from bicompile.lowering.gpu.selftest import SelfTest
from bicompile.lowering.scan.selftest import SCANS
from bicompile.lowering.scatter.selftest import SCATTERS
from bicompile.testing import same_bits


@pytest.mark.parametrize("selftest", [SCANS, SCATTERS], ids=["scans", "scatters"])
def test_cases_have_the_bits_of_their_references(selftest: SelfTest):
    compared = 0
    for ours, theirs in selftest.cases(torch.device("cpu")):
        expected = theirs()
        if expected.dtype != torch.bfloat16:  # to which the interpreter does not round to nearest
            assert same_bits(ours(), expected)
            compared += 1
    assert compared
