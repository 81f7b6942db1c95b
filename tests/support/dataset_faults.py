"""Kills a process at random moments while it commits, merges, collects, pushes and pulls.

    python dataset_faults.py FOLDER KILLS

A driver forks victims, so that two hundred of them cost less than two hundred Pythons. After every
kill it opens both stores and checks every promise: what is there is whole, what was is still there.
Used by the tests with few kills and by `make soak` with many.
"""

import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import marrow.store.version
from marrow.core.errors import StoreError
from marrow.store.store import Store
from marrow.store.versions.checkout import checkout
from marrow.store.versions.transfer import pull, push
from marrow.store.versions.versions import Versions


def change(folder: Path, dice: random.Random) -> None:
    """Change some files: add, rewrite, rename, delete; small ones and one large."""
    for _ in range(dice.randrange(1, 6)):
        path = folder / f"{dice.randrange(40):02d}"
        if dice.random() < 0.2:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(dice.randbytes(dice.choice([0, 10, 1_000, 60_000])))
    if dice.random() < 0.5:
        (folder / "large").write_bytes(dice.randbytes(150_000))


def work(base: Path, seed: int) -> None:
    """Do everything at once, until killed."""
    dice = random.Random(seed)
    folder = base / "folder"
    with Store.open(base / "home") as store, Store.open(base / "other") as other:
        versions = Versions(store)
        while True:
            what = dice.randrange(8)
            try:
                if what <= 2 or store.refs.get("main") is None:
                    folder.mkdir(exist_ok=True)
                    change(folder, dice)
                    (folder / "always").write_text("there")
                    versions.commit(folder, "main", f"{seed}", replace=True)
                elif what == 3:
                    name = f"work-{dice.randrange(10**9)}"
                    versions.branch("main", name)
                    change(folder, dice)
                    (folder / "always").write_text("there")
                    versions.commit(folder, name, replace=True)
                    versions.merge(name, "main", take="theirs")
                    versions.refs.remove(name)
                elif what == 4:
                    store.collect()
                elif what == 5:
                    push(store, "main", str(base / "remote"))
                elif what == 6:
                    if (base / "remote/names").exists():
                        pull(other, "main", str(base / "remote"))
                else:
                    checkout(store, versions.resolve("main"), base / "out", name="main", force=True)
            except StoreError as error:
                if "no dataset" not in str(error):  # nothing was pushed before the kill
                    raise


def check(home: Path) -> int:
    """Check every promise about a store; return how many versions it has."""
    num_versions = _check(home)
    assert list((home / "staging").glob("*")) == [], "leftovers"
    return num_versions


def _check(home: Path) -> int:
    with Store.open(home) as store:
        versions = Versions(store)
        store.collect()
        found = versions.verify()
        assert found.missing == {}, found.missing
        assert found.damage.aside == (), found.damage.aside
        ref = store.refs.get("main")
        if ref is None:
            return 0
        log = list(versions.log("main"))
        assert log[0].artifact.id == ref.artifact_id == store.resolve("main").id
        numbers = [named.version for named in store.catalog.names(name="main")]
        assert numbers == list(range(1, len(numbers) + 1))
        for entry in versions.entries(log[0].artifact):
            assert versions.contents.has(entry.sha256)
        return len(numbers)


def in_child(body: Callable[[], None]) -> int:
    """Run a body in a forked process; return its id."""
    child = os.fork()
    if child == 0:
        try:
            body()
        except BaseException:  # noqa: BLE001 - whatever it is, the parent is told
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def main() -> None:
    """Kill as often as asked."""
    base, kills = Path(sys.argv[1]), int(sys.argv[2])
    marrow.store.version.code_version()
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else random.randrange(10**6)
    dice = random.Random(seed)
    most = {"home": 0, "other": 0}
    for number in range(kills):
        child = in_child(lambda n=number: work(base, seed + n))
        time.sleep(dice.uniform(0.05, 0.6))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"seed {seed}: the victim failed by itself"
        for name, had in most.items():
            if (base / name).exists():
                now = check(base / name)
                assert now >= had, f"seed {seed}: {name} had {had} versions, has {now}"
                most[name] = now
    leftovers = list((base / "out").rglob(".tmp-*")) if (base / "out").exists() else []
    with Store.open(base / "home") as store:
        if store.refs.get("main") is not None:
            checkout(store, Versions(store).resolve("main"), base / "out", force=True)
            push(store, "main", str(base / "remote"))
            with Store.open(base / "other") as other:
                pull(other, "main", str(base / "remote"))
                assert other.resolve("main").id == store.resolve("main").id
    check(base / "other")
    shutil.rmtree(base)
    print(f"{kills} kills, {most['home']} versions, {len(leftovers)} leftovers in the user's folder")


if __name__ == "__main__":
    main()
