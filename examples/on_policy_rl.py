"""Is "on-policy" reinforcement learning on-policy?  Only if the trainer computes the sampler's probabilities.

    python examples/on_policy_rl.py                                 # two minutes on two cores
    python examples/on_policy_rl.py --steps 300 --write --plot rl.png
    python examples/on_policy_rl.py --device cuda --hidden 2048 --layers 8 --lr 2e-4

A small Llama learns, from rewards alone, to count on from the last digit of its prompt.  ``generate`` samples with a
cache and left padding, token by token, all prompts in one batch; the trainer recomputes the log-probabilities in one
pass over whole sequences, in micro-batches, and takes a policy gradient step with importance weights.  Printed for
some steps: the reward, and KL(sampler || trainer), once with stock PyTorch, and once with the trainer compiled by
``batch_invariant`` and the sampler in ``bicompile.eager()``, which has the same lowerings.
"""

import argparse
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList

import bicompile
from bicompile.bench import Report, Row, plotting
from bicompile.sampling import SeededSampler

DIGITS = 10  # tokens 0 to 9; the next one pads
PAD = DIGITS
ANSWER = 8  # tokens


@dataclass
class Curves:
    """What one training run showed, step by step."""

    rewards: list[float] = field(default_factory=list)  # share of tokens that count on
    kls: list[float] = field(default_factory=list)  # nats a token, mean over the tokens
    seconds: float = 0.0


@dataclass
class Samples:
    """Sampled sequences: tokens and mask are ``[rows, prompt + ANSWER]``, logits ``[rows, ANSWER, vocabulary]``."""

    tokens: Tensor
    mask: Tensor
    logits: Tensor


def policy(args: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama with random weights, the same for the same arguments."""
    torch.manual_seed(0)
    heads = max(4, args.hidden // 64)
    config = LlamaConfig(
        vocab_size=DIGITS + 1, hidden_size=args.hidden, intermediate_size=3 * args.hidden,
        num_attention_heads=heads, num_key_value_heads=heads // 2, num_hidden_layers=args.layers,
        pad_token_id=PAD, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(args.device, getattr(torch, args.dtype)).eval()


def prompts(rows: int, step: int) -> tuple[Tensor, Tensor]:
    """Digits of 1 to 6 tokens, padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(1, 7, (rows, 1), generator=generator)
    mask = torch.arange(6) >= 6 - lengths
    digits = torch.randint(0, DIGITS, (rows, 6), generator=generator)
    return digits.masked_fill(~mask, PAD), mask.long()


@torch.no_grad()
def sample(model: LlamaForCausalLM, rows: int, step: int, context: AbstractContextManager) -> Samples:
    """Answers, each drawn by a seed of its own, in ``context``."""
    ids, mask = (t.to(model.device) for t in prompts(rows, step))
    sampler = SeededSampler([step * rows + row for row in range(rows)])
    settings = {"max_new_tokens": ANSWER, "return_dict_in_generate": True, "output_logits": True}
    with context:
        out = model.generate(ids, attention_mask=mask, logits_processor=LogitsProcessorList([sampler]), **settings)
    mask = torch.cat([mask, mask.new_ones(rows, ANSWER)], dim=1)
    return Samples(out.sequences, mask, torch.stack(out.logits, dim=1))


def recompute(model: torch.nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    """The logits that each answered token was drawn from, in one pass and with a graph for the gradient."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return logits[:, -ANSWER - 1 : -1].float()


def train_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, samples: Samples, micro: int) -> float:
    """One policy gradient step over all samples; KL(sampler || trainer) before it, in nats a token."""
    answers = samples.tokens[:, -ANSWER:]
    rewards = counts_on(samples.tokens)
    advantages = rewards - rewards.mean(0)
    total = 0.0
    optimizer.zero_grad()
    for at in range(0, len(answers), micro):
        rows = slice(at, at + micro)
        theirs = samples.logits[rows].log_softmax(-1)
        ours = recompute(model, samples.tokens[rows], samples.mask[rows]).log_softmax(-1)
        total += (theirs.exp() * (theirs - ours.detach())).sum().item()
        taken = answers[rows, :, None]
        weights = (ours - theirs).gather(2, taken).squeeze(2).exp()  # 1, were it on-policy
        (-(weights * advantages[rows]).sum() / answers.numel()).backward()
    optimizer.step()
    return total / answers.numel()


def counts_on(tokens: Tensor) -> Tensor:
    """``[rows, ANSWER]``: 1 for each answered digit that is the one before it plus one."""
    before, answers = tokens[:, -ANSWER - 1 : -1], tokens[:, -ANSWER:]
    return ((answers < DIGITS) & (answers == (before + 1) % DIGITS)).float()


def run(mode: str, args: argparse.Namespace) -> Curves:
    """Train from scratch in one mode."""
    model, curves = policy(args), Curves()
    trainer, sampling = model, nullcontext
    if mode == "batch_invariant":
        model.set_attn_implementation("batch_invariant")
        trainer, sampling = torch.compile(model, backend="batch_invariant"), bicompile.eager
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    start = time.perf_counter()
    for step in range(args.steps):
        samples = sample(model, args.rows, step, sampling())
        curves.rewards.append(counts_on(samples.tokens).mean().item())
        curves.kls.append(train_step(trainer, optimizer, samples, args.micro))
        if step % max(args.steps // 10, 1) == 0 or step == args.steps - 1:
            print(f"{mode:>15} step {step:4}: reward {curves.rewards[-1]:.3f}, KL {curves.kls[-1]:.3g}", flush=True)
    curves.seconds = time.perf_counter() - start
    return curves


def main() -> None:
    """Train in both modes and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=64, help="sequences sampled for a step, in one batch")
    parser.add_argument("--micro", type=int, default=16, help="sequences of a micro-batch of the trainer")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plot", metavar="FILE", help="draw the curves (needs matplotlib)")
    parser.add_argument("--write", action="store_true", help="keep the result in examples/benchmarks/results")
    args = parser.parse_args()

    runs = {mode: run(mode, args) for mode in ("stock", "batch_invariant")}
    for mode, curves in runs.items():
        largest = max(abs(kl) for kl in curves.kls)
        print(
            f"{mode:>15}: KL(sampler || trainer) at most {largest:.3g}, last reward {curves.rewards[-1]:.3f}, "
            f"{curves.seconds:.0f} s"
        )
    stock, ours = runs["stock"], runs["batch_invariant"]
    largest = max(abs(kl) for kl in ours.kls)
    curves = {f"{mode}_{name}": getattr(c, name) for mode, c in runs.items() for name in ("rewards", "kls")}
    case = f"policy gradient, {args.steps} steps of {args.rows} sequences, {args.layers} layers, {args.dtype}"
    report = Report("on_policy_rl", args.device)
    report.rows.append(Row(case, "stock transformers", stock.seconds / ours.seconds, largest == 0.0, curves))
    report.summarise("steps with a KL of exactly 0", sum(kl == 0.0 for kl in ours.kls) / args.steps, bar=1.0)
    if args.write:
        print(report.write())
    if args.plot:
        plotting.curves(report.rows, Path(args.plot))


if __name__ == "__main__":
    main()
