"""Records are values: they cannot change behind a reader's back, and they tell what they hold."""

import dataclasses

import pytest

from marrow.core import records
from marrow.core.hashes import canonical_json
from marrow.core.records import Artifact, Completion, FileEntry, Parent, Sampling

KINDS = [kind for kind in vars(records).values() if dataclasses.is_dataclass(kind)]
FILE = FileEntry("a", "0" * 64, "1" * 32, 3)
ARTIFACT = Artifact(
    "id", "rows", "key", (Parent("source", "p"),), (FILE, FILE), {"n": 1}, "v", "r", {"os": "linux"}, 1.0
)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_records_are_frozen_and_slotted(kind):
    assert kind.__dataclass_params__.frozen
    assert "__dict__" not in dir(kind)


def test_an_artifact_knows_its_size_and_can_be_hashed():
    assert ARTIFACT.num_bytes == 6
    assert canonical_json(ARTIFACT) == canonical_json(dataclasses.replace(ARTIFACT))
    with pytest.raises(dataclasses.FrozenInstanceError):
        ARTIFACT.kind = "other"


def test_records_do_not_share_their_empty_mappings():
    assert Parent("a", "b").detail is not Parent("a", "b").detail
    assert Completion("t", (), "stop", 0).ledger == {}


def test_the_default_sampling_draws_from_the_whole_distribution():
    default = Sampling()
    assert (default.temperature, default.top_k, default.top_p, default.stop) == (1.0, 0, 1.0, ())
