"""The checkpoints that come with the package, and the pipeline of digits that two of them make."""

from pathlib import Path

from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageToImage

import hf_spectral_dp
from hf_spectral_dp import DPSpectralPipeline

CHECKPOINTS = Path(hf_spectral_dp.__file__).parent / "checkpoints"


def digits_pipeline() -> DPSpectralPipeline:
    """The public generator of digits, without a progress bar."""
    pipeline = DPSpectralPipeline(
        AutoModelForCausalLM.from_pretrained(CHECKPOINTS / "digits"),
        AutoImageProcessor.from_pretrained(CHECKPOINTS / "digits"),
        AutoModelForImageToImage.from_pretrained(CHECKPOINTS / "digits-super-resolution"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


__all__ = ["CHECKPOINTS", "digits_pipeline"]
