"""Audits: their bounds are bounds, the right code passes, and what is broken is refuted."""

import numpy as np
import pytest
import torch
from scipy import stats

from hf_spectral_dp.privacy import mechanism
from hf_spectral_dp.privacy.audit import (
    Finding,
    epsilon_of_mu,
    gaussian_dp_lower_bound,
    mechanism_audit,
    one_run_lower_bound,
    one_run_p_value,
    rate_bounds,
)
from hf_spectral_dp.privacy.clipping import PerExampleClipper
from hf_spectral_dp.privacy.noise import GaussianNoise

QUICK = {"trials": 20_000, "lone_trials": 60}  # a false alarm in 10,000 runs, as with 10^5


@pytest.mark.parametrize("successes, trials", [(0, 20), (3, 20), (20, 20), (5000, 10_000)])
def test_rates_are_bounded_by_the_binomial_tail(successes, trials):
    low, high = rate_bounds(successes, trials, 0.01)
    assert low <= successes / trials <= high
    # At each bound the observation is just as unlikely as allowed.
    assert low == 0 or stats.binom.sf(successes - 1, trials, low) == pytest.approx(0.01)
    assert high == 1 or stats.binom.cdf(successes, trials, high) == pytest.approx(0.01)


@pytest.mark.parametrize("mu", [0.0, 0.5, 1.0, 3.0])
def test_the_bound_on_mu_is_below_mu_and_not_far(mu):
    random = np.random.default_rng(1)
    bounds = [
        gaussian_dp_lower_bound(random.normal(mu, 1, 50_000), random.normal(0, 1, 50_000), [mu / 2], 0.01)
        for _ in range(20)
    ]
    assert max(bounds) <= mu and min(bounds) >= mu - 0.1


def test_scores_that_are_not_numbers_give_a_canary_away():
    inside, outside = np.full(200, np.nan), np.random.default_rng(0).normal(size=200)
    assert gaussian_dp_lower_bound(inside, outside, [0.0, 10.0], 0.01) > 3
    assert gaussian_dp_lower_bound(outside, outside, [0.0, 10.0], 0.01) == 0


def test_epsilon_of_mu():
    assert epsilon_of_mu(0.0, 1e-5) == 0
    assert epsilon_of_mu(1.0, 1e-5) == pytest.approx(4.3771, abs=1e-3)  # Balle and Wang at sigma = 1


@pytest.mark.parametrize(
    "canaries, guesses, correct, epsilon",
    [(100, 100, 100, 3.49), (166, 166, 166, 4.0), (1000, 1000, 1000, 5.78), (1000, 200, 200, 4.17)],
)
def test_the_one_run_p_value_at_known_points(canaries, guesses, correct, epsilon):
    """Points at which 95 % confidence is just reached, at delta = 1e-5."""
    assert one_run_p_value(canaries, guesses, correct, epsilon, 1e-5) == pytest.approx(0.05, rel=0.03)


def test_without_delta_the_p_value_is_the_binomial_tail():
    for correct in range(31):
        chance = np.exp(1) / (1 + np.exp(1))
        expected = stats.binom.sf(correct - 1, 30, chance)
        assert one_run_p_value(30, 30, correct, 1.0, 0.0) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="guesses=40"):
        one_run_p_value(30, 40, 10, 1.0, 0.0)


def test_the_one_run_bound_holds_for_randomised_response():
    """The strongest epsilon-DP release of each coin: the bound may exceed epsilon in 5 % of runs, no more."""
    random, exceeded, bounds = np.random.default_rng(2), 0, []
    for _ in range(200):
        coins = random.random(300) < 0.5
        told = np.where(random.random(300) < np.exp(1) / (1 + np.exp(1)), coins, ~coins)
        bounds.append(one_run_lower_bound(told + 1e-3 * random.random(300), coins, 1e-5))
        exceeded += bounds[-1] > 1.0
    assert exceeded <= 20  # 10 expected at most; 20 by chance in 0.2 % of experiments
    assert np.median(bounds) > 0.5  # and it is no empty bound


def test_the_one_run_bound_without_and_with_full_knowledge():
    random = np.random.default_rng(3)
    coins = random.random(1000) < 0.5
    assert one_run_lower_bound(random.normal(size=1000), coins, 1e-5, 0.999) == 0
    assert one_run_lower_bound(np.where(coins, 1.0, -1.0), coins, 1e-5) > 4
    with pytest.raises(ValueError, match="one number per canary"):
        one_run_lower_bound(np.zeros(3), np.zeros(4), 1e-5)


def test_a_finding_that_is_not_a_number_is_refuted():
    assert Finding("x", float("nan"), 0.0, 1.0).refuted
    assert not Finding("x", 0.5, 0.0, 1.0).refuted


def test_the_right_code_passes_and_the_control_is_caught():
    audit = mechanism_audit(**QUICK)
    assert not audit.refuted, [finding for finding in audit.findings if finding.refuted]
    assert 0.8 < audit.mu_lower_bound <= audit.claimed_mu == 1
    assert audit.epsilon_lower_bound <= audit.claimed_epsilon
    weak = mechanism_audit(0.85, 1.0, **QUICK)
    assert weak.refuted and weak.mu_lower_bound > 1


def no_noise_on_the_first_parameter(monkeypatch):
    add = GaussianNoise.add_
    monkeypatch.setattr(GaussianNoise, "add_", lambda self, tensors: add(self, list(tensors)[1:]))


def an_empty_batch_is_skipped(monkeypatch):
    release = mechanism.NoisyClippedMean.release

    def skipping(self, rows, losses):
        return release(self, rows, losses) if len(rows) else self.clipper.take()

    monkeypatch.setattr(mechanism.NoisyClippedMean, "release", skipping)


def noise_from_the_global_seed(monkeypatch):
    init = GaussianNoise.__init__

    def seeded(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self._generator = np.random.default_rng(torch.initial_seed())

    monkeypatch.setattr(GaussianNoise, "__init__", seeded)


def clipped_to_twice_the_norm(monkeypatch):
    add = PerExampleClipper.add

    def doubled(self, losses, batch_size, padding=0):
        add(self, losses, batch_size, padding)
        add(self, losses, batch_size, padding)

    monkeypatch.setattr(PerExampleClipper, "add", doubled)


@pytest.mark.parametrize(
    "bug, found",
    [
        (no_noise_on_the_first_parameter, "canaries in a crowd, table layer only"),
        (an_empty_batch_is_skipped, "a canary alone: the scale of the rest"),
        (noise_from_the_global_seed, "an adversary who knows every seed"),
        (clipped_to_twice_the_norm, "canaries in a crowd"),
    ],
)
def test_bugs_are_refuted_by_the_attack_meant_for_them(monkeypatch, bug, found):
    bug(monkeypatch)
    audit = mechanism_audit(trials=3000, lone_trials=60)
    assert found in [finding.check for finding in audit.findings if finding.refuted]
    assert audit.mu_lower_bound > audit.claimed_mu


def test_the_audit_leaves_the_global_generators_as_they_were():
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()
    mechanism_audit(trials=200, lone_trials=3)
    assert (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()) == before
