"""`marrow run` from end to end on a small CSV folder: results, cache, lineage, faults."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from marrow_process import Marrow, command, environment

from marrow.store.store import Store

pytestmark = pytest.mark.slow
STEPS = ["ingest", "clean", "split", "tokenizer", "shards", "train", "evaluate", "export", "serve", "report"]


def with_source(tiny: Path, source: Path) -> list[str | Path]:
    return ["run", tiny, "--set", f"data.source={source}"]


def test_a_run_tells_everything_as_json(marrow: Marrow, tiny: Path, csv_source: Path, finished: Path) -> None:
    done = marrow(*with_source(tiny, csv_source), "--json", home=finished)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [step["name"] for step in told["steps"]] == STEPS
    scores = {score["name"]: score["bits_per_byte"] for score in told["scores"]}
    assert 0 < scores["this model"] < 8
    assert len(told["samples"]) == 2
    assert all(sample["before"] != sample["after"] for sample in told["samples"])
    assert told["serving"]["errors"] == 0
    assert told["serving"]["requests"] == 8


def test_the_second_run_builds_nothing_and_loads_no_torch(
    tiny: Path, csv_source: Path, home: Path, tmp_path: Path
) -> None:
    code = (
        "import sys\nfrom marrow.cli.main import run\n"
        "status = run(sys.argv[1:])\nsys.exit(status or ('torch' in sys.modules and 'torch was loaded'))"
    )
    done = subprocess.run(
        [command()[0], "-c", code, *map(str, with_source(tiny, csv_source))],
        capture_output=True,
        text=True,
        env=environment(home),
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cached") == len(STEPS)
    assert "built" not in done.stdout


def test_a_new_learning_rate_reruns_only_what_follows(
    marrow: Marrow, tiny: Path, csv_source: Path, home: Path
) -> None:
    done = marrow(*with_source(tiny, csv_source), "--set", "train.lr=0.01", "--json", home=home)
    assert done.returncode == 0, done.stderr
    status = {step["name"]: step["status"] for step in json.loads(done.stdout)["steps"]}
    cut = STEPS.index("train")
    assert all(status[step] == "cached" for step in STEPS[:cut])
    assert all(status[step] == "built" for step in STEPS[cut:])


def test_the_same_recipe_twice_gives_the_same_weights(
    marrow: Marrow, tiny: Path, csv_source: Path, finished: Path, tmp_path: Path
) -> None:
    done = marrow(*with_source(tiny, csv_source), home=tmp_path / "other")
    assert done.returncode == 0, done.stderr
    with Store.open(finished) as one, Store.open(tmp_path / "other") as two:
        assert one.resolve("tiny").files == two.resolve("tiny").files


def test_a_damaged_blob_is_found_by_hash_and_rebuilt(
    marrow: Marrow, tiny: Path, csv_source: Path, home: Path
) -> None:
    with Store.open(home) as store:
        shards = store.catalog.latest(kind="shards")[0]
        blob = store.blobs.place(next(f.sha256 for f in shards.files if f.name.endswith(".arrow")))
        before = store.resolve("tiny").id
    blob.chmod(0o644)
    with blob.open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    done = marrow(*with_source(tiny, csv_source), "--json", home=home)
    assert done.returncode == 0, done.stderr
    assert "is damaged: rebuilding" in done.stderr
    status = {step["name"]: step["status"] for step in json.loads(done.stdout)["steps"]}
    assert status["shards"] == "rebuilt"
    assert {status[step] for step in STEPS if step != "shards"} == {"cached"}  # the same bytes came back
    with Store.open(home) as store:
        assert store.resolve("tiny").id == before
        assert not store.verify(store.get(shards.id))


def test_two_runs_at_once_both_finish_and_agree(
    tiny: Path, csv_source: Path, tmp_path: Path, finished: Path
) -> None:
    home = tmp_path / "shared"
    runs = [start(with_source(tiny, csv_source), home) for _ in range(2)]
    told = [run.communicate(timeout=250) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], told
    with Store.open(home) as store, Store.open(finished) as alone:
        for kind in STEPS[:8]:  # serve and report hold timings
            artifacts = store.catalog.latest(kind=kind)
            assert len(artifacts) == 1, f"{kind} was built twice"
            assert not store.verify(artifacts[0])
        assert store.resolve("tiny").files == alone.resolve("tiny").files


CHANGES = {  # a setting that makes the step, and what follows, run anew
    "ingest": "data.row_group_bytes=4MiB",
    "clean": "data.dedup.similarity=0.7",
    "split": "data.split.seed=5",
    "tokenizer": "tokenizer.min_frequency=3",
    "shards": "shards.max_padding=0.5",
    "train": "train.steps=40",
    "evaluate": "evaluate.stride=16",
    "export": "train.steps=13",
    "serve": "load.max_tokens=9",
    "report": "report.max_tokens=17",
}


@pytest.mark.parametrize("step", CHANGES)
def test_killed_in_any_step_the_next_run_goes_on(
    step: str, marrow: Marrow, tiny: Path, csv_source: Path, home: Path, finished: Path
) -> None:
    arguments = [*with_source(tiny, csv_source), "--set", CHANGES[step]]
    run = start(arguments, home)
    wait_for_step(home, run, step)
    time.sleep(0.3 if step in ("train", "serve", "evaluate", "report") else 0.01)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    again = marrow(*arguments, "--json", home=home)
    assert again.returncode == 0, again.stderr
    with Store.open(home) as store:
        assert list((home / "staging").iterdir()) == []
        assert list((home / "work").iterdir()) == []
        for artifact in store.catalog.latest(limit=1000):
            assert not store.verify(artifact)
    assert_no_server_is_left(home)


def start(arguments: list[str | Path], home: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command(*arguments),
        env=environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(home: Path, run: "subprocess.Popen[str]", step: str) -> None:
    """Wait until the catalog says that the newest run is in a step."""
    deadline = time.monotonic() + 120
    with Store.open(home) as store:
        while time.monotonic() < deadline:
            if run.poll() is not None:
                return  # faster than the look: the run ended before the kill, which must do no harm
            newest = store.runs.latest(limit=1)[0]
            if newest.status == "running" and any(s.name == step for s in newest.steps):
                return
            time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached")


def assert_no_server_is_left(home: Path) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if not any(str(home).encode() in environ_of(pid) for pid in pids()):
            return
        time.sleep(0.1)
    raise AssertionError("a server outlived its run")


def pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]


def environ_of(pid: int) -> bytes:
    try:
        found = Path(f"/proc/{pid}/environ").read_bytes()
        return found if b"MARROW_HOME" in found else b""
    except OSError:
        return b""


def test_ctrl_c_ends_with_130_and_the_next_run_goes_on(
    marrow: Marrow, tiny: Path, csv_source: Path, home: Path
) -> None:
    arguments = [*with_source(tiny, csv_source), "--set", "train.steps=150"]
    run = start(arguments, home)
    wait_for_step(home, run, "train")
    time.sleep(3)  # into the steps, past the import of torch
    run.send_signal(signal.SIGINT)
    out, told = run.communicate(timeout=60)
    assert run.returncode == 130, told
    assert "interrupted" in told
    assert "hint: " in told
    assert "Traceback" not in told
    assert out == ""
    with Store.open(home) as store:
        assert store.runs.latest(limit=1)[0].status == "interrupted"
    again = marrow(*arguments, home=home)
    assert again.returncode == 0, again.stderr


def test_lineage_reaches_the_source(marrow: Marrow, finished: Path) -> None:
    told = json.loads(marrow("lineage", "tiny", "--json", home=finished).stdout)
    kinds = {artifact["id"]: artifact["kind"] for artifact in told["artifacts"]}
    assert kinds[told["root"]] == "export"
    assert set(kinds.values()) == {"export", "train", "shards", "tokenizer", "split", "clean", "ingest"}
    (edge,) = (e for e in told["edges"] if e["role"] == "shards")
    assert edge["detail"]["samples"] == [0, 48]
    tree = marrow("lineage", "tiny", home=finished).stdout
    assert tree.index("export") < tree.index("train") < tree.index("ingest")
    assert "digraph" in marrow("lineage", "tiny", "--dot", home=finished).stdout
    rows = next(artifact["id"] for artifact in told["artifacts"] if artifact["kind"] == "ingest")
    down = marrow("lineage", rows[:12], "--down", home=finished).stdout
    assert "export" in down
    assert "report" in down


def test_why_adds_up(marrow: Marrow, finished: Path) -> None:
    told = json.loads(marrow("why", "tiny", "--json", home=finished).stdout)
    whole, *steps = (entry["ledger"] for entry in told)
    assert [ledger["name"] for ledger in steps] == STEPS
    for ledger in (whole, *steps):
        parts = sum(part["seconds"] for part in ledger["parts"].values())
        assert parts == pytest.approx(ledger["wall_s"], rel=1e-6)
    train = next(ledger for ledger in steps if ledger["name"] == "train")
    assert {"data wait", "forward", "backward", "optimiser", "checkpoint"} <= set(train["parts"])
    assert "bottleneck:" in marrow("why", "tiny", home=finished).stdout


def test_complete_prints_only_the_completion(marrow: Marrow, finished: Path) -> None:
    told = marrow("complete", "tiny", "the loader", "--max-tokens", "8", "--seed", "3", home=finished)
    again = marrow("complete", "tiny", "--max-tokens", "8", "--seed", "3", home=finished, text="the loader")
    assert told.returncode == again.returncode == 0, told.stderr + again.stderr
    assert told.stdout.strip()
    assert told.stdout == again.stdout


def test_chat_refuses_a_base_model(marrow: Marrow, finished: Path) -> None:
    told = marrow("chat", "tiny", home=finished)
    assert told.returncode == 1
    assert "base model" in told.stderr
    assert "hint: marrow complete tiny" in told.stderr


def test_export_is_a_folder_that_transformers_loads(marrow: Marrow, finished: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from marrow.kernels.attention.attention import attention, pack
    from marrow.models import huggingface

    folder = tmp_path / "model"
    told = marrow("export", "tiny", folder, home=finished)
    assert told.returncode == 0, told.stderr
    assert told.stdout.strip() == str(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = huggingface.load(folder, torch.float32)
    ids_N = torch.tensor(AutoTokenizer.from_pretrained(folder).encode("the loader reads every row"))
    positions_N = torch.arange(len(ids_N))
    packing = pack(torch.zeros(len(ids_N), dtype=torch.int32), len(ids_N))
    with torch.no_grad():
        hidden_NC = ours(ids_N, positions_N, lambda layer, q, k, v: attention(q, k, v, packing))
        # Equal but for the order of fp32 additions: a few ulp of logits of order 1.
        torch.testing.assert_close(
            ours.logits(hidden_NC), theirs(ids_N[None]).logits[0], atol=2e-5, rtol=2e-5
        )
    assert marrow("export", "tiny", folder, home=finished).returncode == 2  # never over existing files


def test_the_report_is_one_page_that_stands_alone(finished: Path) -> None:
    page = (finished / "tiny.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    for title in ("What it learned", "What it writes", "Serving", "Where the time went", "Lineage"):
        assert title in page
    assert 'src="http' not in page


def test_ctrl_c_ends_a_server_with_130_and_no_word_about_unfinished_work(finished: Path) -> None:
    server = start(["serve", "tiny", "--port", "0", "--json"], finished)
    assert server.stdout is not None
    assert json.loads(server.stdout.readline())["model"] == "tiny"
    server.send_signal(signal.SIGINT)
    _, told = server.communicate(timeout=60)
    assert server.returncode == 130, told
    assert told.strip() == "drained and stopped"
