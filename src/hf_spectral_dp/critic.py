"""A private critic of classes: softmax regression on public features of images.

A few noisy sums over all private images cost little of a budget and say which class a picture looks like. What the
critic then says of public photos, or of what the generator draws, is post-processing. So the public model can learn the
private classes from public photos before private training begins (PrivImage, arXiv:2311.12850, chooses public classes
by a private query), and the pipeline can sort what is drawn by what it shows, and draw again what nobody wants.

That critic is trained on images as the generator makes them: through codec and super-resolution, not the originals.
`mean_critic.MeanCritic` chooses among what the generator draws by another knowledge, for images without classes, too.
"""

from collections.abc import Callable
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

    def judge(
        self, images: Tensor, labels: Tensor | None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the critic makes of images: scores (B,), the highest stays; and (B,), the class that it takes each for.

        Class -1 tells nothing: the critic needs to see all images that there are for a place.

        Args:
            images: (B, C, H, W) in [-1, 1].
            labels: class (B,) that they were drawn for; None without, where the critic knows no classes.
            generator: of what is random.
        """
        raise NotImplementedError


@torch.no_grad()
def draw_by_choice(
    critic: Critic,
    draw: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    labels: Tensor | None,
    count: int,
    attempts: int,
    batch_size: int,
    generator: torch.Generator | None = None,
    on_kept: Callable[[int], object] = lambda number: None,
) -> Tensor:
    """Images as a critic chooses them: in every place the first that it takes for the class of the place, or the best.

    What it takes for another class goes to a place that waits for that class, if there is one: a generator mistakes
    classes, and what shows one unasked is as good, and other than what shows it on request. No image stays twice.
    Post-processing of the releases of generator and critic; no private image is looked at.

    Args:
        draw: an image for each of those places (LongTensor of `batch_size` at most) at the attempt of that number, from
            0: what is to be returned (B, ...), and how the critic sees it (B, C, H, W) in [-1, 1].
        labels: class (count,) of every place; None without.
        attempts: images drawn for a place at most.
        generator: of the critic's own chances.
        on_kept: called with the number of places that are settled, as they become so.

    Returns:
        What `draw` returned of the images that stay, (count, ...).
    """
    asked = torch.full((count,), -1) if labels is None else labels.cpu()
    best, kept = torch.full((count,), -torch.inf), torch.empty(0)
    held, settled, final = torch.zeros(3, count, dtype=torch.bool)
    for attempt in range(attempts):
        last = attempt + 1 == attempts
        waiting = torch.arange(count)
        while len(waiting := waiting[~settled[waiting]]):
            places, waiting = waiting[:batch_size], waiting[batch_size:]
            images, looks = draw(places, attempt)
            scores, shown = (
                value.cpu() for value in critic.judge(looks, None if labels is None else labels[places], generator)
            )
            own = (shown == asked[places]) & (shown >= 0)
            settled[places[own]] = True
            free = ~own & (shown >= 0) & (held[places] | (not last))  # no place may end without an image
            targets = places.clone()
            for label in shown[free].unique():
                spare = (free & (shown == label)).nonzero()[:, 0]
                vacant = (~settled & (asked == label)).nonzero()[: len(spare), 0]
                targets[spare[: len(vacant)]] = vacant
                settled[vacant] = True
            given = targets != places
            better = ~settled[places] & ((scores > best[places]) | ~held[places])  # the first, be its score no number
            stays = given | own | better
            if len(kept) < count:
                kept = images.new_empty(count, *images.shape[1:])
            kept[targets[stays]] = images[stays.to(images.device)]
            held[targets[stays]] = True
            best[places[better & ~given]] = scores[better & ~given].to(best.dtype)
            before = int(final.sum())
            final |= settled
            final[places] |= last
            on_kept(int(final.sum()) - before)
    return kept


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
    def judge(
        self, images: Tensor, labels: Tensor | None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """How likely images show their label, and the class that each shows likeliest. Nothing is random.

        So an image that the critic takes for its class stays, and not the one that shows it likeliest: among those the
        images would be alike, and classifiers learn less from them.
        """
        assert labels is not None
        logits = self(images.to(self.device))
        asked = labels.to(logits.device)  # where the critic went, if it is offloaded
        return logits.log_softmax(1).gather(1, asked[:, None])[:, 0], logits.argmax(1)


__all__ = ["ClassCritic", "Critic", "CriticConfig", "check_critic", "draw_by_choice"]
