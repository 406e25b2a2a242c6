"""Differentially private image generators from coarse wavelet tokens, for the Hugging Face ecosystem.

The names of training and accounting are imported when they are first used: whoever only draws images does not wait for
the accountants, the trainer and what they bring along.
"""

import importlib
from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageToImage

from .bundled import bundled_model
from .codec import SpectralCodec
from .configuration_spectral import SpectralConfig
from .image_processing_spectral import SpectralImageProcessor
from .modeling_spectral import SpectralTokenizerForCausalLM
from .super_resolution import SpectralSuperResolution, SpectralSuperResolutionConfig

if TYPE_CHECKING:
    from .card import PrivacyCard
    from .critic import ClassCritic
    from .mean_critic import MeanCritic
    from .pipeline_spectral import DPSpectralPipeline
    from .privacy.budget import PrivacyBudget
    from .trainer import DPTrainer
    from .training_args import DPTrainingArguments

_LATER = {
    "ClassCritic": "critic",
    "DPSpectralPipeline": "pipeline_spectral",
    "DPTrainer": "trainer",
    "DPTrainingArguments": "training_args",
    "MeanCritic": "mean_critic",
    "PrivacyBudget": "privacy.budget",
    "PrivacyCard": "card",
}

AutoConfig.register(SpectralConfig.model_type, SpectralConfig)
AutoModelForCausalLM.register(SpectralConfig, SpectralTokenizerForCausalLM)
AutoImageProcessor.register(SpectralConfig, image_processor_classes={"pil": SpectralImageProcessor})
AutoConfig.register(SpectralSuperResolutionConfig.model_type, SpectralSuperResolutionConfig)
AutoModelForImageToImage.register(SpectralSuperResolutionConfig, SpectralSuperResolution)


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "ClassCritic",
    "DPSpectralPipeline",
    "DPTrainer",
    "DPTrainingArguments",
    "MeanCritic",
    "PrivacyBudget",
    "PrivacyCard",
    "SpectralCodec",
    "SpectralConfig",
    "SpectralImageProcessor",
    "SpectralSuperResolution",
    "SpectralSuperResolutionConfig",
    "SpectralTokenizerForCausalLM",
    "bundled_model",
]
