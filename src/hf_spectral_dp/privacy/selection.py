"""Choosing the best of several candidates by a count over private data, at a stated cost.

The choice is a data access like any other: a checkpoint or classifier that is simply the best one on private images
leaks. Here it is the exponential mechanism in exact arithmetic.
"""

import math
import secrets
from collections.abc import Sequence

_BITS = 16  # of the fraction in the rational number below e^epsilon


def private_choice(counts: Sequence[int], epsilon: float) -> int:
    """Index of a candidate, drawn with probability in proportion to b^count for a rational b just below e^epsilon.

    Formal guarantee: let every count be a number of private units that satisfy some property of that candidate (such as
    "classified correctly"), and let candidates and properties not depend on these units. Then the index is
    (epsilon, 0)-differentially private under adding or removing one unit, and so under zeroing one out. Proof: adding a
    unit raises every count by 0 or 1, so it multiplies every weight by a factor in [1, b] and their sum by one in
    [1, b]; every probability changes by a factor in [1/b, b], and b <= e^epsilon. (McSherry and Talwar, FOCS 2007; the
    factor 2 of the general case is not needed, because all counts move in one direction.) Replacing a unit costs
    2 epsilon; a person with k units costs k epsilon; several choices add up.

    Weights are whole numbers of any length and the draw is `secrets.randbelow`, so nothing is rounded: the guarantee is
    that of the program, apart from the time it takes.

    Args:
        counts: one number of units per candidate, at least one, each >= 0.
        epsilon: of this one choice, in [0.001, 20].

    Raises:
        ValueError: no candidates, a count that is negative, or epsilon out of range.
        TypeError: a count that is no integer.
    """
    if not counts:
        raise ValueError("counts=[] names no candidate to choose; give one count per candidate.")
    if not 0.001 <= epsilon <= 20:
        raise ValueError(
            f"epsilon={epsilon} must be in [0.001, 20]; below, the choice is a toss, above, it protects nobody."
        )
    for count in counts:
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"count {count!r} is a {type(count).__name__}; a unit satisfies or not, so give integers.")
        if count < 0:
            raise ValueError(f"count {count} must not be negative.")
    # Two below the floor: exp may be off in its last place, and at 2**-16 that is far less than one.
    numerator, denominator = math.floor(math.exp(epsilon) * 2**_BITS) - 2, 2**_BITS
    low, high = min(counts), max(counts)  # all weights divided by b^low, times denominator^(high - low): integers
    weights = [numerator ** (count - low) * denominator ** (high - count) for count in counts]
    draw = secrets.randbelow(sum(weights))
    for index, weight in enumerate(weights):
        if draw < weight:
            return index
        draw -= weight
    raise AssertionError("unreachable: draw is below the sum of the weights")


__all__ = ["private_choice"]
