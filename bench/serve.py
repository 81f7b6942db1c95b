"""Serving: Marrow's engine against transformers' `generate`, the same weights and requests.

    python bench/serve.py            # a table, and bench/results/serve.json

64 requests with prompts of 8 to 96 tokens and 16 to 96 new tokens each, greedy, fp32. transformers
pads each batch to its longest prompt and runs it until its longest answer ends (its own way to
batch); Marrow batches continuously. Both are told to ignore the end token, so that they draw the
same number of tokens. Runs are interleaved; the figure is tokens asked for per CPU-second, the
median over the repetitions. The last line is the engine behind HTTP, driven by 8 streaming clients,
the clients' own CPU time included. Needs `transformers` (bench/requirements-serve.txt).
"""

import argparse
import json
import random
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from marrow.core.records import Sampling
from marrow.models import huggingface
from marrow.models.config import ModelConfig
from marrow.models.decoder import Decoder
from marrow.serve.app import make_app
from marrow.serve.config import ServeRecipe
from marrow.serve.engine import Engine
from marrow.serve.load import Load, drive
from marrow.serve.sequence import Request
from marrow.serve.server import Server, bind, url_of
from marrow.text.tokenizer import Tokenizer

BATCH = 16
RESULTS = Path(__file__).parent / "results" / "serve.json"


def make_folder(folder: Path) -> Path:
    """Write a model of the quickstart's shape with random weights."""
    words = [f"def f{n}(self, x={n}): return self.items[{n}:x]  # part {n * 7}\n" for n in range(3000)]
    Tokenizer.train(words, 2048).save(folder / "tokenizer.json")
    vocab_size = Tokenizer.load(folder).vocab_size
    huggingface.save(folder / "model", Decoder(ModelConfig(vocab_size=vocab_size)), folder)
    return folder / "model"


def make_requests(vocab_size: int, count: int) -> list[tuple[list[int], int]]:
    """Draw prompts of 8 to 96 tokens and lengths of 16 to 96 new ones, the same each time."""
    rng = random.Random(0)
    return [
        ([rng.randrange(64, vocab_size) for _ in range(rng.randrange(8, 97))], rng.randrange(16, 97))
        for _ in range(count)
    ]


def run_marrow(engine: Engine, requests: list[tuple[list[int], int]]) -> list[list[int]]:
    """Submit all at once; the engine decides who runs."""
    streams = [
        engine.submit(Request(tuple(prompt), Sampling(most, temperature=0, ignore_eos=True)))
        for prompt, most in requests
    ]
    return [list(stream.result().token_ids) for stream in streams]


def run_transformers(model: Any, requests: list[tuple[list[int], int]], pad_id: int) -> list[list[int]]:
    """Go through batches in order, padded on the left."""
    texts = []
    for begin in range(0, len(requests), BATCH):
        some = requests[begin : begin + BATCH]
        longest = max(len(prompt) for prompt, _ in some)
        ids = torch.tensor([[pad_id] * (longest - len(prompt)) + prompt for prompt, _ in some])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in some])
        most = max(most for _, most in some)
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=most,
            min_new_tokens=most,
            do_sample=False,
            pad_token_id=pad_id,
        )
        texts += [
            row[longest : longest + wanted].tolist() for row, (_, wanted) in zip(out, some, strict=True)
        ]
    return texts


def timed(function: Any, *arguments: Any) -> tuple[Any, float, float]:
    """Return a call's result, its wall seconds and its CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function(*arguments)
    return result, time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--requests", type=int, default=64)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        folder = make_folder(Path(name))
        recipe = ServeRecipe(dtype="fp32", max_sequences=BATCH, prefix_cache=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with Engine.load(folder, recipe, name="bench") as engine:
            requests = make_requests(engine.config.vocab_size, options.requests)
            tokens = sum(most for _, most in requests)
            runs: dict[str, list[tuple[float, float]]] = {"marrow": [], "transformers": []}
            for repeat in range(options.repeats + 1):  # the first warms up
                ours, *ours_s = timed(run_marrow, engine, requests)
                theirs, *theirs_s = timed(run_transformers, model, requests, engine.tokenizer.pad_id)
                if repeat:
                    runs["marrow"].append((ours_s[0], ours_s[1]))
                    runs["transformers"].append((theirs_s[0], theirs_s[1]))
            agree = sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(requests)
            http = over_http(engine, options.requests)
        ledger = engine.ledger()
    report(runs, tokens, agree, http, {name: part.seconds for name, part in ledger.parts.items()})


def over_http(engine: Engine, count: int) -> dict[str, Any]:
    """Drive the same engine through its server, from this process."""
    listener = bind("127.0.0.1", 0)
    ready = threading.Event()
    server = Server(make_app(engine, None), engine, ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    ready.wait(30)
    cpu = time.process_time()
    body = {"temperature": 0, "ignore_eos": True}
    facts, _ = drive(url_of(listener), Load(["def f1(self", "return self"], count, 8, None, 56, body=body))
    facts["cpu_s"] = time.process_time() - cpu
    server.should_exit = True
    thread.join()
    return facts


def report(
    runs: dict[str, list[tuple[float, float]]],
    tokens: int,
    agree: float,
    http: dict[str, Any],
    ledger: dict[str, float],
) -> None:
    """Print the table and write the results."""
    rates = {
        name: {
            "tokens_per_cpu_s": statistics.median(tokens / cpu for _, cpu in values),
            "tokens_per_s": statistics.median(tokens / wall for wall, _ in values),
        }
        for name, values in runs.items()
    }
    peer = rates["transformers"]["tokens_per_cpu_s"]
    print(f"{'':<20}{'tok/CPU-s':>12}{'tok/s':>10}{'x peer':>8}")
    for name, rate in rates.items():
        ratio = rate["tokens_per_cpu_s"] / peer
        print(f"{name:<20}{rate['tokens_per_cpu_s']:>12.0f}{rate['tokens_per_s']:>10.0f}{ratio:>8.2f}")
    behind, rate_s = http["completion_tokens"] / http["cpu_s"], http["completion_tokens_per_s"]
    print(f"{'marrow, HTTP + load':<20}{behind:>12.0f}{rate_s:>10.0f}{behind / peer:>8.2f}")
    latency = ", ".join(f"{name} p50 {http[name]['p50']:.1f}" for name in ("ttft_ms", "itl_ms"))
    print(f"texts that agree: {agree:.0%}   {latency}")
    total = sum(ledger.values())
    parts = sorted(ledger.items(), key=lambda part: -part[1])
    print("engine's time: " + ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in parts))
    results = {"rates": rates, "tokens": tokens, "agree": agree, "http": http}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
