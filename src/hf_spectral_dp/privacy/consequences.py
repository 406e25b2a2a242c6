"""What a guarantee means to a reader: how well any attack can do, and what holds for several units together.

All figures are proven upper bounds, rounded up. They follow from the same event as epsilon, whose proof is in
`PrivacyPlan`; here is what is derived from it.
"""

import math
from typing import Any

from dp_accounting.dp_event import DpEvent
from dp_accounting.rdp import RdpAccountant

from .budget import RELATIONS, PrivacyPlan, deltas_of, epsilon_of, gaussian_epsilon, least_delta, round_up

FALSE_POSITIVE_RATES = (0.01, 0.001)
GROUP_SIZES = (2, 5, 10)
_EPSILONS = [0.05 * step for step in range(401)]  # up to 20: where the bounds are looked for
_SHRINKINGS = range(17)  # powers of 10^(-1/2) by which delta is shrunk for a group


def gaussian_dp(plan: PrivacyPlan, steps: int | None = None) -> float:
    """mu such that the steps are mu-Gaussian differentially private (Dong, Roth and Su, 2022), rounded up.

    Formal guarantee: one noisy sum without subsampling is 1/noise_multiplier-GDP (their Theorem 2.7), k of them are
    sqrt(k)/noise_multiplier-GDP (Corollary 3.3), and a batch that stays secret only mixes this with no release at all,
    which is harder to tell apart. No smaller mu holds for Poisson batches: at the smallest false positive rates the
    power of the best attack is that against k unsampled sums, times q^k, and no Gaussian of a smaller mu keeps up with
    its tail. So amplification by sampling cannot be put into mu; it is in epsilon and in the profile. A truncated batch
    is counted twice, because a unit may take the place of another one. With earlier runs the squares add up (Corollary
    3.3 again).
    """
    runs = [(run, run.sums_per_unit()) for run in plan.earlier] + [(plan, plan.sums_per_unit(steps))]
    return round_up(math.hypot(*(_moved(run) * math.sqrt(count) / run.noise_multiplier for run, count in runs)))


def _moved(plan: PrivacyPlan) -> int:
    """How far one unit can move a noisy sum, in clipping norms."""
    return 2 if plan.sampling == "truncated_poisson" else 1


def privacy_pairs(event: DpEvent, adjacency: str) -> list[tuple[float, float]]:
    """Pairs (epsilon, delta) that the event satisfies, all at once: for epsilon 0 to 20, delta rounded up."""
    return list(zip(_EPSILONS, deltas_of(event, _EPSILONS, adjacency), strict=True))


def attack_bounds(plan: PrivacyPlan, steps: int | None = None) -> dict[str, Any]:
    """How well any attack can tell whether one unit was in the data, if it knows all the others.

    Formal guarantee: an (e, d(e))-DP mechanism allows no test of false positive rate a more than min over e of
    exp(e) a + d(e) true positives (Kairouz et al., arXiv:1311.0776, Theorem 2.1), and no test a difference of the two
    rates of more than d(0).

    Returns:
        {"advantage": largest true minus false positive rate,
        "true_positive_rates": [{"false_positive_rate", "true_positive_rate"}, ...]}, all in [0, 1].
    """
    pairs, rates = privacy_pairs(plan.event(steps), plan.adjacency), []
    for rate in FALSE_POSITIVE_RATES:
        bound = min(math.exp(epsilon) * rate + delta for epsilon, delta in pairs)
        rates.append({"false_positive_rate": rate, "true_positive_rate": min(1.0, round_up(bound))})
    return {"advantage": min(1.0, round_up(pairs[0][1])), "true_positive_rates": rates}


def group_epsilons(plan: PrivacyPlan, steps: int | None = None) -> list[dict[str, Any]]:
    """Epsilon at the plan's delta for k units together, such as k images of one person.

    Formal guarantee: the smaller of two bounds. (e, d)-DP for one unit is (k e, d (exp(k e) - 1) / (exp(e) - 1))-DP
    for k (Vadhan, 2017, Lemma 2.2); and mu-GDP for one is k mu-GDP for k (Dong, Roth and Su, 2022, Theorem 2.14).

    Returns:
        [{"units": k, "epsilon": ...}, ...] for k of `GROUP_SIZES`.
    """
    event, mu = plan.event(steps), gaussian_dp(plan, steps)
    shrunk = [plan.delta * 10 ** (-power / 2) for power in _SHRINKINGS]
    pairs = [(_epsilon_at(event, delta, plan.adjacency), delta) for delta in shrunk]
    groups = []
    for units in GROUP_SIZES:
        bound = gaussian_epsilon(1 / (units * mu), plan.delta) if mu else 0.0
        for epsilon, delta in pairs:
            if math.isfinite(epsilon) and _group_delta(units, epsilon, delta) <= plan.delta:
                bound = min(bound, round_up(units * epsilon))
        groups.append({"units": units, "epsilon": bound})
    return groups


def _epsilon_at(event: DpEvent, delta: float, adjacency: str) -> float:
    """Epsilon at any delta: by Renyi divergences where it is too small for PLD; infinite where these have no proof."""
    if delta >= least_delta(event):
        return epsilon_of(event, delta, adjacency)
    accountant = RdpAccountant(neighboring_relation=RELATIONS[adjacency])
    return float(accountant.compose(event).get_epsilon(delta)) if accountant.supports(event) else math.inf


def _group_delta(units: int, epsilon: float, delta: float) -> float:
    """delta (exp(k epsilon) - 1) / (exp(epsilon) - 1), infinite where it leaves the range of floats."""
    if epsilon == 0:
        return units * delta
    if units * epsilon > 600:
        return math.inf
    return delta * math.expm1(units * epsilon) / math.expm1(epsilon)


__all__ = ["FALSE_POSITIVE_RATES", "GROUP_SIZES", "attack_bounds", "gaussian_dp", "group_epsilons", "privacy_pairs"]
