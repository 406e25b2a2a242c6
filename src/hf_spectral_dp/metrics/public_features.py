"""The feature extractors that need no download: small convolutional networks trained on public photos, and shipped.

`CHECKPOINT` is for metrics: on its features they order degradations (blur, noise, JPEG, wrong colours, missing classes)
by their strength, which `python -m benchmarks.features` shows. Its figures are no Inception FID and must not be
compared with published ones. `EYE` is for critics of classes: it was trained to know objects in small images, blurred
as a codec blurs them or not, so it overlooks what metrics have to see.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..bundled import CHECKPOINTS

CHECKPOINT = CHECKPOINTS / "public-features"
EYE = CHECKPOINTS / "public-eye"
SHIFT = 4  # pixels by which images are moved at most, in each direction


class PublicFeatureConfig(PretrainedConfig):
    """Shape of a `PublicFeatureNetwork`.

    Args:
        image_size: side to which images are brought, a multiple of 16; of 8 for "resnet9".
        widths: channels of the stem and of each stage; every stage halves the side, those after the first two give
            features.
        num_classes: outputs of the classifier that trains the network.
        architecture: "strided", where convolutions halve the side and those stages end in a residual block of one, or
            "resnet9", where the largest of 2 x 2 is kept and two stages have a residual block of two convolutions
            (D. Page's network for CIFAR-10; ResNet, arXiv:1512.03385); that has four widths.

    Raises:
        ValueError: no such architecture, or a size or widths that do not fit "resnet9".
    """

    model_type = "spectral_public_features"

    def __init__(
        self,
        image_size: int = 64,
        widths: tuple[int, ...] = (16, 32, 64, 128, 256),
        num_classes: int = 200,
        architecture: str = "strided",
        **kwargs,
    ):
        super().__init__(**kwargs)
        if architecture not in ("strided", "resnet9"):
            raise ValueError(f"architecture={architecture!r} is unknown; choose 'strided' or 'resnet9'.")
        if architecture == "resnet9" and len(widths) != 4:
            raise ValueError(f"widths={list(widths)} are {len(widths)}; 'resnet9' has four, such as 32 64 128 256.")
        if architecture == "resnet9" and (image_size < 8 or image_size % 8):
            raise ValueError(f"image_size={image_size} is halved three times by a 'resnet9'; use a multiple of 8.")
        self.architecture = architecture
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


def _strided(widths: list[int]) -> list[nn.Module]:
    return [
        _stage(inputs, outputs, stride=1 if depth == 0 else 2, residual=depth > 1)
        for depth, (inputs, outputs) in enumerate(zip([3, *widths], widths, strict=False))
    ]


class _Double(nn.Sequential):
    """x + relu(norm(conv(relu(norm(conv(x)))))): two convolutions."""

    def __init__(self, channels: int):
        super().__init__(*(layer for _ in range(2) for layer in _stage(channels, channels, 1, residual=False)))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + super().forward(hidden)


def _resnet9(first: int, second: int, third: int, fourth: int) -> list[nn.Module]:
    def pooled(inputs: int, outputs: int) -> list[nn.Module]:
        return [*_stage(inputs, outputs, 1, residual=False), nn.MaxPool2d(2)]

    return [
        _stage(3, first, 1, residual=False),
        nn.Sequential(*pooled(first, second)),
        nn.Sequential(_Double(second), *pooled(second, third)),
        nn.Sequential(*pooled(third, fourth), _Double(fourth)),
    ]


class PublicFeatureNetwork(PreTrainedModel):
    """A residual network for small colour photos with features of several depths.

    The features of an image are the spatial means of the outputs of the stages after the first two, each channel scaled
    to mean 0 and variance 1 over the public photos it was trained on, so that texture, parts and objects weigh the
    same. A "resnet9" has the largest values of the last stage, too, and its features are those of an image and of its
    mirror image, averaged.
    """

    config_class = PublicFeatureConfig
    base_model_prefix = "network"
    main_input_name = "pixel_values"

    def __init__(self, config: PublicFeatureConfig):
        super().__init__(config)
        widths, self.peaks = config.widths, config.architecture == "resnet9"
        stages = _resnet9(*widths) if self.peaks else _strided(widths)
        self.stages = nn.ModuleList(stages)
        self.classifier = nn.Linear(widths[-1], config.num_classes)
        dim = sum(widths[2:]) + (widths[-1] if self.peaks else 0)
        self.register_buffer("feature_mean", torch.zeros(dim))
        self.register_buffer("feature_scale", torch.ones(dim))
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
        return images.expand(-1, 3, -1, -1).to(self.dtype, memory_format=torch.channels_last)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Outputs of the stages after the first two, (B, C, h, w) each, for prepared images."""
        found = []
        for depth, stage in enumerate(self.stages):
            images = stage(images)
            if depth > 1:
                found.append(images)
        return found

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Class logits (B, num_classes) of images (B, 1 or 3, H, W) in [-1, 1]."""
        return self.classify(self.prepare(pixel_values))

    def summary(self, images: Tensor) -> Tensor:
        """What classes are told by, (B, widths[-1]), of images (B, 3, h, w) in [-1, 1] of any side, not resized."""
        last = self.maps(images.to(memory_format=torch.channels_last))[-1]
        return last.amax((2, 3)) if self.peaks else last.mean((2, 3))

    def classify(self, images: Tensor) -> Tensor:
        """Class logits (B, num_classes) of the same; for training."""
        return self.classifier(self.summary(images))

    def pooled(self, maps: list[Tensor]) -> Tensor:
        """Spatial means (B, D) of those outputs; of a "resnet9" followed by the largest values of the last."""
        means = [found.mean((2, 3)) for found in maps]
        return torch.cat([*means, maps[-1].amax((2, 3))] if self.peaks else means, dim=1)

    def scaled(self, maps: list[Tensor]) -> Tensor:
        """Features (B, D) of the outputs of those stages: pooled, and scaled."""
        return (self.pooled(maps) - self.feature_mean) * self.feature_scale

    def seen(self, pixel_values: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Features (B, D), float32, of images (B, 1 or 3, H, W) in [-1, 1], and their `maps`."""
        images = self.prepare(pixel_values)
        maps = self.maps(images)
        features = self.scaled(maps).float()
        if self.peaks:
            features = (features + self.scaled(self.maps(images.flip(-1))).float()) / 2
        return features, maps

    def features(self, pixel_values: Tensor) -> Tensor:
        """Features (B, D), float32, of images (B, 1 or 3, H, W) in [-1, 1]."""
        return self.seen(pixel_values)[0]


def random_views(images: Tensor, generator: torch.Generator) -> Tensor:
    """How small photos (B, C, S, S) are shown to a classifier that learns: (B, C, S, S), the like of them.

    Every second one is mirrored, and all are moved by at most `SHIFT` pixels over a mirrored border, at random.
    """
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(mirrored.to(images.device)[:, None, None, None], images.flip(-1), images)
    side, wide = images.shape[-1], F.pad(images, [SHIFT] * 4, mode="reflect")
    corners = torch.randint(2 * SHIFT + 1, (len(images), 2), generator=generator).tolist()
    return torch.stack([image[:, y : y + side, x : x + side] for image, (y, x) in zip(wide, corners, strict=True)])


__all__ = ["CHECKPOINT", "EYE", "SHIFT", "PublicFeatureConfig", "PublicFeatureNetwork", "random_views"]
