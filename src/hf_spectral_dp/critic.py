"""A private critic of classes: softmax regression on public features, and what it knows about public images.

A few noisy sums over all private images cost little of a budget and say which class a picture looks like. The critic
that they train labels public images, so that the public model learns the private classes from public pictures before
private training begins (as PrivImage, arXiv:2311.12850, chooses public classes by a private query).

The critic sees images as the generator will make them: through codec and super-resolution, not the originals.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from .modeling_spectral import SpectralTokenizerForCausalLM
from .super_resolution import upscale_to
from .token_store import TokenStore

Features = Callable[[Tensor], Tensor]
"""Features (B, D), float32 on the CPU, of tokens (B, T)."""


class ClassCriticConfig(PreTrainedConfig):
    """Shape of a `ClassCritic`.

    Args:
        num_features: D, of the public extractor.
        num_classes: of the private images.
    """

    model_type = "spectral_class_critic"

    def __init__(self, num_features: int = 448, num_classes: int = 10, **kwargs: Any):
        super().__init__(**kwargs)
        self.num_features = num_features
        self.num_classes = num_classes


class ClassCritic(PreTrainedModel):
    """Softmax regression on features that are whitened by public images and brought to length 1.

    A row is float32 (1 + D,): the class, -1 for none, then the features. Before training the gradients of all rows are
    equally long, a little above 1, so a clipping norm of 1 scales them all alike.

    `fit` is public. The weights are private: train them by `DPTrainer`, whose guarantee is theirs.
    """

    config_class = ClassCriticConfig
    base_model_prefix = "critic"
    main_input_name = "features"

    def __init__(self, config: ClassCriticConfig):
        super().__init__(config)
        self.register_buffer("mean", torch.zeros(config.num_features))
        self.register_buffer("whitening", torch.eye(config.num_features))
        self.regression = nn.Linear(config.num_features, config.num_classes)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):  # all classes alike: nothing is known of them yet
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

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

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, num_classes) of features (B, D)."""
        return self.regression(F.normalize((features - self.mean) @ self.whitening, dim=1))

    def per_example_loss(self, input_ids: Tensor) -> Tensor:
        """Cross entropy of every row (B, 1 + D), in nats, (B,); 0 for a row without a class, which teaches nothing.

        The rows are no token ids; trainers call them so.
        """
        labels = input_ids[:, 0].long()
        losses = F.cross_entropy(self(input_ids[:, 1:]), labels.clamp(min=0), reduction="none")
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
        return self(features).softmax(1).topk(count, dim=0).indices.T


def features_of(
    model: SpectralTokenizerForCausalLM, super_resolution: Any, extractor: Callable[[Tensor], Tensor]
) -> Features:
    """Features of tokens: decoded, brought to the full size as the pipeline does, and seen by a public extractor.

    Args:
        model: decodes. super_resolution: any public backend of `super_resolution.upscaler`; None where the decoded
            images have the full size. extractor: see `metrics.features`.
    """

    @torch.no_grad()
    def features(tokens: Tensor) -> Tensor:
        images = model.decode(tokens.to(model.device))
        return extractor(upscale_to(model.config.image_size, super_resolution, images))

    return features


class FeatureRows:
    """Features of private token rows in memory, with the units of their store, as `DPTrainer` reads them.

    Every row is a function of one image and of the store's coins for it, so the units are those of the store. As
    secret as the images.

    Args:
        store: token rows of the private images.
        model: their generator, which says which class a row has.
        features: of tokens.
    """

    def __init__(self, store: TokenStore, model: SpectralTokenizerForCausalLM, features: Features):
        found = []
        for indices in tqdm(torch.arange(len(store)).split(500), desc="features", unit="500 rows"):
            rows = store[indices]["input_ids"]
            labels = rows[:, :1] - model.config.layout.codes
            labels[rows[:, :1] == model.config.null_token_id] = -1
            found.append(torch.cat([labels.float(), features(rows[:, 1:])], 1))
        self.rows = torch.cat(found)
        self.units, self.unit = store.units, store.unit
        self.fingerprint = hashlib.sha256(self.rows.numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: Any) -> dict[str, Tensor]:
        return {"input_ids": self.rows[torch.as_tensor(indices, dtype=torch.long)]}


__all__ = ["ClassCritic", "ClassCriticConfig", "FeatureRows", "Features", "features_of"]
