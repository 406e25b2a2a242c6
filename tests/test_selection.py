"""The private choice: its law is the exponential mechanism's, and one unit changes it by at most e^epsilon."""

import math
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_spectral_dp.privacy import selection
from hf_spectral_dp.privacy.selection import private_choice


def law(counts, epsilon, monkeypatch_total):
    """The exact probabilities: what `randbelow` is asked for, and how much of it goes to each index."""
    total = []
    monkeypatch_total(lambda bound: total.append(bound) or 0)
    private_choice(counts, epsilon)
    (bound,), edges = total, []
    for index in range(len(counts)):  # the smallest draw that chooses a later index, by bisection
        low, high = 0, bound
        while low < high:
            middle = (low + high) // 2
            monkeypatch_total(lambda _, middle=middle: middle)
            low, high = (middle + 1, high) if private_choice(counts, epsilon) <= index else (low, middle)
        edges.append(low)
    return [Fraction(after - before, bound) for before, after in zip([0, *edges], edges, strict=False)]


@given(
    counts=st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=1, max_size=4),
    epsilon=st.sampled_from([0.001, 0.1, 1.0, 5.0]),
)
def test_one_unit_moves_no_probability_by_more_than_epsilon(counts, epsilon):
    def replaced(function):
        selection.secrets = type("Secrets", (), {"randbelow": staticmethod(function)})

    original = selection.secrets
    try:
        without = law([count for count, _ in counts], epsilon, replaced)
        with_unit = law([count + right for count, right in counts], epsilon, replaced)
    finally:
        selection.secrets = original
    assert sum(without) == sum(with_unit) == 1
    limit = Fraction(math.exp(epsilon))
    for one, other in zip(without, with_unit, strict=True):
        assert one > 0 and 1 / limit <= other / one <= limit


def test_the_odds_are_those_of_the_exponential_mechanism():
    tallies = Counter(private_choice([10, 12, 7], 0.5) for _ in range(4000))
    weights = [math.exp(0.5 * count) for count in (10, 12, 7)]
    for index, weight in enumerate(weights):
        expected = weight / sum(weights)
        assert abs(tallies[index] / 4000 - expected) < 5 * math.sqrt(expected * (1 - expected) / 4000)


def test_far_apart_counts_do_not_overflow():
    assert private_choice([0, 5000], 10.0) == 1


def test_what_is_no_count_is_refused():
    with pytest.raises(ValueError, match="no candidate"):
        private_choice([], 1.0)
    with pytest.raises(ValueError, match="epsilon=0"):
        private_choice([1], 0.0)
    with pytest.raises(TypeError, match="float"):
        private_choice([0.5, 1], 1.0)
    with pytest.raises(ValueError, match="negative"):
        private_choice([-1], 1.0)
