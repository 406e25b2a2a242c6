"""What follows from a guarantee for attackers and groups: closed forms, the known truth, and monotony."""

import dataclasses
import math

import pytest
from card_reports import COMPOSED, PLAN, PLANS, SINGLE_PASS, TRUNCATED
from dp_accounting.rdp import RdpAccountant
from scipy.stats import norm

from hf_spectral_dp.privacy.budget import PrivacyBudget, PrivacyPlan, gaussian_epsilon, least_delta
from hf_spectral_dp.privacy.consequences import attack_bounds, gaussian_dp, group_epsilons

# Every unit in every batch: the exact answers are known, those of one Gaussian of mu = sqrt(steps) / noise.
WHOLE = PrivacyPlan(num_examples=1000, sampling_rate=1.0, steps=4, noise_multiplier=4.0, target_epsilon=9.0, delta=1e-5)
MU = 0.5


def test_mu_by_hand():
    assert gaussian_dp(WHOLE) == MU and gaussian_dp(WHOLE, steps=1) == 0.25
    assert gaussian_dp(PLAN) == 0.4  # sqrt(4) / 5, whatever the sampling rate
    assert gaussian_dp(TRUNCATED) == 0.8  # a unit may take another one's place
    assert gaussian_dp(SINGLE_PASS) == 0.1572  # two passes began: sqrt(2) / 9 = 0.15713...


def test_with_earlier_runs_the_squares_of_mu_add_up():
    assert gaussian_dp(COMPOSED) == pytest.approx(math.sqrt(4 / 5**2 + 2 / 20**2 + 3 / 8**2), abs=1e-4)
    assert gaussian_dp(COMPOSED, steps=0) == pytest.approx(math.sqrt(2 / 20**2 + 3 / 8**2), abs=1e-4)
    truncated = dataclasses.replace(TRUNCATED, earlier=(SINGLE_PASS, TRUNCATED))
    assert gaussian_dp(truncated) == pytest.approx(math.sqrt(2 * 0.8**2 + 2 / 9**2), abs=1e-4)
    first, alone = attack_bounds(COMPOSED, 0), attack_bounds(PLAN)
    assert max(first["advantage"], alone["advantage"]) < attack_bounds(COMPOSED)["advantage"]


def test_mu_dominates_epsilon_without_amplification():
    for plan in [*PLANS, COMPOSED]:
        assert gaussian_epsilon(1 / gaussian_dp(plan), plan.delta) >= plan.epsilon_without_amplification() - 1e-4


def test_without_sampling_the_bounds_are_the_best_attack():
    bounds = attack_bounds(WHOLE)
    best = 2 * norm.cdf(MU / 2) - 1
    assert best <= bounds["advantage"] <= best + 2e-3
    for entry in bounds["true_positive_rates"]:
        power = norm.cdf(norm.ppf(entry["false_positive_rate"]) + MU)  # Neyman and Pearson
        assert power <= entry["true_positive_rate"] <= 1.1 * power + 2e-3


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.sampling)
def test_bounds_grow_with_steps_and_with_groups(plan):
    first, last = attack_bounds(plan, 1), attack_bounds(plan)
    assert 0 <= first["advantage"] <= last["advantage"] <= 1
    epsilons = [plan.epsilon(), *(group["epsilon"] for group in group_epsilons(plan))]
    assert epsilons == sorted(epsilons) and all(math.isfinite(epsilon) for epsilon in epsilons)


def test_a_group_in_every_batch_is_a_larger_gaussian():
    for group in group_epsilons(WHOLE):
        exact = gaussian_epsilon(1 / (group["units"] * MU), WHOLE.delta)
        assert exact - 1e-4 <= group["epsilon"] <= exact + 1e-3


def test_groups_after_many_steps_are_bounded_where_rounding_errors_would_decide():
    """Ten units ask for a delta that PLD cannot tell any more; Renyi divergences can, and it is no worse than they."""
    plan = PrivacyBudget(1.0).calibrate(num_examples=50_000, sampling_rate=0.02, steps=2000)
    event = plan.event()
    assert least_delta(event) > plan.delta * 1e-8
    *_, ten = group_epsilons(plan)
    accountant = RdpAccountant().compose(event)
    bounds = []
    for power in range(17):
        delta = plan.delta * 10 ** (-power / 2)
        epsilon = accountant.get_epsilon(delta)
        if delta * math.expm1(10 * epsilon) / math.expm1(epsilon) <= plan.delta:
            bounds.append(10 * epsilon)
    assert 10 < ten["epsilon"] <= min(bounds) + 1e-4 < 20
