"""Kernels with one planted bug each, and sound twins, for the checks of `marrow.kernels.memory`."""

from marrow.kernels import tile
from marrow.kernels.tile import tl


@tile.jit
def copy(source, target, count, MASKED: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """Without the mask, or with a shift, it reads and writes beyond the end."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK) + SHIFT
    inside = at < count if MASKED else at == at
    tl.store(target + at, tl.load(source + at, mask=inside), mask=at < count)


@tile.jit
def write_beyond(target, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, at.to(tl.float32))


@tile.jit
def overlap(target, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """With a step below the block, neighbours write the same elements."""
    tl.store(target + tl.program_id(0) * STEP + tl.arange(0, BLOCK), 1.0)


@tile.jit
def read_neighbour(values, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """Read what another program writes in this launch, before or after it does."""
    program, at = tl.program_id(0), tl.arange(0, BLOCK)
    other = (program + SHIFT) % tl.num_programs(0)
    tl.store(values + program * BLOCK + at, tl.load(values + other * BLOCK + at) + 1.0)


@tile.jit
def scatter(target, places, ATOMIC: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.load(places + tl.arange(0, BLOCK))
    if ATOMIC:
        tl.atomic_add(target + at, 1.0)
    else:
        tl.store(target + at, tl.arange(0, BLOCK).to(tl.float32))


@tile.jit
def add_rows(rows, total, columns, BLOCK: tl.constexpr):
    """All programs add to one row, by atomics: no race."""
    at = tl.arange(0, BLOCK)
    inside = at < columns
    values = tl.load(rows + tl.program_id(0) * columns + at, mask=inside)
    tl.atomic_add(total + at, values, mask=inside)


@tile.jit
def store_then_add(total, BLOCK: tl.constexpr):
    """The first program sets to zero what the others add to: a race."""
    at = tl.arange(0, BLOCK)
    if tl.program_id(0) == 0:
        tl.store(total + at, tl.zeros([BLOCK], tl.float32))
    tl.atomic_add(total + at, 1.0)


@tile.jit
def double_rows(x, y, columns, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Without WIDE, the offset of a row overflows beyond 2^31."""
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    row = row.to(tl.int64) if WIDE else row
    values = tl.load(x + row * columns + at, mask=at < columns)
    tl.store(y + row * columns + at, values * 2, mask=at < columns)


@tile.jit
def follow(table, x, y, BLOCK: tl.constexpr):
    """Read rows through a table of numbers."""
    at = tl.arange(0, BLOCK)
    row = tl.load(table + tl.program_id(0)).to(tl.int64)
    tl.store(y + tl.program_id(0) * BLOCK + at, tl.load(x + row * BLOCK + at))


@tile.jit
def masked_load(source, target, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < count, other=-1.0))


@tile.jit
def swap(lock):
    tl.atomic_cas(lock, 0, 1)
