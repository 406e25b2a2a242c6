"""Distances of feature matrices: equal to other libraries, to loops, to closed forms; unbiased where they say so."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.parity import features, of_torch_fidelity, of_torchmetrics
from hf_spectral_dp.metrics.distances import (
    KernelMatrices,
    Moments,
    band_error,
    cmmd,
    frechet_distance,
    frechet_distances,
    gaussian_kernel,
    gram_matrices,
    kernel_distance,
    mean_pair_distance,
    neighbourhoods,
    perceptual_embedding,
    polynomial_kernel,
    style_distance,
)

REAL, OTHER = features(300, 24, 0), features(260, 24, 1, shift=0.2, scale=1.2)


def test_frechet_and_kernel_distance_equal_torchmetrics():
    theirs = of_torchmetrics(REAL, OTHER)
    assert frechet_distance(REAL, OTHER) == pytest.approx(theirs["frechet_distance"], rel=1e-3)
    assert kernel_distance(REAL[:260], OTHER) == pytest.approx(theirs["kernel_distance"], rel=1e-3)


def test_all_equal_torch_fidelity():
    """Where it can be imported: it needs torchvision."""
    pytest.importorskip("torch_fidelity", reason="torch-fidelity needs torchvision", exc_type=ImportError)
    theirs, one, ours = of_torch_fidelity(REAL, OTHER), REAL[:260], neighbourhoods(REAL, OTHER, k=3)
    assert frechet_distance(REAL, OTHER) == pytest.approx(theirs["frechet_distance"], rel=1e-3)
    assert kernel_distance(one, OTHER) == pytest.approx(theirs["kernel_distance"], rel=1e-3)
    assert cmmd(one, OTHER) == pytest.approx(theirs["cmmd"], rel=1e-3)
    assert float(ours.precision.mean()) == pytest.approx(theirs["precision"], rel=1e-3)
    assert float(ours.recall.mean()) == pytest.approx(theirs["recall"], rel=1e-3)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_frechet_distance_is_a_distance_of_laws(seed, dim):
    one, other = features(50, dim, seed), features(40, dim, seed + 1, shift=0.5)
    turned = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed)))[0]
    forward = frechet_distance(one, other)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(other, one) == pytest.approx(forward, abs=1e-5)
    assert frechet_distance(one @ turned, other @ turned) == pytest.approx(forward, rel=1e-4, abs=1e-4)
    assert frechet_distances(Moments.of(one), [Moments.of(other), Moments.of(one)])[0] == pytest.approx(forward)


def test_frechet_distance_by_hand():
    identity = torch.eye(3, dtype=torch.float64)
    one = Moments(100, torch.zeros(3, dtype=torch.float64), identity)
    other = Moments(100, torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64), 9 * identity)
    assert frechet_distance(one, other) == pytest.approx(4 + 3 * (3 - 1) ** 2)


def test_constant_images_have_a_distance_and_too_few_have_none():
    constant = torch.ones(50, 3)
    assert frechet_distance(features(50, 3, 0), constant) > 0
    assert frechet_distance(constant, constant) == 0
    with pytest.raises(ValueError, match=r"3 images for the covariance of 4 features.*kernel_distance"):
        frechet_distance(features(3, 4, 0), features(50, 4, 0))


def test_bad_features_are_named():
    with pytest.raises(ValueError, match="1 of 300 rows hold NaN"):
        kernel_distance(REAL, torch.where(torch.arange(300)[:, None] == 7, torch.nan, REAL))
    with pytest.raises(ValueError, match="24 and 5 features"):
        cmmd(REAL, torch.zeros(10, 5))
    with pytest.raises(ValueError, match="at least 2"):
        Moments.of(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="k=5 needs more than 5"):
        neighbourhoods(REAL[:4], REAL)


@pytest.mark.parametrize("distance", [kernel_distance, cmmd])
def test_kernel_distances_are_unbiased(distance):
    """Rows from two laws on six points: the true distance is a finite sum, and the mean of many estimates hits it."""
    points = features(6, 4, 5).double()
    laws = torch.tensor([[0.3, 0.2, 0.2, 0.1, 0.1, 0.1], [0.1, 0.1, 0.2, 0.2, 0.2, 0.2]], dtype=torch.float64)
    kernel = (polynomial_kernel if distance is kernel_distance else gaussian_kernel)(points, points).first
    generator = torch.Generator().manual_seed(0)

    def estimates(one: int, other: int) -> tuple[np.ndarray, np.ndarray]:
        unbiased, biased = [], []
        for _ in range(1500):
            x, y = (points[laws[law].multinomial(8, True, generator=generator)] for law in (one, other))
            unbiased.append(distance(x, y))
            matrices = (polynomial_kernel if distance is kernel_distance else gaussian_kernel)(x, y)
            biased.append(float(matrices.first.mean() + matrices.second.mean() - 2 * matrices.between.mean()))
        return np.array(unbiased), np.array(biased)

    for one, other in ((0, 0), (0, 1)):
        difference = laws[one] - laws[other]
        truth = float(difference @ kernel @ difference)
        unbiased, biased = estimates(one, other)
        error = unbiased.std() / math.sqrt(len(unbiased))
        assert abs(unbiased.mean() - truth) < 4 * error
        assert biased.mean() - truth > 20 * error  # the estimate that keeps the diagonal would be noticed


def test_resampled_kernel_distances_scatter_about_the_distance():
    matrices = polynomial_kernel(REAL[:60].double(), OTHER[:50].double())
    once = matrices.resampled(torch.ones(1, 60).double(), torch.ones(1, 50).double())
    assert float(once) == pytest.approx(matrices.distance())
    generator = torch.Generator().manual_seed(0)
    counts = [
        torch.stack([torch.randint(n, (n,), generator=generator).bincount(minlength=n) for _ in range(3000)]).double()
        for n in (60, 50)
    ]
    resamples = matrices.resampled(*counts)
    assert abs(resamples.mean() - matrices.distance()) < 4 * resamples.std() / math.sqrt(3000)


def test_a_kernel_matrix_by_hand():
    one, other = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [1.0]])
    # (xy + 1)^3: within the first 1, 1 off the diagonal; within the second 8; between 1, 1, 27, 27.
    assert kernel_distance(one, other) == pytest.approx(1 + 8 - 2 * 14)
    matrices = KernelMatrices(torch.eye(2), torch.eye(2), torch.zeros(2, 2))
    assert matrices.distance() == 0
    assert cmmd(one + 1, other) == pytest.approx(0, abs=1e-6)  # of length 1 all are alike


def test_neighbourhoods_equal_loops():
    real, generated, k = REAL[:40].numpy(), OTHER[:30].numpy(), 3

    def radius(rows: np.ndarray, index: int) -> float:
        return sorted(np.linalg.norm(rows - rows[index], axis=1))[k]

    found = neighbourhoods(REAL[:40], OTHER[:30], k)
    balls = np.array([[np.linalg.norm(r - g) <= radius(real, i) for g in generated] for i, r in enumerate(real)])
    theirs = np.array([[np.linalg.norm(r - g) <= radius(generated, j) for j, g in enumerate(generated)] for r in real])
    np.testing.assert_array_equal(found.precision, balls.any(0))
    np.testing.assert_allclose(found.density, balls.sum(0) / k)
    np.testing.assert_array_equal(found.coverage, balls.any(1))
    np.testing.assert_array_equal(found.recall, theirs.any(1))


def test_a_collapsed_generator_is_precise_and_covers_little():
    collapsed = REAL[:1].expand(200, -1) + 1e-4 * features(200, 24, 3)
    found = neighbourhoods(REAL, collapsed)
    assert found.precision.mean() > 0.95 and found.coverage.mean() < 0.1 and found.recall.mean() < 0.1


def test_pair_distances_from_sums_equal_those_of_all_pairs():
    generator = torch.Generator().manual_seed(0)
    maps = [torch.rand(9, 4, 6, 6, generator=generator), torch.rand(9, 8, 3, 3, generator=generator)]
    vectors = perceptual_embedding(maps)
    pairs = []
    for a, b in itertools.combinations(range(9), 2):
        units = [found / found.norm(dim=1, keepdim=True) for found in maps]
        pairs.append(sum(float((unit[a] - unit[b]).square().sum(0).mean()) for unit in units))  # LPIPS as in its paper
    assert mean_pair_distance(vectors.mean(0), float(vectors.square().sum(1).mean()), 9) == pytest.approx(
        np.mean(pairs), rel=1e-5
    )


def test_style_sees_texture_and_not_place():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(20, 3, 8, 8, generator=generator)
    grams = gram_matrices([images]).mean(0)
    moved = gram_matrices([images.roll(3, dims=2)]).mean(0)
    assert style_distance(grams, moved, [3]) == pytest.approx(0, abs=1e-6)
    assert style_distance(grams, 2 * grams, [3]) == pytest.approx(1)
    by_hand = images[0].flatten(1) @ images[0].flatten(1).T / 64
    torch.testing.assert_close(gram_matrices([images])[0], by_hand.flatten())


def test_band_error_by_hand():
    assert band_error(torch.tensor([1.0, 2.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 0.0, 3.0])) == pytest.approx(0.5)
