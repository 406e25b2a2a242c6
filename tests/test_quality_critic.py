"""The critic in the quality benchmark: what its run costs is counted, and it chooses as the pipeline does."""

import pytest
import torch

from benchmarks.quality_critic import (
    CHOICES,
    CLASS_SHARE,
    MEAN_SHARE,
    choose_by,
    features,
    learn_classes,
    mean_rows,
    photo_rows,
    private_mean,
)
from benchmarks.quality_methods import Cost, TokenGenerator, train_privately
from hf_spectral_dp import SpectralConfig
from hf_spectral_dp.metrics.features import PublicFeatures
from hf_spectral_dp.privacy.ledger import read_ledger


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture
def generator() -> TokenGenerator:
    torch.manual_seed(0)
    config = SpectralConfig(
        image_size=16, num_channels=3, levels=2, patch_sizes=[2, 2], codebook_sizes=[8, 8], num_classes=2,
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    return TokenGenerator.from_public_images(config, images(60), lambda coarse: coarse)


def test_critic_and_training_share_one_budget(generator, tmp_path):
    labels = torch.arange(50) % 2
    rows = generator.rows(images(50, 1), labels)
    ledger, cost = learn_classes(generator, rows, images(650, 2), 8.0, 1e-5, steps=8, folder=tmp_path)
    critic_run = read_ledger(ledger)
    assert critic_run["charged"] == 40 and critic_run["header"]["plan"]["target_epsilon"] == 8.0 * CLASS_SHARE
    assert cost.steps == 8 and cost.flops > 0 and cost.epsilon is None
    assert generator.critic is not None and generator.critic.regression.weight.abs().sum() > 0
    settings = {"max_steps": 3, "expected_batch_size": 10, "micro_batch_size": 10}
    own = train_privately(generator, rows, 8.0, 1e-5, **settings, earlier_ledgers=[ledger])
    assert 7.9 < own.epsilon <= 8


def test_photos_have_no_class_and_are_seen_through_the_tokens(generator):
    photos = images(5, 3)
    rows = photo_rows(generator, photos)
    assert rows[:, 0].eq(generator.model.config.null_token_id).all()
    assert torch.equal(rows[:, 1:], generator.model.codec.encode(photos))

    class Sees:
        def features(self, shown: torch.Tensor) -> torch.Tensor:
            return shown.flatten(1)

    assert torch.equal(features(generator, Sees(), rows), generator.model.decode(rows[:, 1:]).flatten(1))


def test_of_the_attempts_the_one_stays_that_the_critic_likes_best(generator):
    class Bright:
        """Class 1 is bright, class 0 dark."""

        def judge(self, shown: torch.Tensor, labels: torch.Tensor, generator: object) -> tuple:
            light = shown.mean((1, 2, 3)) * (2 * labels - 1)
            return light, torch.full(light.shape, -1)

    labels = torch.arange(40) % 2
    plain = generator.sample(labels, torch.Generator().manual_seed(0)).mean((1, 2, 3))
    generator.critic, generator.attempts = Bright(), 6
    chosen = generator.sample(labels, torch.Generator().manual_seed(0)).mean((1, 2, 3))
    assert (chosen[labels == 1] >= plain[labels == 1]).all() and (chosen[labels == 0] <= plain[labels == 0]).all()
    assert (chosen != plain).float().mean() > 0.5


def test_mean_and_training_share_one_budget_and_the_twin_knows_the_mean_exactly(generator, tmp_path):
    private = images(50, 1)
    critic, (ledger,) = private_mean(mean_rows(private, "cpu"), 8.0, 1e-5, tmp_path, "cpu")
    run = read_ledger(ledger)
    assert run["charged"] == 1 and run["header"]["plan"]["target_epsilon"] == 8.0 * MEAN_SHARE
    settings = {"max_steps": 3, "expected_batch_size": 10, "micro_batch_size": 10, "earlier_ledgers": [ledger]}
    own = train_privately(generator, generator.rows(private, torch.arange(50) % 2), 8.0, 1e-5, **settings)
    assert 7.9 < own.epsilon <= 8
    exact, ledgers = private_mean(mean_rows(private, "cpu"), float("inf"), 1e-5, tmp_path / "twin", "cpu")
    directions = torch.nn.functional.normalize(PublicFeatures().network.features(private), dim=1)
    assert torch.allclose(exact.sums.weight[0] / exact.sums.bias, directions.mean(0), atol=1e-5)
    assert ledgers == [] and not torch.equal(critic.sums.weight, exact.sums.weight)


@pytest.mark.slow
def test_what_the_choice_costs_is_counted(generator, tmp_path):
    exact, _ = private_mean(mean_rows(images(50, 1), "cpu"), float("inf"), 1e-5, tmp_path, "cpu")
    cost = choose_by(exact, generator, Cost(1.0, 5.0, steps=3), 50)
    assert cost.flops > 5 and (cost.seconds, cost.steps) == (1.0, 3)
    assert generator.sampling["critic"] == "MeanCritic" and generator.attempts == CHOICES
    assert exact.exponent.abs().sum() > 0
