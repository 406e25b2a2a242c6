"""Units larger than a row: a person with several rows, of which a few are kept and one at a time is used.

Two rules make the person the unit. `FirstRows` keeps at most k rows of each, by a rule that looks at no other person.
`OneRowPerUnit` lets a sampled person contribute one of them, so that a person moves the clipped sum by at most C.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .noise import system_generator


class FirstRows:
    """Keeps the first `limit` rows of every unit, in the order of a stream, and numbers the units as they appear.

    Formal guarantee: which rows of a unit are kept depends on the rows of that unit alone, so adding or removing one
    unit with all its rows leaves the kept rows of every other unit as they are (their numbers may change; no sampler
    looks at those). A unit keeps from 1 to `limit` rows.

    Attributes:
        units: the unit (number from 0) of every kept row, in order.
        beyond_limit: rows that were not kept.

    Args:
        column: what names the unit, for messages.
        limit: k >= 1.

    Raises:
        ValueError: one of the two is missing, or limit is below 1.
    """

    def __init__(self, column: str | None, limit: int | None):
        if column is None or limit is None or limit < 1:
            raise ValueError(
                f"unit_column={column!r} and max_rows_per_unit={limit}: give both, the second at least 1; so many"
                " images of one person are used at most."
            )
        self.column, self.limit = column, limit
        self.units: list[int] = []
        self.beyond_limit = 0
        self._numbers: dict[str, int] = {}
        self._kept: list[int] = []  # rows, by unit

    def keep(self, names: Sequence[Any]) -> list[int]:
        """Positions of the rows to keep, among the next rows of the stream; `names` are the units of these.

        Raises:
            ValueError: a name that is neither text nor a whole number. Rows of nobody have no unit to protect.
        """
        kept = []
        for position, name in enumerate(names):
            if not isinstance(name, str | int | np.integer) or not str(name).strip():
                raise ValueError(
                    f"{self.column}={name!r} names no person; give every image a text or a whole number, or leave out"
                    " the images of nobody."
                )
            number = self._numbers.setdefault(str(name), len(self._numbers))
            if number == len(self._kept):
                self._kept.append(0)
            if self._kept[number] < self.limit:
                self._kept[number] += 1
                self.units.append(number)
                kept.append(position)
        self.beyond_limit += len(names) - len(kept)
        return kept


class OneRowPerUnit:
    """Of every sampled unit (a person), one of its rows, uniformly at random and anew at every draw.

    Formal guarantee:
        Sample units, not rows, by a sampler of `sampling.py`, and take the rows that `draw` gives. Then a batch holds
        at most one row of any unit, so a unit contributes one vector of norm at most C. Let the row that every unit
        would show be drawn first: given these, the step is that of the sampler on one row per unit, and adding,
        removing or zeroing out a unit adds, removes or zeroes out its row. The true step is the mixture over these
        draws, whose law is the same for both data sets, and no worse than the step given the worst of them (joint
        convexity of the hockey-stick divergence). Unit: all rows of one person. Assumptions: which rows a person has
        depends on no other person, and the generator is the default one.

    Args:
        units: (rows,) the unit of every row, numbered from 0 without gaps.
        generator: for tests only; see `PoissonSampler`.

    Raises:
        ValueError: no rows, or a number without rows.
    """

    def __init__(self, units: np.ndarray, generator: np.random.Generator | None = None):
        units = np.asarray(units)
        if not len(units) or units.min() < 0 or not (counts := np.bincount(units)).all():
            raise ValueError("units must number the units of all rows from 0 without gaps; build the store again.")
        self._counts = counts
        self._starts = np.cumsum(counts) - counts
        self._rows = np.argsort(units, kind="stable")
        self._generator = system_generator() if generator is None else generator

    def __len__(self) -> int:
        return len(self._counts)

    def draw(self, chosen: np.ndarray) -> np.ndarray:
        """A row (int64) of each unit in `chosen`, in its order."""
        return self._rows[self._starts[chosen] + self._generator.integers(0, self._counts[chosen])]


__all__ = ["FirstRows", "OneRowPerUnit"]
