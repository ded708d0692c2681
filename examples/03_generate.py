"""Does a prompt get the same completion beside a longer one, which pads it?

    python examples/03_generate.py

Prints, for stock transformers and ``batch_invariant``, how many of a small random model's logits change.
"""

import torch
import transformers

import bicompile
from bicompile.testing import difference

TOKENS = 12
PROMPT, OTHER = "A short question", "A question that is quite a bit longer"


def model(attention: str) -> transformers.LlamaForCausalLM:
    """A Llama of two layers with random weights that reads and writes bytes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=257, initializer_range=0.2, eos_token_id=None, pad_token_id=256, **sizes
    )
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()


def logits(model: transformers.LlamaForCausalLM, *texts: str) -> torch.Tensor:
    """The logits ``[TOKENS, 257]`` from which the first text's completion is chosen."""
    width = max(map(len, texts))
    ids = torch.tensor([[256] * (width - len(text)) + list(text.encode()) for text in texts])
    settings = {"max_new_tokens": TOKENS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return torch.stack(model.generate(ids, attention_mask=(ids != 256).long(), **settings).logits, dim=1)[0]


def changed(model: transformers.LlamaForCausalLM) -> int:
    """How many of the logits alone have other bits in company."""
    found = difference(logits(model, PROMPT), logits(model, PROMPT, OTHER))
    return found.elements if found else 0


def main() -> None:
    """Compare the two."""
    total = TOKENS * 257
    print(f"{'stock':>16}: {changed(model('sdpa'))} of {total} logits changed")
    ours = model("batch_invariant")
    with bicompile.eager():  # or compile it: ours.forward = torch.compile(ours.forward, backend="batch_invariant")
        print(f"{'batch_invariant':>16}: {changed(ours)} of {total} logits changed")


if __name__ == "__main__":
    main()
