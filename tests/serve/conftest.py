"""Tiny models in folders as the export step writes them: random weights, a real tokenizer."""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from marrow.models import huggingface
from marrow.models.config import ModelConfig
from marrow.models.decoder import Decoder
from marrow.serve.app import make_app
from marrow.serve.config import ServeRecipe
from marrow.serve.engine import Engine
from marrow.serve.server import Server, bind, url_of
from marrow.text.chat import ChatTemplate
from marrow.text.tokenizer import Tokenizer

SHAPE = ModelConfig(
    hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_size=8,
    max_positions=2048, initial_std=0.4,
)  # fmt: skip
# A wide spread of weights keeps the likeliest tokens apart by much more than fp32's rounding, so
# that greedy texts can be compared token for token, however the batch was cut.
RECIPE = ServeRecipe(dtype="fp32", max_batch_tokens=64, max_sequences=8, kv_memory=1 << 20)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [f"def read(self, n={n}):\n    return self.data[{n}:{n * 7}]  # größer\n" for n in range(300)]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(TEXTS, 400).save(folder / "tokenizer.json")
    return folder


def write_model(folder: Path, tokenizer_folder: Path, *, qk_norm: bool = False, seed: int = 0) -> Path:
    vocab_size = Tokenizer.load(tokenizer_folder).vocab_size
    config = dataclasses.replace(SHAPE, vocab_size=vocab_size, qk_norm=qk_norm, tie_embeddings=qk_norm)
    huggingface.save(folder, Decoder(config, seed=seed), tokenizer_folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"), tokenizer_folder)


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    return write_model(tmp_path_factory.mktemp("qwen3"), tokenizer_folder, qk_norm=True)


@pytest.fixture(scope="session")
def other_weights(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A second model of the llama's shape."""
    return write_model(tmp_path_factory.mktemp("other"), tokenizer_folder, seed=1)


@pytest.fixture(scope="session")
def chat_model(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    for path in llama.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


Start = Callable[..., Engine]


@pytest.fixture
def start() -> Iterator[Start]:
    """Open engines as `start(folder, max_sequences=2, ...)`; each must end with clean books."""
    engines: list[Engine] = []

    def open_engine(folder: Path, **changes: object) -> Engine:
        engine = Engine.load(folder, dataclasses.replace(RECIPE, **changes), name="tiny")  # type: ignore[arg-type]
        engines.append(engine)
        return engine

    yield open_engine
    for engine in engines:
        if engine.is_ready:
            assert engine.drain(20)
            until = time.monotonic() + 5  # the gauges may be one step behind the answers
            while engine.metrics.blocks_used and time.monotonic() < until:
                time.sleep(0.001)
            assert engine.metrics.blocks_used == 0
        engine.close()


@pytest.fixture
def serve(start: Start) -> Iterator[Callable[..., str]]:
    """Serve a folder from a thread of this process: `serve(folder, max_waiting=0, ...)` is its URL."""
    stops: list[Callable[[], None]] = []

    def open_server(folder: Path, **changes: object) -> str:
        engine = start(folder, **changes)
        listener = bind("127.0.0.1", 0)
        ready = threading.Event()
        server = Server(make_app(engine, ChatTemplate.load(folder)), engine, ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        assert ready.wait(20)

        def stop() -> None:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()

        stops.append(stop)
        return url_of(listener)

    yield open_server
    for stop in stops:
        stop()
