"""The flags that choose an engine."""

import subprocess
import sys

import pytest

from marrow.cli.engine import engine_of
from marrow.core.errors import UsageError
from marrow.data.engine import INLINE, Processes, Threads


def test_names_make_engines_with_the_workers_asked_for() -> None:
    assert engine_of("inline", 7) is INLINE
    for name, kind in (("threads", Threads), ("processes", Processes)):
        engine = engine_of(name, 3)
        assert isinstance(engine, kind)
        assert engine.workers == 3
        engine.close()


def test_without_a_number_there_is_a_worker_for_each_cpu() -> None:
    assert 1 <= engine_of("threads").workers <= 16


@pytest.mark.parametrize("name", ["", "thread", "Threads", "threads:4", "rayon", "dask"])
def test_another_name_is_refused_with_the_allowed_ones(name: str) -> None:
    with pytest.raises(UsageError, match="no engine") as error:
        engine_of(name)
    assert "inline, threads, processes" in str(error.value.hint)


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(UsageError, match="--workers -1"):
        engine_of("threads", -1)


def test_without_ray_the_error_names_the_extra() -> None:
    program = (
        "import sys; sys.modules['ray'] = None\n"
        "from marrow.cli.engine import engine_of\n"
        "from marrow.core.errors import UsageError\n"
        "try:\n    engine_of('ray')\n"
        "except UsageError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True
    )
    assert "not installed" in done.stdout
    assert "marrow[ray]" in done.stdout


def test_choosing_loads_neither_ray_nor_torch() -> None:
    program = (
        "import sys; from marrow.cli.engine import engine_of; engine_of('threads', 2)\n"
        "print({'ray', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
