"""What does the compiler do to my function, and what does it refuse?

    python examples/02_explain.py

Prints the certificate of a small attention block, and that of a function with an op whose order nobody knows.
"""

import torch
import torch.nn.functional as F

import bicompile


def block(x: torch.Tensor) -> torch.Tensor:
    """Self-attention and a norm over ``x`` [rows, 7, 32]; then a mean over the rows, which crosses the batch."""
    heads = x.unflatten(-1, (4, 8)).transpose(1, 2)
    y = F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
    return F.layer_norm(x + y, (32,)).mean(0)


def main() -> None:
    """Explain one function that is covered, and one that is not."""
    x = torch.randn(5, 7, 32)
    print(bicompile.explain(block, x))
    print()
    print(bicompile.explain(lambda x: torch.linalg.pinv(x), x))


if __name__ == "__main__":
    main()
