"""The accountant against closed forms, a second library and itself."""

import dataclasses
import json
import math

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from opacus.accountants import PRVAccountant
from scipy import stats

from benchmarks.accountants import agreement, within_budget
from hf_spectral_dp.privacy.budget import (
    SAMPLING,
    PrivacyBudget,
    PrivacyPlan,
    default_delta,
    deltas_of,
    epsilon_of,
    event_from_dict,
    event_to_dict,
    gaussian_epsilon,
    round_up,
)


@pytest.mark.parametrize(
    "epsilon, num_examples, sampling_rate, steps",
    [
        (8.0, 4000, 0.128, 300), (1.0, 60_000, 0.05, 500), (10.0, 50_000, 0.02, 1000), (3.0, 1000, 1.0, 20),
        (1.0, 10**9, 1e-7, 10_000),  # here the wide grid is a little below the official one
        (0.5, 10**6, 1e-3, 5000),  # and here far above
    ],
)  # fmt: skip
def test_the_plan_meets_the_budget_with_hardly_any_noise_to_spare(epsilon, num_examples, sampling_rate, steps):
    plan = PrivacyBudget(epsilon).calibrate(num_examples=num_examples, sampling_rate=sampling_rate, steps=steps)
    assert 0.998 * epsilon < plan.epsilon() <= epsilon
    assert plan.delta == default_delta(num_examples) < 1 / num_examples
    assert plan.expected_batch_size == pytest.approx(sampling_rate * num_examples)


def test_other_accountants_agree_on_random_schedules():
    """The short form of `python -m benchmarks.accountants`."""
    rows = agreement(tried=5, seed=1)
    assert rows[0]["tried"] == 5 and not any(row["failed"] for row in rows), rows
    assert rows[0]["largest_difference"] < 0.01


def test_the_epsilon_of_a_plan_is_that_of_the_noise_it_states():
    """Another accountant, told of the plan's own noise, rate and steps, agrees within one percent."""
    plan = PrivacyBudget(8.0).calibrate(num_examples=4000, sampling_rate=0.128, steps=300)
    accountant = PRVAccountant()
    accountant.history = [(plan.noise_multiplier, plan.sampling_rate, plan.steps)]
    assert accountant.get_epsilon(plan.delta) == pytest.approx(plan.epsilon(), rel=0.01)


def test_the_bound_of_a_log_is_near_and_on_the_safe_side():
    plan = PrivacyBudget(8.0).calibrate(num_examples=4000, sampling_rate=0.068, steps=100)
    for steps in (0, 1, 30, 99):
        assert plan.epsilon(steps) <= plan.epsilon_so_far(steps) <= min(plan.epsilon(steps) + 1e-3, plan.epsilon())
    assert plan.epsilon_so_far(100) == plan.epsilon()


def test_no_prefix_of_a_random_plan_is_over_its_budget():
    row = within_budget(tried=3, seed=5)
    assert row["tried"] == 3 and row["failed"] == 0 and row["least_of_budget_used"] > 0.99, row


def hockey_stick(p, q, epsilon, dx):
    """The smallest delta of two densities on one grid."""
    return float(np.clip(p - math.exp(epsilon) * q, 0, None).sum() * dx)


@pytest.mark.parametrize("rows, rate, size, noise", [(4, 0.5, 2, 1.0), (10, 0.1, 3, 1.0), (4, 1.0, 2, 1.0)])
def test_truncated_sampling_costs_what_its_densities_say(rows, rate, size, noise):
    """One step on the worst data: one row pulls up, all others down. D' has a null row at the place of the one."""
    x, dx = np.linspace(-size - 12, 14, 60_001, retstep=True)

    def normal(mean):
        return np.exp(-((x - mean) ** 2) / (2 * noise**2)) / (noise * math.sqrt(2 * math.pi))

    with_row = without = np.zeros_like(x)
    for others in range(rows):
        weight = stats.binom(rows - 1, rate).pmf(others)
        if others < size:  # nothing is cut
            kept, enters = others, rate
        else:  # it is in the batch with probability size / (others + 1) if it was sampled, and takes somebody's place
            kept, enters = size, rate * size / (others + 1)
        rest = kept if others < size else kept - 1
        with_row = with_row + weight * ((1 - enters) * normal(-kept) + enters * normal(1 - rest))
        without = without + weight * ((1 - enters) * normal(-kept) + enters * normal(-rest))
    truncated = dp_event.TruncatedSubsampledGaussianDpEvent(rows, rate, size, noise)
    for epsilon in (0.2, 1.0):
        delta = max(hockey_stick(with_row, without, epsilon, dx), hockey_stick(without, with_row, epsilon, dx))
        assert epsilon - 1e-4 <= epsilon_of(truncated, delta, "zero-out-one")
    gaussian = dp_event.GaussianDpEvent(noise)
    poisson = dp_event.PoissonSampledDpEvent(rate, gaussian)
    assert epsilon_of(truncated, delta, "zero-out-one") > epsilon_of(poisson, delta)
    if rate == 1.0:  # a uniform half of the rows is not Poisson sampling at rate 1/2: its account would be too low
        assert epsilon_of(dp_event.PoissonSampledDpEvent(size / rows, gaussian), delta) < 0.9


def test_truncation_far_away_costs_nothing_and_its_relation_is_not_chosen_freely():
    event = dp_event.SelfComposedDpEvent(dp_event.TruncatedSubsampledGaussianDpEvent(5000, 0.05, 5000, 2.0), 10)
    poisson = dp_event.PoissonSampledDpEvent(0.05, dp_event.GaussianDpEvent(2.0))
    assert epsilon_of(event, 1e-5, "zero-out-one") == epsilon_of(dp_event.SelfComposedDpEvent(poisson, 10), 1e-5)
    with pytest.raises(ValueError, match="adjacency='add-or-remove-one': truncated .* under zero-out-one only"):
        epsilon_of(event, 1e-5)
    with pytest.raises(ValueError, match="adjacency='replace-one' is not one of add-or-remove-one, zero-out-one"):
        epsilon_of(event, 1e-5, "replace-one")


def test_a_pass_costs_one_gaussian_whatever_its_batches():
    def plan(batch, steps):
        return PrivacyBudget(4.0, 1e-5).calibrate(
            num_examples=1003, sampling_rate=batch / 1003, steps=steps, sampling="single_pass"
        )

    whole, split = plan(1003, 1), plan(10, 101)
    assert split.steps_per_pass == 101 and whole.noise_multiplier == split.noise_multiplier
    costs = {plan(10, 303).epsilon(steps) for steps in (203, 250, 303)}
    assert len(costs) == 1 and plan(10, 303).event(202) == plan(10, 303).event(102) != plan(10, 303).event(203)
    exact = gaussian_epsilon(split.noise_multiplier, 1e-5)
    assert split.epsilon(1) == split.epsilon(101) == pytest.approx(exact, abs=2e-4)
    assert split.epsilon_without_amplification() == pytest.approx(split.epsilon(), abs=2e-4)
    assert split.expected_batch_size == pytest.approx(10)


@pytest.mark.parametrize("sampling, relation", SAMPLING.items())
def test_every_sampling_states_its_relation_and_survives_json(sampling, relation):
    size = 400 if sampling == "truncated_poisson" else None
    plan = PrivacyBudget(1.0, 1e-5).calibrate(
        num_examples=5000, sampling_rate=0.05, steps=300, sampling=sampling, max_batch_size=size
    )
    assert plan.adjacency == relation and 0.99 < plan.epsilon() <= 1.0
    assert PrivacyPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert event_from_dict(json.loads(json.dumps(event_to_dict(plan.event())))) == plan.event()
    assert plan.epsilon(0) == 0 < plan.epsilon(1) <= plan.epsilon(299) <= plan.epsilon()


FULL = PrivacyPlan(num_examples=5000, sampling_rate=1.0, steps=2, noise_multiplier=20.0, target_epsilon=2.0, delta=1e-5)


def test_earlier_runs_cost_what_dp_accounting_says_of_all_events():
    earlier = (FULL, dataclasses.replace(FULL, sampling_rate=0.1, steps=30, noise_multiplier=2.0))
    plan = dataclasses.replace(FULL, sampling_rate=0.05, steps=40, noise_multiplier=1.5, earlier=earlier)
    accountant = PLDAccountant()
    for q, noise, steps in ((1.0, 20.0, 2), (0.1, 2.0, 30), (0.05, 1.5, 40)):
        accountant.compose(dp_event.PoissonSampledDpEvent(q, dp_event.GaussianDpEvent(noise)), steps)
    alone = dataclasses.replace(plan, earlier=())
    assert plan.epsilon() == round_up(accountant.get_epsilon(1e-5)) > alone.epsilon() > 0
    assert plan.epsilon(0) == dataclasses.replace(earlier[1], earlier=earlier[:1]).epsilon() < plan.epsilon(1)
    assert plan.profile(40, [1e-5]) == [{"delta": 1e-5, "epsilon": plan.epsilon()}]


@pytest.mark.parametrize("sampling", ["poisson", "single_pass"])
def test_runs_on_full_batches_are_one_gaussian(sampling):
    first = dataclasses.replace(FULL, sampling=sampling)
    both = dataclasses.replace(first, steps=3, noise_multiplier=30.0, earlier=(first,))
    exact = gaussian_epsilon(1 / math.sqrt(2 / 20**2 + 3 / 30**2), 1e-5)
    assert both.epsilon() == pytest.approx(exact, abs=3e-4)
    assert both.epsilon_without_amplification() == pytest.approx(exact, abs=1.1e-4)
    assert both.epsilon_without_amplification(0) == first.epsilon_without_amplification()


@pytest.mark.parametrize("share", [0.3, 0.97])
def test_a_budget_pays_for_earlier_runs_and_is_not_exceeded(share):
    def plan(earlier=()):
        return PrivacyBudget(1.0, 1e-5).calibrate(num_examples=5000, sampling_rate=0.1, steps=20, earlier=earlier)

    first = PrivacyBudget(share, 1e-5).calibrate(num_examples=5000, sampling_rate=1.0, steps=1)
    second = plan([first])
    assert second.earlier == (first,) and second.epsilon(0) == first.epsilon()
    assert second.noise_multiplier > plan().noise_multiplier
    assert 1.0 - 0.005 * (1.0 - share) - 1e-4 <= second.epsilon() <= 1.0
    with pytest.raises(ValueError, match="epsilon=1.0 is the budget of all runs.*earlier ones cost .*choose a larger"):
        plan([first] * 12)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_examples": 4000}, "num_examples=5000, but an earlier run had 4000: .*same units only; train on"),
        ({"sampling": "single_pass"}, "'poisson' is accounted under add-or-remove-one, .*'single_pass' under zero-out"),
        ({"earlier": (FULL,)}, "an earlier run has 1 earlier runs of its own; list them beside it"),
    ],
)
def test_earlier_runs_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(FULL, earlier=(dataclasses.replace(FULL, **changes),))


def test_plans_with_earlier_runs_survive_json_and_others_are_written_as_before():
    plan = dataclasses.replace(FULL, steps=5, earlier=(FULL, FULL))
    assert PrivacyPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert event_from_dict(json.loads(json.dumps(event_to_dict(plan.event())))) == plan.event()
    assert "earlier" not in FULL.to_dict() and FULL.to_dict() in plan.to_dict()["earlier"]
    assert isinstance(FULL.event(), dp_event.SelfComposedDpEvent)
    truncated = dp_event.TruncatedSubsampledGaussianDpEvent(5000, 0.05, 400, 2.0)
    with pytest.raises(ValueError, match="under zero-out-one only"):
        epsilon_of(dp_event.ComposedDpEvent((FULL.event(), dp_event.SelfComposedDpEvent(truncated, 2))), 1e-5)


@pytest.mark.parametrize("noise_multiplier", [0.3, 1.0, 4.0])
def test_one_unsampled_gaussian_has_its_closed_form(noise_multiplier):
    event = dp_event.GaussianDpEvent(noise_multiplier)
    assert gaussian_epsilon(noise_multiplier, 1e-5) == pytest.approx(epsilon_of(event, 1e-5), abs=2e-4)
    epsilon, m = gaussian_epsilon(noise_multiplier, 1e-5), 1 / noise_multiplier

    def phi(x):
        return math.erfc(-x / math.sqrt(2)) / 2

    assert phi(m / 2 - epsilon / m) - math.exp(epsilon) * phi(-m / 2 - epsilon / m) <= 1e-5


@pytest.mark.parametrize("delta, steps", [(1e-10, 30_000), (1e-11, 10_000), (1e-12, 1_000), (1e-14, 10)])
def test_rounding_errors_of_many_sums_are_counted_where_delta_is_tiny(delta, steps):
    """Sums over all rows are one Gaussian, whose epsilon is known; the transforms of PLD alone fall short of it."""
    plan = PrivacyBudget(8.0, delta).calibrate(num_examples=10**6, sampling_rate=1.0, steps=steps)
    exact = gaussian_epsilon(plan.noise_multiplier / math.sqrt(steps), delta)
    assert exact <= plan.epsilon() <= 8 and plan.epsilon() < exact + 0.1
    assert deltas_of(plan.event(), [exact])[0] >= 0.999 * delta


def test_a_delta_below_the_rounding_errors_is_refused():
    with pytest.raises(ValueError, match=r"delta=1e-14 is too small .* 10000 noisy sums.* half of 4.44e-12; take"):
        PrivacyBudget(8.0, 1e-14).calibrate(num_examples=10**6, sampling_rate=1.0, steps=10_000)


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
        ({"sampling": "shuffled"}, "sampling='shuffled' is none that the accountant has a proof for; choose one of"),
        ({"sampling": "truncated_poisson"}, "max_batch_size=None must be at least the expected batch size 500"),
        ({"sampling": "truncated_poisson", "max_batch_size": 499}, "max_batch_size=499 must be at least"),
        ({"max_batch_size": 600}, "max_batch_size=600 is for sampling='truncated_poisson' only, not 'poisson'"),
        ({"sampling": "single_pass", "sampling_rate": 0.0301}, "expected_batch_size=150.5 must be a whole number"),
    ],
)
def test_an_impossible_plan_is_refused(changes, message):
    arguments = {"num_examples": 5000, "sampling_rate": 0.1, "steps": 10, **changes}
    delta = arguments.pop("delta", None)
    with pytest.raises(ValueError, match=message):
        PrivacyBudget(8.0, delta).calibrate(**arguments)
