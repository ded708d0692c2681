"""Does a row keep its bits when its batch changes?

    python examples/01_linear.py

Prints, for stock eager and ``batch_invariant``, how many of 12 rows come out different alone than in their batch.
"""

import torch
from torch import nn

import bicompile
from bicompile.testing import same_bits

ROWS = 12


def rows_changed(model: nn.Module, batch: torch.Tensor) -> int:
    """How many rows of ``batch`` [rows, 768] have other bits alone."""
    whole = model(batch)
    return sum(not same_bits(model(batch[i : i + 1])[0], whole[i]) for i in range(ROWS))


def main() -> None:
    """Compare the two on one linear layer."""
    torch.manual_seed(0)
    layer, batch = nn.Linear(768, 256), torch.randn(ROWS, 768)
    with torch.no_grad():
        print(f"{'stock eager':>16}: {rows_changed(layer, batch)} of {ROWS} rows changed")
        compiled = bicompile.batch_invariant(layer)
        print(f"{'batch_invariant':>16}: {rows_changed(compiled, batch)} of {ROWS} rows changed")


if __name__ == "__main__":
    main()
