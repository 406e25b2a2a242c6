"""Small parts of pipelines that several test files share: models of coarse tokens, networks that enlarge, the whole."""

import torch

from hf_spectral_dp import SpectralConfig, SpectralTokenizerForCausalLM
from hf_spectral_dp.image_processing_spectral import SpectralImageProcessor
from hf_spectral_dp.pipeline_spectral import DPSpectralPipeline
from hf_spectral_dp.super_resolution import SpectralSuperResolution, SpectralSuperResolutionConfig


def coarse_model(scales: int = 2, channels: int = 1, num_classes: int = 10) -> SpectralTokenizerForCausalLM:
    """16x16 images of which the tokens carry 4x4 (one scale), 8x8 (two) or all 16x16 (three)."""
    torch.manual_seed(0)
    config = SpectralConfig(
        image_size=16,
        num_channels=channels,
        levels=2,
        patch_sizes=[2, 2, 4][:scales],
        codebook_sizes=[16, 16, 16][:scales],
        num_classes=num_classes,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = SpectralTokenizerForCausalLM(config)
    for index in range(scales):
        model.codec.codebook(index).normal_()
    return model


def network(channels: int = 1, scale: int = 2) -> SpectralSuperResolution:
    torch.manual_seed(0)
    return SpectralSuperResolution(
        SpectralSuperResolutionConfig(num_channels=channels, scale=scale, features=4, num_blocks=1)
    )


def pipeline(scales=2, channels=1, num_classes=10, pad=0, super_resolution=None, **stored) -> DPSpectralPipeline:
    pipe = DPSpectralPipeline(
        coarse_model(scales, channels, num_classes),
        SpectralImageProcessor(image_size=16, num_channels=channels, pad=pad),
        super_resolution,
        **stored,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def enlarging(**fields) -> SpectralSuperResolution:
    config = SpectralSuperResolutionConfig(num_channels=1, features=4, num_blocks=1, keep_average=False, **fields)
    return SpectralSuperResolution(config)


def of_half_the_side() -> SpectralTokenizerForCausalLM:
    """A model whose tokens show images of 16 x 16 at side 8."""
    return SpectralTokenizerForCausalLM(
        SpectralConfig(
            image_size=16, num_channels=1, levels=2, patch_sizes=[1, 1], codebook_sizes=[8, 8], hidden_size=16,
            intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        )
    )  # fmt: skip
