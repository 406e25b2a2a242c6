"""The pipeline of digits that two of the models that come with the package make."""

from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageToImage

from hf_spectral_dp import DPSpectralPipeline, bundled_model


def digits_pipeline() -> DPSpectralPipeline:
    """The public generator of digits, without a progress bar."""
    pipeline = DPSpectralPipeline(
        AutoModelForCausalLM.from_pretrained(bundled_model("digits")),
        AutoImageProcessor.from_pretrained(bundled_model("digits")),
        AutoModelForImageToImage.from_pretrained(bundled_model("digits-super-resolution")),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


__all__ = ["digits_pipeline"]
