"""Is a benchmark's score a property of the model, or of the batch size it was measured with?

    python examples/07_evaluation.py                # SmolLM2 if its package is installed
    python examples/07_evaluation.py --lm-eval      # by lm-evaluation-harness (pip install lm_eval)

Multiple choice as lm-evaluation-harness scores it: an answer's score is the sum of the log-probabilities of its tokens
behind the question; the greatest wins.  Prints, for stock transformers and ``batch_invariant``, how many of the scores
have other bits in batches than alone, how many answers that turns, and the accuracy.
"""

import argparse
import contextlib
from typing import Any

import torch

import bicompile
from bicompile.demo.models import Subject, subject

QUESTIONS = (
    ("The capital of France is", (" Paris", " Rome", " Berlin", " Madrid")),
    ("Water is made of hydrogen and", (" oxygen", " iron", " salt", " gold")),
    ("Two plus two is", (" four", " five", " a colour", " seven")),
    ("The opposite of hot is", (" cold", " warm", " very hot indeed", " blue")),
    ("A group of lions is called a", (" pride", " herd", " school of fish", " flock")),
    ("The first man on the moon was", (" Neil Armstrong", " Albert Einstein", " Napoleon", " Yuri Gagarin")),
    ("Bees make", (" honey", " milk", " paper and ink", " stones")),
    ("The largest ocean on Earth is the", (" Pacific", " Atlantic", " Indian", " Mediterranean Sea")),
)  # the first one is right
Scores = list[float]  # of every answer to every question, in order


@torch.inference_mode()
def our_loop(model: Any, chosen: Subject, batch_size: int) -> Scores:
    """The scores in batches of so many answers, padded on the right."""
    pairs = [(chosen.encode(q), chosen.encode(q + answer)) for q, answers in QUESTIONS for answer in answers]
    scores = []
    for first in range(0, len(pairs), batch_size):
        part = pairs[first : first + batch_size]
        width = max(len(whole) for _, whole in part)
        ids = torch.tensor([whole + [chosen.pad] * (width - len(whole)) for _, whole in part])
        mask = torch.tensor([[1] * len(whole) + [0] * (width - len(whole)) for _, whole in part])
        logs = model(ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
        for row, (question, whole) in enumerate(part):
            places = range(len(question), len(whole))
            scores.append(sum(logs[row, place - 1, whole[place]].item() for place in places))
    return scores


def harness(model: Any, chosen: Subject, batch_size: int) -> Scores:
    """The same questions, by lm-evaluation-harness."""
    import lm_eval
    from datasets import Dataset
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    rows = [{"question": question, "choices": list(answers)} for question, answers in QUESTIONS]
    task = {
        "task": "own",
        "output_type": "multiple_choice",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
    }
    task |= {"test_split": "test", "doc_to_text": "question", "doc_to_choice": "choices", "doc_to_target": 0}
    task |= {"target_delimiter": "", "metric_list": [{"metric": "acc"}]}
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = lm_eval.simple_evaluate(wrapped, tasks=[task], bootstrap_iters=0, verbosity="ERROR")
    return [score for sample in found["samples"]["own"] for score, _ in sample["filtered_resps"]]


def right(scores: Scores) -> list[bool]:
    """Whether each question's first answer has the greatest score."""
    each = [scores[first : first + 4] for first in range(0, len(scores), 4)]
    return [four[0] == max(four) for four in each]


def main() -> None:
    """Evaluate with several batch sizes, stock and ours."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small model with random weights")
    parser.add_argument("--lm-eval", action="store_true", help="let lm-evaluation-harness do it (not --tiny)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=(2, 3, 5, 8, 16, 32))
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    args = parser.parse_args()
    chosen = subject("random" if args.tiny else "auto", print)
    evaluate = harness if args.lm_eval else our_loop
    model = chosen.load(getattr(torch, args.dtype))
    for mode, attention in (("stock", "sdpa"), ("batch_invariant", "batch_invariant")):
        model.set_attn_implementation(attention)
        with bicompile.eager() if mode == "batch_invariant" else contextlib.nullcontext():
            alone, *others = (evaluate(model, chosen, size) for size in (1, *args.batch_sizes))
        changed = sum(a != b for other in others for a, b in zip(alone, other, strict=True))
        turned = sum(a != b for other in others for a, b in zip(right(alone), right(other), strict=True))
        print(
            f"{mode:>16}: {changed} of {len(alone) * len(others)} scores changed, {turned} answers turned, "
            f"accuracy {sum(right(alone)) / len(QUESTIONS):.3f} alone"
        )


if __name__ == "__main__":
    main()
