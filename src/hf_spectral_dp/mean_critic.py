"""A private mean of public features, and a choice among what the generator draws that comes near it.

The mean of bounded features over all private images is one noisy sum: it costs little of a budget, and any number of
generated images may then be compared with it. DP-MEPF (Harder et al., arXiv:2205.12900) releases such a mean and trains
a generator to match it. Here the generator is trained by `DPTrainer` on tokens, and the mean corrects what that left
wrong: of several images drawn, the pipeline keeps one, at random, with odds that are exponential in the features. Among
all such choices the weights of the exponent are those for which the images kept have the private mean on average (the
dual of the smallest change of the generator's law that does so).
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from .critic import Critic, CriticConfig

RIDGE = 1.0
"""Penalty on the squared weights, in units in which features vary by 1: the prior of an exponent of that size."""
PUBLIC_RIDGE = 10.0
"""The same where public images are weighed: they are far from private ones, and few near images would count alone."""


class MeanCritic(Critic, PreTrainedModel):  # diffusers loads components whose module knows this name
    """The mean of public features of the private images, and how to choose images that have it.

    Features are brought to length 1. Training is private: one full batch by `DPTrainer`, whose guarantee is its own, as
    `feature_rows.mean_arguments` has it, on rows as `feature_rows.ImageFeatureRows` makes them. A row is float32 (D,).
    The loss of a row is linear, so its gradient is minus the features and minus 1: all gradients are of length sqrt(2),
    and after one step at a rate of 1 `sums` holds sum and number of the features in one unknown unit, with the noise of
    the step. `fit`, afterwards, looks at generated images only.

    It knows no classes: with labels, it chooses among images of one label by the mean of all.
    """

    _keep_in_fp32_modules_strict = ["network", "sums", "exponent"]

    def __init__(self, config: CriticConfig):
        super().__init__(config)
        dim = self.network.feature_mean.numel()
        self.sums = nn.Linear(dim, 1)
        self.register_buffer("exponent", torch.zeros(dim))
        self.post_init()
        self.train(False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self.sums:
            nn.init.zeros_(self.sums.weight)
            nn.init.zeros_(self.sums.bias)

    def per_example_loss(self, input_ids: Tensor) -> Tensor:
        """Minus the output for each row of features (B, D): (B,). The rows are no token ids; trainers call them so."""
        return -self.sums(F.normalize(input_ids, dim=1))[:, 0]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logarithm of the odds (B,) with which images (B, 1 or 3, H, W) in [-1, 1] are kept."""
        return F.normalize(self.features(pixel_values), dim=1) @ self.exponent.float()

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Finds the exponent of the choice from images that the generator drew; 64 sets of eight will do.

        Post-processing of two private releases, generator and mean; no private image is looked at. If the noisy number
        of images is not positive, a warning says so and none is preferred.

        Args:
            features: (N, M, D) of the M images of each of N choices.

        Raises:
            ValueError: fewer than two images to choose from.
        """
        if features.ndim != 3 or features.shape[1] < 2:
            raise ValueError(f"features has shape {tuple(features.shape)}; give (N, M, D) with M >= 2 to choose from.")
        self.exponent.copy_(self._exponent_for(features, RIDGE))

    @torch.no_grad()
    def odds(self, features: Tensor) -> Tensor:
        """How often to take which public image, so that those taken have the private mean on average: (N,), sum 1.

        The odds are exponential in the features; among all odds with that mean they are the nearest to equal ones.
        Post-processing of the mean; `exponent`, which `fit` found, stays. If the noisy number of private images is not
        positive, a warning says so and all odds are equal.

        Args:
            features: (N, D) of public images, N >= 2.
        """
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"features has shape {tuple(features.shape)}; give (N, D) of N >= 2 images to weigh.")
        directions = F.normalize(features.double().cpu(), dim=1)
        return (directions @ self._exponent_for(features[None], PUBLIC_RIDGE).double().cpu()).softmax(0)

    def _exponent_for(self, features: Tensor, ridge: float) -> Tensor:
        """Weights (D,) for which images chosen from sets of features (N, M, D) have the private mean."""
        count = self.sums.bias.item()
        if count <= 0:
            warnings.warn(f"the noisy number of private images is {count:.3g} units; none is preferred.", stacklevel=3)
            return torch.zeros_like(self.exponent)
        mean = (self.sums.weight[0] / count).double().cpu()
        mean /= mean.norm().clamp(min=1)  # no mean of directions is longer: what is above is noise
        return _exponent(F.normalize(features.double().cpu(), dim=2), mean, ridge)

    @torch.no_grad()
    def judge(
        self, images: Tensor, labels: Tensor | None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scores of which the highest is that of one image at random, by the odds of `forward`; it needs to see all.

        Arguments as in `Critic.judge`; labels do not matter.
        """
        odds = self(images.to(self.device))
        device = self.device if generator is None else generator.device
        waiting = torch.empty(odds.shape, device=device).exponential_(generator=generator).log()
        # The first of competing exponential clocks is the one of these odds (Gumbel's maximum).
        return odds - waiting.to(odds.device), torch.full(odds.shape, -1)


def _exponent(drawn: Tensor, mean: Tensor, ridge: float) -> Tensor:
    """Weights (D,) for which images kept from sets `drawn` (N, M, D) have `mean` on average, up to the ridge.

    Their mean is the gradient of the mean over sets of logsumexp(drawn @ weights), which is convex.
    """
    centre = drawn.mean((0, 1))
    scale = (drawn - centre).square().mean().sqrt().clamp(min=1e-12)
    points, target = (drawn - centre) / scale, (mean - centre) / scale
    weights = torch.zeros(len(mean), dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = torch.logsumexp(points @ weights, 1).mean() - weights @ target + ridge / 2 * weights.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return (weights.detach() / scale).float()


__all__ = ["PUBLIC_RIDGE", "RIDGE", "MeanCritic"]
