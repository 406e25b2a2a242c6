"""Detail from public data: upscaling coarse private images with a public super-resolution model.

Upscaling the output of a DP generator is post-processing: it costs no privacy as long as the upscaler never saw the
private images. The small network here predicts only what the wavelet tokens do not carry. Its output averaged over
blocks of `scale` x `scale` pixels *is* its input, which is the same as keeping the Haar LL band and predicting the
three detail bands; it therefore never contradicts the private model.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from huggingface_hub.dataclasses import strict
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .safe_loading import HubModel

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
        private_runs: None for a public network. Else the heads of the ledgers of the private runs that shaped it
            (`mend_towards`): a card must count them, see `private_marks`.

    Raises:
        ValueError: a field out of range, naming it, its value and the rule.
    """

    model_type = "spectral_super_resolution"

    num_channels: int = 3
    scale: int = 2
    features: int = 32
    num_blocks: int = 5
    keep_average: bool = True
    private_runs: list[str] | None = None

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


class SpectralSuperResolution(HubModel, PreTrainedModel):
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
            deviation = (2 / (9 * module.in_channels)) ** 0.5
            if module is getattr(self, "tail", None):
                deviation = 1e-4  # an untrained network is bicubic upsampling
            elif any(module is block.second for block in getattr(self, "body", ())):
                deviation *= 0.1  # or what the blocks add to each other would grow with their number
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


@dataclass(frozen=True)
class Upscaler:
    """One call for all backends; `upscaler` makes it.

    Attributes:
        scale: output side over input side.
        run: enlarges images (B, C, h, w) in [-1, 1]; any device and dtype come out.
        channels: what `run` takes; grey images are repeated on 3 channels and averaged back. None: it says so itself.
        multiple: h and w that `run` takes are multiples of this; images are padded by their edge pixels and cut again.
        name: for errors.
    """

    scale: int
    run: Callable[[Tensor], Tensor]
    channels: int | None = None
    multiple: int = 1
    name: str = "the upscaler"

    def __call__(self, images: Tensor, tile_size: int | None = None, tile_overlap: int = 32) -> Tensor:
        """Enlarges images (B, 1 or 3, h, w) in [-1, 1]: (B, same, scale * h, scale * w), same device and dtype.

        Args:
            tile_size: side in input pixels of the squares that are enlarged one after the other, so that memory does
                not grow with the image; None enlarges images as a whole.
            tile_overlap: input pixels around a square that the backend sees and that are cut off again. There is no
                seam if no output pixel depends on input farther away than that (`SpectralSuperResolution` at scale
                2: 2 + 2 * num_blocks pixels) and, for a backend with windows such as Swin2SR, if tile and overlap are
                multiples of the window. Backends that draw noise or attend to the whole image show seams.

        Raises:
            ValueError: wrong shape, a tile that is too small, or an output of another size than `scale` says.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images has shape {tuple(images.shape)}; expected (B, 1 or 3, h, w).")
        if tile_size is None:
            return self._whole(images)
        if tile_size < 1 or tile_overlap < 0:
            raise ValueError(f"tile_size={tile_size} must be at least 1, tile_overlap={tile_overlap} at least 0.")
        (height, width), scale = images.shape[-2:], self.scale
        result = images.new_empty(*images.shape[:2], height * scale, width * scale)
        for top in range(0, height, tile_size):
            for left in range(0, width, tile_size):
                above, beside = max(0, top - tile_overlap), max(0, left - tile_overlap)
                bottom, right = min(height, top + tile_size), min(width, left + tile_size)
                part = self._whole(images[:, :, above : bottom + tile_overlap, beside : right + tile_overlap])
                rows = slice((top - above) * scale, (bottom - above) * scale)
                columns = slice((left - beside) * scale, (right - beside) * scale)
                result[:, :, top * scale : bottom * scale, left * scale : right * scale] = part[:, :, rows, columns]
        return result

    def _whole(self, images: Tensor) -> Tensor:
        (height, width), channels = images.shape[-2:], images.shape[1]
        missing = (0, -width % self.multiple, 0, -height % self.multiple)
        padded = F.pad(images, missing, mode="replicate") if any(missing) else images
        repeated = self.channels == 3 and channels == 1
        result = self.run(padded.expand(-1, 3, -1, -1) if repeated else padded)
        expected = (len(images), *padded.shape[1:2], padded.shape[2] * self.scale, padded.shape[3] * self.scale)
        if repeated:
            result = result.mean(1, keepdim=True)
        if result.shape != expected:
            raise ValueError(
                f"{self.name} made {tuple(result.shape)} of {tuple(padded.shape)}, which is not scale={self.scale}."
            )
        return result[:, :, : height * self.scale, : width * self.scale].to(images).clamp(-1, 1)


def upscaler(backend: Any, scale: int | None = None, **options: Any) -> Upscaler:
    """One call for any super-resolution backend.

    Args:
        backend: one of
            - "nearest", "bicubic", "lanczos": plain resampling, no new detail;
            - `SpectralSuperResolution`, or a transformers model whose output has `reconstruction`, such as
              `Swin2SRForImageSuperResolution`; also compiled by `torch.compile`;
            - a diffusers pipeline: `StableDiffusionUpscalePipeline`, `LDMSuperResolutionPipeline` or
              `StableDiffusionLatentUpscalePipeline`;
            - an image model that `spandrel` loaded (`spandrel.ModelLoader().load_from_file(...)`);
            - an `Upscaler`: returned as it is.
            It must have been trained on PUBLIC images; then it costs no privacy.
        scale: factor of plain resampling (default 2). A model brings its own.
        options: for a diffusers pipeline, what its call takes: `prompt` (default: none; one text for all images),
            `generator`, `num_inference_steps`, ...

    Raises:
        ValueError: unknown resampling mode, scale below 1, or options for a backend that takes none.
        TypeError: a backend of another kind.
    """
    model = getattr(backend, "_orig_mod", backend)  # what torch.compile wrapped
    name = type(model).__name__
    if isinstance(backend, DiffusionPipeline):
        made = _diffusers_upscaler(backend, options)
    elif options:
        raise ValueError(f"{sorted(options)} are options of diffusers pipelines; {name} takes none.")
    elif isinstance(backend, Upscaler):
        made = backend
    elif isinstance(backend, str):
        made = _resampler(backend, 2 if scale is None else scale)
    elif isinstance(model, SpectralSuperResolution):
        made = Upscaler(model.config.scale, lambda images: backend(images.to(model.device)), name=name)
    elif isinstance(model, PreTrainedModel):
        made = _transformers_upscaler(backend, model)
    elif isinstance(model, _spandrel_models()):
        made = _spandrel_upscaler(backend)
    else:
        raise TypeError(
            f"super-resolution by a {name} is unknown; use a transformers image-to-image model, a diffusers upscaler, a"
            f" spandrel model, or one of {', '.join(RESAMPLING_MODES)}."
        )
    if scale is not None and made.scale != scale:
        raise ValueError(f"scale={scale} but {name} upscales by {made.scale}; leave scale unset.")
    return made


def upscale(backend: Any, images: Tensor, scale: int | None = None, **options: Any) -> Tensor:
    """Enlarges images (B, 1 or 3, h, w) in [-1, 1] by any backend: `upscaler(backend, scale, **options)(images)`."""
    return upscaler(backend, scale, **options)(images)


def upscale_to(side: int, backend: Any, images: Tensor, **tiling: int) -> Tensor:
    """Enlarges images (B, 1 or 3, h, w) as often as it takes until they are at least `side` wide.

    Args:
        backend: as `upscaler` takes it; None is "bicubic".
        tiling: `tile_size` and `tile_overlap`, see `Upscaler`.
    """
    if images.shape[-1] < side:
        enlarge = upscaler("bicubic" if backend is None else backend)
        while images.shape[-1] < side:
            images = enlarge(images, **tiling)
    return images


def _diffusers_upscaler(pipeline: DiffusionPipeline, options: dict[str, Any]) -> Upscaler:
    """One of the three upscaling pipelines of diffusers, whose modules take a second to import: only where one is."""
    from diffusers import (
        LDMSuperResolutionPipeline,
        StableDiffusionLatentUpscalePipeline,
        StableDiffusionUpscalePipeline,
    )

    name = type(pipeline).__name__
    halvings = len(pipeline.unet.config.block_out_channels) - 1 if hasattr(pipeline, "unet") else 0
    if isinstance(pipeline, LDMSuperResolutionPipeline):
        # Tensors are taken as they are, in [-1, 1]; the latents have the side of the small image.
        def run(images: Tensor) -> Tensor:
            return pipeline(image=images, output_type="pt", **options).images * 2 - 1

        return Upscaler(2 ** (len(pipeline.vqvae.config.block_out_channels) - 1), run, 3, 2**halvings, name)
    if isinstance(pipeline, StableDiffusionUpscalePipeline):
        scale, multiple = pipeline.vae_scale_factor, max(pipeline.vae_scale_factor, 2**halvings)
    elif isinstance(pipeline, StableDiffusionLatentUpscalePipeline):
        scale, multiple = 2, pipeline.vae_scale_factor * 2**halvings
    else:
        raise TypeError(
            f"{name} is no upscaler; use StableDiffusionUpscalePipeline, LDMSuperResolutionPipeline or"
            " StableDiffusionLatentUpscalePipeline."
        )
    prompt = options.get("prompt", "")
    if not isinstance(prompt, str):
        raise ValueError(f"prompt={prompt!r} must be one text, which holds for all images.")
    if not prompt and not options.get("negative_prompt"):  # guiding empty texts costs twice for nothing
        options = {"guidance_scale": 1.0, **options}

    def run_with_text(images: Tensor) -> Tensor:
        texts = {key: [options.get(key) or ""] * len(images) for key in ("prompt", "negative_prompt")}
        pixels = ((images + 1) / 2).clamp(0, 1)
        return pipeline(image=pixels, output_type="pt", **{**options, **texts}).images * 2 - 1

    return Upscaler(scale, run_with_text, 3, multiple, name)


def _transformers_upscaler(backend: Callable[..., Any], model: PreTrainedModel) -> Upscaler:
    """A transformers image-to-image model, which takes and returns RGB in [0, 1]."""
    name = type(model).__name__
    scale = getattr(model.config, "upscale", None)
    if not isinstance(scale, int):
        raise TypeError(
            f"super_resolution is a {name}, whose config has no integer `upscale`; use"
            " SpectralSuperResolution or Swin2SRForImageSuperResolution."
        )

    def run(images: Tensor) -> Tensor:
        pixels = ((images + 1) / 2).to(model.device, model.dtype)
        return backend(pixel_values=pixels).reconstruction.float() * 2 - 1

    # Padded by us: the model's own reflection padding fails for images smaller than its window.
    return Upscaler(scale, run, 3, getattr(model.config, "window_size", 1), name)


def _spandrel_models() -> tuple[type, ...]:
    """The class of spandrel's image models, if anybody imported it: otherwise no object can be one."""
    spandrel = sys.modules.get("spandrel")
    return () if spandrel is None else (spandrel.ImageModelDescriptor,)


def _spandrel_upscaler(descriptor: Any) -> Upscaler:
    """A model of spandrel, which takes one image in [0, 1] at a time and pads it as its architecture needs."""

    def run(images: Tensor) -> Tensor:
        pixels = ((images + 1) / 2).clamp(0, 1).to(descriptor.device, descriptor.dtype)
        return torch.cat([descriptor(image) for image in pixels.split(1)]).float() * 2 - 1

    if descriptor.input_channels != descriptor.output_channels:
        raise TypeError(
            f"this {descriptor.architecture.name} model takes {descriptor.input_channels} channels and returns"
            f" {descriptor.output_channels}; use one that returns images like its input."
        )
    return Upscaler(descriptor.scale, run, descriptor.input_channels, name=f"spandrel's {descriptor.architecture.name}")


def _resampler(mode: str, scale: int) -> Upscaler:
    """Plain resampling by an integer factor."""
    if mode not in RESAMPLING_MODES:
        raise ValueError(f"resampling mode {mode!r} is unknown; use one of {', '.join(RESAMPLING_MODES)}.")
    if scale < 1:
        raise ValueError(f"scale={scale} must be at least 1.")
    return Upscaler(scale, lambda images: _resample(images, mode, scale), name=mode)


def _bicubic(images: Tensor, scale: int) -> Tensor:
    return F.interpolate(images, scale_factor=float(scale), mode="bicubic", align_corners=False)


def _resample(images: Tensor, mode: str, scale: int) -> Tensor:
    """Plain resampling of (B, C, h, w) by an integer factor; Lanczos as in Pillow."""
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
    return result.view(batch, channels, height * scale, width * scale).to(images.device)


__all__ = [
    "RESAMPLING_MODES",
    "Resampling",
    "SpectralSuperResolution",
    "SpectralSuperResolutionConfig",
    "Upscaler",
    "upscale",
    "upscale_to",
    "upscaler",
]
