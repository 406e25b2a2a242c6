"""The feature extractor that needs no download: a small convolutional network trained on public photos, and shipped.

Metrics on its features order degradations (blur, noise, JPEG, wrong colours, missing classes) by their strength, which
`python -m benchmarks.features` shows. Its figures are no Inception FID and must not be compared with published ones.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "public-features"


class PublicFeatureConfig(PretrainedConfig):
    """Shape of a `PublicFeatureNetwork`.

    Args:
        image_size: side to which images are brought, a multiple of 16.
        widths: channels of the stem and of each stage; every stage halves the side, those after the first two end in
            a residual block and give features.
        num_classes: outputs of the classifier that trains the network.
    """

    model_type = "spectral_public_features"

    def __init__(
        self,
        image_size: int = 64,
        widths: tuple[int, ...] = (16, 32, 64, 128, 256),
        num_classes: int = 200,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.image_size = image_size
        self.widths = list(widths)
        self.num_classes = num_classes


class _Residual(nn.Module):
    """relu(x + norm(conv(x))): one convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.relu(hidden + self.norm(self.conv(hidden)))


def _stage(inputs: int, outputs: int, stride: int, residual: bool) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    layers: list[nn.Module] = [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, *([_Residual(outputs)] if residual else []))


class PublicFeatureNetwork(PreTrainedModel):
    """A residual network for 64x64 colour photos with features of three depths.

    The features of an image are the spatial means of the outputs of the last three stages, each channel scaled to mean
    0 and variance 1 over the public photos it was trained on, so that texture, parts and objects weigh the same.
    """

    config_class = PublicFeatureConfig
    base_model_prefix = "network"
    main_input_name = "pixel_values"

    def __init__(self, config: PublicFeatureConfig):
        super().__init__(config)
        widths = config.widths
        self.stages = nn.ModuleList(
            _stage(inputs, outputs, stride=1 if depth == 0 else 2, residual=depth > 1)
            for depth, (inputs, outputs) in enumerate(zip([3, *widths], widths, strict=False))
        )
        self.classifier = nn.Linear(widths[-1], config.num_classes)
        self.register_buffer("feature_mean", torch.zeros(sum(widths[2:])))
        self.register_buffer("feature_scale", torch.ones(sum(widths[2:])))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def prepare(self, pixel_values: Tensor) -> Tensor:
        """Images (B, 1 or 3, H, W) in [-1, 1] as the network takes them: (B, 3, image_size, image_size)."""
        side = self.config.image_size
        images = pixel_values.to(self.device, torch.float32).clamp(-1, 1)
        if images.shape[-2:] != (side, side):
            images = F.interpolate(images, (side, side), mode="bicubic", antialias=True, align_corners=False)
        return images.expand(-1, 3, -1, -1).to(memory_format=torch.channels_last)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Outputs of the last three stages, (B, C, h, w) each, for prepared images."""
        found = []
        for depth, stage in enumerate(self.stages):
            images = stage(images)
            if depth > 1:
                found.append(images)
        return found

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Class logits (B, num_classes) of images (B, 1 or 3, H, W) in [-1, 1]."""
        return self.classify(self.prepare(pixel_values))

    def classify(self, images: Tensor) -> Tensor:
        """Class logits (B, num_classes) of images (B, 3, h, w) in [-1, 1] of any side, not resized; for training."""
        return self.classifier(self.maps(images.to(memory_format=torch.channels_last))[-1].mean((2, 3)))

    def pooled(self, maps: list[Tensor]) -> Tensor:
        """Spatial means (B, D) of the outputs of the last three stages."""
        return torch.cat([found.mean((2, 3)) for found in maps], dim=1)

    def scaled(self, maps: list[Tensor]) -> Tensor:
        """Features (B, D) of the outputs of the last three stages: their means, scaled."""
        return (self.pooled(maps) - self.feature_mean) * self.feature_scale

    def features(self, pixel_values: Tensor) -> Tensor:
        """Features (B, D), float32, of images (B, 1 or 3, H, W) in [-1, 1]."""
        return self.scaled(self.maps(self.prepare(pixel_values)))


__all__ = ["CHECKPOINT", "PublicFeatureConfig", "PublicFeatureNetwork"]
