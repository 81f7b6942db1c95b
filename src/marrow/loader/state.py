"""Where a run stands in the global order: a few numbers that a human can read, and no more."""

import json
from dataclasses import asdict, dataclass

from marrow.core.errors import DataError, UsageError
from marrow.loader.order import MOST_POSITIONS, Ranges, merge


@dataclass(frozen=True, slots=True)
class LoaderState:
    """Where a run stands in the global order.

    position: the first one not yet given out, counted over epochs and ranks. skip: [low, high)
    positions never given out. manifest: check of the data, so that a state is not used on other
    data. order: which order of samples it is a position in.
    """

    seed: int
    position: int
    skip: Ranges = ()
    manifest: str = ""
    order: str = "full"

    def to_json(self) -> str:
        """Write the state for a human and for `from_json`."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "LoaderState":
        """Read what `to_json` wrote. Raises: DataError if it is something else."""
        try:
            values = json.loads(text)
            skip = merge([(int(low), int(high)) for low, high in values["skip"]])
            position = int(values["position"])
            if not 0 <= position <= MOST_POSITIONS:
                raise ValueError(f"position {position}, allowed are 0 to 2^63 - 1")
            order = str(values.get("order", "full"))  # states of version 0.1 have none
            return cls(int(values["seed"]), position, skip, str(values["manifest"]), order)
        except (ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
            raise DataError(
                f"this is no loader state: {error!r}", hint="the checkpoint is damaged; use an earlier one"
            ) from error
