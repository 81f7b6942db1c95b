"""Which code a step depends on: enough that no stale artifact is used, no more than that."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from marrow.cli import main
from marrow.cli.data import group
from marrow.cli.pipeline import Pipeline
from marrow.cli.sources import PACKAGE, file_of, imports_of, source_files
from marrow.core.hashes import hash_sources
from marrow.store.steps import Step

STEPS = [
    "marrow.data.ingest",
    "marrow.data.clean",
    "marrow.data.split",
    "marrow.data.shards",
    "marrow.train.loop",
    "marrow.train.evaluate",
    "marrow.models.huggingface",
    "marrow.cli.trial",
    "marrow.cli.findings",
]
ALSO = {"marrow.cli.trial": "marrow.cli.serve"}  # what its child process runs
# What only programs of users import.
DOORS = {"loader/budget.py", "loader/device_copy.py", "loader/images.py", "models/accounting.py"}
HEAVY = ("marrow.train", "marrow.models", "marrow.cli.findings")  # they load torch


def closure(module: str) -> set[str]:
    return {path.relative_to(PACKAGE).as_posix() for path in files_of(module)}


def files_of(module: str) -> tuple[Path, ...]:
    return source_files(*filter(None, (module, ALSO.get(module))))


def key(*files: Path) -> str:
    return Step(kind="train", build=lambda work: {}, sources=files).key()


def test_the_list_above_is_that_of_the_pipeline() -> None:
    text = Path(sys.modules[Pipeline.__module__].__file__ or "").read_text(encoding="utf-8")
    assert all(f'module="{module}"' in text for module in STEPS)
    # The tokenizer, trained or taken, and the shards share a module.
    assert text.count('module="marrow.') == len(STEPS) + 2
    assert all(f'also="{module}"' in text for module in ALSO.values())
    assert text.count('also="marrow.') == len(ALSO)


@pytest.mark.parametrize(
    "module",
    [pytest.param(m, marks=pytest.mark.slow) if m.startswith(HEAVY) else m for m in (*STEPS, *ALSO.values())],
)
@pytest.mark.slow
def test_a_step_knows_all_that_python_loads_for_it(module: str) -> None:
    """The interpreter is the oracle: what importing the module loads is in its closure."""
    found = closure(module)
    code = (
        f"import sys, {module}\n"
        "print(*(m.__file__ for n, m in sys.modules.items() if n.startswith('marrow.') and m.__file__))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {Path(file).relative_to(PACKAGE) for file in done.stdout.split()}
    made_by = {p.as_posix() for p in loaded if p.parts[0] != "core" and p.name != "__init__.py"}
    assert made_by, "the oracle saw nothing"
    assert made_by <= found


def test_imports_inside_functions_and_of_types_count() -> None:
    # cli/serve.py imports the server inside its command, so that a wrong target costs no torch.
    assert "marrow.serve.server" in imports_of("marrow.cli.serve")
    top = subprocess.run(
        [sys.executable, "-c", "import sys, marrow.cli.serve; print('marrow.serve.server' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert top.stdout.strip() == "False"


def test_core_and_code_from_elsewhere_stay_out() -> None:
    for module in STEPS:
        for path in files_of(module):
            assert path.is_relative_to(PACKAGE)
            assert not path.is_relative_to(PACKAGE / "core") or path.stem in ("page", "charts", "graph")
    assert not any(name.startswith("marrow.core") for name in imports_of("marrow.train.loop"))


def test_training_does_not_depend_on_serving_nor_on_how_rows_were_read() -> None:
    found = closure("marrow.train.loop")
    assert "train/loop.py" in found and "models/decoder.py" in found and "loader/plan.py" in found
    assert not any(name.startswith(("serve/", "cli/")) for name in found)
    assert not found & {"store/store.py", "store/catalog.py"}  # of the store only bytes at a URL
    assert "data/ingest.py" not in found and "data/clean.py" not in found
    shards = closure("marrow.data.shards")
    assert not any(name.startswith(("models/", "train/")) for name in shards)
    kernels = {name for name in shards if name.startswith("kernels/") and name.endswith(".py")}
    assert kernels == {
        "kernels/__init__.py",
        "kernels/rows/gather_rows.py",
        "kernels/native.py",
    }  # a row's check


def test_a_step_depends_on_the_c_files_of_its_operators_and_their_headers() -> None:
    """C files stand in `csrc` beside a module, or beside the folder of its group."""
    found = closure("marrow.train.loop")
    assert {"kernels/csrc/rms_norm.c", "kernels/csrc/lanes.h", "kernels/csrc/gather_rows.c"} <= found
    assert "kernels/csrc/minhash.c" not in found
    assert "kernels/csrc/minhash.c" in closure("marrow.data.clean")
    assert "text/csrc/bpe.c" in closure("marrow.data.shards")


def test_the_serve_step_depends_on_the_server_that_its_child_runs() -> None:
    assert "serve/engine.py" not in closure("marrow.data.split")
    found = closure("marrow.cli.trial")
    assert {
        "cli/serve.py",
        "serve/server.py",
        "serve/engine.py",
        "serve/app.py",
        "models/decoder.py",
    } <= found


def test_every_source_file_but_core_belongs_to_a_step_or_to_the_command_line() -> None:
    verbs = [where.split(":")[0] for table in (main.VERBS, group.VERBS) for where, _ in table.values()]
    used = set().union(*map(closure, [*STEPS, *verbs]))
    layers = ("data", "loader", "models", "train", "text", "serve")
    rest = {
        path.relative_to(PACKAGE).as_posix()
        for layer in layers
        for path in (PACKAGE / layer).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert rest - used == DOORS


def test_a_change_of_a_file_changes_the_key_of_the_steps_that_use_it_alone(tmp_path: Path) -> None:
    copy = tmp_path / "marrow"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))

    def keys() -> dict[str, str]:
        return {m: key(*(copy / p.relative_to(PACKAGE) for p in files_of(m))) for m in STEPS}

    before = keys()
    file = copy / "train" / "optimiser.py"
    file.write_text(file.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    changed = {module for module, now in keys().items() if now != before[module]}
    assert changed == {module for module in STEPS if "train/optimiser.py" in closure(module)}
    assert changed == {"marrow.train.loop"}


def test_a_key_is_the_same_in_every_checkout(tmp_path: Path) -> None:
    files = source_files("marrow.models.config")
    for checkout in ("one", "two"):
        for path in files:
            target = tmp_path / checkout / path.relative_to(PACKAGE)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    one, two = ([tmp_path / c / p.relative_to(PACKAGE) for p in files] for c in ("one", "two"))
    assert hash_sources(one) == hash_sources(reversed(two))


def test_what_is_no_module_has_no_file() -> None:
    assert file_of("marrow.train.no_such_thing") is None
    assert file_of("marrow.train.loop") == PACKAGE / "train" / "loop.py"
    assert file_of("marrow.train") == PACKAGE / "train" / "__init__.py"
    assert imports_of("marrow.no_such_folder.thing") == ()


def test_several_modules_give_the_union_sorted_and_each_file_once() -> None:
    both = source_files("marrow.data.split", "marrow.data.ingest")
    assert both == tuple(sorted({*source_files("marrow.data.split"), *source_files("marrow.data.ingest")}))
