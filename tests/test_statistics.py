"""What is kept of a stream: the same however it is cut, of one size however long it is, and with honest intervals."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from hf_spectral_dp.metrics.distances import Moments
from hf_spectral_dp.metrics.features import PublicFeatures
from hf_spectral_dp.metrics.public_features import PublicFeatureConfig, PublicFeatureNetwork
from hf_spectral_dp.metrics.statistics import GROUPS, ImageStatistics, Sums, band_energies, collect, jackknife


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> PublicFeatures:
    folder = tmp_path_factory.mktemp("network")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        PublicFeatureNetwork(PublicFeatureConfig(16, (2, 2, 4, 4, 4), 2)).save_pretrained(folder)
    return PublicFeatures(folder)


def images(count: int, seed: int = 0, side: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_sums_do_not_depend_on_how_the_stream_is_cut(tiny):
    pixels = images(97)
    whole = collect(pixels, tiny, tiny)
    cut = collect(iter(pixels.split([1, 40, 3, 53])), tiny, tiny)
    assert whole.count == cut.count == 97 and whole.counts.max() - whole.counts.min() <= 4
    expected = Moments.of(tiny(pixels))
    for found in (whole.all().moments, cut.all().moments):
        torch.testing.assert_close(found.covariance, expected.covariance, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.mean, expected.mean, rtol=1e-4, atol=1e-6)
    for name, value in whole.all().sums.items():
        torch.testing.assert_close(cut.all().sums[name], value, rtol=1e-4, atol=1e-5)


def test_its_size_does_not_depend_on_the_stream(tiny):
    def size(count: int) -> int:
        found = collect((images(50, seed) for seed in range(count)), tiny, tiny, reservoir=60)
        return found.rows.nbytes + sum(value.nbytes for value in found.sums.values())

    assert size(2) == size(6)


def test_the_sample_is_uniform(tiny):
    """Every image is kept equally often, wherever it stands in the stream."""

    class Index:
        name, fingerprint, dim = "index", "0", 1

        def __call__(self, pixels):
            return (pixels[:, 0, 0, :1] + 1) * 20

    pixels = torch.zeros(40, 3, 8, 8) + torch.arange(40.0).view(-1, 1, 1, 1) / 20 - 1
    kept = torch.cat([collect(pixels.split(20), Index(), tiny, reservoir=10, seed=seed).rows for seed in range(100)])
    counts = torch.bincount(kept[:, 0].round().long(), minlength=40)
    assert len(kept) == 1000 and stats.chisquare(counts.numpy()).pvalue > 1e-4


def statistics_of(values: np.ndarray) -> ImageStatistics:
    parts = torch.tensor(values).view(GROUPS, -1)
    counts = torch.full((GROUPS,), parts.shape[1])
    return ImageStatistics((3, 8, 8), counts, {"x": parts.sum(1)}, torch.zeros(2, 1), [])


def test_intervals_cover_what_they_should():
    """The ratio of two means, 300 times: about 95 of 100 intervals hold the true value."""
    random = np.random.default_rng(0)

    def ratio(first: Sums, second: Sums) -> float:
        return float(second.mean("x") / first.mean("x"))

    covered = 0
    for _ in range(300):
        real, generated = (statistics_of(random.exponential(scale, 400)) for scale in (1, 2))
        value, low, high = jackknife(real, generated, ratio, 0.95)
        assert low < value < high
        covered += low <= 2 <= high
    assert 0.93 <= covered / 300 <= 1


def test_an_interval_by_hand():
    """Of a mean, leaving out groups gives the variance of the mean of the ten group means."""
    values = np.random.default_rng(0).normal(size=100)
    _, low, high = jackknife(statistics_of(values), statistics_of(values), lambda _, s: float(s.mean("x")), 0.9)
    deviation = values.reshape(10, 10).mean(1).std(ddof=1) / math.sqrt(10)
    assert high - low == pytest.approx(2 * stats.t.ppf(0.95, 9) * deviation)


def test_band_energies_of_stripes():
    stripes = torch.ones(1, 1, 16, 16)
    stripes[..., ::2, :] = -1  # rows alternate: all energy in one band of the finest level, sides of the others too
    energies = band_energies(stripes)
    assert energies.shape == (1, 6)  # 16 pixels: two levels down to 4
    assert float(energies.sum()) == pytest.approx(float(energies[0, 3])) and energies[0, 3] == pytest.approx(4)
    assert band_energies(torch.full((2, 3, 28, 28), 0.5)).max() < 1e-12
    assert band_energies(images(2, side=18)).shape == (2, 6)  # 18 is not divisible by 4: the last two pixels are left


@pytest.mark.parametrize(
    "stream, error, words",
    [
        (images(19), ValueError, "19 images; at least 20"),
        ([images(30), images(30, side=24)], ValueError, "resize all to one shape"),
        (torch.where(torch.arange(30).view(-1, 1, 1, 1) == 8, torch.nan, images(30)), ValueError, "0 to 29: NaN"),
        (images(30) * 200, ValueError, r"scale images to \[-1, 1\]"),
        ((images(30) * 127).to(torch.uint8), TypeError, "images.float"),
        (images(30)[:, :2], ValueError, "1 or 3"),
        (images(30, side=4), ValueError, "at least 8"),
        ([(images(30), ["one caption"])], ValueError, "1 captions for 30 images"),
    ],
)
def test_bad_images_are_refused_with_what_to_do(tiny, stream, error, words):
    with pytest.raises(error, match=words):
        collect(stream, tiny, tiny)
