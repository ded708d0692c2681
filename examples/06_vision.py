"""Does an image get the same scores alone and in a batch of images?

    python examples/06_vision.py

Prints, for stock transformers and ``batch_invariant``, how many of 8 images' scores change in batches of 2 to 8: of a
convolutional network and of a vision transformer, both small and with random weights.
"""

import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

import bicompile
from bicompile.testing import same_bits

IMAGES = 8


def models() -> dict[str, nn.Module]:
    """Both models, for images of 32 by 32."""
    torch.manual_seed(0)
    resnet = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], num_labels=10)
    sizes = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 6}
    vit = ViTConfig(image_size=32, patch_size=8, num_labels=10, **sizes)
    return {
        "ResNet": ResNetForImageClassification(resnet).eval(),
        "ViT": ViTForImageClassification(vit).eval(),
    }


def changed(model: nn.Module, images: torch.Tensor) -> int:
    """How many images have other scores in some batch than alone."""
    alone = [model(images[i : i + 1]).logits[0] for i in range(IMAGES)]
    found = set()
    for size in (2, 3, 5, 8):
        for first in range(0, IMAGES, size):
            scores = model(images[first : first + size]).logits
            found |= {first + i for i, row in enumerate(scores) if not same_bits(row, alone[first + i])}
    return len(found)


@torch.no_grad()
def main() -> None:
    """Compare the two."""
    images = torch.randn(IMAGES, 3, 32, 32)
    for name, model in models().items():
        print(f"{name:>6} {'stock':>16}: {changed(model, images)} of {IMAGES} images changed")
        with bicompile.eager():  # or compile it: bicompile.batch_invariant(model, dynamic=True)
            print(f"{name:>6} {'batch_invariant':>16}: {changed(model, images)} of {IMAGES} images changed")


if __name__ == "__main__":
    main()
