"""MeanCritic: a private mean, and a choice among generated images that comes near it."""

import pytest
import torch
import torch.nn.functional as F
from critic_parts import ASKED, blobs, knowing, network

from hf_spectral_dp import DPTrainer, MeanCritic, mean_critic
from hf_spectral_dp.feature_rows import RowsInMemory, draw_choices, mean_arguments
from hf_spectral_dp.mean_critic import RIDGE
from hf_spectral_dp.privacy.clipping import PerExampleClipper
from hf_spectral_dp.privacy.ledger import read_ledger
from hf_spectral_dp.trainer import LEDGER


def sets(count: int, size: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, size, 6, generator=torch.Generator().manual_seed(seed)) + 2 * torch.eye(6)[0]


def kept(critic: MeanCritic, drawn: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Directions of the kept ones of sets (N, M, 6), where features stand for the images that show them."""
    critic.features = lambda images: images
    generator = torch.Generator().manual_seed(seed)
    scores, shown = zip(*(critic.judge(images, None, generator) for images in drawn.unbind(1)), strict=True)
    del critic.features
    assert torch.stack(shown).eq(-1).all()  # it chooses among all
    chosen = torch.stack(scores, 1).argmax(1)
    return F.normalize(drawn[torch.arange(len(drawn)), chosen], dim=1)


def test_all_gradients_are_of_one_length_and_sum_to_sum_and_number():
    """By hand: minus (direction, 1), divided by sqrt(2)."""
    rows = blobs(50)[0]
    critic = MeanCritic.on(network())
    clipper = PerExampleClipper(critic, 1.0)
    clipper.add(lambda: critic.per_example_loss(rows), len(rows))
    sums = clipper.take()
    assert torch.allclose(sums["sums.weight"][0], -F.normalize(rows, dim=1).sum(0) / 2**0.5, atol=1e-4)
    assert torch.allclose(sums["sums.bias"], torch.tensor([-50 / 2**0.5]), atol=1e-4)


def test_one_noisy_step_gives_the_mean(tmp_path):
    """As far from the exact one as the noise of one full batch makes it, no more."""
    rows = blobs(3000)[0]
    arguments = mean_arguments(str(tmp_path), 1.0, 1e-5, use_cpu=True, disable_tqdm=True)
    trainer = DPTrainer(MeanCritic.on(network()), arguments, RowsInMemory(rows))
    trainer.train()
    assert read_ledger(tmp_path / LEDGER)["charged"] == 1 and 0.99 < trainer.epsilon_spent <= 1
    found = trainer.merged_model()
    noise = trainer.plan.noise_multiplier * 2**0.5  # of a sum of (direction, 1), in their own unit
    error = found.sums.weight[0] / found.sums.bias - F.normalize(rows, dim=1).mean(0)
    assert 0 < error.abs().max() < 5 * 2 * noise / len(rows)
    assert trainer.privacy_report()["training"]["trainable_parameters"] == 6 + 1


@pytest.mark.parametrize(("ridge", "left"), [(RIDGE, 0.6), (0.001, 0.15)])
def test_images_kept_have_the_private_mean(monkeypatch, ridge, left):
    """On sets that it did not learn from; what is asked for lies within what eight images offer, far from the usual."""
    monkeypatch.setattr(mean_critic, "RIDGE", ridge)
    critic, fresh = knowing(), sets(6000, seed=1)
    critic.fit(sets(600))
    before = F.normalize(fresh.flatten(0, 1), dim=1).mean(0)
    assert (kept(critic, fresh).mean(0) - ASKED).norm() < left * (before - ASKED).norm()


def test_the_exponent_is_that_of_the_ridge_by_an_explicit_loop():
    critic, drawn = knowing(), sets(200)
    critic.fit(drawn)
    directions = F.normalize(drawn.double(), dim=2)
    scale = (directions - directions.mean((0, 1))).square().mean().sqrt()
    exponent, total = critic.exponent.double(), torch.zeros(6, dtype=torch.double)
    for candidates in directions:
        odds = torch.tensor([float((direction @ exponent).exp()) for direction in candidates], dtype=torch.double)
        total += (odds / odds.sum()) @ candidates
    missing = ASKED.double() - total / len(drawn)
    assert torch.allclose(missing / scale, RIDGE * exponent * scale, atol=1e-4)


def test_choices_are_drawn_at_their_odds():
    critic = knowing()
    critic.exponent[0] = 1.5
    two = torch.eye(6)[:2]  # odds of e^1.5 to 1
    chosen = kept(critic, two.expand(20000, 2, 6))
    assert abs(float(chosen[:, 0].mean()) - 1 / (1 + torch.tensor(-1.5).exp())) < 0.015
    same = [kept(critic, two.expand(50, 2, 6), seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], same[2])


def test_a_number_lost_in_the_noise_means_no_choice():
    critic = knowing()
    critic.fit(sets(100))
    assert critic.exponent.abs().sum() > 0
    with torch.no_grad():
        critic.sums.bias.fill_(-0.001)
    with pytest.warns(UserWarning, match=r"noisy number of private images is -0.001 units; none is preferred"):
        critic.fit(sets(100))
    assert critic.exponent.eq(0).all()
    with pytest.raises(ValueError, match=r"give \(N, M, D\) with M >= 2"):
        critic.fit(sets(10, size=1))


def test_a_mean_longer_than_any_is_shortened():
    """Noise among few images: directions have means of length 1 at most."""
    asked = torch.tensor([3.0, 4.0, 0, 0, 0, 0])
    long, right = knowing(asked), knowing(asked / 5)
    for critic in (long, right):
        critic.fit(sets(100))
    assert torch.allclose(long.exponent, right.exponent, atol=1e-5)


def test_what_is_drawn_to_learn_from_is_seen_by_the_network():
    critic, drawn = knowing(), []

    def draw(count: int) -> torch.Tensor:
        drawn.append(torch.rand(count, 3, 16, 16) * 2 - 1)
        return drawn[-1]

    features = draw_choices(draw, critic, attempts=3, count=5)
    assert features.shape == (5, 3, 6)
    assert torch.allclose(features[:, 2], critic.network.features(drawn[2]))


def test_a_saved_critic_chooses_the_same(tmp_path):
    critic = knowing()
    torch.nn.init.normal_(critic.exponent)
    critic.save_pretrained(tmp_path)
    again, images = MeanCritic.from_pretrained(tmp_path), torch.rand(5, 3, 16, 16) * 2 - 1
    assert torch.equal(again(images), critic(images)) and not again.training
    assert torch.equal(again.sums.weight, critic.sums.weight)
    public = network()
    again.train()
    assert torch.equal(again.features(images), public.features(images))


def test_odds_give_public_images_the_private_mean():
    """Nearly exactly without a ridge; among all odds with that mean the nearest to equal ones, so never negative."""
    features = sets(1, 4000, seed=5)[0]
    directions = F.normalize(features.double(), dim=1)
    wanted = directions[:300].mean(0)
    critic = knowing(wanted.float())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mean_critic, "PUBLIC_RIDGE", 1e-6)
        odds = critic.odds(features)
    assert odds.sum().item() == pytest.approx(1) and bool((odds > 0).all())
    assert torch.allclose(odds @ directions, wanted, atol=1e-4)
    gap = (directions.mean(0) - wanted).norm()
    assert (critic.odds(features) @ directions - wanted).norm() < gap  # the ridge leaves some of it
    assert critic.exponent.abs().sum() == 0  # it is for generated images


@pytest.mark.parametrize("shape", [(1, 6), (2, 3, 6)])
def test_odds_need_a_matrix_of_several_images(shape):
    with pytest.raises(ValueError, match="N >= 2 images to weigh"):
        knowing().odds(torch.randn(shape))
