"""The plots of the report: what they draw is what they were given, read off the axes."""

import numpy as np
import pytest

from hf_spectral_dp.metrics.membership import power_limit
from hf_spectral_dp.metrics.utility import ClassAccuracy, UtilityResult
from hf_spectral_dp.plots import ACCENT, ALARM, accuracies, attack_curve, profile, shares

pytest.importorskip("matplotlib")
PAIRS = [(0.0, 0.4), (1.0, 0.1), (3.0, 1e-5)]


def test_the_curve_of_attacks_is_the_limit_and_what_was_tried_stands_where_it_was_measured():
    figure = attack_curve.__wrapped__(PAIRS, [("loss", 0.2, 0.1, 0.35)])
    assert [axis.get_xscale() for axis in figure.axes] == ["linear", "log"]
    for axis in figure.axes:
        rates, power = axis.get_lines()[0].get_data()
        assert rates.min() <= 1e-5 and rates.max() == 1
        np.testing.assert_allclose(power, power_limit(PAIRS, rates))
        guessing = axis.get_lines()[1]
        np.testing.assert_array_equal(*guessing.get_data())
        (tried,) = axis.containers
        point, _, (bar,) = tried.lines
        assert (*point.get_xdata(), *point.get_ydata(), tried.get_label()) == (0.01, 0.2, "loss")
        np.testing.assert_allclose(bar.get_segments()[0][:, 1], [0.1, 0.35])


def test_the_profile_is_in_order_of_delta():
    figure = profile.__wrapped__([{"delta": 1e-5, "epsilon": 3.0}, {"delta": 1e-7, "epsilon": 5.0}])
    (line,) = figure.axes[0].get_lines()
    assert line.get_xdata().tolist() == [1e-7, 1e-5] and line.get_ydata().tolist() == [5.0, 3.0]


def test_a_share_above_chance_is_an_alarm():
    """Only where the whole interval lies above: by hand, 0.52 to 0.6 and 0.45 to 0.6, where chance has 0.5."""
    figure = shares.__wrapped__([("copies", 0.56, 0.52, 0.6, 0.5), ("none", 0.52, 0.45, 0.6, 0.5)])
    axis = figure.axes[0]
    bars = {tuple(line.get_xdata()): line.get_color() for line in axis.get_lines() if len(line.get_xdata()) == 2}
    assert bars[0.52, 0.6] == ALARM and bars[0.45, 0.6] == ACCENT
    assert [text.get_text() for text in axis.get_yticklabels()] == ["none", "copies"]


def test_accuracies_stand_beside_the_names_of_their_kind_and_class():
    classes = ClassAccuracy(0, 0.9, 0.8, 0.95, 10), ClassAccuracy(1, 0.6, 0.4, 0.7, 12)
    result = UtilityResult("residual", (0.7, 0.8), 0.75, 0.05, 0.6, 0.85, classes, 22)
    whole, each = accuracies.__wrapped__([result], ["cat", "dog"]).axes
    assert [text.get_text() for text in whole.get_yticklabels()] == [result.architecture]
    assert [list(line.get_xdata()) for line in whole.get_lines()] == [[0.6, 0.85], [0.7, 0.8], [0.75]]
    (drawn,) = each.containers
    assert list(drawn.lines[0].get_ydata()) == [0.9, 0.6]
