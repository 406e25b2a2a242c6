"""What critics look through and at, for several test files: a small public network, features, a mean that is known."""

import torch

from hf_spectral_dp import MeanCritic
from hf_spectral_dp.metrics.public_features import PublicFeatureConfig, PublicFeatureNetwork

ASKED = torch.tensor([0.4, 0.3, -0.2, 0.0, 0.0, 0.0])


def blobs(rows: int = 300, dim: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features around one of three means, with directions of very different variance."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (rows,), generator=generator)
    stretch = torch.logspace(-0.5, 0.5, dim)
    features = torch.randn(rows, dim, generator=generator) + 3 * torch.eye(3, dim)[labels]
    return features * stretch + 5, labels


def network() -> PublicFeatureNetwork:
    """Six features of images of 16 x 16, with statistics of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PublicFeatureNetwork(PublicFeatureConfig(16, (2, 2, 2, 2, 2), 4)).eval()


def knowing(mean: torch.Tensor = ASKED) -> MeanCritic:
    """A critic that was told this mean (6,) exactly."""
    critic = MeanCritic.on(network())
    with torch.no_grad():
        critic.sums.bias.fill_(0.25)
        critic.sums.weight.copy_(mean * 0.25)
    return critic
