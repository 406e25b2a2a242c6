"""Detail from public data: upscaling coarse private images with a public super-resolution model.

Upscaling the output of a DP generator is post-processing: it costs no privacy as long as the upscaler never saw the
private images. The small network here predicts only what the wavelet tokens do not carry. Its output averaged over
blocks of `scale` x `scale` pixels *is* its input, which is the same as keeping the Haar LL band and predicting the
three detail bands; it therefore never contradicts the private model.
"""

from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

Resampling = Literal["nearest", "bicubic", "lanczos"]
RESAMPLING_MODES: tuple[str, ...] = get_args(Resampling)


@strict
class SpectralSuperResolutionConfig(PreTrainedConfig):
    """Configuration of `SpectralSuperResolution`.

    Attributes:
        num_channels: 1 (grey) or 3 (RGB).
        scale: output side over input side, 2 or 4; 4 runs the same doubling network twice.
        features: width of the network.
        num_blocks: residual blocks.
        keep_average: True makes block means of the output equal the input, for inputs that are exact area averages.
            False lets the network also mend the input, for one trained on what a codec makes of images.

    Raises:
        ValueError: a field out of range, naming it, its value and the rule.
    """

    model_type = "spectral_super_resolution"

    num_channels: int = 3
    scale: int = 2
    features: int = 32
    num_blocks: int = 5
    keep_average: bool = True

    def __post_init__(self, **kwargs):
        if self.num_channels not in (1, 3):
            raise ValueError(f"num_channels={self.num_channels} must be 1 (grey) or 3 (RGB).")
        if self.scale not in (2, 4):
            raise ValueError(f"scale={self.scale} must be 2 or 4; call the pipeline's upscaler twice for more.")
        if self.features < 1 or self.num_blocks < 1:
            raise ValueError(f"features={self.features} and num_blocks={self.num_blocks} must be at least 1.")
        super().__post_init__(**kwargs)


class _ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a GELU, added to the input (EDSR, arXiv:1707.02921, Section 3.1: no batch norm)."""

    def __init__(self, features: int):
        super().__init__()
        self.first = nn.Conv2d(features, features, 3, padding=1, padding_mode="replicate")
        self.second = nn.Conv2d(features, features, 3, padding=1, padding_mode="replicate")

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.second(F.gelu(self.first(hidden)))


class SpectralSuperResolution(PreTrainedModel):
    """Small residual upscaler for box-filtered (area-averaged) images, trained on PUBLIC images only.

    One doubling is: bicubic upsampling plus a predicted residual (pixel shuffle), minus its own block means, times
    the largest factor of at most 1 that keeps the block inside [-1, 1], plus the input pixel. So for every input in
    [-1, 1] the output lies in [-1, 1] and its 2x2 block means equal the input, up to rounding. With
    `keep_average=False` it is upsampling plus residual, clamped to [-1, 1].
    """

    config: SpectralSuperResolutionConfig
    config_class = SpectralSuperResolutionConfig
    base_model_prefix = "super_resolution"
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: SpectralSuperResolutionConfig):
        super().__init__(config)
        self.head = nn.Conv2d(config.num_channels, config.features, 3, padding=1, padding_mode="replicate")
        self.body = nn.ModuleList(_ResidualBlock(config.features) for _ in range(config.num_blocks))
        self.tail = nn.Conv2d(config.features, 4 * config.num_channels, 3, padding=1, padding_mode="replicate")
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            # The tail starts near zero, so that an untrained network is bicubic upsampling.
            deviation = 1e-4 if module is getattr(self, "tail", None) else (2 / (9 * module.in_channels)) ** 0.5
            nn.init.normal_(module.weight, std=deviation)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def _double(self, images: Tensor) -> Tensor:
        hidden = self.head(images)
        for block in self.body:
            hidden = block(hidden)
        detail = _bicubic(images, 2) + F.pixel_shuffle(self.tail(hidden), 2)
        if not self.config.keep_average:
            return detail.clamp(-1, 1)
        detail = detail - F.interpolate(F.avg_pool2d(detail, 2), scale_factor=2.0, mode="nearest")
        # How far the block may move up and down from its mean before a pixel leaves [-1, 1].
        highest, lowest = F.max_pool2d(detail, 2), F.max_pool2d(-detail, 2)
        smallest = torch.finfo(detail.dtype).tiny
        room = torch.minimum((1 - images) / highest.clamp_min(smallest), (1 + images) / lowest.clamp_min(smallest))
        return F.interpolate(images, scale_factor=2.0, mode="nearest") + detail * F.interpolate(
            room.clamp(0, 1), scale_factor=2.0, mode="nearest"
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Upscales images.

        Args:
            pixel_values: (B, num_channels, h, w) in [-1, 1]; values outside are clamped.

        Returns:
            (B, num_channels, scale * h, scale * w) in [-1, 1]; with `keep_average`, `avg_pool2d(output, scale)` equals
            the input.

        Raises:
            ValueError: another number of dimensions or channels.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; this model takes"
                f" (B, {self.config.num_channels}, h, w)."
            )
        images = pixel_values.to(self.dtype).clamp(-1, 1)
        for _ in range(self.config.scale.bit_length() - 1):
            images = self._double(images)
        return images


def upscale(backend: PreTrainedModel | Resampling, images: Tensor, scale: int | None = None) -> Tensor:
    """Upscales images with any backend: ours, a transformers image-to-image model, or plain resampling.

    Args:
        backend: `SpectralSuperResolution`; a transformers model whose output has `reconstruction`, such as
            `Swin2SRForImageSuperResolution` (RGB in [0, 1]; grey images are repeated on three channels and averaged
            back); or "nearest", "bicubic", "lanczos".
        images: (B, C, h, w) in [-1, 1], C = 1 or 3.
        scale: factor of plain resampling (default 2). A model brings its own; give it only to have it checked.

    Returns:
        (B, C, scale * h, scale * w) in [-1, 1], same device as `images`.

    Raises:
        ValueError: unknown resampling mode, scale below 1, wrong shape, or a model with another scale.
        TypeError: a model whose output is no image.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images has shape {tuple(images.shape)}; expected (B, 1 or 3, h, w).")
    if isinstance(backend, str):
        return _resample(images, backend, 2 if scale is None else scale)
    if isinstance(backend, SpectralSuperResolution):
        result = backend(images.to(backend.device))
    else:
        result = _image_to_image(backend, images)
    factor = result.shape[-1] // images.shape[-1]
    if scale is not None and factor != scale:
        raise ValueError(f"scale={scale} but {type(backend).__name__} upscales by {factor}; leave scale unset.")
    return result.to(images.device).clamp(-1, 1)


def _bicubic(images: Tensor, scale: int) -> Tensor:
    return F.interpolate(images, scale_factor=float(scale), mode="bicubic", align_corners=False)


def _resample(images: Tensor, mode: str, scale: int) -> Tensor:
    """Plain resampling of (B, C, h, w) by an integer factor; Lanczos as in Pillow."""
    if mode not in RESAMPLING_MODES:
        raise ValueError(f"resampling mode {mode!r} is unknown; use one of {', '.join(RESAMPLING_MODES)}.")
    if scale < 1:
        raise ValueError(f"scale={scale} must be at least 1.")
    if mode == "nearest":
        return F.interpolate(images, scale_factor=float(scale), mode="nearest")
    if mode == "bicubic":
        return _bicubic(images.float(), scale).clamp(-1, 1)
    batch, channels, height, width = images.shape
    planes = [
        np.asarray(Image.fromarray(plane, "F").resize((width * scale, height * scale), Image.Resampling.LANCZOS))
        for plane in images.detach().float().cpu().reshape(-1, height, width).numpy()
    ]
    result = torch.from_numpy(np.stack(planes)) if planes else torch.zeros(0)
    return result.view(batch, channels, height * scale, width * scale).to(images.device).clamp(-1, 1)


def _image_to_image(model: PreTrainedModel, images: Tensor) -> Tensor:
    """Runs a transformers image-to-image model, which takes and returns RGB in [0, 1]."""
    height, width = images.shape[-2:]
    window = getattr(model.config, "window_size", 1)
    # Padded here, by edge pixels: the model's own reflection padding fails for images smaller than its window.
    padded = F.pad(images, (0, -width % window, 0, -height % window), mode="replicate")
    pixels = (padded.expand(-1, 3, -1, -1) + 1) / 2
    reconstruction = getattr(model(pixel_values=pixels.to(model.device, model.dtype)), "reconstruction", None)
    if not isinstance(reconstruction, Tensor) or reconstruction.ndim != 4:
        raise TypeError(
            f"{type(model).__name__} returns no `reconstruction` (B, 3, H, W); use an image-to-image model such as"
            " Swin2SRForImageSuperResolution, SpectralSuperResolution, or a resampling mode."
        )
    factor = reconstruction.shape[-1] // padded.shape[-1]
    result = reconstruction[:, :, : height * factor, : width * factor].float() * 2 - 1
    return result.mean(1, keepdim=True) if images.shape[1] == 1 else result


__all__ = ["RESAMPLING_MODES", "Resampling", "SpectralSuperResolution", "SpectralSuperResolutionConfig", "upscale"]
