"""Records that cross folders. Frozen, slotted, no tensors, no behaviour beyond reading them.

Artifact   what the store keeps: files, parents, and where they came from
Sampling   how one completion is drawn
Completion what a generator gives back
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Json = Any  # what json.loads can return


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of an artifact. `sha256` names its blob; `xxh3` is the quick check of its bytes."""

    name: str
    sha256: str
    xxh3: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Parent:
    """An edge of the lineage graph: the child used `artifact_id` as its `role`.

    `detail` says which part was used, as in {"seed": 1, "epoch": 0, "samples": [0, 4096]}.
    """

    role: str
    artifact_id: str
    detail: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Artifact:
    """Something made: immutable files and facts, with parents.

    `id` is the SHA-256 of kind, key, parents and files, so equal work has one id. `key` is the
    hash of everything the step that made it depends on. `facts` are the numbers worth showing.
    """

    id: str
    kind: str
    key: str
    parents: tuple[Parent, ...]
    files: tuple[FileEntry, ...]
    facts: Mapping[str, Json]
    code_version: str
    recipe_hash: str
    environment: Mapping[str, str]
    created_s: float

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.num_bytes for file in self.files)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one completion is drawn. temperature 0 is greedy; top_k 0 and top_p 1 keep all tokens."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished text. `ledger` holds seconds per stage: queue, prefill, decode, ..."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    ledger: Mapping[str, float] = field(default_factory=dict)
