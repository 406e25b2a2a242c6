"""From a budget (epsilon, delta) to a plan (noise, rate, steps), and from a plan to the epsilon it really costs.

The official figure is that of privacy loss distributions (dp-accounting, PLD), which composes the mechanism numerically
with an upper bound. Every epsilon printed by this package comes from `epsilon_of`. `SAMPLING` names the ways to form
batches that there is a proof for; each fixes its event, its neighbouring relation and (in `sampling.py`) its sampler.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.privacy_accountant import NeighboringRelation
from scipy.optimize import brentq
from scipy.special import log_ndtr

RELATIONS = {
    "add-or-remove-one": NeighboringRelation.ADD_OR_REMOVE_ONE,
    "zero-out-one": NeighboringRelation.REPLACE_SPECIAL,
}
# How batches are formed, and which data sets are neighbours under the proof for it: "add-or-remove-one" unit, or
# "zero-out-one", where the unit keeps its place but contributes nothing, so that N and all places are public.
SAMPLING = {"poisson": "add-or-remove-one", "truncated_poisson": "zero-out-one", "single_pass": "zero-out-one"}

_GRID = 1e-4  # on which privacy losses are rounded up: dp-accounting's default, so that strangers find the same figures
# Added to delta for each noisy sum: the errors found against exact Gaussians are a twentieth of it.
_ROUNDING = float(np.finfo(float).eps)
_DIGITS = 4  # of a displayed epsilon and of a noise multiplier, always rounded to the safe side


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


@lru_cache(maxsize=4)  # a distribution may take hundreds of MiB
def _pld(event: dp_event.DpEvent, adjacency: str, grid: float) -> PLDAccountant:
    return PLDAccountant(RELATIONS[adjacency], value_discretization_interval=grid).compose(event)


@lru_cache(maxsize=4096)
def _epsilon(event: dp_event.DpEvent, delta: float, adjacency: str, grid: float) -> float:
    if delta < (least := least_delta(event)):
        raise ValueError(
            f"delta={delta:.3g} is too small for the accountant after {_compositions(event)} noisy sums, whose rounding"
            f" errors may add up to half of {least:.3g}; take a delta of at least that, or fewer steps."
        )
    return round_up(float(_pld(event, adjacency, grid).get_epsilon(delta - least / 2)))


def least_delta(event: dp_event.DpEvent) -> float:
    """The smallest delta at which the epsilon of an event can be told: twice what rounding errors may add up to."""
    return 2 * _ROUNDING * _compositions(event)


def _compositions(event: dp_event.DpEvent) -> int:
    """The noisy sums in an event."""
    if isinstance(event, dp_event.SelfComposedDpEvent):
        return event.count * _compositions(event.event)
    if isinstance(event, dp_event.ComposedDpEvent):
        return sum(map(_compositions, event.events))
    return 0 if isinstance(event, dp_event.NoOpDpEvent) else 1


def epsilon_of(
    event: dp_event.DpEvent, delta: float, adjacency: str = "add-or-remove-one", grid: float = _GRID
) -> float:
    """The epsilon of `event` at `delta`, by PLD, rounded up to four decimals.

    `grid` is the step on which losses are rounded up: every grid gives a valid upper bound, a wider one is quicker
    and mostly looser. The default is dp-accounting's own, so that a stranger recomputes the same figure. PLD itself
    does not count the rounding errors of its Fourier transforms, which grow with the number of noisy sums and matter
    where delta is tiny; here `_ROUNDING` for each sum is taken off delta.

    Raises:
        ValueError: delta is below twice those rounding errors.
        ValueError: an unknown relation, or one that the event is not proven for: truncation depends on the number of
            rows, which adding or removing a row changes.
        dp_accounting.UnsupportedEventError: an event that the accountant has no proof for.
    """
    if adjacency not in RELATIONS:
        raise ValueError(f"adjacency={adjacency!r} is not one of {', '.join(RELATIONS)}.")
    parts = event.events if isinstance(event, dp_event.ComposedDpEvent) else (event,)
    truncated = dp_event.TruncatedSubsampledGaussianDpEvent
    if adjacency != "zero-out-one" and any(isinstance(getattr(part, "event", part), truncated) for part in parts):
        raise ValueError(f"adjacency={adjacency!r}: truncated Poisson sampling is accounted under zero-out-one only.")
    return _epsilon(event, delta, adjacency, grid)


def deltas_of(event: dp_event.DpEvent, epsilons: Sequence[float], adjacency: str = "add-or-remove-one") -> list[float]:
    """The delta of `event` at each epsilon >= 0, by PLD: upper bounds, as `epsilon_of` is."""
    epsilon_of(event, 0.5, adjacency)  # refuses what it has no proof for
    lost = least_delta(event) / 2
    return [min(1.0, float(delta) + lost) for delta in _pld(event, adjacency, _GRID).get_delta(list(epsilons))]


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
    """Plain JSON form of an event: {"type": class name, field: value, nested event or list of events}."""

    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return event_to_dict(value) if isinstance(value, dp_event.DpEvent) else value

    fields = {name.name: plain(getattr(event, name.name)) for name in event.__attrs_attrs__}
    return {"type": type(event).__name__, **fields}


_EVENTS = (
    "GaussianDpEvent",
    "PoissonSampledDpEvent",
    "TruncatedSubsampledGaussianDpEvent",
    "SelfComposedDpEvent",
    "ComposedDpEvent",
    "NoOpDpEvent",
)


def event_from_dict(fields: Mapping[str, Any]) -> dp_event.DpEvent:
    """Inverse of `event_to_dict`.

    Raises:
        ValueError: an event type that this package never records, or a wrong set of fields.
    """
    values = dict(fields)
    name = values.pop("type", None)
    if name not in _EVENTS:
        raise ValueError(f"event type {name!r} is not one of {', '.join(_EVENTS)}.")

    def built(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple(built(item) for item in value)  # not a list, which has no hash
        return event_from_dict(value) if isinstance(value, Mapping) else value

    try:
        return getattr(dp_event, name)(**{key: built(value) for key, value in values.items()})
    except TypeError as error:
        raise ValueError(f"event {name} with fields {sorted(values)}: {error}.") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """A mechanism that fits a budget: how batches are formed, how much noise is added, how many steps are allowed.

    Attributes:
        num_examples: units N of the private data (rows, or persons where a column names them); treated as public.
        sampling_rate: q, the expected batch size over N. The probability with which each unit enters each batch,
            independently; with "single_pass" merely the share of the rows that one batch holds.
        steps: number of noisy sums that may be released.
        noise_multiplier: standard deviation of the noise on the clipped sum over the clipping norm.
        target_epsilon: what the user asked for, earlier runs included; `epsilon()` never exceeds it.
        delta: the delta at which epsilon is stated.
        sampling: a key of `SAMPLING`.
        max_batch_size: the largest batch of "truncated_poisson"; None otherwise.
        earlier: plans of earlier runs on the same units, `steps` being those that were charged; every figure of this
            plan is that of all runs together.

    Formal guarantee: release `steps` sums of per-unit vectors of Euclidean norm at most C, each plus
    N(0, (noise_multiplier C)^2) on every coordinate, over batches that are formed as `sampling` says and stay secret.
    That is (epsilon(), delta)-differentially private (numeric composition by PLD, Doroshenko et al., arXiv:2207.04380),
    whatever function of the released sums chooses the next vectors; all else computed from the sums is post-processing.
        *poisson*, adding or removing one unit. Fresh Poisson batches at rate q (Abadi et al., arXiv:1607.00133).
        *truncated_poisson*, zeroing out one unit. As above, but of a batch of more than max_batch_size units a uniform
            subset of that size is kept. This is not free: where the others fill the batch, the unit takes the place of
            another one and moves the sum by up to 2 C (Ganesh, arXiv:2508.15089).
        *single_pass*, zeroing out one unit. Consecutive batches of exactly q N places; a pass takes `steps_per_pass`
            of them and every place is in one. Given the earlier releases of its pass, one step depends on the unit and
            the others do not, so a pass is one Gaussian mechanism (parallel composition, McSherry, SIGMOD 2009, also
            with adaptive steps), and k steps are ceil(k / steps_per_pass) of them. No amplification is claimed. Under
            adding or removing a row this would be false: every later row would move to another place.
    With *earlier* runs the guarantee is that of their releases and these together, by adaptive sequential composition
    on the same units under one neighbouring relation: a vector may depend on all that was released before, in its own
    run or an earlier one. Assumption, as within one run: the constants of all plans do not depend on what was released
    (numeric composition is proven for mechanisms that are fixed beforehand).

    Raises:
        ValueError: an unknown sampling, constants that do not fit it, or earlier runs of other units, of another
            neighbouring relation, or with earlier runs of their own.
    """

    num_examples: int
    sampling_rate: float
    steps: int
    noise_multiplier: float
    target_epsilon: float
    delta: float
    sampling: str = "poisson"
    max_batch_size: int | None = None
    earlier: tuple["PrivacyPlan", ...] = ()

    def __post_init__(self) -> None:
        size, expected = self.max_batch_size, self.expected_batch_size
        if self.sampling not in SAMPLING:
            raise ValueError(
                f"sampling={self.sampling!r} is none that the accountant has a proof for; choose one of"
                f" {', '.join(SAMPLING)}."
            )
        if self.sampling == "truncated_poisson" and (size is None or size < expected):
            raise ValueError(
                f"max_batch_size={size} must be at least the expected batch size {expected:g} with"
                " sampling='truncated_poisson'; some standard deviations more, for every truncation costs privacy."
            )
        if self.sampling != "truncated_poisson" and size is not None:
            raise ValueError(f"max_batch_size={size} is for sampling='truncated_poisson' only, not {self.sampling!r}.")
        if self.sampling == "single_pass" and not (round(expected) >= 1 and math.isclose(expected, round(expected))):
            raise ValueError(
                f"expected_batch_size={expected:g} must be a whole number of rows with sampling='single_pass'."
            )
        for run in self.earlier:
            if run.num_examples != self.num_examples:
                raise ValueError(
                    f"num_examples={self.num_examples}, but an earlier run had {run.num_examples}: costs add up for the"
                    " same units only; train on the data and with the privacy unit of the earlier run."
                )
            if run.adjacency != self.adjacency:
                raise ValueError(
                    f"sampling={self.sampling!r} is accounted under {self.adjacency}, but an earlier run's"
                    f" {run.sampling!r} under {run.adjacency}: one claim needs one relation; choose a sampling that"
                    " is accounted under that of the earlier run."
                )
            if run.earlier:
                raise ValueError(
                    f"an earlier run has {len(run.earlier)} earlier runs of its own; list them beside it instead."
                )

    @property
    def adjacency(self) -> str:
        """The neighbouring relation of the guarantee."""
        return SAMPLING[self.sampling]

    @property
    def expected_batch_size(self) -> float:
        """q N, a public constant: the divisor of every noisy sum."""
        return self.sampling_rate * self.num_examples

    @property
    def steps_per_pass(self) -> int:
        """Batches in which "single_pass" takes every row once."""
        return math.ceil(self.num_examples / round(self.expected_batch_size))

    def sums_per_unit(self, steps: int | None = None) -> int:
        """The noisy sums that one unit may be in after `steps` steps (default: all) of this run alone."""
        count = self.steps if steps is None else steps
        return math.ceil(count / self.steps_per_pass) if self.sampling == "single_pass" else count

    def event(self, steps: int | None = None) -> dp_event.DpEvent:
        """The event of `steps` steps (default: all), after those of all earlier runs."""
        own = self._own_event(self.steps if steps is None else steps)
        if not self.earlier:
            return own
        events = (*(run.event() for run in self.earlier), own)  # a tuple, because a list has no hash
        return dp_event.ComposedDpEvent(tuple(event for event in events if event != dp_event.NoOpDpEvent()))

    def claimed(self, charged: int) -> int:
        """The steps that a claim counts for a run that charged so many: all planned ones, as soon as there was one.

        Who ends a run early may have looked at what it released, and epsilon of the charged steps is proven only for
        a number of steps that was fixed before. For one chosen on the way, that of the most steps it could have had
        holds (privacy filters: Rogers et al., arXiv:1605.08294; Whitehouse et al., arXiv:2203.05481).
        """
        return self.steps if charged else 0

    def _own_event(self, count: int) -> dp_event.DpEvent:
        if count == 0:
            return dp_event.NoOpDpEvent()
        gaussian = dp_event.GaussianDpEvent(self.noise_multiplier)
        if self.sampling == "single_pass":
            return dp_event.SelfComposedDpEvent(gaussian, self.sums_per_unit(count))
        if self.sampling == "truncated_poisson":
            return dp_event.SelfComposedDpEvent(
                dp_event.TruncatedSubsampledGaussianDpEvent(
                    self.num_examples, self.sampling_rate, self.max_batch_size, self.noise_multiplier
                ),
                count,
            )
        return dp_event.SelfComposedDpEvent(dp_event.PoissonSampledDpEvent(self.sampling_rate, gaussian), count)

    def epsilon(self, steps: int | None = None) -> float:
        """Epsilon spent after `steps` steps (default: all), rounded up to four decimals; 0 after none at all."""
        return epsilon_of(self.event(steps), self.delta, self.adjacency)

    def epsilon_so_far(self, steps: int) -> float:
        """An upper bound of `epsilon(steps)` for a log: by a tenth of its time, mostly above it by less than 0.001.

        Losses are rounded up on a grid ten times as wide. What all steps cost is no less, and known exactly.
        """
        if steps >= self.steps:
            return self.epsilon(steps)
        return min(epsilon_of(self.event(steps), self.delta, self.adjacency, grid=10 * _GRID), self.epsilon())

    def profile(self, steps: int | None = None, deltas: Sequence[float] | None = None) -> list[dict[str, float]]:
        """Epsilon at several deltas: a fuller picture of the same mechanism than one pair."""
        chosen = deltas or sorted({1e-3, 1e-4, 1e-5, 1e-6, 1e-8, self.delta}, reverse=True)
        event = self.event(steps)
        return [{"delta": delta, "epsilon": epsilon_of(event, delta, self.adjacency)} for delta in chosen]

    def epsilon_without_amplification(self, steps: int | None = None) -> float:
        """Epsilon against an observer who knows which rows entered each batch: as if all rows entered all batches.

        With "single_pass" that observer learns nothing new, and this is `epsilon` by its closed form.
        """
        own = self.sums_per_unit(steps) / self.noise_multiplier**2
        precision = own + sum(run.sums_per_unit() / run.noise_multiplier**2 for run in self.earlier)
        return gaussian_epsilon(1 / math.sqrt(precision), self.delta) if precision else 0.0  # all Gaussians are one

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for `from_dict`; "earlier" only where there are any."""
        fields = {**dataclasses.asdict(self), "earlier": [run.to_dict() for run in self.earlier]}
        return {name: value for name, value in fields.items() if name != "earlier" or value}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "PrivacyPlan":
        """Inverse of `to_dict`."""
        return cls(**{**fields, "earlier": tuple(cls.from_dict(run) for run in fields.get("earlier", ()))})


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

    def calibrate(
        self,
        *,
        num_examples: int,
        sampling_rate: float,
        steps: int,
        sampling: str = "poisson",
        max_batch_size: int | None = None,
        earlier: Sequence[PrivacyPlan] = (),
    ) -> PrivacyPlan:
        """The plan with the least noise (to about four digits, never too little) that stays within this budget.

        Args:
            num_examples: units N of the private data.
            sampling_rate: q in (0, 1]; the expected batch size is q N.
            steps: noisy sums to release, at least 1.
            sampling: how batches are formed; see `PrivacyPlan`.
            max_batch_size: of "truncated_poisson".
            earlier: runs on the same units, with the steps they were charged; their cost is part of this budget.

        Raises:
            ValueError: a value out of range, constants that do not fit `sampling`, delta not below 1/N, or earlier
                runs that do not fit or leave nothing of the budget.
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
                sampling=sampling,
                max_batch_size=max_batch_size,
                earlier=tuple(earlier),
            )

        spent = plan(1).epsilon(steps=0)
        if spent >= self.epsilon:
            raise ValueError(
                f"epsilon={self.epsilon} is the budget of all runs together, and the earlier ones cost {spent} at"
                f" delta={delta:.3g}; choose a larger epsilon, for what is spent cannot be given back."
            )

        def epsilon(units: int, grid: float) -> float:
            candidate = plan(units)
            return epsilon_of(candidate.event(), delta, candidate.adjacency, grid)

        def least(high: int, grid: float) -> int:
            """The least noise that fits at this grid."""
            while epsilon(high, grid) > self.epsilon:
                high *= 2
                if high > 10**10:
                    beside = f" beside earlier runs that cost {spent}" if earlier else ""
                    raise ValueError(
                        f"epsilon={self.epsilon} cannot be met with steps={steps}{beside}; ask for fewer steps."
                    )
            low = high // 2
            while low >= 2000 and epsilon(low, grid) <= self.epsilon:
                low, high = low // 2, low
            while high - low > 1:  # `high` fits, `low` does not (or lies below any noise in use)
                middle = (low + high) // 2
                low, high = (low, middle) if epsilon(middle, grid) <= self.epsilon else (middle, high)
            return high

        units = least(10_000, grid=1e-3)  # quick; mostly within a per mille of the official grid, on either side
        # Many steps may each cost less than the wide grid can tell; not with little noise, where losses are large.
        left = self.epsilon - spent
        if units > 5000 and epsilon(units, _GRID) < self.epsilon - 0.002 * left:
            units = least(units, _GRID)
        while (over := epsilon(units, _GRID) - self.epsilon) > 0:
            # Where earlier runs cost nearly all, noise changes the whole by little: a longer step, still short of it.
            units += 1 + (int(units * over / left / 2) if earlier else 0)
        return plan(units)


__all__ = [
    "RELATIONS",
    "SAMPLING",
    "PrivacyBudget",
    "PrivacyPlan",
    "default_delta",
    "deltas_of",
    "epsilon_of",
    "event_from_dict",
    "event_to_dict",
    "gaussian_epsilon",
    "least_delta",
    "round_up",
]
