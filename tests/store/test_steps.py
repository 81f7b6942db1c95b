import mmap
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from marrow.core.errors import DamagedBlob, DiskFull
from marrow.core.records import Artifact, Parent
from marrow.core.span import span
from marrow.store.steps import COST, Step, Workspace, run_step
from marrow.store.store import Store


class Work:
    """A build that counts how often it ran and writes its texts."""

    def __init__(self, **texts: str) -> None:
        self.texts = texts
        self.count = 0

    def __call__(self, workspace: Workspace) -> Mapping[str, Any]:
        self.count += 1
        for name, text in self.texts.items():
            (workspace.out / name).write_text(text)
        return {"files": len(self.texts)}


def damage(store: Store, artifact: Artifact, which: int = 0) -> str:
    digest = artifact.files[which].sha256
    path = store.blobs.place(digest)
    path.chmod(0o644)
    path.write_bytes(b"\0" * path.stat().st_size)
    return digest


# What is found again, and what is not


def test_a_step_is_built_once_and_then_found(store: Store, home: Path) -> None:
    work = Work(a="x")
    step = Step("rows", work, config={"rows": 3})
    first = run_step(store, step)
    assert (first.status, work.count) == ("built", 1)
    second = run_step(store, step)
    assert (second.status, second.artifact, work.count) == ("cached", first.artifact, 1)
    with Store.open(home) as other:
        assert run_step(other, step).status == "cached"


def test_everything_a_step_depends_on_is_in_its_key(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text("one = 1")
    one, two = (run_step(store, Step(kind, Work(a=kind))).artifact for kind in ("one", "two"))
    base = Step(
        "rows",
        Work(a="x"),
        parents=(Parent("rows", one.id),),
        config={"rows": 3, "nested": {"a": [1, 2]}},
        sources=(source,),
        environment={"torch": "2.13.0"},
    )
    keys = {
        base.key(),
        replace(base, kind="shards").key(),
        replace(base, parents=(Parent("rows", two.id),)).key(),
        replace(base, parents=(Parent("other", one.id),)).key(),
        replace(base, parents=()).key(),
        replace(base, config={"rows": 3, "nested": {"a": [2, 1]}}).key(),
        replace(base, sources=()).key(),
        replace(base, environment={"torch": "2.13.1"}).key(),
    }
    before = base.key()
    source.write_text("one = 2")
    assert len(keys | {base.key()}) == 9
    source.write_text("one = 1")
    assert base.key() == before


def test_what_does_not_change_the_work_is_not_in_its_key(store: Store) -> None:
    one, two = (run_step(store, Step(kind, Work(a=kind))).artifact for kind in ("one", "two"))
    parents = (Parent("a", one.id), Parent("b", two.id))
    base = Step("rows", Work(a="x"), parents=parents, config={"x": 1, "y": 2})
    for same in (
        replace(base, name="a nicer name"),
        replace(base, build=Work(b="other code is the sources' matter")),
        replace(base, parents=parents[::-1]),
        replace(base, config={"y": 2, "x": 1}),
    ):
        assert same.key() == base.key()


def test_two_roles_of_one_name_are_a_mistake(store: Store) -> None:
    one = run_step(store, Step("one", Work(a="x"))).artifact
    with pytest.raises(AssertionError, match="roles must differ"):
        Step("rows", Work(), parents=(Parent("a", one.id), Parent("a", one.id)))


def test_changing_one_step_rebuilds_only_what_follows(store: Store) -> None:
    def chain(middle: int) -> list[str]:
        parents: tuple[Parent, ...] = ()
        statuses = []
        for kind, config in (("rows", 0), ("clean", 0), ("train", middle), ("export", 0)):
            step = Step(kind, Work(a=f"{kind}{config}"), parents=parents, config=config)
            result = run_step(store, step)
            statuses.append(result.status)
            parents = (Parent("input", result.artifact.id),)
        return statuses

    assert chain(1) == ["built"] * 4
    assert chain(1) == ["cached"] * 4
    assert chain(2) == ["cached", "cached", "built", "built"]
    assert chain(1) == ["cached"] * 4


# What a build gets and leaves


def test_a_build_reads_its_parents_and_notes_what_it_used(store: Store) -> None:
    rows = run_step(store, Step("rows", Work(a="text of rows"))).artifact

    def build(workspace: Workspace) -> Mapping[str, Any]:
        text = (workspace.inputs["rows"] / "a").read_text()
        (workspace.out / "deep").mkdir()
        (workspace.out / "deep" / "copy").write_text(text)
        workspace.used("rows", epoch=0, samples=[0, 4])
        return {"length": len(text)}

    result = run_step(
        store, Step("clean", build, parents=(Parent("rows", rows.id),), environment={"torch": "2"})
    )
    artifact = store.get(result.artifact.id)
    assert artifact.parents == (Parent("rows", rows.id, {"epoch": 0, "samples": [0, 4]}),)
    assert artifact.facts["length"] == 12
    assert (store.view(artifact) / "deep" / "copy").read_text() == "text of rows"
    assert artifact.environment["torch"] == "2" and "python" in artifact.environment


def test_the_recipe_is_noted_but_does_not_rebuild(store: Store) -> None:
    work = Work(a="x")
    first = run_step(store, Step("rows", work), recipe_hash="r1")
    second = run_step(store, Step("rows", work), recipe_hash="r2")
    assert (second.status, second.artifact.recipe_hash) == ("cached", "r1")
    assert second.artifact == first.artifact


def test_what_a_build_cost_is_kept_and_adds_up(store: Store) -> None:
    def build(workspace: Workspace) -> Mapping[str, Any]:
        with span("read"):
            time.sleep(0.02)
        with span("compute"):
            held = bytearray(64 << 20)
            held[:: 1 << 12] = b"\1" * len(held[:: 1 << 12])
            until = time.process_time() + 0.05
            while time.process_time() < until:
                pass
        return {}

    result = run_step(store, Step("rows", build))
    cost = result.artifact.facts[COST]
    parts = {name: part["seconds"] for name, part in result.ledger["parts"].items()}
    assert set(parts) == {"read", "compute", "other"}
    assert sum(parts.values()) == pytest.approx(cost["wall_s"], rel=0.02)  # the ledger's promise
    assert parts["read"] >= 0.02 and result.cpu_s >= 0.05
    assert 64 << 20 <= result.peak_rss_bytes < 64 << 30
    again = run_step(store, Step("rows", build))
    assert again.status == "cached" and again.ledger == result.ledger and again.cpu_s == result.cpu_s


def test_the_peak_of_memory_is_the_steps_own(store: Store) -> None:
    def hungry(workspace: Workspace) -> Mapping[str, Any]:
        with mmap.mmap(-1, 256 << 20) as held:  # not the heap, which may keep what it had
            held[:: 1 << 12] = b"\1" * (1 << 16)
        return {}

    large = run_step(store, Step("large", hungry)).peak_rss_bytes
    small = run_step(store, Step("small", Work(a="x"))).peak_rss_bytes
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs /proc to let the peak start anew")
    assert small < large - (128 << 20)


def test_a_failed_build_leaves_its_work_and_nothing_else(store: Store, home: Path) -> None:
    def build(workspace: Workspace) -> Mapping[str, Any]:
        (workspace.out / "half").write_text("half")
        checkpoint = workspace.work / "checkpoint"
        if not checkpoint.exists():
            checkpoint.write_text("step 7")
            raise ValueError("stopped")
        (workspace.out / "half").unlink()
        (workspace.out / "whole").write_text(checkpoint.read_text())
        return {}

    step = Step("train", build)
    with pytest.raises(ValueError, match="stopped"):
        run_step(store, step)
    assert store.catalog.latest() == [] and list(store.blobs.digests()) == []
    assert [path.name for path in home.rglob("*half*")] == []
    result = run_step(store, step)
    assert (store.view(result.artifact) / "whole").read_text() == "step 7"
    assert list((home / "work").iterdir()) == []


# Damage


def test_a_damaged_blob_is_said_set_aside_and_rebuilt(store: Store, home: Path) -> None:
    work = Work(a="x" * 100, b="y")
    step = Step("shards", work)
    first = run_step(store, step).artifact
    digest = damage(store, first)
    said: list[str] = []
    result = run_step(store, step, say=said.append)
    assert (result.status, result.artifact, work.count) == ("rebuilt", first, 2)
    assert said == [f"blob {digest[:12]} (a) of shards is damaged: rebuilding"]
    assert store.verify(first) == () and len(list((home / "damaged").iterdir())) == 1
    assert run_step(store, step).status == "cached"


def test_two_files_of_one_damaged_blob_are_said_once(store: Store) -> None:
    step = Step("shards", Work(a="same", b="same"))
    first = run_step(store, step).artifact
    damage(store, first)
    said: list[str] = []
    assert run_step(store, step, say=said.append).artifact == first
    assert len(said) == 1 and "is damaged: rebuilding" in said[0]


def test_work_left_by_a_process_killed_after_publishing_goes(store: Store, home: Path) -> None:
    step = Step("rows", Work(a="x"))
    run_step(store, step)
    (store.work_folder(step.key()) / "checkpoint").write_text("left")
    with store.step_lock(step.key()):
        assert run_step(store, step).status == "cached"
        assert len(list((home / "work").iterdir())) == 1, "someone builds there"
    assert run_step(store, step).status == "cached"
    assert list((home / "work").iterdir()) == []


def test_a_missing_blob_is_said_and_rebuilt_and_children_stay_valid(store: Store) -> None:
    step = Step("rows", Work(a="x"))
    rows = run_step(store, step).artifact
    child = Step("clean", Work(b="y"), parents=(Parent("rows", rows.id),))
    run_step(store, child)
    store.blobs.place(rows.files[0].sha256).unlink()
    said: list[str] = []
    assert run_step(store, step, say=said.append).status == "rebuilt"
    assert said == [f"blob {rows.files[0].sha256[:12]} (a) of rows is missing: rebuilding"]
    assert run_step(store, child).status == "cached"


def test_a_rebuild_that_differs_says_so_and_is_found_from_then_on(store: Store) -> None:
    work = Work(a="first")
    step = Step("rows", work, name="the rows")
    first = run_step(store, step).artifact
    damage(store, first)
    work.texts = {"a": "second"}
    said: list[str] = []
    second = run_step(store, step, say=said.append)
    assert second.status == "rebuilt" and second.artifact.id != first.id
    assert said[-1] == f"the rows was rebuilt with other bytes than before: {second.artifact.id[:12]}"
    assert run_step(store, step).artifact == second.artifact


def test_a_step_does_not_start_on_a_damaged_parent(store: Store) -> None:
    rows = run_step(store, Step("rows", Work(a="x" * 10))).artifact
    damage(store, rows)
    work = Work(b="y")
    with pytest.raises(DamagedBlob):
        run_step(store, Step("clean", work, parents=(Parent("rows", rows.id),)))
    assert work.count == 0


def test_a_full_disk_in_a_build_keeps_the_store_whole(small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("2m")
    with Store.open(disk / "home") as store:
        good = Step("rows", Work(a="x"))
        run_step(store, good)
        with pytest.raises(DiskFull, match="cannot build big"):
            run_step(store, Step("big", Work(a="x" * (4 << 20))))
        assert run_step(store, good).status == "cached"
        assert run_step(store, Step("small", Work(a="z"))).status == "built"


# Two processes

BUILD = """
import sys
from pathlib import Path
from marrow.store.steps import Step, run_step
from marrow.store.store import Store

def build(workspace):
    print("building", flush=True)
    with open(sys.argv[2], "a") as log:
        log.write("x")
    (workspace.work / "checkpoint").touch()
    sys.stdin.readline()
    (workspace.out / "a").write_text("x")
    return {}

with Store.open(Path(sys.argv[1])) as store:
    result = run_step(store, Step("shards", build), say=lambda text: print(text, flush=True))
    print(result.status, result.artifact.id)
"""


def test_of_two_processes_one_builds_and_the_other_says_that_it_waits(
    home: Path, tmp_path: Path, spawn: Callable[..., Any]
) -> None:
    builder = spawn(BUILD, home, tmp_path / "log")
    assert builder.line() == "building"
    waiter = spawn(BUILD, home, tmp_path / "log")
    assert waiter.line() == f"waiting for process {builder.process.pid}, which is building shards"
    builder.go()
    built, cached = builder.result()[-1].split(), waiter.result()[-1].split()
    assert (built[0], cached[0]) == ("built", "cached") and built[1] == cached[1]
    assert (tmp_path / "log").read_text() == "x"


def test_after_kill_9_the_waiter_builds_and_finds_the_work(
    home: Path, tmp_path: Path, spawn: Callable[..., Any]
) -> None:
    killed = spawn(BUILD, home, tmp_path / "log")
    killed.line()
    waiter = spawn(BUILD, home, tmp_path / "log")
    assert waiter.line().startswith("waiting for process")
    killed.kill()
    assert waiter.line() == "building"
    assert len(list((home / "work").glob("*/checkpoint"))) == 1
    waiter.go()
    assert waiter.result()[-1].startswith("built")
    assert list((home / "work").iterdir()) == []
    with Store.open(home) as store:
        assert list((home / "staging").iterdir()) == []
        assert store.verify(store.catalog.latest()[0]) == ()
