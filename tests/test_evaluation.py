"""One call, one row per metric: real images score their floor, worse images score worse, nothing passes unsaid."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from hf_spectral_dp import SpectralImageProcessor
from hf_spectral_dp.metrics.distances import frechet_distance
from hf_spectral_dp.metrics.evaluation import BETTER, evaluate_images, read_images
from hf_spectral_dp.metrics.features import PublicFeatures
from hf_spectral_dp.metrics.public_features import PublicFeatureConfig, PublicFeatureNetwork

DISTANCES = ("frechet_distance", "kernel_distance", "cmmd", "style_distance", "wavelet_energy_error")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> PublicFeatures:
    folder = tmp_path_factory.mktemp("network")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = PublicFeatureNetwork(PublicFeatureConfig(16, (4, 8, 6, 6, 6), 2)).eval()
    with torch.no_grad():
        found = network.features(smooth(500, 9))
        network.feature_mean.copy_(found.mean(0))
        network.feature_scale.copy_(1 / found.std(0).clamp_min(1e-6))
    network.save_pretrained(folder)
    return PublicFeatures(folder)


def smooth(count: int, seed: int) -> torch.Tensor:
    """Blobs of colour (count, 3, 16, 16)."""
    noise = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, (16, 16), mode="bicubic").tanh()


@pytest.fixture(scope="module")
def rows(tiny) -> dict[str, dict[str, dict]]:
    """Rows by metric, for other real images, for images with noise, and for one image again and again."""
    other = smooth(400, 1)
    noisy = (other + 0.6 * torch.randn(other.shape, generator=torch.Generator().manual_seed(2))).clamp(-1, 1)
    sets = {"real": other, "noisy": noisy, "collapsed": other[:1].expand(400, -1, -1, -1)}
    return {
        name: {row["metric"]: row for row in evaluate_images(smooth(500, 0), some, tiny, resamples=50)}
        for name, some in sets.items()
    }


def test_rows_are_plain_and_complete(rows):
    keys = {"metric", "value", "low", "high", "floor", "n", "n_real", "better", "extractor", "note"}
    for row in rows["real"].values():
        assert set(row) == keys and json.loads(json.dumps(row, allow_nan=False)) == row
        assert row["low"] <= row["value"] <= row["high"] and row["n"] == 400
    assert set(rows["real"]) == set(BETTER) - {"text_agreement"}
    assert rows["real"]["frechet_distance"]["extractor"].startswith("public-features@")


def test_real_images_score_about_their_floor_and_worse_ones_worse(rows):
    for metric in DISTANCES:
        real, noisy = rows["real"][metric], rows["noisy"][metric]
        assert noisy["low"] > noisy["floor"] and noisy["value"] > 2 * real["value"], metric
    assert rows["noisy"]["precision"]["high"] < rows["real"]["precision"]["low"]
    diversity = rows["real"]["diversity"]
    assert diversity["low"] < diversity["floor"] < diversity["high"]


def test_a_collapsed_generator_is_told_by_diversity_and_coverage(rows):
    collapsed = rows["collapsed"]
    assert collapsed["diversity"]["value"] == pytest.approx(0, abs=1e-5)
    assert collapsed["coverage"]["high"] < 0.1 and collapsed["recall"]["high"] < 0.1
    assert collapsed["frechet_distance"]["low"] > rows["real"]["frechet_distance"]["high"]


def test_the_floor_is_that_of_sets_of_the_same_sizes(tiny):
    """The scaled distance of two halves equals, on average, that of two independent sets as large as the two given."""

    def noise(count: int, seed: int) -> torch.Tensor:
        return torch.rand(count, 1, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1

    floors, fresh = [], []
    for seed in range(12):
        real, generated, other = noise(600, 3 * seed), noise(100, 3 * seed + 1), noise(600, 3 * seed + 2)
        floors.append(evaluate_images(real, generated, tiny, resamples=20, reservoir=50)[0]["floor"])
        fresh.append(frechet_distance(tiny(other), tiny(generated)))
    error = (np.var(floors) / 12 + np.var(fresh) / 12) ** 0.5
    assert abs(np.mean(floors) - np.mean(fresh)) < 4 * error < 0.4 * np.mean(fresh)  # the scale is 1.75, not 1


def test_too_few_for_a_covariance_is_said_and_the_rest_is_measured(tiny):
    found = {row["metric"]: row for row in evaluate_images(smooth(20, 0), smooth(20, 1), tiny, resamples=20)}
    row = found["frechet_distance"]
    assert row["value"] is row["low"] is row["high"] is row["floor"] is None
    assert "18 images for the covariance of 18 features" in row["note"]
    assert found["kernel_distance"]["value"] is not None


def test_agreement_with_captions(tiny):
    class Colours:
        """Reads the mean colour of an image, and the names of three colours."""

        name, fingerprint, dim = "colours", "0", 3

        def __call__(self, images):
            return images.mean((2, 3)) + 1

        def text_features(self, texts):
            names = ["red", "green", "blue"]
            return torch.nn.functional.one_hot(torch.tensor([names.index(text) for text in texts]), 3).float()

    red = smooth(60, 0) * 0.1
    red[:, 0] += 0.85
    right, wrong = [(red, ["red"] * 60)], [(red, ["blue"] * 60)]
    for captions, low, high in ((right, 70, 100), (wrong, 0, 60)):
        found = {row["metric"]: row for row in evaluate_images(right, captions, Colours(), resamples=20)}
        row = found["text_agreement"]
        assert low < row["low"] <= row["value"] <= row["high"] < high + 1e-9 and 70 < row["floor"] < 100


def test_sets_that_cannot_be_compared_are_refused(tiny):
    with pytest.raises(ValueError, match="all real images are alike"):
        evaluate_images(torch.zeros(30, 3, 16, 16), smooth(30, 0), tiny)
    with pytest.raises(ValueError, match=r"real images are \(3, 16, 16\), generated \(1, 16, 16\)"):
        evaluate_images(smooth(30, 0), smooth(30, 0)[:, :1], tiny)
    with pytest.raises(ValueError, match="confidence=95"):
        evaluate_images(smooth(30, 0), smooth(30, 0), tiny, confidence=95)


def test_unreadable_images_are_left_out_and_counted():
    good = Image.fromarray(np.zeros((20, 24, 3), np.uint8))
    broken = {"bytes": b"no image", "path": None}
    rows = [{"image": broken if index == 3 else good, "caption": str(index)} for index in range(7)]
    processor = SpectralImageProcessor(image_size=16, num_channels=3)
    with pytest.warns(UserWarning, match="1 images could not be read"):
        batches = list(read_images(rows, processor, caption_column="caption", batch_size=4))
    assert [len(images) for images, _ in batches] == [4, 2]
    assert [caption for _, captions in batches for caption in captions] == ["0", "1", "2", "4", "5", "6"]
