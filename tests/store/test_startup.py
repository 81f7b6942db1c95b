from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RUN = """
import sys, time
start_s = time.process_time()
import sqlalchemy, sqlalchemy.dialects.sqlite
ready_s = time.process_time()
from pathlib import Path
from marrow.core.records import Parent
from marrow.store.steps import Step, run_step
from marrow.store.store import Store

def build(workspace):
    (workspace.out / "a").write_text("x" * 100_000)
    return {}

with Store.open(Path(sys.argv[1])) as store:
    statuses, parents = set(), ()
    for number in range(10):
        result = run_step(store, Step("link", build, parents=parents, config=number))
        statuses.add(result.status)
        parents = (Parent("before", result.artifact.id),)
print((time.process_time() - ready_s) / (ready_s - start_s))
print(*statuses)
print(sorted(set(sys.argv[2].split()) & set(sys.modules)))
"""
HEAVY = "torch numpy pandas pyarrow transformers rich obstore duckdb psycopg fastapi http.client"


@pytest.mark.slow
def test_ten_cached_steps_are_found_in_no_time_without_torch(home: Path, spawn: Callable[..., Any]) -> None:
    """The import of SQLAlchemy is four fifths of the start; all the rest may take half as long as it."""
    assert spawn(RUN, home, HEAVY).result()[1] == "built"
    runs = [spawn(RUN, home, HEAVY).result() for _ in range(3)]
    assert {(statuses, loaded) for _, statuses, loaded in runs} == {("cached", "[]")}
    assert min(float(ratio) for ratio, _, _ in runs) < 0.5  # 0.21 to 0.31 on a busy machine
