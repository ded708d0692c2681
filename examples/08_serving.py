"""Does a server under load give each client the bytes that a client alone gets?

    python examples/08_serving.py                 # SmolLM2 if its package is installed
    python examples/08_serving.py --tiny          # a small model with random weights

A small HTTP server stands before the continuous batching of transformers, which mixes the requests that have arrived
in every step.  Clients come at random moments, each with one of a few prompts.  Prints, for stock transformers and
``batch_invariant``, how many different answers the prompts got.
"""

import argparse
import json
import random
import threading
import time
import urllib.request
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import bicompile
from bicompile.demo.models import Subject, subject
from bicompile.demo.trials import NEIGHBOURS, PROMPTS
from bicompile.transformers import cover


class Server(ThreadingHTTPServer):
    """Answers ``POST`` of a text with the JSON list of the tokens that follow it greedily."""

    def __init__(self, model: Any, chosen: Subject, tokens: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.chosen, self.waiting = chosen, dict[str, Future]()
        greedy = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=chosen.pad)
        settings = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)
        self.manager = model.init_continuous_batching(greedy, settings)
        self.manager.start()
        for task in (self.deliver, self.serve_forever):
            threading.Thread(target=task, daemon=True).start()

    def deliver(self) -> None:
        """Hand each result to who waits for it."""
        for result in self.manager:
            self.waiting.pop(result.request_id).set_result(result)

    def complete(self, text: str) -> list[int]:
        """The completion; other threads' requests share its steps."""
        name, future = uuid.uuid4().hex, Future()
        self.waiting[name] = future
        self.manager.add_request(self.chosen.encode(text), request_id=name)
        result = future.result(timeout=600)
        if result.error:
            raise RuntimeError(result.error)
        return result.generated_tokens

    def close(self) -> None:
        """Stop serving and generating."""
        self.shutdown()
        self.server_close()
        self.manager.stop(block=True)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        body = json.dumps(self.server.complete(text)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing: the clients count."""


def answers(server: Server, prompts: list[str], clients: int, seconds: float) -> dict[str, set[bytes]]:
    """The different bodies that each prompt got: alone first, then from ``clients`` who come within ``seconds``."""

    def post(text: str, delay: float) -> tuple[str, bytes]:
        time.sleep(delay)
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}", data=text.encode()) as reply:
            return text, reply.read()

    rng = random.Random(0)
    found = {prompt: {post(prompt, 0.0)[1]} for prompt in prompts}
    asked = [rng.choice([*prompts, *NEIGHBOURS]) for _ in range(clients)]
    with ThreadPoolExecutor(clients) as pool:
        for text, body in pool.map(post, asked, [rng.uniform(0, seconds) for _ in asked]):
            found.setdefault(text, set()).add(body)
    return found


def main() -> None:
    """Serve with both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small model with random weights")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10.0, help="in which the clients come")
    parser.add_argument("--tokens", type=int, default=24, help="length of an answer")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    chosen = subject("random" if args.tiny else "auto", print)
    for mode, attention in (("stock", "sdpa"), ("batch_invariant", "batch_invariant")):
        model = chosen.load(getattr(torch, args.dtype)).to(args.device)
        model.set_attn_implementation(attention)
        server = Server(cover(model) if mode == "batch_invariant" else model, chosen, args.tokens)
        try:
            found = answers(server, list(PROMPTS), args.clients, args.seconds)
        finally:
            server.close()
        unique = sum(map(len, found.values()))
        print(f"{mode:>16}: {unique} different answers to {len(found)} prompts from {args.clients} clients", flush=True)


assert bicompile  # makes the attention's name known

if __name__ == "__main__":
    main()
