"""An untrained pipeline, and what is measured of it by the owner of the images and by others; for several files."""

from functools import cache

import torch

from hf_spectral_dp import (
    DPSpectralPipeline,
    SpectralConfig,
    SpectralImageProcessor,
    SpectralTokenizerForCausalLM,
)
from hf_spectral_dp.assessment import Assessment, assess
from hf_spectral_dp.real_images import RealImages
from hf_spectral_dp.super_resolution import SpectralSuperResolution, SpectralSuperResolutionConfig


def tiny_pipeline() -> DPSpectralPipeline:
    """A pipeline that was never trained, for 12 x 12 pictures in 16 x 16, coarse ones half as large."""
    config = SpectralConfig(
        image_size=16, num_channels=1, levels=2, patch_sizes=[2, 2], codebook_sizes=[16, 16], num_classes=10,
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SpectralTokenizerForCausalLM(config)
        for index in range(2):
            model.codec.codebook(index).normal_(std=2.0)
    network = SpectralSuperResolution(SpectralSuperResolutionConfig(num_channels=1, features=4, num_blocks=1))
    processor = SpectralImageProcessor(image_size=16, num_channels=1, pad=2)
    pipeline = DPSpectralPipeline(model, processor, network)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def real_images(count: int, seed: int, name: str = "noise", public: bool = False) -> RealImages:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(count, 1, 16, 16, generator=generator) * 2 - 1
    return RealImages(name, pixels, torch.arange(count) % 10, public, 0)


@cache
def owners_assessment() -> Assessment:
    """With everything that an owner can give; the model is its own twin."""
    pipeline = tiny_pipeline()
    return assess(
        pipeline, real_images(110, 0, "held out"), training=real_images(120, 1, "training"), twin=pipeline.model,
        num_images=100, seeds=1, steps=2, show_private=True,
    )  # fmt: skip


@cache
def strangers_assessment() -> Assessment:
    """Public real images only."""
    return assess(tiny_pipeline(), real_images(100, 0, "public", public=True), num_images=60, seeds=1, steps=2)
