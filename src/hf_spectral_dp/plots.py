"""The plots of the report, drawn by matplotlib and returned as SVG text that can stand inside a page."""

import functools
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .metrics.membership import power_limit
from .metrics.utility import UtilityResult

INK, ACCENT, QUIET, ALARM = "#1d2433", "#0f766e", "#94a3b8", "#b45309"
_SERIES = ("#0f766e", "#4f46e5", "#b45309")
_STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be selected, and takes the page's font
    "svg.hashsalt": "hf_spectral_dp",  # the same plot is the same file
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Segoe UI", "Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": "#e2e8f0",
    "legend.frameon": False,
}


Plot = Callable[..., Any]


def _svg_of(title: str) -> Callable[[Plot], Callable[..., str]]:
    """Turns a function that draws a figure into one that returns it as SVG, in our style."""

    def wrapped(draw: Plot) -> Callable[..., str]:
        @functools.wraps(draw)
        def svg(*args: Any) -> str:
            try:
                import matplotlib
            except ImportError as error:
                raise ImportError("the report draws with matplotlib; pip install 'hf-spectral-dp[report]'.") from error
            buffer = io.StringIO()
            with matplotlib.rc_context(_STYLE):
                metadata = {"Date": None, "Creator": None}
                draw(*args).savefig(buffer, format="svg", transparent=True, metadata=metadata)
            return _inline(buffer.getvalue(), title, draw.__name__)

        return svg

    return wrapped


def _drawing(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """A figure without a window, in inches, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def _inline(text: str, title: str, name: str) -> str:
    """One <svg> element without anything that a page around it could trip over; its ids begin with `name`."""
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([\w-]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r' xmlns(?::\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)  # the page decides; viewBox keeps the shape
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1).strip()


@_svg_of("Largest true positive rate of any attack by false positive rate")
def attack_curve(bounds: Sequence[tuple[float, float]], measured: Sequence[tuple[str, float, float, float]]) -> Any:
    """How many members any attack can find, by how many others it accuses: linear, and both axes logarithmic.

    Args:
        bounds: pairs (epsilon, delta) that the mechanism satisfies; see `metrics.membership.power_limit`.
        measured: attacks that were tried: name, true positive rate at a false positive rate of 1 %, its interval.
    """
    rates = np.concatenate([np.geomspace(1e-5, 0.02, 60), np.linspace(0.02, 1, 200)])
    power = power_limit(bounds, rates)
    figure, axes = _drawing(9.2, 3.9, 2)
    for index, axis in enumerate(axes):
        axis.fill_between(rates, power, 1, color="#f1f5f9", linewidth=0)
        axis.plot(rates, power, color=ACCENT, linewidth=2, label="the most that the claim allows")
        axis.plot(rates, rates, color=QUIET, linewidth=1, linestyle="--", label="guessing")
        for number, (name, rate, low, high) in enumerate(measured):
            error = [[max(rate - low, 0)], [max(high - rate, 0)]]
            color = _SERIES[1 + number % 2]
            axis.errorbar([0.01], [max(rate, 1e-5)], yerr=error, fmt="o", markersize=5, color=color, label=name)
        axis.set_xlabel("share of others accused")
        axis.set_ylabel("share of members found")
        axis.set_ylim(0 if index == 0 else 1e-4, 1)
        axis.set_xlim(0 if index == 0 else 1e-4, 1)
    axes[0].set_title("impossible above the line", loc="left", fontsize=10, color=QUIET)
    axes[1].set_xscale("log")
    axes[1].set_yscale("log")
    axes[1].set_title("the same, few accusations magnified", loc="left", fontsize=10, color=QUIET)
    axes[0].legend(loc="lower right", fontsize=9)
    return figure


@_svg_of("Epsilon at several deltas")
def profile(pairs: Sequence[Mapping[str, float]]) -> Any:
    """Epsilon by delta, as the card has it."""
    figure, axis = _drawing(4.4, 3.0)
    ordered = sorted(pairs, key=lambda pair: pair["delta"])
    axis.plot([p["delta"] for p in ordered], [p["epsilon"] for p in ordered], "o-", color=ACCENT, markersize=5)
    axis.set_xscale("log")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("δ")
    axis.set_ylabel("ε")
    return figure


@_svg_of("Accuracy of classifiers trained on generated images")
def accuracies(results: Sequence[UtilityResult], names: Sequence[str]) -> Any:
    """Accuracy of every kind of classifier: all trainings and the interval, then class by class."""
    figure, (whole, each) = _drawing(9.2, 3.6, 2)
    for index, result in enumerate(results):
        color, place = _SERIES[index % len(_SERIES)], len(results) - 1 - index
        whole.plot([result.low, result.high], [place, place], color=color, linewidth=6, alpha=0.25)
        whole.plot(result.accuracies, [place] * len(result.accuracies), "o", color=color, markersize=4, alpha=0.7)
        whole.plot([result.accuracy], [place], "|", color=color, markersize=16, markeredgewidth=2)
        shift = (index - (len(results) - 1) / 2) * 0.22
        places = [one.label + shift for one in result.per_class]
        errors = [
            [max(0.0, one.accuracy - one.low) for one in result.per_class],
            [max(0.0, one.high - one.accuracy) for one in result.per_class],
        ]
        each.errorbar(
            places, [one.accuracy for one in result.per_class], yerr=errors, fmt="o", markersize=4, linewidth=1,
            color=color, label=result.architecture,
        )  # fmt: skip
    whole.set_yticks(range(len(results)), [result.architecture for result in reversed(results)])
    whole.set_ylim(-0.6, len(results) - 0.4)
    whole.set_xlabel("accuracy on real test images")
    whole.grid(axis="y", visible=False)
    shown = range(len(names)) if len(names) <= 20 else range(0, len(names), len(names) // 10)
    each.set_xticks(list(shown), [names[index] for index in shown], rotation=0 if max(map(len, names)) < 4 else 60)
    each.set_xlabel("class")
    each.set_ylabel("accuracy")
    each.legend(loc="lower left", fontsize=9)
    return figure


@_svg_of("Share of generated images nearest to a training image")
def shares(rows: Sequence[tuple[str, float, float, float, float]]) -> Any:
    """Share of generated images whose nearest real image was trained on.

    Args:
        rows: name, share, its interval, and the share by chance.
    """
    figure, axis = _drawing(6.4, 0.9 + 0.5 * len(rows))
    for index, (_, share, low, high, expected) in enumerate(reversed(rows)):
        color = ALARM if low > expected else ACCENT
        axis.plot([low, high], [index, index], color=color, linewidth=6, alpha=0.3)
        axis.plot([share], [index], "o", color=color, markersize=6)
    axis.axvline(rows[0][4], color=QUIET, linestyle="--", linewidth=1.2)
    axis.set_yticks(range(len(rows)), [row[0] for row in reversed(rows)])
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.set_xlabel("share nearest to a training image (dashed: by chance)")
    axis.grid(axis="y", visible=False)
    return figure


__all__ = ["accuracies", "attack_curve", "profile", "shares"]
