"""A private critic of classes: softmax regression on public features of images.

A few noisy sums over all private images cost little of a budget and say which class a picture looks like. What the
critic then says of public photos, or of what the generator draws, is post-processing. So the public model can learn the
private classes from public photos before private training begins (PrivImage, arXiv:2311.12850, chooses public classes
by a private query), and the pipeline can keep those of its images that look most like their class.

That critic is trained on images as the generator makes them: through codec and super-resolution, not the originals.
`mean_critic.MeanCritic` chooses among what the generator draws by another knowledge, for images without classes, too.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .metrics.public_features import PublicFeatureConfig, PublicFeatureNetwork
from .private_marks import marks
from .safe_loading import HubModel


class CriticConfig(PreTrainedConfig):
    """Shape of a critic.

    Args:
        num_classes: that the critic tells apart; 0 if it knows none.
        network: fields of the `PublicFeatureConfig` of its public network.
        private_runs: None before private training; after it, heads of the ledgers of its runs, see `private_marks`.
    """

    model_type = "spectral_critic"

    def __init__(
        self,
        num_classes: int = 0,
        network: dict[str, Any] | None = None,
        private_runs: list[str] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.num_classes = num_classes
        self.private_runs = private_runs
        self.network = network or {}


class Critic(HubModel, PreTrainedModel):
    """What all critics share: a public network that stays as it is, and a choice among images."""

    config_class = CriticConfig
    base_model_prefix = "critic"
    main_input_name = "pixel_values"

    def __init__(self, config: CriticConfig):
        super().__init__(config)
        self.network = PublicFeatureNetwork(PublicFeatureConfig(**config.network)).requires_grad_(False)

    def train(self, mode: bool = True) -> "Critic":
        """As in torch, but the public network stays as it is: its normalisation must not follow private batches."""
        super().train(mode)
        self.network.train(False)
        return self

    @classmethod
    def on(cls, network: PublicFeatureNetwork, num_classes: int = 0) -> Any:
        """An untrained critic that looks at images through a copy of a public network, and has its marks."""
        names = ("image_size", "widths", "num_classes", "architecture")
        critic = cls(cls.config_class(num_classes, {name: getattr(network.config, name) for name in names}))
        critic.network.load_state_dict(network.state_dict())
        critic.config.private_runs = marks(network) or None
        return critic

    @torch.no_grad()
    def features(self, pixel_values: Tensor) -> Tensor:
        """Features (B, D) of images (B, 1 or 3, H, W) in [-1, 1], as the public network sees them."""
        return self.network.features(pixel_values)

    def choose(
        self, candidates: Sequence[Tensor], labels: Tensor | None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Which of several images is kept: indices (B,) into `candidates`, on the critic's device.

        Args:
            candidates: images (B, C, H, W) in [-1, 1], at least one of each.
            labels: class (B,) that they were drawn for; None without, where the critic knows no classes.
            generator: of random choices.
        """
        raise NotImplementedError


def check_critic(critic: Any, num_classes: int) -> None:
    """Raises ValueError unless that is a critic, and one for a model of so many classes."""
    if not isinstance(critic, Critic):
        raise ValueError(f"critic is a {type(critic).__name__}; use a ClassCritic or a MeanCritic.")
    if critic.config.num_classes not in (0, num_classes):
        raise ValueError(
            f"num_classes={critic.config.num_classes} in the critic but {num_classes} in the model; use the critic of"
            " the same private images."
        )


class ClassCritic(Critic):
    """Softmax regression on features that are whitened by public images and brought to length 1.

    Network and whitening are public: see `on` and `fit`. The regression is private: train it by `DPTrainer`, whose
    guarantee is its own, on rows as `feature_rows.FeatureRows` makes them. A row is float32 (1 + D,): the class, -1 for
    none, then the features. Before training the gradients of all rows are equally long, a little above 1, so a clipping
    norm of 1 scales them all alike.
    """

    _keep_in_fp32_modules_strict = ["network", "mean", "whitening", "regression"]  # a small model; half would not pay

    def __init__(self, config: CriticConfig):
        super().__init__(config)
        dim = self.network.feature_mean.numel()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("whitening", torch.eye(dim))
        self.regression = nn.Linear(dim, config.num_classes)
        self.post_init()
        self.train(False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self.regression:  # all classes alike: nothing is known of them yet
            nn.init.zeros_(self.regression.weight)
            nn.init.zeros_(self.regression.bias)

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Takes mean and covariance from features (N, D) of public images.

        Directions in which public images vary less than a thousandth of the average count as if they varied so much.

        Raises:
            ValueError: fewer images than features, whose covariance says nothing of some directions.
        """
        if len(features) < features.shape[1]:
            raise ValueError(f"{len(features)} public images for {features.shape[1]} features; give at least as many.")
        values = features.double()
        mean = values.mean(0)
        variances, directions = torch.linalg.eigh((values - mean).T @ (values - mean) / len(values))
        variances += 1e-3 * variances.mean()
        self.mean.copy_(mean)
        self.whitening.copy_(directions * variances.rsqrt())

    def classify(self, features: Tensor) -> Tensor:
        """Logits (B, num_classes) of features (B, D)."""
        white = F.normalize((features - self.mean) @ self.whitening.to(features.dtype), dim=1)
        return self.regression(white.to(self.regression.weight.dtype))  # a whole pipeline may be cast

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, 1 or 3, H, W) in [-1, 1]."""
        return self.classify(self.features(pixel_values))

    def per_example_loss(self, input_ids: Tensor) -> Tensor:
        """Cross entropy of every row (B, 1 + D), in nats, (B,); 0 for a row without a class, which teaches nothing.

        The rows are no token ids; trainers call them so.
        """
        labels = input_ids[:, 0].long()
        losses = F.cross_entropy(self.classify(input_ids[:, 1:]), labels.clamp(min=0), reduction="none")
        return losses * (labels >= 0)

    @torch.no_grad()
    def likeliest(self, features: Tensor, share: float) -> Tensor:
        """Which images look most like each class: indices (num_classes, K) into features (N, D) of public images.

        K is the `share` of N, at least 1; the likeliest come first. An image may stand for several classes: what is
        asked for is what each class looks like, not what each image shows.

        Raises:
            ValueError: share is not in (0, 1].
        """
        if not 0 < share <= 1:
            raise ValueError(f"share={share} must be in (0, 1]; 0.1 takes for every class a tenth of the images.")
        count = max(1, round(share * len(features)))
        return self.classify(features).softmax(1).topk(count, dim=0).indices.T

    @torch.no_grad()
    def choose(
        self, candidates: Sequence[Tensor], labels: Tensor | None, generator: torch.Generator | None = None
    ) -> Tensor:
        """The image that shows its label likeliest; nothing is random. Arguments as in `Critic.choose`."""
        assert labels is not None
        likely = [self(images.to(self.device)).log_softmax(1) for images in candidates]
        asked = labels.to(likely[0].device)[:, None]  # where the critic went, if it is offloaded
        return torch.cat([some.gather(1, asked) for some in likely], 1).argmax(1)


__all__ = ["ClassCritic", "Critic", "CriticConfig", "check_critic"]
