"""How do I make my own module batch-invariant, and let one op through that the compiler refuses?

    python examples/05_any_module.py

A module that solves least squares by ``torch.linalg.pinv``, whose order of additions nobody declared, is refused by
name.  Written with ops that are known it is covered.  Allowed by name it runs too: that op's bits are then the caller's
to answer for.
"""

import textwrap

import torch
from torch import nn

import bicompile
from bicompile.errors import UnsupportedOpError
from bicompile.testing import assert_batch_invariant


class Fit(nn.Module):
    """Least squares in each row ``[points, features]`` by itself: of the first feature by three learned ones."""

    def __init__(self, features: int = 8) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(features, 16), nn.GELU(), nn.Linear(16, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.pinv(self.layer(x)) @ x[..., :1]


@bicompile.batch_invariant  # or later: module = bicompile.batch_invariant(module)
class CoveredFit(Fit):
    """The same from the normal equations: products, and a solution for one row at a time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        learned = self.layer(x)
        return torch.linalg.solve(learned.mT @ learned, learned.mT @ x[..., :1])


@torch.no_grad()
def main() -> None:
    """Refused, covered, allowed."""
    torch.manual_seed(0)
    x, stock, covered = torch.randn(9, 20, 8), Fit(), CoveredFit()
    covered.load_state_dict(stock.state_dict())
    try:
        bicompile.batch_invariant(stock)(x)
    except UnsupportedOpError as error:
        print(f"refused: {textwrap.shorten(str(error), 90)}")
    assert_batch_invariant(covered, x)
    print(f"covered: every row keeps its bits; {(covered(x) - stock(x)).abs().max():.1e} from stock")
    allowing = bicompile.batch_invariant(stock, options={"allow": ["aten.linalg_pinv"]})
    print(f"allowed: solutions of shape {tuple(allowing(x).shape)}, whose bits nobody promises")


if __name__ == "__main__":
    main()
