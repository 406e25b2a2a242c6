"""Persons as units: at most k rows are kept, one at a time is used, and a person moves the clipped sum by at most C."""

import numpy as np
import pytest
import torch
from randomgen import AESCounter
from scipy import stats

from hf_spectral_dp.privacy.sampling import PoissonSampler
from hf_spectral_dp.privacy.units import FirstRows, OneRowPerUnit


def fixed(key: int) -> np.random.Generator:
    return np.random.Generator(AESCounter(key=key))


def test_the_first_rows_of_each_are_kept_in_order():
    rows = FirstRows("person", 2)
    assert rows.keep(["b", "a", "b", "b"]) == [0, 1, 2]
    assert rows.keep(["a", "a", "c"]) == [0, 2]
    assert rows.units == [0, 1, 0, 1, 2] and rows.beyond_limit == 2


def test_what_is_kept_of_a_person_depends_on_no_other_person():
    generator = np.random.default_rng(0)
    names = generator.integers(0, 12, 200).tolist()
    everyone, without = FirstRows("person", 3), FirstRows("person", 3)
    kept = [row for row in everyone.keep(names) if names[row] != 5]
    others = [row for row, name in enumerate(names) if name != 5]
    assert kept == [others[row] for row in without.keep([names[row] for row in others])]
    assert np.bincount(everyone.units).max() == 3


@pytest.mark.parametrize("name", [None, "", "  ", 1.5, float("nan"), b"x"])
def test_an_image_of_nobody_is_refused(name):
    with pytest.raises(ValueError, match="person=.* names no person; give every image"):
        FirstRows("person", 2).keep(["a", name])


@pytest.mark.parametrize("column, limit", [("person", None), (None, 2), ("person", 0)])
def test_column_and_limit_belong_together(column, limit):
    with pytest.raises(ValueError, match=f"unit_column={column!r} and max_rows_per_unit={limit}"):
        FirstRows(column, limit)


@pytest.mark.parametrize("units", [[], [0, 2], [-1, 0]])
def test_numbers_with_gaps_are_refused(units):
    with pytest.raises(ValueError, match="without gaps"):
        OneRowPerUnit(np.array(units, dtype=np.int64))


def test_a_person_never_contributes_two_rows_to_a_batch():
    units = np.random.default_rng(0).integers(0, 40, 300)
    rows = OneRowPerUnit(units)
    sampler = PoissonSampler(len(rows), 0.5)
    for _ in range(200):
        chosen = sampler.next_batch()
        assert (units[rows.draw(chosen)] == chosen).all() and len(set(chosen)) == len(chosen)


def test_every_row_of_a_sampled_person_is_as_likely():
    units = np.array([0, 1, 2, 1, 1, 2])
    rows, trials = OneRowPerUnit(units, generator=fixed(60)), 6000
    drawn = np.stack([rows.draw(np.array([1, 2])) for _ in range(trials)])
    counts = np.bincount(drawn.reshape(-1), minlength=6)
    assert counts[0] == 0
    assert stats.chisquare(counts[[1, 3, 4]]).pvalue > 1e-4 and stats.chisquare(counts[[2, 5]]).pvalue > 1e-4
    table = np.zeros((6, 6))
    np.add.at(table, tuple(drawn.T), 1)  # and the persons draw independently
    assert stats.chi2_contingency(table[[1, 3, 4]][:, [2, 5]]).pvalue > 1e-4


def test_adding_a_person_with_many_rows_moves_the_clipped_sum_by_at_most_the_clipping_norm():
    """All persons sampled, rows of huge gradients: the sum with one person more is the other sum plus one vector."""
    generator = torch.Generator().manual_seed(0)
    gradients = 100 * torch.randn(60, 7, generator=generator)
    gradients[50:] = gradients[50]  # ten equal rows of one person, the worst case
    units = np.repeat(np.arange(11), [5] * 10 + [10])

    def clipped_sum(persons: int) -> torch.Tensor:
        mine = units[units < persons]
        rows = OneRowPerUnit(mine, generator=fixed(70)).draw(np.arange(persons))
        clipped = gradients[rows] / gradients[rows].norm(dim=1, keepdim=True).clamp(min=1)
        return clipped.sum(0)

    # The same key draws the same rows of the first ten persons, so the difference is the eleventh's contribution.
    assert float((clipped_sum(11) - clipped_sum(10)).norm()) == pytest.approx(1.0, abs=1e-5)


def test_no_seed_reaches_the_draw():
    drawn = []
    for _ in range(2):
        np.random.seed(0)
        drawn.append(tuple(OneRowPerUnit(np.repeat(np.arange(50), 20)).draw(np.arange(50))))
    assert drawn[0] != drawn[1]
