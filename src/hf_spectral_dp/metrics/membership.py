"""Membership inference: can somebody who has the model tell the images it was trained on from others?

The attacks are those that work on autoregressive image models (Kowalczuk et al., arXiv:2502.02514): what the model
knows about a row beyond what is likely anyway, that is the log-probability of its tokens given its own label minus
that without a label, and the likelihood of its least likely tokens (min-k %, Shi et al., arXiv:2310.16789).

Such figures are evidence of leakage, never a proof of privacy: a better attack may exist. They are computed from
private rows and are not covered by the guarantee, so think before publishing them. Measure the model beside a twin
trained without noise: an attack that fails on the twin says nothing about the model.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

_RESAMPLES = 1000


@torch.no_grad()
def token_log_probabilities(model: Any, rows: Tensor, conditional: bool = True, batch_size: int = 256) -> Tensor:
    """Log-probability (N, T), in nats, of each token of rows (N, 1 + T) given those before it.

    Args:
        model: a causal language model whose logits (B, t, V) predict the next token. It is run in eval mode.
        conditional: keep the start tokens of the rows, which name their classes; False puts `config.null_token_id`
            there.
    """
    device, training = next(model.parameters()).device, model.training
    model.eval()
    found = []
    for some in rows.split(batch_size):
        some = some.to(device)
        targets = some[:, 1:]
        inputs = some[:, :-1].clone()
        if not conditional:
            inputs[:, 0] = model.config.null_token_id
        logits = model(input_ids=inputs, use_cache=False).logits.float()
        chosen = logits.gather(2, targets[..., None])[..., 0]
        found.append((chosen - logits.logsumexp(2)).cpu())
    model.train(training)
    return torch.cat(found)


def membership_scores(conditional: Tensor, unconditional: Tensor | None = None, k: float = 0.2) -> dict[str, Tensor]:
    """Scores (N,) of several attacks from per-token log-probabilities (N, T); larger for likely members.

    Args:
        conditional: given the row's own label; unconditional: without, for the attacks on their difference.
        k: the share of least likely tokens that min-k looks at, in (0, 1].

    Raises:
        ValueError: shapes that differ, or k out of range.
    """
    if not 0 < k <= 1:
        raise ValueError(f"k={k} is a share of the tokens: in (0, 1].")
    if unconditional is not None and unconditional.shape != conditional.shape:
        raise ValueError(
            f"conditional {tuple(conditional.shape)} and unconditional {tuple(unconditional.shape)} must be log-"
            "probabilities of the same tokens."
        )
    least = max(1, round(k * conditional.shape[1]))

    def lowest(values: Tensor) -> Tensor:
        return values.topk(least, dim=1, largest=False).values.mean(1)

    scores = {"likelihood": conditional.mean(1), f"min-{100 * k:g} %": lowest(conditional)}
    if unconditional is not None:
        gain = conditional - unconditional
        scores |= {"likelihood gained by the label": gain.mean(1), f"min-{100 * k:g} % of the gain": lowest(gain)}
    return scores


@dataclass(frozen=True)
class MembershipResult:
    """How well one attack tells members from others.

    Attributes:
        attack: its name.
        auroc: probability that a member scores higher than another row; 0.5 is guessing. low, high: its interval.
        tpr: share of members found at a false positive rate of at most 1 %; tpr_low, tpr_high: its interval.
        confidence: of each interval, if the rows are independent draws and the attack was not chosen by its result.
        members, others: numbers of rows.
    """

    attack: str
    auroc: float
    low: float
    high: float
    tpr: float
    tpr_low: float
    tpr_high: float
    confidence: float
    members: int
    others: int

    @property
    def caught(self) -> bool:
        """Does the attack work beyond chance: does the interval of the AUROC lie above one half?"""
        return self.low > 0.5


def attack_result(attack: str, members: Tensor, others: Tensor, confidence: float = 0.95) -> MembershipResult:
    """AUROC and TPR at 1 % FPR of scores of members (N,) and of rows that were held out (M,).

    The interval of the AUROC is DeLong's (Biometrics 1988) on the logit scale; where the AUROC is 0 or 1 and that has
    no width, the exact one for one pair per row. That of the TPR is a bootstrap over both groups, percentiles of
    1,000.

    Raises:
        ValueError: fewer than 100 others (a false positive rate of 1 % would mean nothing), fewer than 2 members, NaN.
    """
    inside, outside = members.double().numpy(), others.double().numpy()
    if len(outside) < 100 or len(inside) < 2:
        raise ValueError(f"{len(inside)} members and {len(outside)} others: give at least 2 and 100.")
    if np.isnan(inside).any() or np.isnan(outside).any():
        raise ValueError(f"a score of attack {attack!r} is NaN.")
    failure = 1 - confidence
    auroc, deviation = _delong(inside, outside)
    if deviation > 0:
        width = stats.norm.isf(failure / 2) * deviation / (auroc * (1 - auroc))
        low, high = (1 / (1 + np.exp(-(np.log(auroc / (1 - auroc)) + sign * width))) for sign in (-1, 1))
    else:
        pairs = min(len(inside), len(outside))
        certain = (failure / 2) ** (1 / pairs)
        low, high = {0.0: (0.0, 1 - certain), 1.0: (certain, 1.0)}.get(auroc, (auroc, auroc))
    random = np.random.default_rng(0)
    rates = [_tpr(random.choice(inside, len(inside)), random.choice(outside, len(outside))) for _ in range(_RESAMPLES)]
    tpr_low, tpr_high = np.quantile(rates, [failure / 2, 1 - failure / 2])
    names = ("auroc", "low", "high", "tpr", "tpr_low", "tpr_high")
    figures = (auroc, low, high, _tpr(inside, outside), tpr_low, tpr_high)
    rounded: dict[str, Any] = {name: round(float(value), 4) for name, value in zip(names, figures, strict=True)}
    return MembershipResult(attack=attack, confidence=confidence, members=len(inside), others=len(outside), **rounded)


def _delong(inside: np.ndarray, outside: np.ndarray) -> tuple[float, float]:
    """AUROC, ties counting half, and its standard deviation."""
    both = stats.rankdata(np.concatenate([inside, outside]))
    n, m = len(inside), len(outside)
    above = (both[:n] - stats.rankdata(inside)) / m  # for each member the share of others below it
    below = 1 - (both[n:] - stats.rankdata(outside)) / n
    return float(above.mean()), float(np.sqrt(above.var(ddof=1) / n + below.var(ddof=1) / m))


def _tpr(inside: np.ndarray, outside: np.ndarray) -> float:
    """Share of `inside` above the threshold that at most 1 % of `outside` exceed."""
    allowed = int(0.01 * len(outside))
    threshold = np.partition(outside, len(outside) - 1 - allowed)[len(outside) - 1 - allowed]
    return float((inside > threshold).mean())


def auroc_limit(epsilon: float, delta: float) -> float:
    """The AUROC that (epsilon, delta)-DP leaves to attacks on the membership of one row: e^eps / (1 + e^eps) + delta.

    The area under the largest curve with TPR <= e^eps FPR + delta and 1 - FPR <= e^eps (1 - TPR) + delta, rounded up.
    The rates are those over many runs; that of the rows of one run scatters around them.
    """
    return min(1.0, 1 / (1 + math.exp(-epsilon)) + delta)


def power_limit(pairs: Sequence[tuple[float, float]], rates: np.ndarray) -> np.ndarray:
    """The largest true positive rate of any attack on one row, at each false positive rate (n,) in [0, 1].

    A mechanism that is (epsilon, delta)-DP allows no test with more than e^eps FPR + delta, nor one with more than
    1 - e^-eps (1 - delta - FPR), which is the same for the opposite test (Kairouz et al., arXiv:1311.0776, Theorem
    2.1). It holds for every pair that the mechanism satisfies, so the smallest bound counts.
    """
    epsilons, deltas = np.array(pairs, dtype=float).T[:, :, None]
    direct = np.exp(epsilons) * rates + deltas
    opposite = 1 - np.exp(-epsilons) * (1 - deltas - rates)
    return np.minimum(np.minimum(direct, opposite).min(0), 1)


def auroc_limit_of(pairs: Sequence[tuple[float, float]]) -> float:
    """As `auroc_limit`, for a mechanism that satisfies several pairs: the area below `power_limit`, from above."""
    edges = np.linspace(0, 1, 4001)
    return float(power_limit(pairs, edges[1:]).mean())  # the limit grows: its right end is the most of every step


def membership_inference(
    model: Any, members: Tensor, others: Tensor, confidence: float = 0.95
) -> list[MembershipResult]:
    """All attacks on one model, for rows (N, 1 + T) it was trained on and rows (M, 1 + T) of the same kind it was not.

    The attacks that need a label are left out where `config.num_classes` is 0.

    Raises:
        ValueError: too few rows, see `attack_result`.
    """
    scores: list[Mapping[str, Tensor]] = []
    for rows in (members, others):
        with_label = token_log_probabilities(model, rows)
        labelled = getattr(model.config, "num_classes", 0) > 0
        scores.append(membership_scores(with_label, token_log_probabilities(model, rows, False) if labelled else None))
    return [attack_result(name, scores[0][name], scores[1][name], confidence) for name in scores[0]]


__all__ = [
    "MembershipResult",
    "attack_result",
    "auroc_limit",
    "auroc_limit_of",
    "membership_inference",
    "membership_scores",
    "power_limit",
    "token_log_probabilities",
]
