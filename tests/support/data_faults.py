"""kill -9 at random moments of the data steps, again and again, and a comparison of what comes out.

    python tests/support/data_faults.py FOLDER --kills 10

A driver forks victims, so that hundreds of them cost less than hundreds of Pythons. Each goes on in the
store that the one before left; where one reaches the end, its artifacts must be those of a run that
nobody killed, bit for bit, and a new store is begun.
"""

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from marrow_process import write_csv

RECIPE = {"text": "{title}: {body}"}


def outcome(folder: Path, *, kills: int) -> dict[str, int]:
    """Run the driver in a process of its own, which has no threads when it forks."""
    done = subprocess.run(
        [sys.executable, __file__, str(folder), "--kills", str(kills)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, int] = json.loads(done.stdout)
    return told


def run_steps(home: Path, source: Path) -> list[str]:
    """Run the data steps through the store; return the ids of their artifacts, which hash their bytes."""
    from marrow.core.records import Parent
    from marrow.data.clean import clean
    from marrow.data.config import DataRecipe
    from marrow.data.ingest import ingest
    from marrow.data.shards import train_tokenizer, write_shards
    from marrow.data.shards_config import ShardsRecipe
    from marrow.data.split import split
    from marrow.store.steps import Step, run_step
    from marrow.store.store import Store
    from marrow.text.config import TokenizerRecipe

    data = DataRecipe(source=str(source), **RECIPE)
    ids: list[str] = []
    with Store.open(home) as store:

        def step(kind: str, build: Any, **parents: str) -> str:
            roles = [Parent(role, one) for role, one in parents.items()]
            done = run_step(store, Step(kind, build, parents=roles, config=kind))
            assert not store.verify(done.artifact), "what is published is whole"
            ids.append(done.artifact.id)
            return done.artifact.id

        rows = step("ingest", lambda work: ingest(data, work.out))
        documents = step("clean", lambda work: clean(data, work.inputs["rows"], work.out), rows=rows)
        parts = step(
            "split", lambda work: split(data, work.inputs["documents"], work.out), documents=documents
        )
        tokenizer = step(
            "tokenizer",
            lambda work: train_tokenizer(TokenizerRecipe(vocab_size=512), work.inputs["split"], work.out),
            split=parts,
        )
        step(
            "shards",
            lambda work: write_shards(
                ShardsRecipe(context=64), work.inputs["split"], work.inputs["tokenizer"], work.out
            ),
            split=parts,
            tokenizer=tokenizer,
        )
    return ids


def victim(home: Path, source: Path, answer: Path) -> int:
    """Fork a process that runs the steps and leaves the ids."""
    if child := os.fork():
        return child
    try:
        ids = run_steps(home, source)
        temporary = answer.with_suffix(".tmp")
        temporary.write_text(json.dumps(ids))
        temporary.rename(answer)
        os._exit(0)
    finally:  # also where it failed: only the driver goes on in the code that called this
        sys.excepthook(*sys.exc_info()) if sys.exc_info()[0] else None
        os._exit(1)


def drive(folder: Path, kills: int) -> dict[str, int]:
    """Kill victims until there were so many kills; the last one is let live."""
    source = folder / "notes.csv"
    write_csv(source, 400)
    answer = folder / "answer.json"
    began = time.monotonic()
    child = victim(folder / "calm", source, answer)
    assert os.waitpid(child, 0)[1] == 0
    lasted_s = time.monotonic() - began
    calm = json.loads(answer.read_text())
    draw = random.Random(0)
    home, done, finished = folder / "home", 0, 0
    while True:
        answer.unlink(missing_ok=True)
        child = victim(home, source, answer)
        if done < kills:
            time.sleep(draw.uniform(0, lasted_s))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL), f"a victim failed by itself: {status}"
        if status:
            done += 1
        if answer.exists():
            assert json.loads(answer.read_text()) == calm, "the end is not that of the run nobody killed"
            finished += 1
            shutil.rmtree(home)
            if done >= kills:
                return {"kills": done, "finished": finished}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, required=True)
    options = parser.parse_args()
    for layer in ("data.clean", "data.ingest", "data.shards", "data.split", "store.steps", "store.store"):
        importlib.import_module(f"marrow.{layer}")  # once, for all victims
    print(json.dumps(drive(options.folder, options.kills)))
