"""Membership inference: figures against their definitions, intervals against simulation."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score
from training_parts import Rows

from hf_spectral_dp.metrics.membership import (
    attack_result,
    auroc_limit,
    auroc_limit_of,
    membership_inference,
    membership_scores,
    power_limit,
    token_log_probabilities,
)


def test_log_probabilities_are_those_of_the_loss(grey_model):
    rows = Rows(7).rows
    found = token_log_probabilities(grey_model, rows, batch_size=3)
    assert found.shape == (7, 12) and (found < 0).all()
    torch.testing.assert_close(-found.mean(1), grey_model.per_example_loss(rows).detach())
    null = rows.clone()
    null[:, 0] = grey_model.config.null_token_id
    without = token_log_probabilities(grey_model, rows, conditional=False)
    torch.testing.assert_close(without, token_log_probabilities(grey_model, null))


def test_scores_by_hand():
    conditional = torch.tensor([[-1.0, -2.0, -3.0, -4.0, -10.0]])
    unconditional = torch.tensor([[-2.0, -2.0, -5.0, -1.0, -10.0]])
    scores = membership_scores(conditional, unconditional, k=0.4)
    assert {name: value.item() for name, value in scores.items()} == {
        "likelihood": -4.0,
        "min-40 %": -7.0,
        "likelihood gained by the label": 0.0,
        "min-40 % of the gain": -1.5,
    }
    assert set(membership_scores(conditional)) == {"likelihood", "min-20 %"}
    with pytest.raises(ValueError, match="k=0"):
        membership_scores(conditional, k=0)
    with pytest.raises(ValueError, match="same tokens"):
        membership_scores(conditional, unconditional[:, :3])


def test_auroc_and_tpr_are_what_they_are_called():
    generator = torch.Generator().manual_seed(0)
    members, others = (
        torch.randn(150, generator=generator) + 0.7,
        torch.randn(200, generator=generator).round(decimals=1),
    )
    result = attack_result("x", members.round(decimals=1), others)
    truth = [1] * 150 + [0] * 200
    assert result.auroc == pytest.approx(roc_auc_score(truth, [*members.round(decimals=1), *others]), abs=1e-4)
    threshold = others.sort().values[-3]  # two of two hundred are above
    assert result.tpr == pytest.approx(float((members.round(decimals=1) > threshold).float().mean()), abs=1e-4)
    assert result.low < result.auroc < result.high and result.tpr_low <= result.tpr <= result.tpr_high


def test_the_interval_covers_the_truth():
    """N(1, 1) against N(0, 1): AUROC = Phi(1 / sqrt 2) = 0.7602."""
    generator, covered = torch.Generator().manual_seed(1), 0
    for _ in range(100):
        result = attack_result("x", torch.randn(120, generator=generator) + 1, torch.randn(120, generator=generator))
        covered += result.low <= 0.7602 <= result.high
    assert covered >= 88  # 95 expected, three standard deviations


def test_separation_chance_and_misuse():
    perfect = attack_result("x", torch.ones(100) + torch.rand(100), torch.rand(100))
    assert perfect.auroc == perfect.tpr == perfect.high == 1 and 0.9 < perfect.low < 1 and perfect.caught
    same = attack_result("x", torch.zeros(100), torch.zeros(100))
    assert same.auroc == 0.5 and same.tpr == 0 and not same.caught
    with pytest.raises(ValueError, match="99 others"):
        attack_result("x", torch.zeros(100), torch.zeros(99))
    with pytest.raises(ValueError, match="NaN"):
        attack_result("x", torch.full((100,), float("nan")), torch.zeros(100))


def test_the_limit_of_the_claim():
    """The area under TPR = min(e^eps FPR + delta, 1 - (1 - delta - FPR) / e^eps), by numbers."""
    for epsilon, delta in ((0.0, 0.0), (1.0, 0.0), (1.0, 1e-3), (4.0, 1e-5)):
        fpr = np.linspace(0, 1, 200_001)
        tpr = np.minimum(np.minimum(np.exp(epsilon) * fpr + delta, 1 - np.exp(-epsilon) * (1 - delta - fpr)), 1)
        area = np.trapezoid(tpr, fpr)
        assert area - 1e-6 <= auroc_limit(epsilon, delta) <= area + delta + 1e-6
        np.testing.assert_allclose(power_limit([(epsilon, delta)], fpr), tpr)
        assert area <= auroc_limit_of([(epsilon, delta)]) <= area + 1e-3


def test_the_limit_of_several_pairs_is_that_of_the_mechanism():
    """A mechanism of mu-GDP: its power is Phi(Phi^-1(FPR) + mu), its AUROC Phi(mu / sqrt 2)."""
    mu = 1.3
    epsilons = np.linspace(0, 12, 600)
    deltas = stats.norm.cdf(mu / 2 - epsilons / mu) - np.exp(epsilons) * stats.norm.cdf(-mu / 2 - epsilons / mu)
    pairs, rates = list(zip(epsilons, deltas, strict=True)), np.array([0.001, 0.01, 0.2, 0.7])
    truth = stats.norm.cdf(stats.norm.ppf(rates) + mu)
    found = power_limit(pairs, rates)
    assert (found >= truth - 1e-12).all()
    np.testing.assert_allclose(found, truth, rtol=1e-3)
    assert stats.norm.cdf(mu / 2**0.5) <= auroc_limit_of(pairs) <= stats.norm.cdf(mu / 2**0.5) + 2e-3


def test_all_attacks_on_one_model(grey_model, colour_model):
    results = membership_inference(grey_model, Rows(120).rows, Rows(120, seed=1).rows)
    assert [result.attack for result in results] == [
        "likelihood", "min-20 %", "likelihood gained by the label", "min-20 % of the gain",
    ]  # fmt: skip
    assert all(0.3 < result.auroc < 0.7 for result in results)  # never trained on either
    rows = Rows(120).rows
    rows[:, 0] = colour_model.config.null_token_id
    assert len(membership_inference(colour_model, rows, rows)) == 2  # no label, nothing gained by it
