"""The table of compiled kernels (`compiled.py`): its rows, its file, what is a fault, and what is worse."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

SHARED_LIMIT_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
# Every kernel loads 128 bits at a time, and does so with half of its load instructions or more. Kernels that
# may stay below that half, and what their other loads are; the large tensors' are wide in these too.
NARROW = {
    "attention._backward_keys": "a bound, a sum and a delta of each row of queries",
    "cross_entropy._backward": "six numbers of the row, before the loop",
    "dequantise._dequantise": "a step, and a zero, of each block",
    "fp8_linear._multiply": "weights of rows that stay in fp32, products without tensor cores",
    "int4_linear._multiply": "rows in the order of the nibbles, a pair at a time, from the L2",
    "int8_linear._multiply": "scales of outputs and rows",
    "linear_log_probs._backward": "seven numbers of the row, before the loop",
    "lora_linear._expand": "places and adapters of rows; ranks below 16",
    "lora_linear._multiply": "places of rows, ends of groups; 16 outputs, all of a rank",
    "paged_attention._forward": "numbers of blocks; keys of 8 bits, by 64, and their scales",
    "paged_attention._merge": "a maximum and a sum of each split",
    "sample._report": "what is listed, few values",
    "sample._sample": "what filters left, at any place of the scratch",
    "top_k._search": "queries, from the L1",
    "verify_draft._verify": "what filters left, and the draft's probabilities of that",
}


@dataclass(frozen=True, slots=True)
class Row:
    """What one kernel became on one architecture. The first six name it.

    dots: matrix products of the source that tensor cores can do. spills: instructions that move registers
    to memory and back; stack_bytes: what they take, a thread. skipped: why it was not compiled.
    """

    op: str
    kernel: str
    example: str
    dtype: str
    arch: int
    config: str
    registers: int = 0
    stack_bytes: int = 0
    spills: int = 0
    shared_bytes: int = 0
    dots: int = 0
    tensor_core: int = 0
    loads: int = 0
    wide_loads: int = 0
    stores: int = 0
    wide_stores: int = 0
    skipped: str = ""

    @property
    def name(self) -> tuple[Any, ...]:
        """Return what the row is about."""
        return self.op, self.kernel, self.example, self.dtype, self.arch, self.config


def read(path: Path) -> list[Row]:
    """Read the table."""
    numbers = {field.name for field in fields(Row) if field.type is int}
    with path.open(newline="") as file:
        lines: list[dict[str, Any]] = list(csv.DictReader(file))
    for line in lines:
        line.update({name: int(line[name]) for name in numbers})
    return [Row(**line) for line in lines]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write the table."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def faults(row: Row) -> list[str]:
    """Say what is wrong with a row whatever it was before."""
    found = []
    if row.spills or row.stack_bytes:
        found.append(f"spills registers ({row.spills} instructions, {row.stack_bytes} bytes)")
    if row.shared_bytes > (limit := SHARED_LIMIT_BYTES[row.arch]):
        found.append(f"takes {row.shared_bytes} bytes of shared memory, of {limit}")
    if row.dots and not row.tensor_core:
        found.append("multiplies matrices without tensor cores")
    if row.loads and not row.wide_loads:
        found.append("has no 128-bit loads")
    elif 2 * row.wide_loads < row.loads and f"{row.op}.{row.kernel}" not in NARROW:
        found.append(f"has 128-bit loads for {row.wide_loads} of {row.loads} only")
    return found


def worse(before: Row, now: Row) -> list[str]:
    """Say what got worse; registers alone do not count."""
    found = []
    if before.tensor_core and not now.tensor_core:
        found.append("lost its tensor-core instructions")
    if before.wide_loads and not now.wide_loads:
        found.append("lost its 128-bit loads")
    if before.wide_stores and not now.wide_stores:
        found.append("lost its 128-bit stores")
    if now.skipped and not before.skipped:
        found.append(f"is skipped now: {now.skipped}")
    return found


def check(rows: Sequence[Row], table: Sequence[Row], *, is_whole: bool = False) -> list[str]:
    """Compare what was compiled with the table; return complaints.

    Args: is_whole: rows are of all operators and architectures, so that none of the table may be missing.
    """
    known, complaints = {row.name: row for row in table}, []
    for row in rows:
        before = known.get(row.name)
        wrong = faults(row) + (["is not in the table"] if before is None else worse(before, row))
        complaints += [f"{' '.join(map(str, row.name))}: {what}" for what in wrong]
    compared, made = {(row.op, row.arch) for row in rows}, {row.name for row in rows}
    gone = [row for row in table if row.name not in made and (is_whole or (row.op, row.arch) in compared)]
    return complaints + [f"{' '.join(map(str, row.name))}: is in the table alone" for row in gone]


def describe(row: Row) -> str:
    """Return one line of text for a row."""
    what = row.skipped or (
        f"{row.registers:>3} registers, {row.spills} spills, {row.shared_bytes} bytes shared, "
        f"{row.tensor_core} tensor-core instructions for {row.dots} products, "
        f"{row.wide_loads} of {row.loads} loads and {row.wide_stores} of {row.stores} stores of 128 bits"
    )
    return f"sm_{row.arch:<4}{row.op}.{row.kernel} {row.dtype} {row.example} [{row.config}]: {what}"
