"""`marrow complete`: a beginning from the command line, a pipe or a terminal, and the same text after it."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest

from marrow.cli.main import run
from marrow.core.records import Sampling
from marrow.serve.config import ServeRecipe
from marrow.serve.engine import Engine
from marrow.serve.sequence import Request

pytestmark = pytest.mark.usefixtures("small_engine")

RECIPE = ServeRecipe(dtype="fp32", kv_memory=1 << 20)
Complete = Callable[..., tuple[int, str, str]]


class Terminal(io.StringIO):
    """What is typed on a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def complete(spoken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Complete:
    """Run the verb; return its exit status, stdout and stderr."""

    def call(
        *arguments: str, stdin: bytes | Terminal = b"", target: Path = spoken / "base"
    ) -> tuple[int, str, str]:
        piped = stdin if isinstance(stdin, Terminal) else io.TextIOWrapper(io.BytesIO(stdin), "utf-8")
        monkeypatch.setattr("sys.stdin", piped)
        capsys.readouterr()
        code = run(["complete", str(target), *arguments])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


def continued(folder: Path, text: str, **sampling: object) -> str:
    with Engine.load(folder, RECIPE, name="oracle") as engine:
        return engine.submit(Request(tuple(engine.encode(text)), Sampling(**sampling))).result().text  # type: ignore[arg-type]


@pytest.mark.parametrize("prompt", ["the loader", "größer\nthan two lines\n", "🙂"])
@pytest.mark.parametrize("way", ["argument", "pipe"])
def test_the_text_is_what_the_model_says_to_all_of_the_prompt(
    complete: Complete, spoken: Path, prompt: str, way: str
) -> None:
    flags = ["--temperature", "0", "--max-tokens", "12"]
    given = {"stdin": prompt.encode()} if way == "pipe" else {"stdin": b"not read"}
    code, out, err = complete(*([prompt] if way == "argument" else []), *flags, **given)
    assert (code, err) == (0, "")
    assert out == continued(spoken / "base", prompt, temperature=0.0, max_tokens=12) + "\n"


def test_on_a_terminal_each_line_is_a_beginning_of_its_own(complete: Complete, spoken: Path) -> None:
    typed = ["the loader", "row"]
    stdin = Terminal("".join(f"{line}\n" for line in typed))
    code, out, err = complete("--temperature", "0", "--max-tokens", "7", stdin=stdin)
    texts = [continued(spoken / "base", line, temperature=0.0, max_tokens=7) for line in typed]
    assert out == "".join(f"> {line}{text}\n" for line, text in zip(typed, texts, strict=True)) + "> "
    assert (code, err) == (0, "base: type a beginning; an empty line or Ctrl-D ends.\n")


def test_an_empty_line_ends(complete: Complete) -> None:
    assert complete(stdin=Terminal("\nnot read\n"))[:2] == (0, "> ")


def test_the_same_seed_draws_the_same_and_another_draws_another(complete: Complete) -> None:
    def drawn(seed: int) -> str:
        code, out, _ = complete("row", "--seed", str(seed), "--temperature", "2", "--max-tokens", "20")
        assert code == 0
        return out

    assert drawn(1) == drawn(1) != drawn(2)


def test_without_a_number_the_text_fills_what_the_context_holds(complete: Complete, spoken: Path) -> None:
    prompt = "the loader reads row 7; "
    with Engine.load(spoken / "base", RECIPE, name="oracle") as engine:
        room = engine.max_tokens(len(engine.encode(prompt)))
    assert 0 < room < 128
    _, out, _ = complete(prompt, "--temperature", "0")
    assert out == continued(spoken / "base", prompt, temperature=0.0, max_tokens=room) + "\n"


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "words"),
    [
        ((), b"caf\xe9", 2, "stdin is not UTF-8"),
        (("the loader reads row " * 60,), b"", 1, "96"),
        (("row", "--max-tokens", "4000"), b"", 1, "4000"),
        (("row", "--max-tokens", "0"), b"", 2, "max-tokens"),
        (("row", "--temperature", "nan"), b"", 1, "temperature"),
        (("row", "--seed", "one"), b"", 2, "seed"),
        (("row", "too", "many"), b"", 2, "unexpected"),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(
    complete: Complete, arguments: tuple[str, ...], stdin: bytes, code: int, words: str
) -> None:
    found, out, err = complete(*arguments, stdin=stdin)
    assert (found, out) == (code, "") and words in err and "Traceback" not in err


def test_a_line_on_a_terminal_that_is_no_text_is_refused(complete: Complete) -> None:
    class Latin(Terminal):
        def readline(self, size: int | None = -1, /) -> str:
            return b"caf\xe9\n".decode("utf-8")

    code, _, err = complete(stdin=Latin())
    assert code == 2 and "stdin is not UTF-8" in err and "hint: " in err


def test_a_model_whose_weights_are_cut_short_is_refused(
    complete: Complete, spoken: Path, tmp_path: Path
) -> None:
    for path in (spoken / "base").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    code, out, err = complete("row", target=tmp_path)
    assert (code, out) == (1, "") and "model.safetensors is damaged" in err and "hint: " in err
