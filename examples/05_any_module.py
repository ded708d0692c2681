"""How do I make my own module batch-invariant, and let one op through that the compiler refuses?

    python examples/05_any_module.py

A module that measures distances with ``torch.cdist``, whose order of additions nobody declared, is refused by name.
Written with ops that are known it is covered.  Allowed by name it runs too: that op's bits are then the caller's to
answer for.
"""

import textwrap

import torch
from torch import nn

import bicompile
from bicompile.errors import UnsupportedOpError
from bicompile.testing import assert_batch_invariant


class Prototypes(nn.Module):
    """Scores ``[rows, classes]``: how far each input lies from the prototype of each class."""

    def __init__(self, features: int = 48, classes: int = 5) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(features, 64), nn.GELU(), nn.LayerNorm(64))
        self.centres = nn.Parameter(torch.randn(classes, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -torch.cdist(self.layer(x), self.centres)


@bicompile.batch_invariant  # or later: module = bicompile.batch_invariant(module)
class CoveredPrototypes(Prototypes):
    """The same distances from a norm, which is a reduction that is known."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -torch.linalg.vector_norm(self.layer(x).unsqueeze(1) - self.centres, dim=-1)


@torch.no_grad()
def main() -> None:
    """Refused, covered, allowed."""
    torch.manual_seed(0)
    x, stock, covered = torch.randn(9, 48), Prototypes(), CoveredPrototypes()
    covered.load_state_dict(stock.state_dict())
    try:
        bicompile.batch_invariant(stock)(x)
    except UnsupportedOpError as error:
        print(f"refused: {textwrap.shorten(str(error), 90)}")
    assert_batch_invariant(covered, x)
    print(f"covered: every row keeps its bits; {(covered(x) - stock(x)).abs().max():.1e} from stock")
    allowing = bicompile.batch_invariant(stock, options={"allow": ["aten._cdist_forward"]})
    print(f"allowed: scores of shape {tuple(allowing(x).shape)}, whose bits nobody promises")


if __name__ == "__main__":
    main()
