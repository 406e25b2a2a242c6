"""Differentially private image generators from coarse wavelet tokens, for the Hugging Face ecosystem."""

from transformers import AutoConfig, AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageToImage

from .card import PrivacyCard
from .codec import SpectralCodec
from .configuration_spectral import SpectralConfig
from .image_processing_spectral import SpectralImageProcessor
from .modeling_spectral import SpectralTokenizerForCausalLM
from .pipeline_spectral import DPSpectralPipeline
from .privacy.budget import PrivacyBudget
from .super_resolution import SpectralSuperResolution, SpectralSuperResolutionConfig
from .trainer import DPTrainer
from .training_args import DPTrainingArguments

AutoConfig.register(SpectralConfig.model_type, SpectralConfig)
AutoModelForCausalLM.register(SpectralConfig, SpectralTokenizerForCausalLM)
AutoImageProcessor.register(SpectralConfig, image_processor_classes={"pil": SpectralImageProcessor})
AutoConfig.register(SpectralSuperResolutionConfig.model_type, SpectralSuperResolutionConfig)
AutoModelForImageToImage.register(SpectralSuperResolutionConfig, SpectralSuperResolution)

__all__ = [
    "DPSpectralPipeline",
    "DPTrainer",
    "DPTrainingArguments",
    "PrivacyBudget",
    "PrivacyCard",
    "SpectralCodec",
    "SpectralConfig",
    "SpectralImageProcessor",
    "SpectralSuperResolution",
    "SpectralSuperResolutionConfig",
    "SpectralTokenizerForCausalLM",
]
