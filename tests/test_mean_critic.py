"""MeanCritic: a private mean per class, and a choice among generated images that comes near it."""

import pytest
import torch
import torch.nn.functional as F
from test_critic import blobs, network, rows_of

from hf_spectral_dp import DPTrainer, MeanCritic, mean_critic
from hf_spectral_dp.feature_rows import RowsInMemory, draw_choices, mean_arguments
from hf_spectral_dp.mean_critic import RIDGE
from hf_spectral_dp.privacy.clipping import PerExampleClipper
from hf_spectral_dp.privacy.ledger import read_ledger
from hf_spectral_dp.trainer import LEDGER


def knowing(means: torch.Tensor) -> MeanCritic:
    """A critic that was told these means (classes, 6) exactly; of no classes if there is one."""
    critic = MeanCritic.on(network(), 0 if len(means) == 1 else len(means))
    with torch.no_grad():
        critic.sums.bias.fill_(0.25)
        critic.sums.weight.copy_(means * 0.25)
    return critic


def sets(count: int, size: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, size, 6, generator=torch.Generator().manual_seed(seed)) + 2 * torch.eye(6)[0]


def kept(critic: MeanCritic, drawn: torch.Tensor, labels: torch.Tensor | None = None, seed: int = 0) -> torch.Tensor:
    """Directions of the kept ones of sets (N, M, 6), where features stand for the images that show them."""
    critic.features = lambda images: images
    chosen = critic.choose(list(drawn.unbind(1)), labels, torch.Generator().manual_seed(seed))
    del critic.features
    return F.normalize(drawn[torch.arange(len(drawn)), chosen], dim=1)


def test_all_gradients_are_of_one_length_and_sum_to_sums_and_numbers():
    """By hand: minus (direction, 1) at the row's class, divided by sqrt(2); a row without a class gives nothing."""
    features, labels = blobs(50)
    critic, rows = MeanCritic.on(network(), 3), rows_of(features, labels)
    rows[:10, 0] = -1
    clipper = PerExampleClipper(critic, 1.0)
    clipper.add(lambda: critic.per_example_loss(rows), len(rows))
    sums = clipper.take()
    directions, one_hot = F.normalize(features[10:], dim=1), F.one_hot(labels[10:], 3).float()
    assert torch.allclose(sums["sums.weight"], -one_hot.T @ directions / 2**0.5, atol=1e-4)
    assert torch.allclose(sums["sums.bias"], -one_hot.sum(0) / 2**0.5, atol=1e-4)


def test_without_classes_every_row_counts_whatever_its_label():
    features, labels = blobs(30)
    critic, rows = MeanCritic.on(network(), 0), rows_of(features, labels)
    rows[:10, 0] = -1
    critic.per_example_loss(rows).sum().backward()
    assert torch.allclose(-critic.sums.weight.grad[0], F.normalize(features, dim=1).sum(0), atol=1e-4)
    assert critic.sums.bias.grad.tolist() == [-30.0]


def test_one_noisy_step_gives_the_means_of_the_classes(tmp_path):
    """As far from the exact ones as the noise of one full batch makes them, no more."""
    features, labels = blobs(3000)
    critic = MeanCritic.on(network(), 3)
    arguments = mean_arguments(str(tmp_path), 1.0, 1e-5, use_cpu=True, disable_tqdm=True)
    trainer = DPTrainer(critic, arguments, RowsInMemory(rows_of(features, labels)))
    trainer.train()
    assert read_ledger(tmp_path / LEDGER)["charged"] == 1 and 0.99 < trainer.epsilon_spent <= 1
    found = trainer.merged_model()
    noise = trainer.plan.noise_multiplier * 2**0.5  # of a sum of (direction, 1), in their own unit
    for label in range(3):
        own = F.normalize(features[labels == label], dim=1)
        error = found.sums.weight[label] / found.sums.bias[label] - own.mean(0)
        assert 0 < error.abs().max() < 5 * 2 * noise / len(own)
    assert trainer.privacy_report()["training"]["trainable_parameters"] == 3 * (6 + 1)


@pytest.mark.parametrize("classes", [0, 2])
@pytest.mark.parametrize(("ridge", "left"), [(RIDGE, 0.6), (0.001, 0.15)])
def test_images_kept_have_the_private_mean(monkeypatch, classes, ridge, left):
    """On sets that it did not learn from; what is asked for lies within what eight images offer, far from the usual."""
    monkeypatch.setattr(mean_critic, "RIDGE", ridge)
    asked = torch.tensor([[0.4, 0.3, -0.2, 0.0, 0.0, 0.0], [0.6, 0.0, 0.0, 0.2, 0.2, 0.0]])[: max(1, classes)]
    critic = knowing(asked)
    labels = torch.arange(classes).repeat(300) if classes else None
    drawn = sets(600)
    critic.fit(drawn, labels)
    fresh = sets(6000, seed=1)
    others = torch.arange(classes).repeat(3000) if classes else None
    chosen = kept(critic, fresh, others)
    for label, mean in enumerate(asked):
        own = chosen if others is None else chosen[others == label]
        before = F.normalize(fresh.flatten(0, 1), dim=1).mean(0)
        assert (own.mean(0) - mean).norm() < left * (before - mean).norm()


def test_the_exponent_is_that_of_the_ridge_by_an_explicit_loop():
    asked = torch.tensor([[0.4, 0.3, -0.2, 0.0, 0.0, 0.0]])
    critic, drawn = knowing(asked), sets(200)
    critic.fit(drawn)
    directions = F.normalize(drawn.double(), dim=2)
    scale = (directions - directions.mean((0, 1))).square().mean().sqrt()
    exponent, total = critic.exponents[0].double(), torch.zeros(6, dtype=torch.double)
    for candidates in directions:
        odds = torch.tensor([float((direction @ exponent).exp()) for direction in candidates], dtype=torch.double)
        total += (odds / odds.sum()) @ candidates
    missing = asked[0].double() - total / len(drawn)
    assert torch.allclose(missing / scale, RIDGE * exponent * scale, atol=1e-4)


def test_choices_are_drawn_at_their_odds():
    critic = knowing(torch.zeros(1, 6))
    critic.exponents[0, 0] = 1.5
    two = torch.eye(6)[:2]  # odds of e^1.5 to 1
    chosen = kept(critic, two.expand(20000, 2, 6))
    assert abs(float(chosen[:, 0].mean()) - 1 / (1 + torch.tensor(-1.5).exp())) < 0.015
    same = [kept(critic, two.expand(50, 2, 6), seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], same[2])


def test_a_class_lost_in_the_noise_gets_no_choice():
    critic = knowing(torch.zeros(2, 6))
    with torch.no_grad():
        critic.sums.bias[1] = -0.001
    critic.exponents.fill_(1)
    with pytest.warns(UserWarning, match=r"class 1 has 50 choices and a noisy share of -0.001"):
        critic.fit(sets(100), torch.arange(2).repeat(50))
    assert critic.exponents[0].abs().sum() > 0 and critic.exponents[1].eq(0).all()
    with pytest.raises(ValueError, match=r"give \(N, M, D\) with M >= 2"):
        critic.fit(sets(10, size=1))


def test_a_mean_longer_than_any_is_shortened():
    """Noise in a small class: directions have means of length 1 at most."""
    asked = torch.tensor([[3.0, 4.0, 0, 0, 0, 0]])
    long, right = knowing(asked), knowing(asked / 5)
    for critic in (long, right):
        critic.fit(sets(100))
    assert torch.allclose(long.exponents, right.exponents, atol=1e-5)


def test_what_is_drawn_to_learn_from_is_seen_by_the_network():
    critic = knowing(torch.zeros(2, 6))
    drawn = []

    def draw(labels: torch.Tensor | None, count: int) -> torch.Tensor:
        assert labels is not None and labels.tolist() == [0, 1] * 5 and count == 10
        drawn.append(torch.rand(count, 3, 16, 16) * 2 - 1)
        return drawn[-1]

    features, labels = draw_choices(draw, critic, attempts=3, each=5)
    assert features.shape == (10, 3, 6) and labels.tolist() == [0, 1] * 5
    assert torch.allclose(features[:, 2], critic.network.features(drawn[2]))
    shown = draw_choices(lambda labels, count: torch.zeros(count, 3, 16, 16), knowing(torch.zeros(1, 6)), 2, each=4)
    assert shown[0].shape == (4, 2, 6) and shown[1] is None


def test_a_saved_critic_chooses_the_same(tmp_path):
    critic = knowing(torch.zeros(2, 6))
    torch.nn.init.normal_(critic.exponents)
    critic.save_pretrained(tmp_path)
    again, images = MeanCritic.from_pretrained(tmp_path), torch.rand(5, 3, 16, 16) * 2 - 1
    assert torch.equal(again(images), critic(images)) and not again.training
    assert torch.equal(again.sums.weight, critic.sums.weight)
    public = network()
    again.train()
    assert torch.equal(again.features(images), public.features(images))
