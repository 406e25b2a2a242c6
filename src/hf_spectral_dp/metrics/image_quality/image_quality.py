"""Quality of generated images as a metric of the `evaluate` library, loaded from this folder, offline.

    metric = evaluate.load("path/to/hf_spectral_dp/metrics/image_quality")
    metric.compute(predictions=generated, references=real)      # lists of Pillow images
"""

from typing import Any

import datasets
import evaluate

from hf_spectral_dp.image_processing_spectral import SpectralImageProcessor
from hf_spectral_dp.metrics.evaluation import evaluate_images
from hf_spectral_dp.metrics.features import load_extractor

_DESCRIPTION = """Compares generated images with real ones: Frechet and kernel distances, CMMD, precision, recall,
density, coverage, style, wavelet energies and diversity, each with an interval and with the figure of real images."""

_INPUTS = """
Args:
    predictions: generated Pillow images, at least 20. references: as many real ones.
    extractor: "public" (shipped, default), "inception:FILE", "clip:FOLDER_OR_ID" or "dinov2:FOLDER_OR_ID".
    image_size: side to which all are brought; num_channels: 1 or 3.
    resamples, confidence, seed: of the intervals.
Returns:
    {metric: value} for every metric that could be measured, and "rows": all rows of `evaluate_images`.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class ImageQuality(evaluate.Metric):
    """`evaluate_images` for two lists of images of equal length, which is what `evaluate` can hold."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()}),
        )

    def _compute(
        self,
        predictions: Any,
        references: Any,
        extractor: str = "public",
        image_size: int = 64,
        num_channels: int = 3,
        resamples: int = 200,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> dict[str, Any]:
        processor = SpectralImageProcessor(image_size=image_size, num_channels=num_channels)

        def stream(images: Any) -> Any:
            for start in range(0, len(images), 128):
                yield processor(images[start : start + 128])["pixel_values"]

        rows = evaluate_images(
            stream(references),
            stream(predictions),
            load_extractor(extractor),
            resamples=resamples,
            confidence=confidence,
            seed=seed,
        )
        values: dict[str, Any] = {row["metric"]: row["value"] for row in rows if row["value"] is not None}
        return values | {"rows": rows}
