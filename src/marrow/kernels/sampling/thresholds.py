"""What the Triton kernels of sampling share: thresholds without a sort.

A filter keeps the head of the order (value downwards, token upwards). `collect` copies what is above a bound
that nothing kept can be below; the exact limit is found on that little, by halving a range of the integers
that order fp32 values as they order themselves; `draw` goes through what is kept in the vocabulary's order.
"""

from marrow.kernels import tile
from marrow.kernels.tile import tl


def row_options(op: str, columns: int) -> dict[str, int]:
    """Return BLOCK and num_warps for programs that walk a row."""
    block = max(128, min(2048, 1 << (columns - 1).bit_length()))
    default = {"BLOCK": block, "num_warps": max(1, block // 256)}  # 8 elements a thread: more would spill
    others = ({"num_warps": 16}, {"BLOCK": 4096, "num_warps": 16}, {"BLOCK": 1024, "num_warps": 4})
    return tile.config(op, block, default, others)


@tile.jit
def _key(x, BELOW_SIGN: tl.constexpr = 0x7FFFFFFF):  # type: ignore[no-untyped-def]
    """Return integers in the order of fp32 values."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # + 0.0: no -0
    return bits ^ ((bits >> 31) & BELOW_SIGN)


@tile.jit
def maxima(x, columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the largest of every BLOCK-th value, and how many are NaN."""
    at = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    nans = tl.zeros([BLOCK], tl.int32)
    for start in range(0, columns, BLOCK):
        some = tl.load(x + start + at, mask=start + at < columns, other=float("-inf")).to(tl.float32)
        nans += (some != some).to(tl.int32)
        best = tl.maximum(best, some)
    return best, tl.sum(nans, 0)


@tile.jit
def bound(best, wanted, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the key of the `wanted`-th of the maxima, which as many values reach; or the least."""
    keys = _key(best).to(tl.int64)
    low, high = tl.min(keys, 0), tl.max(keys, 0)
    while low < high:
        middle = low + (high - low + 1) // 2
        is_reached = tl.sum((keys >= middle).to(tl.int32), 0) >= wanted
        low = tl.where(is_reached, middle, low)
        high = tl.where(is_reached, high, middle - 1)
    return tl.where(wanted > BLOCK, -(2**31), low)


@tile.jit
def gather(x, columns, least, values, places, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Copy values whose key is at least `least`, in order; return how many."""
    at = tl.arange(0, BLOCK)
    count = tl.zeros([], tl.int32)
    for start in range(0, columns, BLOCK):
        inside = start + at < columns
        some = tl.load(x + start + at, mask=inside, other=float("-inf")).to(tl.float32)
        kept = inside & (_key(some).to(tl.int64) >= least)
        place = count + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(values + place, some, mask=kept)
        tl.store(places + place, start + at, mask=kept)
        count += tl.sum(kept.to(tl.int32), 0)
    tl.debug_barrier()  # others of the program read what is stored
    return count


@tile.jit
def _head(values, count, most, inverse, above, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return how many values have a key of at least `above`, and their mass."""
    at = tl.arange(0, BLOCK)
    number = tl.zeros([], tl.int64)
    mass = tl.zeros([], tl.float64)
    for start in range(0, count, BLOCK):
        some = tl.load(values + start + at, mask=start + at < count, other=float("-inf"))
        kept = (start + at < count) & (_key(some).to(tl.int64) >= above)
        number += tl.sum(kept.to(tl.int64), 0)
        mass += tl.sum(tl.where(kept, tl.exp((some - most) * inverse), 0.0).to(tl.float64), 0)
    return number, mass


@tile.jit
def _filter(values, count, most, inverse, top_k, top_p, mass, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the key above which all are kept, and how many of its own. mass: of the row, without top-k."""
    floor = tl.full([], -(2**31), tl.int64)
    high = _key(most).to(tl.int64)
    limit, ties = floor, count.to(tl.int64)
    if top_k < count:
        low, top = floor, high
        while low < top:
            middle = low + (top - low + 1) // 2
            number, _ = _head(values, count, most, inverse, middle, BLOCK)
            low = tl.where(number >= top_k, middle, low)
            top = tl.where(number >= top_k, top, middle - 1)
        limit = low
        number, above = _head(values, count, most, inverse, limit + 1, BLOCK)
        ties = top_k - number
        more, reached = _head(values, count, most, inverse, limit, BLOCK)
        mass = above + (reached - above) * (ties.to(tl.float64) / (more - number).to(tl.float64))
    if top_p < 1.0:
        wanted = top_p.to(tl.float64) * mass
        low, top = limit, high
        while low < top:  # at `low` what top-k keeps is enough
            middle = low + (top - low + 1) // 2
            _, reached = _head(values, count, most, inverse, middle, BLOCK)
            low = tl.where(reached >= wanted, middle, low)
            top = tl.where(reached >= wanted, top, middle - 1)
        number, above = _head(values, count, most, inverse, low + 1, BLOCK)
        more, reached = _head(values, count, most, inverse, low, BLOCK)
        equal = (more - number).to(tl.float64)
        needed = tl.ceil((wanted - above) * equal / tl.maximum(reached - above, 1e-300))
        needed = tl.minimum(tl.maximum(needed, 1.0), equal).to(tl.int64)
        ties = tl.where(low == limit, tl.minimum(needed, ties), needed)
        limit = low
    return limit, ties


@tile.jit
def collect(  # type: ignore[no-untyped-def]
    x, columns, best, temperature, top_p, top_k, values, places, BLOCK: tl.constexpr
):
    """Copy what top-k and top-p may keep; return how many, and the limit: a key, and how many of that key."""
    at = tl.arange(0, BLOCK)
    most = tl.max(best, 0)
    inverse = inverse_of(temperature, BLOCK)
    limit = tl.full([], -(2**31), tl.int64)
    ties = tl.full([], 1, tl.int64)
    mass = tl.zeros([], tl.float64)
    least = limit
    if temperature <= 0.0:  # the first of the largest
        least = _key(most).to(tl.int64)
        limit = least
    elif top_k < columns:
        least = bound(best, top_k, BLOCK)
    elif top_p < 1.0:
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, columns, BLOCK):
            some = tl.load(x + start + at, mask=start + at < columns, other=float("-inf")).to(tl.float32)
            sums += tl.exp((some - most) * inverse)
        mass = tl.sum(sums.to(tl.float64), 0)
        # What has less than its share of the rest of the mass is beyond top-p.
        share = (1.0 - top_p.to(tl.float64)) * mass / columns
        at_least = (most + temperature * (tl.log(share.to(tl.float32)) - 1e-3)).to(tl.float32)
        least = _key(tl.where(top_p > 0.0, at_least, most)).to(tl.int64)
    count = gather(x, columns, least, values, places, BLOCK)
    if (temperature > 0.0) & ((top_k < columns) | (top_p < 1.0)):
        if top_k < columns:
            _, mass = _head(values, count, most, inverse, limit, BLOCK)
        limit, ties = _filter(values, count, most, inverse, top_k, top_p, mass, BLOCK)
    return count, limit, ties


@tile.jit
def inverse_of(temperature, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return 1 / temperature, but no infinity; 1 for greedy rows."""
    is_greedy = temperature <= 0.0
    return tl.where(is_greedy, 1.0, tl.minimum(1.0 / tl.where(is_greedy, 1.0, temperature), 1e30))


@tile.jit
def cut_of(most, temperature, min_p, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return what a value must reach for min-p."""
    cut = most.to(tl.float64) + temperature.to(tl.float64) * tl.log(tl.maximum(min_p, 1e-38).to(tl.float64))
    return tl.where(min_p > 0.0, cut, float("-inf"))


@tile.jit
def draw(  # type: ignore[no-untyped-def]
    values,
    places,
    probs,
    count,
    most,
    inverse,
    limit,
    ties,
    cut,
    total,
    token,
    u,
    BLOCK: tl.constexpr,
    HAS_PLACES: tl.constexpr,
    IS_REST: tl.constexpr,
):
    """Draw from what is kept, or, where IS_REST, from what it has, scaled by `total`, above `probs`.

    Returns where the running mass passes u times all of it, how many are kept, all mass, and the token's.
    """
    at = tl.arange(0, BLOCK)
    sum_of_masses = tl.zeros([], tl.float64)
    found = tl.full([], -1, tl.int32)
    last = tl.zeros([], tl.int32)
    number = tl.zeros([], tl.int64)
    own = tl.zeros([], tl.float64)
    for second in tl.static_range(2):
        running = tl.zeros([], tl.float64)
        equal = tl.zeros([], tl.int64)
        for start in range(0, count, BLOCK):
            inside = start + at < count
            some = tl.load(values + start + at, mask=inside, other=float("-inf")).to(tl.float32)
            key = _key(some).to(tl.int64)
            same = (inside & (key == limit)).to(tl.int64)
            kept = inside & ((key > limit) | ((same > 0) & (equal + tl.cumsum(same, 0) <= ties)))
            kept = kept & ((some.to(tl.float64) >= cut) | (some == most))
            mass = tl.where(kept, tl.exp((some - most) * inverse), 0.0).to(tl.float64)
            if HAS_PLACES:
                index = tl.load(places + start + at, mask=inside, other=0)
                if IS_REST:
                    theirs = tl.load(probs + index, mask=inside, other=0.0).to(tl.float64)
                    mass = tl.maximum(mass / total - theirs, 0.0)
                else:
                    own += tl.sum(tl.where(kept & (index == token), mass, 0.0), 0) * (1 - second)
            if second == 1:
                passed = running + tl.cumsum(mass, 0) > u * sum_of_masses
                here = tl.min(tl.where(passed & kept, start + at, 2**31 - 1), 0)
                found = tl.where((found < 0) & (here < 2**31 - 1), here, found)
                last = tl.maximum(last, tl.max(tl.where(mass > 0.0, start + at, 0), 0))
            else:
                number += tl.sum(kept.to(tl.int64), 0)
            running += tl.sum(mass, 0)
            equal += tl.sum(same, 0)
        sum_of_masses = running
    return tl.where(found < 0, last, found), number, sum_of_masses, own
