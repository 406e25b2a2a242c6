"""Audits: attacks on our own code that would show a false claim.

An audit reports a lower bound on what the code under attack leaks, at a confidence. A bound above the claim refutes the
claim. A bound below it proves nothing: the attack may be weak. So every audit has a positive control, a broken or
non-private twin that it must catch, and the bound is never to be quoted as a guarantee.
"""

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from .budget import gaussian_epsilon
from .clipping import PerExampleClipper
from .mechanism import NoisyClippedMean


def rate_bounds(successes: float, trials: float, failure: float) -> tuple[float, float]:
    """Lower and upper bound on a success probability, each wrong with probability at most `failure`.

    Clopper and Pearson (Biometrika 1934): exact for independent trials with one success probability.
    """
    low = float(stats.beta.ppf(failure, successes, trials - successes + 1)) if successes else 0.0
    high = float(stats.beta.ppf(1 - failure, successes + 1, trials - successes)) if successes < trials else 1.0
    return low, high


def gaussian_dp_lower_bound(
    inside: np.ndarray, outside: np.ndarray, thresholds: Sequence[float], failure: float
) -> float:
    """Lower bound on mu from scores of releases with the canary (`inside`) and without it (`outside`).

    If a mechanism is mu-GDP, every test of "with" against "without" has Phi^-1(true positive rate) - Phi^-1(false
    positive rate) <= mu (Dong, Roth and Su, arXiv:1905.02383, Section 2.2). The tests are score > t and score < t for
    each t, both rates are bounded by `rate_bounds`, and the best test counts. NaN is the largest score.

    What it means: if all scores of a side are independent and of one law, and the thresholds were fixed before, the
    probability that mu is below the result is at most `failure` (a union bound over all tests and rates).
    """
    inside, outside = (np.nan_to_num(side, nan=np.inf, posinf=np.inf, neginf=-np.inf) for side in (inside, outside))
    share, best = failure / (4 * len(thresholds)), 0.0
    for threshold in thresholds:
        for positives, alarms in (
            ((inside > threshold).sum(), (outside > threshold).sum()),
            ((inside < threshold).sum(), (outside < threshold).sum()),
        ):
            sensitivity, _ = rate_bounds(int(positives), len(inside), share)
            _, false_alarms = rate_bounds(int(alarms), len(outside), share)
            if sensitivity > 0 and false_alarms < 1:
                best = max(best, float(stats.norm.ppf(sensitivity) - stats.norm.ppf(false_alarms)))
    return best


def epsilon_of_mu(mu: float, delta: float) -> float:
    """Epsilon at delta of a mu-GDP mechanism; 0 for mu = 0."""
    return gaussian_epsilon(1 / mu, delta) if mu > 0 else 0.0


# -- one run -----------------------------------------------------------------------------------------------------------


def one_run_p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """How likely an (epsilon, delta)-DP mechanism lets an adversary guess that well, at most.

    Steinke, Nasr and Jagielski (arXiv:2305.08846), Theorem 5.2 in the form of their Appendix D: each of `canaries`
    examples was put in by a fair coin of its own, the adversary saw what one run released, guessed the coin of
    `guesses` of them and was right for `correct`.

    Raises:
        ValueError: numbers that are not in this order.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"correct={correct}, guesses={guesses}, canaries={canaries} must be in this order from 0.")
    chance = 1 / (1 + math.exp(-epsilon))
    tail = float(stats.binom.sf(correct - 1, guesses, chance))
    # The delta term: the largest mean, over i, of the i probabilities below `correct`.
    below = np.cumsum(stats.binom.pmf(np.arange(correct - 1, -1, -1), guesses, chance))
    largest = float((below / np.arange(1, correct + 1)).max()) if correct else 0.0
    return min(1.0, tail + 2 * canaries * delta * largest)


def one_run_lower_bound(scores: np.ndarray, included: np.ndarray, delta: float, confidence: float = 0.95) -> float:
    """Lower bound on epsilon from one run of a mechanism, by Steinke, Nasr and Jagielski (arXiv:2305.08846).

    Args:
        scores: (m,), one per canary, computed from what the run released and public values: larger where the canary
            seems to have been in.
        included: (m,) bool: where it was in, by independent fair coins that nothing else saw.
        delta: of the claim.
        confidence: of the result.

    What it means: if the run is (epsilon, delta)-DP under adding or removing one canary, and the coins were fair and
    independent, the result is at most epsilon with probability `confidence`. The adversary guesses the top and the
    bottom scores, abstains between, and tries four numbers of guesses fixed beforehand (a union bound pays for them).
    Nothing is assumed about the scores, nor about how the canaries share the noise.

    Raises:
        ValueError: not one score per canary.
    """
    scores, included = np.asarray(scores, float), np.asarray(included, bool)
    if scores.shape != included.shape or scores.ndim != 1 or not len(scores):
        raise ValueError(f"scores {scores.shape} and included {included.shape} must be one number per canary.")
    order, count, best = np.argsort(np.nan_to_num(scores, nan=np.inf)), len(scores), 0.0
    sides = sorted({max(1, count // divisor) for divisor in (2, 4, 10, 20)})
    for side in sides:
        guesses = min(2 * side, count)
        low, high = order[: guesses - side], order[count - side :]
        correct = int(included[high].sum() + (~included[low]).sum())

        def refuted(epsilon: float, guesses: int = guesses, correct: int = correct) -> bool:
            return one_run_p_value(count, guesses, correct, epsilon, delta) <= (1 - confidence) / len(sides)

        if not refuted(0.0):
            continue
        below, above = 0.0, 1.0
        while refuted(above):
            below, above = above, 2 * above
        for _ in range(30):
            middle = (below + above) / 2
            below, above = (middle, above) if refuted(middle) else (below, middle)
        best = max(best, below)
    return best


# -- what an audit says ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One thing that was tried.

    Attributes:
        check: what was tried.
        value: what was measured; low, high: where it may lie if the claim is true.
        refuted: it lies elsewhere.
    """

    check: str
    value: float
    low: float
    high: float

    @property
    def refuted(self) -> bool:
        return not self.low <= self.value <= self.high  # NaN is refuted, too


# -- the mechanism -----------------------------------------------------------------------------------------------------

_CLIPPING_NORM = 0.7  # anything but 1, which would hide a factor that is missing
_SIZES = (1.0, 10.0, 1e3, -10.0, float("inf"))  # of the canaries' gradients, in clipping norms
_PLAIN, _OPPOSED, _INFINITE = 0, 3, 4  # indices of some of them


class _Probe(nn.Module):
    """Layers of every kind that the clipper knows; the gradient of canary k lies in coordinates of its own.

    A row is (k, pattern, size): the pattern says which layers see the canary (the last: all of them). The loss is
    linear in the parameters, so what a canary adds to the clipped sum is known: its direction times the clipping norm.
    """

    patterns: Tensor
    sizes: Tensor
    signs: Tensor
    layers = ("table", "tied", "wide", "narrow", "norm")
    width = 4

    def __init__(self, canaries: int):
        super().__init__()
        self.canaries = canaries
        self.table = nn.Embedding(canaries, self.width)
        self.tied = nn.Embedding(canaries, self.width)
        self.head = nn.Linear(self.width, canaries, bias=False)
        self.head.weight = self.tied.weight
        self.wide = nn.Linear(canaries, self.width, bias=False)  # at two positions: norms through inner products
        self.narrow = nn.Linear(canaries, 1, bias=False)  # its gradients are made one by one
        self.norm = nn.LayerNorm(canaries)
        patterns = torch.cat([torch.eye(len(self.layers)), torch.full((1, len(self.layers)), len(self.layers) ** -0.5)])
        self.register_buffer("patterns", patterns)
        self.register_buffer("sizes", _CLIPPING_NORM * torch.tensor(_SIZES))
        self.register_buffer("signs", torch.tensor([1.0, -1.0]).repeat(canaries)[:canaries])

    def losses(self, rows: Tensor) -> Tensor:
        k, pattern, size = rows.unbind(1)
        one_hot = nn.functional.one_hot(k, self.canaries).to(self.signs.dtype)
        even = one_hot.new_full((len(k), 1, self.width), self.width**-0.5)
        parts = [
            (self.table(k) * even[:, 0]).sum(1),
            ((self.tied(k) * even[:, 0]).sum(1) + self.head(even)[:, 0].gather(1, k[:, None])[:, 0]) / 2,
            (self.wide(one_hot[:, None].repeat(1, 2, 1) / 2) * even).sum((1, 2)),
            self.narrow(one_hot)[:, 0],
            (self.norm(self.signs.expand(len(k), -1)) * one_hot).sum(1) / 2**0.5,
        ]
        return self.sizes[size] * (self.patterns[pattern] * torch.stack(parts, 1)).sum(1)

    def own(self, release: dict[str, Tensor]) -> dict[str, Tensor]:
        """A release or a gradient by parameter, (canaries, its coordinates per canary)."""
        names = {"tied.weight": "head.weight"} if "head.weight" in release else {}
        found = {name: release[names.get(name, name)] for name in self.shares}
        found["wide.weight"] = found["wide.weight"].T
        found["narrow.weight"] = found["narrow.weight"].T
        return {name: value.reshape(self.canaries, -1).double().cpu() for name, value in found.items()}

    @property
    def shares(self) -> dict[str, tuple[int, float]]:
        """For each parameter the layer it belongs to, and each of its entries in the layer's unit direction."""
        entry = self.width**-0.5
        scales = {"table.weight": (0, entry), "tied.weight": (1, entry), "wide.weight": (2, entry)}
        return {**scales, "narrow.weight": (3, 1.0), "norm.weight": (4, 0.5**0.5), "norm.bias": (4, 0.5**0.5)}

    def directions(self, pattern: Tensor) -> dict[str, Tensor]:
        """The unit direction of each canary (canaries,) with that pattern, as `own` arranges it."""
        found = {}
        for name, (layer, entry) in self.shares.items():
            entries = self.width if layer < 3 else 1
            sign = self.signs.double().cpu()[:, None] if name == "norm.weight" else 1.0
            weights = self.patterns.double().cpu()[pattern, layer]
            found[name] = (weights * entry)[:, None].expand(-1, entries) * sign
        return found


@dataclass(frozen=True)
class MechanismAudit:
    """The result of `mechanism_audit`.

    Attributes:
        claimed_mu: 1 over the claimed noise multiplier: the claim, as Gaussian DP of one release.
        mu_lower_bound: of the strongest attack; epsilon_lower_bound: the same at delta.
        findings: everything that was tried, the strongest attacks on mu and the law of the noise.
        trials: releases with and without each canary, per side; confidence: of all findings together.
    """

    claimed_mu: float
    mu_lower_bound: float
    epsilon_lower_bound: float
    claimed_epsilon: float
    delta: float
    trials: int
    confidence: float
    findings: list[Finding]

    @property
    def refuted(self) -> bool:
        return any(finding.refuted for finding in self.findings)


def mechanism_audit(
    noise_multiplier: float = 1.0,
    claimed_noise_multiplier: float | None = None,
    trials: int = 100_000,
    lone_trials: int = 200,
    confidence: float = 0.9999,
    delta: float = 1e-5,
    device: str = "cpu",
) -> MechanismAudit:
    """Attacks single releases of `NoisyClippedMean`, the code that trains, and says whether its claim survives.

    Every trial is a release by that code, with all of its steps. Most trials share releases: canaries whose gradients
    lie in coordinates of their own are put into one batch, each by a coin of its own, and each gives one score, so that
    10^5 trials per side take seconds. Further attacks, with one canary per release and `lone_trials` trials per side,
    try what a crowd would hide: the empty batch, an example that opposes another, the size of the batch, an example
    that is not finite, and an adversary who knows every seed. Last, what is left of the releases after the known sums
    were subtracted must be independent Gaussian noise of the claimed scale, for each parameter.

    Args:
        noise_multiplier: what the code is run with.
        claimed_noise_multiplier: what it is held against (default: the same). The positive control claims more.
        trials: per side, for the canaries in a crowd. 10^5 notice noise that is 5 % too small.
        confidence: a right mechanism passes all findings with at least this probability. Half of the rest goes to the
            bounds on mu, half of that to the canaries in a crowd; the other half to the noise and to what is added.

    What is bounded: mu of one release with a given batch under adding or removing one example, and its epsilon at
    delta. Assumptions: the trials of an attack are independent. Those of lone canaries are, unless releases share a
    hidden state; those in a crowd are if the mechanism is the one claimed. So a bound above the claim refutes the claim
    either way, but in a crowd it says how far off the code is only if its noise is independent. Sampling, composition,
    the ledger and several processes are not looked at.
    """
    claimed = noise_multiplier if claimed_noise_multiplier is None else claimed_noise_multiplier
    lab = _Laboratory(noise_multiplier, claimed, device)
    failure = 1 - confidence
    with _global_generators_kept():
        crowd, law = lab.crowd(trials, failure / 4, failure / 2)
        lone = lab.lone(lone_trials, failure / 4)
    findings = [Finding(name, round(mu, 4), 0.0, 1 / claimed) for name, mu in {**crowd, **lone}.items()]
    strongest = max([*crowd.values(), *lone.values()])
    return MechanismAudit(
        1 / claimed, strongest, epsilon_of_mu(strongest, delta), epsilon_of_mu(1 / claimed, delta), delta, trials,
        confidence, [*findings, *law],
    )  # fmt: skip


class _Laboratory:
    """Runs the mechanism on batches of canaries and scores what comes out, in units of the clipping norm."""

    divisor = 37.5  # no batch has this size

    def __init__(self, noise_multiplier: float, claimed: float, device: str):
        self._multiplier, self._claimed, self._device = noise_multiplier, claimed, device
        self._coins = np.random.default_rng()

    def _built(self, canaries: int, micro_batch_size: int) -> tuple[_Probe, Callable[[list], dict[str, Tensor]]]:
        """A probe, and the release of a batch (a list of rows) in units of the sensitivity."""
        probe = _Probe(canaries).to(self._device)
        clipper = PerExampleClipper(probe, _CLIPPING_NORM)
        mechanism = NoisyClippedMean(clipper, self._multiplier, self.divisor, micro_batch_size, device=self._device)

        def release(batch: list) -> dict[str, Tensor]:
            rows = torch.tensor(batch, device=self._device).reshape(-1, 3).long()
            released = mechanism.release(rows, probe.losses)
            return {name: x * (self.divisor / clipper.sensitivity) for name, x in probe.own(released).items()}

        return probe, release

    def crowd(self, trials: int, failure: float, law_failure: float) -> tuple[dict[str, float], list[Finding]]:
        """Canaries of all sizes and patterns in one batch, each there by a coin of its own."""
        count, scores, patterns, present, scales = 256, [], [], [], []
        probe, release = self._built(count, micro_batch_size=50)
        noise: dict[str, list[Tensor]] = {name: [] for name in probe.shares}
        inside = outside = 0
        every = len(probe.patterns)
        while min(inside, outside) < trials:
            coins = self._coins.random(count) < 0.5
            pattern = torch.from_numpy(self._coins.integers(every, size=count))
            sizes = self._coins.integers(_OPPOSED, size=count)  # the positive ones
            rows = np.stack([np.arange(count), pattern.numpy(), sizes], 1)[coins]
            found, directions = release(self._coins.permutation(rows).tolist()), probe.directions(pattern)
            scores.append(torch.cat([found[name] * directions[name] for name in found], 1).sum(1))
            patterns.append(pattern.numpy())
            present.append(coins)
            scales.append(sizes)
            for name, values in noise.items():
                values.append(found[name] - torch.from_numpy(coins)[:, None] * directions[name])
            inside, outside = inside + int(coins.sum()), outside + int((~coins).sum())
        score, which, there = torch.cat(scores).numpy(), np.concatenate(patterns), np.concatenate(present)
        shifts = [0.5 + self._claimed * units for units in (-2, 0, 2, 4)]
        bounds = {"canaries in a crowd": gaussian_dp_lower_bound(score[there], score[~there], shifts, failure / 2)}
        for index, layer in enumerate([*probe.layers]):
            these = which == index
            bounds[f"canaries in a crowd, {layer} layer only"] = gaussian_dp_lower_bound(
                score[there & these], score[~there & these], shifts, failure / 2 / len(probe.layers)
            )
        size = np.concatenate(scales)
        added = {f"the {layer} layer": which == index for index, layer in enumerate(probe.layers)}
        added |= {f"{_SIZES[index]:g} clipping norms": size == index for index in range(_OPPOSED)}
        share = law_failure / 2 / len(added)
        shares = [self._share(name, score[there & these], share) for name, these in added.items()]
        stacked = {name: torch.stack(values).flatten(1).numpy() for name, values in noise.items()}
        return bounds, [*shares, *self._law(stacked, law_failure / 2)]

    def _share(self, name: str, scores: np.ndarray, failure: float) -> Finding:
        """Does a canary add the clipping norm, no more and no less?"""
        width = stats.norm.isf(failure / 2) * self._claimed / math.sqrt(len(scores)) + 1e-4  # rounding
        return Finding(f"what a gradient adds, {name}", _rounded(scores.mean()), 1 - width, 1 + width)

    def _law(self, noise: dict[str, np.ndarray], failure: float) -> list[Finding]:
        """Is the noise (releases, entries) of each parameter independent and Gaussian, of the claimed scale?"""
        findings, names = [], list(noise)
        share = failure / (5 * len(names))
        for name, following in zip(names, [*names[1:], names[0]], strict=True):
            values = noise[name] / self._claimed
            size = values.size
            low, high = (math.sqrt(stats.chi2.ppf(p, size) / size) for p in (share / 2, 1 - share / 2))
            findings.append(Finding(f"noise of {name} over the claimed", _rounded(values.std()), low, high))
            drawn = np.sort(values.ravel()[:100_000])
            p_value = stats.kstest(drawn, "norm").pvalue if np.isfinite(drawn).all() else 0.0
            findings.append(Finding(f"p-value of Gaussian noise, {name}", float(p_value), share, 1.0))
            width = min(values.shape[1], noise[following].shape[1])
            pairs = {
                "the next release": (values[1:], values[:-1]),
                "the next entry": (values[:, 1:], values[:, :-1]),
                "the next parameter": (values[:, :width], noise[following][:, :width] / self._claimed),
            }
            limit = float(stats.norm.isf(share / 2))
            for what, (first, second) in pairs.items():
                z = float((first * second).sum() / math.sqrt(first.size))
                findings.append(Finding(f"noise of {name} against {what}", _rounded(z), -limit, limit))
        return findings

    def lone(self, trials: int, failure: float) -> dict[str, float]:
        """One canary per release, against an empty batch or one other example."""
        everywhere = len(_Probe.layers)  # the pattern that all layers see
        canary, other, broken = (0, everywhere, 2), (1, everywhere, 1), (0, everywhere, _INFINITE)
        against, same = (0, everywhere, _OPPOSED), (0, everywhere, _PLAIN)
        attacks: dict[str, tuple[list, list]] = {
            "a canary alone": ([], [canary]),
            "a canary beside another": ([other], [other, canary]),
            "a canary against its opposite": ([same], [same, against]),
            "an example that is not finite": ([other], [other, broken]),
        }
        shifts = [0.5 + self._claimed * units for units in (-2, 0, 2)]
        ratios = (0.25, 0.6, 0.85, 1.2, 1.6, 3.0)
        bounds, share = {}, failure / (2 * len(attacks) + 1)
        for name, (without, with_canary) in attacks.items():
            probe, release = self._built(64, micro_batch_size=1)
            direction = {key: value[0] for key, value in probe.directions(torch.full((64,), everywhere)).items()}
            sign = -1.0 if with_canary[-1] == against else 1.0

            def scored(batch: list, release=release, direction=direction, sign=sign) -> tuple[float, float]:
                found = release(batch)
                rest = torch.cat([value[2:].flatten() for value in found.values()])
                shift = sum(float(found[key][0] @ direction[key]) for key in found)
                return sign * shift, float(rest.square().mean().sqrt()) / self._claimed

            pairs = [(scored(without), scored(with_canary)) for _ in range(trials)]
            outside, inside = np.array(pairs).transpose(1, 2, 0)
            offset = -1.0 if with_canary[-1] == against else 0.0  # where the score lies without the canary
            moved = [threshold + offset for threshold in shifts]
            bounds[f"{name}: its direction"] = gaussian_dp_lower_bound(inside[0], outside[0], moved, share)
            bounds[f"{name}: the scale of the rest"] = gaussian_dp_lower_bound(inside[1], outside[1], ratios, share)
        bounds["an adversary who knows every seed"] = self._replayed(trials, canary, shifts, share)
        return bounds

    def _replayed(self, trials: int, canary: tuple[int, int, int], shifts: Sequence[float], failure: float) -> float:
        """The adversary runs the same code with the same seeds on what it knows, and subtracts."""
        scores: list[list[float]] = [[], []]
        for trial in range(trials):
            for side, batch in enumerate(([], [canary])):
                found = []
                for attempt in (batch, []):
                    random.seed(trial)
                    np.random.seed(trial)
                    torch.manual_seed(trial)
                    probe, release = self._built(2, micro_batch_size=1)
                    found.append(release(attempt))
                direction = probe.directions(torch.full((2,), canary[1]))
                moved = [((found[0][name] - found[1][name]) * direction[name])[0].sum() for name in direction]
                scores[side].append(float(torch.stack(moved).sum()))
        return gaussian_dp_lower_bound(np.array(scores[1]), np.array(scores[0]), shifts, failure)


@contextlib.contextmanager
def _global_generators_kept() -> Iterator[None]:
    """Puts the generators that the audit seeds back to where they were."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _rounded(value: float) -> float:
    return round(float(value), 5)


__all__ = [
    "Finding",
    "MechanismAudit",
    "epsilon_of_mu",
    "gaussian_dp_lower_bound",
    "mechanism_audit",
    "one_run_lower_bound",
    "one_run_p_value",
    "rate_bounds",
]
