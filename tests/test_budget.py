"""The accountant against closed forms, a second library and itself."""

import math

import pytest
from dp_accounting import dp_event
from opacus.accountants import PRVAccountant

from hf_spectral_dp.privacy.budget import (
    PrivacyBudget,
    PrivacyPlan,
    default_delta,
    epsilon_of,
    event_from_dict,
    event_to_dict,
    gaussian_epsilon,
    round_up,
)


@pytest.mark.parametrize(
    "epsilon, num_examples, sampling_rate, steps",
    [(8.0, 4000, 0.128, 300), (1.0, 60_000, 0.05, 500), (10.0, 50_000, 0.02, 1000), (3.0, 1000, 1.0, 20)],
)
def test_the_plan_meets_the_budget_with_hardly_any_noise_to_spare(epsilon, num_examples, sampling_rate, steps):
    plan = PrivacyBudget(epsilon).calibrate(num_examples=num_examples, sampling_rate=sampling_rate, steps=steps)
    assert 0.998 * epsilon < plan.epsilon() <= epsilon
    assert plan.delta == default_delta(num_examples) < 1 / num_examples
    assert plan.expected_batch_size == pytest.approx(sampling_rate * num_examples)


def test_a_second_accountant_agrees_within_one_percent():
    plan = PrivacyBudget(8.0, 1e-5).calibrate(num_examples=5000, sampling_rate=0.1, steps=200)
    other = PRVAccountant()
    other.history = [(plan.noise_multiplier, plan.sampling_rate, plan.steps)]
    assert plan.epsilon() == pytest.approx(other.get_epsilon(1e-5, eps_error=0.005), rel=0.01)


@pytest.mark.parametrize("noise_multiplier", [0.3, 1.0, 4.0])
def test_one_unsampled_gaussian_has_its_closed_form(noise_multiplier):
    event = dp_event.GaussianDpEvent(noise_multiplier)
    assert gaussian_epsilon(noise_multiplier, 1e-5) == pytest.approx(epsilon_of(event, 1e-5), abs=2e-4)
    epsilon, m = gaussian_epsilon(noise_multiplier, 1e-5), 1 / noise_multiplier

    def phi(x):
        return math.erfc(-x / math.sqrt(2)) / 2

    assert phi(m / 2 - epsilon / m) - math.exp(epsilon) * phi(-m / 2 - epsilon / m) <= 1e-5


def test_epsilon_grows_with_steps_and_shrinks_with_noise():
    plan = PrivacyPlan(
        num_examples=5000, sampling_rate=0.1, steps=50, noise_multiplier=1.5, target_epsilon=8.0, delta=1e-5
    )
    spent = [plan.epsilon(steps) for steps in (0, 1, 10, 50)]
    assert spent[0] == 0 and spent == sorted(set(spent))
    quieter = PrivacyPlan(**{**plan.to_dict(), "noise_multiplier": 1.4})
    assert quieter.epsilon() > plan.epsilon()
    assert plan.epsilon_without_amplification() > plan.epsilon()
    profile = plan.profile()
    assert len(profile) >= 5
    assert [entry["epsilon"] for entry in profile] == sorted(entry["epsilon"] for entry in profile)


def test_displayed_epsilon_is_rounded_up():
    assert round_up(1.23451) == 1.2346
    assert round_up(2.0) == 2.0
    assert round_up(math.inf) == math.inf


def test_plans_and_events_survive_json():
    plan = PrivacyBudget(8.0).calibrate(num_examples=5000, sampling_rate=0.1, steps=20)
    assert PrivacyPlan.from_dict(plan.to_dict()) == plan
    for event in (plan.event(), plan.event(0), dp_event.GaussianDpEvent(2.0)):
        assert event_from_dict(event_to_dict(event)) == event
    with pytest.raises(ValueError, match="LaplaceDpEvent"):
        event_from_dict({"type": "LaplaceDpEvent", "noise_multiplier": 1.0})
    with pytest.raises(ValueError, match="GaussianDpEvent"):
        event_from_dict({"type": "GaussianDpEvent", "sigma": 1.0})


@pytest.mark.parametrize("epsilon", [0, -1.0, math.inf, math.nan])
def test_an_impossible_epsilon_is_refused(epsilon):
    with pytest.raises(ValueError, match="epsilon="):
        PrivacyBudget(epsilon)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"delta": 1 / 5000}, "delta=0.0002 .*below 0.0002"),
        ({"sampling_rate": 1.5}, "sampling_rate=1.5 .*7500 must not exceed num_examples=5000"),
        ({"sampling_rate": 0.0}, "sampling_rate=0.0"),
        ({"steps": 0}, "steps=0"),
        ({"num_examples": 0}, "num_examples=0"),
    ],
)
def test_an_impossible_plan_is_refused(changes, message):
    arguments = {"num_examples": 5000, "sampling_rate": 0.1, "steps": 10, **changes}
    delta = arguments.pop("delta", None)
    with pytest.raises(ValueError, match=message):
        PrivacyBudget(8.0, delta).calibrate(**arguments)
