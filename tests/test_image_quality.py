"""The metric loads by `evaluate` from its folder, offline, and says what `evaluate_images` says."""

from pathlib import Path

import evaluate
import numpy as np
import pytest
from PIL import Image

import hf_spectral_dp
from hf_spectral_dp import SpectralImageProcessor
from hf_spectral_dp.metrics.evaluation import evaluate_images

FOLDER = Path(hf_spectral_dp.__file__).parent / "metrics" / "image_quality"


def pictures(count: int, seed: int) -> list[Image.Image]:
    random = np.random.default_rng(seed)
    return [Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((20, 24)) for _ in range(count)]


def test_it_gives_the_rows_of_evaluate_images(tmp_path):
    metric = evaluate.load(str(FOLDER), cache_dir=str(tmp_path))
    generated, real = pictures(30, 0), pictures(30, 1)
    found = metric.compute(predictions=generated, references=real, image_size=16, resamples=20)
    processor = SpectralImageProcessor(image_size=16, num_channels=3)
    expected = evaluate_images(processor(real)["pixel_values"], processor(generated)["pixel_values"], resamples=20)
    assert [row["metric"] for row in found["rows"]] == [row["metric"] for row in expected]
    for row in expected:
        if row["value"] is not None:
            assert found[row["metric"]] == pytest.approx(row["value"], rel=1e-3, abs=1e-5)
    assert "frechet_distance" not in found and "covariance" in found["rows"][0]["note"]
