"""From a budget (epsilon, delta) to a plan (noise, rate, steps), and from a plan to the epsilon it really costs.

The official figure is that of privacy loss distributions (dp-accounting, PLD), which composes the Poisson-subsampled
Gaussian mechanism numerically with an upper bound. Every epsilon printed by this package comes from `epsilon_of`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import metadata
from typing import Any

import numpy as np
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.privacy_accountant import NeighboringRelation
from scipy.optimize import brentq
from scipy.special import log_ndtr

ADJACENCY = "add-or-remove-one"
ACCOUNTANT = "PLD"

_DIGITS = 4  # of a displayed epsilon and of a noise multiplier, always rounded to the safe side


def accountant_version() -> str:
    """Name and version of the library that computes every epsilon."""
    return f"dp-accounting {metadata.version('dp-accounting')}"


def round_up(value: float) -> float:
    """`value` rounded up to four decimals; infinity stays infinity."""
    return value if math.isinf(value) else math.ceil(value * 10**_DIGITS - 1e-9) / 10**_DIGITS


def default_delta(num_examples: int) -> float:
    """The smaller of 1/(10 N) and N**-1.1: well below 1/N, where publishing one whole row would already be allowed."""
    return min(0.1 / num_examples, num_examples**-1.1)


def check_delta(delta: float, num_examples: int) -> None:
    """Raises ValueError unless 0 < delta < 1/num_examples."""
    if not 0 < delta < 1 / num_examples:
        raise ValueError(
            f"delta={delta} must be in (0, 1/N) for num_examples={num_examples}, that is below {1 / num_examples:.3g};"
            f" leave it out for the default {default_delta(num_examples):.3g}."
        )


@lru_cache(maxsize=64)
def _pld(event: dp_event.DpEvent, grid: float) -> PLDAccountant:
    return PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=grid).compose(event)


def epsilon_of(event: dp_event.DpEvent, delta: float, grid: float = 1e-4) -> float:
    """The epsilon of `event` at `delta`, by PLD with add-or-remove-one adjacency, rounded up to four decimals.

    `grid` is the step on which losses are rounded up: every grid gives a valid upper bound, a wider one is quicker
    and looser. The default is dp-accounting's own, so that a stranger recomputes the same figure.

    Raises:
        dp_accounting.UnsupportedEventError: an event that the accountant has no proof for.
    """
    return round_up(float(_pld(event, grid).get_epsilon(delta)))


def gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """The exact epsilon of one Gaussian mechanism without sampling, rounded up to four decimals.

    With m = 1 / noise_multiplier: delta = Phi(m/2 - e/m) - exp(e) Phi(-m/2 - e/m) (Balle and Wang, arXiv:1805.06530,
    Theorem 8).
    """
    shift = 1 / noise_multiplier

    def excess(epsilon: float) -> float:
        first, second = log_ndtr(shift / 2 - epsilon / shift), epsilon + log_ndtr(-shift / 2 - epsilon / shift)
        # log(exp(first) - exp(second)) - log(delta), without leaving the range of floats
        return float(first + np.log1p(-np.exp(min(second - first, -1e-15)))) - math.log(delta)

    high = shift * shift / 2 + shift * math.sqrt(2 * math.log(1 / delta))  # a tail bound, never too small
    return 0.0 if excess(0.0) <= 0 else round_up(float(brentq(excess, 0.0, high, xtol=1e-9)) + 1e-8)


def event_to_dict(event: dp_event.DpEvent) -> dict[str, Any]:
    """Plain JSON form of an event: {"type": class name, field: value or nested event}."""
    fields: dict[str, Any] = {"type": type(event).__name__}
    for name in event.__attrs_attrs__:
        value = getattr(event, name.name)
        fields[name.name] = event_to_dict(value) if isinstance(value, dp_event.DpEvent) else value
    return fields


_EVENTS = ("GaussianDpEvent", "PoissonSampledDpEvent", "SelfComposedDpEvent", "NoOpDpEvent")


def event_from_dict(fields: Mapping[str, Any]) -> dp_event.DpEvent:
    """Inverse of `event_to_dict`.

    Raises:
        ValueError: an event type that this package never records, or a wrong set of fields.
    """
    values = dict(fields)
    name = values.pop("type", None)
    if name not in _EVENTS:
        raise ValueError(f"event type {name!r} is not one of {', '.join(_EVENTS)}.")
    arguments = {key: event_from_dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    try:
        return getattr(dp_event, name)(**arguments)
    except TypeError as error:
        raise ValueError(f"event {name} with fields {sorted(values)}: {error}.") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """A mechanism that fits a budget: how often rows are sampled, how much noise is added, how many steps are allowed.

    Attributes:
        num_examples: rows N of the private data; treated as public.
        sampling_rate: probability q with which each row enters each batch, independently.
        steps: number of noisy sums that may be released.
        noise_multiplier: standard deviation of the noise on the clipped sum over the clipping norm.
        target_epsilon: what the user asked for; `epsilon()` never exceeds it.
        delta: the delta at which epsilon is stated.

    Formal guarantee: releasing `steps` sums, each over a fresh Poisson batch at rate `sampling_rate`, of per-example
    vectors of Euclidean norm at most C, plus N(0, (noise_multiplier C)^2) on every coordinate, is
    (epsilon(), delta)-differentially private under adding or removing one row (Abadi et al., arXiv:1607.00133; numeric
    composition by PLD, Doroshenko et al., arXiv:2207.04380). Everything computed from the sums is post-processing.
    """

    num_examples: int
    sampling_rate: float
    steps: int
    noise_multiplier: float
    target_epsilon: float
    delta: float

    @property
    def expected_batch_size(self) -> float:
        """q N, a public constant: the divisor of every noisy sum."""
        return self.sampling_rate * self.num_examples

    def event(self, steps: int | None = None) -> dp_event.DpEvent:
        """The event of `steps` steps (default: all)."""
        count = self.steps if steps is None else steps
        if count == 0:
            return dp_event.NoOpDpEvent()
        step = dp_event.PoissonSampledDpEvent(self.sampling_rate, dp_event.GaussianDpEvent(self.noise_multiplier))
        return dp_event.SelfComposedDpEvent(step, count)

    def epsilon(self, steps: int | None = None) -> float:
        """Epsilon spent after `steps` steps (default: all), rounded up to four decimals; 0 after none."""
        return epsilon_of(self.event(steps), self.delta)

    def profile(self, steps: int | None = None, deltas: Sequence[float] | None = None) -> list[dict[str, float]]:
        """Epsilon at several deltas: a fuller picture of the same mechanism than one pair."""
        chosen = deltas or sorted({1e-3, 1e-4, 1e-5, 1e-6, 1e-8, self.delta}, reverse=True)
        return [{"delta": delta, "epsilon": epsilon_of(self.event(steps), delta)} for delta in chosen]

    def epsilon_without_amplification(self, steps: int | None = None) -> float:
        """Epsilon against an observer who knows which rows entered each batch: as if all rows entered all batches."""
        count = self.steps if steps is None else steps
        if count == 0:
            return 0.0
        return gaussian_epsilon(self.noise_multiplier / math.sqrt(count), self.delta)  # k Gaussians are one

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for `from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "PrivacyPlan":
        """Inverse of `to_dict`."""
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class PrivacyBudget:
    """What may be spent: `epsilon` > 0 at `delta` (default: `default_delta` of the number of rows).

    Example:
        >>> plan = PrivacyBudget(epsilon=8.0).calibrate(num_examples=5000, sampling_rate=0.1, steps=100)
        >>> plan.epsilon() <= 8.0
        True

    Raises:
        ValueError: epsilon not positive and finite, delta not in (0, 1).
    """

    epsilon: float
    delta: float | None = None

    def __post_init__(self) -> None:
        if not (self.epsilon > 0 and math.isfinite(self.epsilon)):
            raise ValueError(
                f"epsilon={self.epsilon} must be positive and finite; 1 to 10 is usual, and training without privacy"
                " is done with transformers.Trainer."
            )
        if self.delta is not None and not 0 < self.delta < 1:
            raise ValueError(f"delta={self.delta} must be in (0, 1), and below 1/N for N private rows.")

    def calibrate(self, *, num_examples: int, sampling_rate: float, steps: int) -> PrivacyPlan:
        """The plan with the least noise (to about four digits, never too little) that stays within this budget.

        Args:
            num_examples: rows N of the private data.
            sampling_rate: q in (0, 1]; the expected batch size is q N.
            steps: noisy sums to release, at least 1.

        Raises:
            ValueError: a value out of range, or delta not below 1/N.
        """
        if num_examples < 1:
            raise ValueError(f"num_examples={num_examples} must be at least 1.")
        if not 0 < sampling_rate <= 1:
            raise ValueError(
                f"sampling_rate={sampling_rate} must be in (0, 1]: the expected batch size"
                f" {sampling_rate * num_examples:g} must not exceed num_examples={num_examples}."
            )
        if steps < 1:
            raise ValueError(f"steps={steps} must be at least 1.")
        delta = default_delta(num_examples) if self.delta is None else self.delta
        check_delta(delta, num_examples)

        def plan(units: int) -> PrivacyPlan:
            return PrivacyPlan(
                num_examples=num_examples,
                sampling_rate=sampling_rate,
                steps=steps,
                noise_multiplier=units / 10**_DIGITS,
                target_epsilon=self.epsilon,
                delta=delta,
            )

        def fits(units: int) -> bool:
            return epsilon_of(plan(units).event(), delta, grid=1e-3) <= self.epsilon

        # The wider grid is an upper bound too, so what fits here fits the official figure.
        high = 10_000
        while not fits(high):
            high *= 2
            if high > 10**10:
                raise ValueError(f"epsilon={self.epsilon} cannot be met with steps={steps}; ask for fewer steps.")
        low = high // 2
        while low >= 2000 and fits(low):
            low, high = low // 2, low
        while high - low > 1:  # `high` fits, `low` does not (or lies below any noise in use)
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        return plan(high)


__all__ = [
    "PrivacyBudget",
    "PrivacyPlan",
    "accountant_version",
    "default_delta",
    "epsilon_of",
    "event_from_dict",
    "event_to_dict",
]
