"""Sampling: every row, subset and split over ranks has the probability that the accountant assumes; passes take all."""

import itertools
import pickle

import numpy as np
import pytest
from randomgen import AESCounter
from scipy import stats

from hf_spectral_dp.privacy.budget import PrivacyPlan
from hf_spectral_dp.privacy.sampling import (
    PoissonSampler,
    SinglePass,
    TruncatedPoissonSampler,
    check_sampler,
    sampler_for,
)

# Fixed keys make the statistical tests repeatable. With a right sampler a fresh key would fail one in ALARM.
ALARM = 1e-4


def fixed(key: int) -> np.random.Generator:
    return np.random.Generator(AESCounter(key=key))


def union_of_ranks(num_examples, sampling_rate, world_size, key=0):
    """A function that draws one global batch."""
    ranks = [
        PoissonSampler(num_examples, sampling_rate, rank, world_size, generator=fixed(key + rank))
        for rank in range(world_size)
    ]
    return lambda: np.concatenate([sampler.next_batch() for sampler in ranks])


@pytest.mark.parametrize(("sampling_rate", "world_size"), [(0.01, 1), (0.3, 1), (0.3, 3), (0.9, 2)])
def test_every_row_enters_with_the_sampling_rate(sampling_rate, world_size):
    draw, trials, rows = union_of_ranks(50, sampling_rate, world_size), 4000, 50
    counts = np.bincount(np.concatenate([draw() for _ in range(trials)]), minlength=rows)
    variance = trials * sampling_rate * (1 - sampling_rate)
    statistic = ((counts - trials * sampling_rate) ** 2).sum() / variance
    assert ALARM < stats.chi2(rows).sf(statistic) < 1 - ALARM


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_subset_has_the_product_probability(world_size):
    """Marginals do not show independence; the law of whole subsets of five rows does."""
    rows, rate, trials = 5, 0.35, 20_000
    draw = union_of_ranks(rows, rate, world_size, key=10)
    counts = np.bincount([int((1 << draw()).sum()) for _ in range(trials)], minlength=2**rows)
    sizes = np.array([sum(bits) for bits in itertools.product((0, 1), repeat=rows)])
    expected = trials * rate**sizes * (1 - rate) ** (rows - sizes)
    assert stats.chisquare(counts, expected).pvalue > ALARM


@pytest.mark.parametrize(
    ("num_examples", "sampling_rate", "world_size"), [(60_000, 0.02, 1), (1000, 0.5, 4), (7, 0.1, 1)]
)
def test_the_batch_size_is_binomial(num_examples, sampling_rate, world_size):
    trials = 2000
    draw = union_of_ranks(num_examples, sampling_rate, world_size, key=20)
    sizes = np.array([len(draw()) for _ in range(trials)])
    mean, variance = num_examples * sampling_rate, num_examples * sampling_rate * (1 - sampling_rate)
    # Five standard errors; that of a sample variance is sqrt((kurtosis - 1) / trials), up to sqrt(3.6 / trials) here.
    assert abs(sizes.mean() - mean) < 5 * np.sqrt(variance / trials)
    assert abs(sizes.var() / variance - 1) < 5 * np.sqrt(3.6 / trials)


def test_batches_are_sorted_distinct_and_in_range():
    sampler = PoissonSampler(100_000, 0.07)  # above numpy's change of method at 5 %
    for _ in range(5):
        batch = sampler.next_batch()
        assert batch.dtype == np.int64 and (np.diff(batch) > 0).all() and batch[0] >= 0 and batch[-1] < 100_000


def test_batches_are_independent_of_each_other():
    """Two batches of expected size 500 of 1000 rows share 250 rows, with sd 13.7; shuffled epochs would share none."""
    sampler = PoissonSampler(1000, 0.5, generator=fixed(30))
    batches = [sampler.next_batch() for _ in range(200)]
    shared = [len(np.intersect1d(a, b)) for a, b in itertools.pairwise(batches)]
    assert abs(np.mean(shared) - 250) < 5 * 13.7 / np.sqrt(199)


def test_rate_one_takes_all_rows():
    for world_size in (1, 3):
        parts = [PoissonSampler(100, 1.0, rank, world_size).next_batch() for rank in range(world_size)]
        assert sorted(np.concatenate(parts)) == list(range(100))


@pytest.mark.parametrize(("num_examples", "sampling_rate"), [(10**9, 1e-7), (10**6, 1e-7)])
def test_a_tiny_rate_is_exact_and_cheap(num_examples, sampling_rate):
    """A billion rows: anything linear in them would not end. Sizes are Poisson with mean 100, and 0.1, to 1e-7."""
    sampler, trials = PoissonSampler(num_examples, sampling_rate, generator=fixed(40)), 2000
    mean = num_examples * sampling_rate
    total = sum(len(sampler.next_batch()) for _ in range(trials))
    assert ALARM < stats.poisson(mean * trials).cdf(total) < 1 - ALARM


@pytest.mark.parametrize("sampling_rate", [1e-7, 1e-6, 1e-5])
def test_the_law_of_tiny_rates(sampling_rate):
    """Batches of 100 rows: the law of their sizes, of the places in the data, of pairs, and of neighbours in time.

    A mask of float32 uniforms has steps of 2**-24, so its rate of 1e-7 would be 1.2e-7: 400 deviations off here.
    """
    rows, trials = round(100 / sampling_rate), 3000
    sampler = PoissonSampler(rows, sampling_rate, generator=fixed(41))
    batches = [sampler.next_batch() for _ in range(trials)]
    sizes, law = np.array([len(batch) for batch in batches]), stats.binom(rows, sampling_rate)
    edges = np.unique(law.ppf(np.arange(1, 20) / 20))
    cells = np.bincount(np.searchsorted(edges, sizes), minlength=len(edges) + 1)  # (-inf, e0], (e0, e1], ...
    expected = trials * np.diff([0, *law.cdf(edges), 1])
    assert stats.chisquare(cells, expected).pvalue > ALARM
    everything = np.concatenate(batches)
    for cell in (everything * 200 // rows, everything % 200):  # no place and no residue is preferred
        assert stats.chisquare(np.bincount(cell, minlength=200)).pvalue > ALARM
    # Rows: the two halves of the data vote independently. Batches: none remembers the one before.
    lower = np.array([(batch < rows // 2).sum() for batch in batches])
    for first, second in ((lower, sizes - lower), (sizes[1:], sizes[:-1])):
        assert stats.pearsonr(first, second).pvalue > ALARM
    repeated = sum(len(np.intersect1d(a, b)) for a, b in itertools.pairwise(batches))
    assert stats.poisson(100 * sampling_rate * trials).sf(repeated - 1) > ALARM


def test_empty_batches_are_given_not_skipped():
    sampler = PoissonSampler(3, 0.1, generator=fixed(50))
    batches = [sampler.next_batch() for _ in range(100)]
    empty = [batch for batch in batches if len(batch) == 0]
    assert 50 < len(empty) < 95  # 0.9 ** 3 = 73 %, five standard errors of 4.4
    assert all(batch.dtype == np.int64 and batch.shape == (0,) for batch in empty)


def test_ranks_partition_the_rows_and_more_ranks_than_rows_work():
    for num_examples, world_size in ((10, 3), (2, 5), (1, 1)):
        parts = [PoissonSampler(num_examples, 1.0, rank, world_size).next_batch() for rank in range(world_size)]
        assert sorted(np.concatenate(parts)) == list(range(num_examples))
        assert all((part % world_size == rank).all() for rank, part in enumerate(parts))


def test_no_seed_reaches_the_sampler():
    drawn = []
    for _ in range(2):
        np.random.seed(0)
        sampler = PoissonSampler(1000, 0.5)
        drawn.append(tuple(sampler.next_batch()))
    assert drawn[0] != drawn[1]
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(sampler)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0, 0.1), "num_examples=0"),
        ((10, 0.0), "sampling_rate=0.0"),
        ((10, 1.5), "sampling_rate=1.5"),
        ((10, float("nan")), "sampling_rate=nan"),
        ((10, 0.1, 2, 2), "rank=2 must be in .*world_size=2"),
        ((10, 0.1, -1, 2), "rank=-1"),
        ((10, 0.1, 0, 0), "world_size=0"),
    ],
)
def test_what_cannot_work_is_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        PoissonSampler(*arguments)


# -- truncated -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3])
def test_truncated_subsets_have_the_law_of_the_event(size):
    """Small subsets as in Poisson sampling; of larger ones, a uniform subset of the largest size."""
    rows, rate, trials = 5, 0.45, 20_000
    sampler = TruncatedPoissonSampler(rows, rate, size, generator=fixed(60))
    counts = np.bincount([int((1 << sampler.next_batch()).sum()) for _ in range(trials)], minlength=2**rows)
    sizes = np.array([bin(subset).count("1") for subset in range(2**rows)])
    probabilities = np.where(sizes < size, rate**sizes * (1 - rate) ** (rows - sizes), 0.0)
    probabilities[sizes == size] = stats.binom(rows, rate).sf(size - 1) / (sizes == size).sum()
    assert counts[sizes > size].sum() == 0
    assert stats.chisquare(counts[sizes <= size], trials * probabilities[sizes <= size]).pvalue > ALARM


def test_truncation_that_never_happens_changes_nothing():
    sampler = TruncatedPoissonSampler(10**6, 1e-4, 10**6, generator=fixed(61))
    plain = PoissonSampler(10**6, 1e-4, generator=fixed(61))
    assert all(np.array_equal(sampler.next_batch(), plain.next_batch()) for _ in range(20))


# -- one pass --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_examples, batch_size", [(10, 3), (9, 3), (1, 5), (7, 7)])
def test_a_pass_has_every_place_in_one_batch(num_examples, batch_size):
    batches = list(SinglePass(num_examples, batch_size).batches(iter(range(100, 200))))
    assert [row for batch in batches for row in batch] == list(range(100, 100 + num_examples))
    assert len(batches) == -(-num_examples // batch_size) and max(map(len, batches)) <= batch_size


def test_a_null_row_keeps_its_place_and_a_short_stream_its_steps():
    rows = [0, 1, None, 3, 4, 5]
    assert list(SinglePass(6, 2).batches(rows)) == [[0, 1], [3], [4, 5]]
    assert list(SinglePass(9, 3).batches(rows)) == [[0, 1], [3, 4, 5], []]


def test_a_row_is_read_only_when_its_batch_is_asked_for():
    read = []
    batches = SinglePass(6, 2).batches(read.append(row) or row for row in range(6))
    assert read == [] and next(batches) == [0, 1] and read == [0, 1]


# -- plan and sampler ------------------------------------------------------------------------------------------------


def plan(sampling: str = "poisson", **changes) -> PrivacyPlan:
    facts = {"num_examples": 100, "sampling_rate": 0.1, "steps": 5, "noise_multiplier": 1.0, "delta": 1e-3}
    return PrivacyPlan(**{**facts, "target_epsilon": 9.0, "sampling": sampling, **changes})


PLANS = [plan(), plan("truncated_poisson", max_batch_size=20), plan("single_pass")]


@pytest.mark.parametrize("index", range(3))
def test_a_plan_accepts_its_own_sampler_and_no_other(index):
    check_sampler(sampler_for(PLANS[index]), PLANS[index])
    others = [sampler_for(other) for other in PLANS if other is not PLANS[index]]
    changed = plan(PLANS[index].sampling, num_examples=200, max_batch_size=PLANS[index].max_batch_size)
    mine = type("Mine", (PoissonSampler,), {})(100, 0.1)
    for wrong in (*others, sampler_for(changed), mine, "poisson", None):
        with pytest.raises(ValueError, match=f"no proof for it: epsilon holds for sampling='{PLANS[index].sampling}'"):
            check_sampler(wrong, PLANS[index])


def test_a_rank_draws_its_own_rows():
    check_sampler(sampler_for(plan(), 1, 4), plan(), 1, 4)
    with pytest.raises(ValueError, match="no proof"):
        check_sampler(sampler_for(plan(), 0, 4), plan(), 1, 4)


@pytest.mark.parametrize("chosen", PLANS[1:], ids=lambda chosen: chosen.sampling)
def test_what_is_not_proven_for_several_processes_is_refused(chosen):
    with pytest.raises(ValueError, match="is proven for one process, not world_size=2"):
        sampler_for(chosen, 0, 2)


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_of_nothing_is_refused(size):
    with pytest.raises(ValueError, match=f"max_batch_size={size}"):
        TruncatedPoissonSampler(10, 0.1, size)
    with pytest.raises(ValueError, match=f"batch_size={size} must be at least 1"):
        SinglePass(10, size)
