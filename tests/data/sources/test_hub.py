"""Datasets in the Hugging Face layout: folders here, and the hub through its real client."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from marrow.core.errors import SourceError, UsageError
from marrow.data.sources.hub import select_files, splits_by_name
from marrow.data.sources.listing import find_files

pytest.importorskip("huggingface_hub")
CARD = """---
license: mit
configs:
- config_name: main
  default: true
  data_files:
  - split: train
    path: "data/train-*.parquet"
  - split: test
    path:
    - data/test.csv
- config_name: extra
  data_dir: more
---
# A dataset
"""
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fill(folder: Path, card: str = CARD) -> Path:
    (folder / "data").mkdir(parents=True)
    (folder / "more").mkdir()
    for i in range(2):
        pq.write_table(pa.table({"n": [i]}), folder / "data" / f"train-{i:05}-of-00002.parquet")
    (folder / "data" / "test.csv").write_text("n\n7\n")
    (folder / "more" / "validation.jsonl").write_text('{"n": 9}\n')
    (folder / "README.md").write_text(card)
    return folder


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        ({}, [0, 1, 7]),
        ({"splits": ("test",)}, [7]),
        ({"splits": ("test", "train")}, [7, 0, 1]),
        ({"subset": "main", "splits": ("train",)}, [0, 1]),
        ({"subset": "extra"}, [9]),
    ],
)
def test_a_card_says_which_files_are_read(tmp_path, read_rows, settings, values):
    table, _ = read_rows(fill(tmp_path / "set"), **settings)
    assert table["n"].to_pylist() == values
    assert "README.md" not in table["_file"].to_pylist()


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"splits": ("valid",)}, "no split 'valid'", "train, test"),
        ({"subset": "mian"}, "no subset 'mian'", "main, extra"),
    ],
)
def test_what_a_card_does_not_name_is_refused(tmp_path, settings, message, hint):
    with pytest.raises(SourceError, match=message) as caught:
        find_files(str(fill(tmp_path / "set")), **settings)
    assert hint in str(caught.value.hint)


def test_a_card_that_promises_too_much_is_refused(tmp_path):
    folder = fill(tmp_path / "set")
    (folder / "data" / "test.csv").unlink()
    with pytest.raises(SourceError, match=r"promises data/test\.csv"):
        find_files(str(folder))


def test_a_card_without_yaml_leaves_a_folder_as_it_is(tmp_path, read_rows):
    table, _ = read_rows(fill(tmp_path / "set", "# A plain readme\n"))
    assert table["_file"].to_pylist() == [
        "README.md", "data/test.csv", "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet", "more/validation.jsonl",
    ]  # fmt: skip


def test_a_damaged_card_is_said(tmp_path):
    with pytest.raises(SourceError, match="no YAML"):
        find_files(str(fill(tmp_path / "set", "---\nconfigs: [\n---\n")))


def test_two_subsets_without_a_default_must_be_chosen():
    card = (
        "---\nconfigs:\n- config_name: a\n  data_files: a.csv\n- config_name: b\n  data_files: b.csv\n---\n"
    )
    with pytest.raises(SourceError, match="2 subsets"):
        select_files(["a.csv", "b.csv"], card, "x", "", ())
    assert select_files(["a.csv", "b.csv"], card, "x", "b", ()) == ["b.csv"]


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["a.csv", "b.csv"], {"train": ["a.csv", "b.csv"]}),
        (
            ["train.csv", "dev.csv"],
            {"train": ["train.csv"], "validation": ["dev.csv"]},
        ),
        (["test/a.csv", "training/b.csv"], {"train": ["training/b.csv"], "test": ["test/a.csv"]}),
        (["my-train-data.csv", "contest.csv"], {"train": ["my-train-data.csv"]}),
        (
            ["data/own-00000-of-00002.csv", "data/own-00001-of-00002.csv", "data/train-00000-of-00001.csv"],
            {
                "train": ["data/train-00000-of-00001.csv"],
                "own": ["data/own-00000-of-00002.csv", "data/own-00001-of-00002.csv"],
            },
        ),
    ],
)
def test_names_tell_splits_as_the_hub_reads_them(names, splits):
    assert splits_by_name(names) == splits
    assert list(splits_by_name(names)) == list(splits)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as its client asks for."""

    protocol_version = "HTTP/1.1"
    folder: Path

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path in (
            "/api/datasets/me/set",
            "/api/datasets/me/set/revision/main",
            f"/api/datasets/me/set/revision/{COMMIT}",
        ):
            files = [p for p in sorted(self.folder.rglob("*")) if p.is_file()]
            siblings = [
                {
                    "rfilename": p.relative_to(self.folder).as_posix(),
                    "size": p.stat().st_size,
                    "blobId": f"{i:040}",
                }
                for i, p in enumerate(files)
            ]
            body = {"id": "me/set", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            self.answer(200, json.dumps(body).encode(), Content_Type="application/json")
        elif path.startswith("/api/datasets/me/set/revision/"):
            self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
        elif path.startswith("/api/datasets/me/gated"):
            self.answer(403, b"{}", X_Error_Code="GatedRepo")
        elif path.startswith(f"/datasets/me/set/resolve/{COMMIT}/"):
            file = self.folder / path.split(COMMIT + "/")[1]
            self.answer(200, file.read_bytes(), ETag=f'"{file.name}"', X_Repo_Commit=COMMIT)
        else:
            self.answer(404, b"{}", X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment in which the client finds this hub, and a cache of its own."""
    handler = type("OneHub", (Hub,), {"folder": fill(tmp_path / "served")})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(tmp_path / "cache"),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "HF_HUB_DISABLE_XET": "1",
    }
    server.shutdown()
    server.server_close()
    thread.join()


PROGRAM = """
import json, sys
from pathlib import Path
import pyarrow.parquet as pq
from marrow.core.errors import MarrowError
from marrow.data.config import DataRecipe
from marrow.data.ingest import ingest
from marrow.data.sources.listing import fingerprint
answers = []
for source, settings in json.loads(sys.argv[1]):
    recipe = DataRecipe(source=source, **{k: tuple(v) if k == "splits" else v for k, v in settings.items()})
    out = Path(sys.argv[2]) / f"out-{len(answers)}"
    out.mkdir(parents=True)
    try:
        key = fingerprint(recipe)
        ingest(recipe, out)
        rows = [row for path in sorted(out.glob("rows-*")) for row in pq.read_table(path).to_pylist()]
        answers.append({"key": key, "n": [row["n"] for row in rows], "files": [row["_file"] for row in rows]})
    except MarrowError as error:
        answers.append({"error": type(error).__name__, "text": error.message, "hint": error.hint})
print(json.dumps(answers))
"""  # the client reads its settings when it is imported, so that each setting needs a process


def ask(
    environment: dict[str, str], folder: Path, *sources: tuple[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, json.dumps(sources), str(folder)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_dataset_of_the_hub_gives_its_rows_and_again_from_the_cache(tmp_path, hub):
    name = "hf://datasets/me/set"
    online = ask(
        hub, tmp_path / "a",
        (name, {}), (f"{name}@{COMMIT}", {"splits": ["test"]}), (name, {"subset": "extra"}),
        (f"{name}/data", {}), (f"{name}@nowhere", {}), ("hf://datasets/me/gated", {}),
        ("hf://datasets/no/such", {}), ("hf://me/set", {}), (name, {"splits": ["none"]}),
    )  # fmt: skip
    assert online[0]["n"] == [0, 1, 7]
    assert online[0]["files"][2] == "data/test.csv"
    assert (online[1]["n"], online[2]["n"]) == ([7], [9])
    assert [answer.get("error") for answer in online[4:]] == [
        "SourceError", "NotPermitted", "SourceError", "UsageError", "SourceError",
    ]  # fmt: skip
    assert "no such revision" in online[4]["text"]
    assert "gated" in online[5]["text"] and "HF_TOKEN" in online[5]["hint"]
    assert "no such dataset" in online[6]["text"]
    assert all(answer.get("hint") for answer in online[4:])
    offline = ask({**hub, "HF_HUB_OFFLINE": "1"}, tmp_path / "b", (name, {}), ("hf://datasets/me/other", {}))
    assert offline[0]["n"] == [0, 1, 7]
    assert offline[1]["error"] == "Unreachable"
    assert "copy the dataset's folder" in offline[1]["hint"]


@pytest.mark.slow
def test_what_the_cache_has_needs_no_hub_that_answers(tmp_path, hub):
    first = ask(hub, tmp_path / "a", ("hf://datasets/me/set", {}))
    gone = {**hub, "HF_ENDPOINT": "http://127.0.0.1:9"}
    again, other = ask(gone, tmp_path / "b", ("hf://datasets/me/set", {}), ("hf://datasets/me/else", {}))
    assert again == first[0]
    assert other["error"] == "Unreachable"


def test_without_the_extra_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match="not installed") as caught:
        find_files("hf://datasets/me/set")
    assert "marrow[hub]" in str(caught.value.hint)
