"""Memorisation: are generated images copies of training images, and does the model continue training images by heart?

Everything here compares training images with held-out images of the same kind that the model has never seen. Whatever
is true of both is no sign of copying: a generated digit is close to many digits. If training had ignored which of the
two sets an image was in, each image would be equally likely to lie in either; the p-values are those of this
hypothesis, so they hold for any generator and any way to measure distance.

Such figures are evidence, never a guarantee: what finds nothing may be a weak attack, and distances in particular miss
leaks that membership inference finds (Yao et al., arXiv:2505.01524). The search for copies counts real images that are
copied, not copies, so many copies of one image are one fact to it; and it does not see copies that lost most of their
detail in the tokens (`python -m benchmarks.copies`). The figures are computed from private images and are not covered
by the privacy guarantee, so think before publishing them. Show them beside a model trained without noise.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from ..privacy.audit import rate_bounds
from .membership import MembershipResult, attack_result

EVIDENCE = (
    "Evidence, not a guarantee: what finds nothing may be a weak attack. The guarantee is epsilon, with its proof."
)
"""The sentence that stands beside every figure of this module."""

FLAG = 0.001
"""A panel flags what would come about by chance less often than this."""

_NEIGHBOURS = 50
_CLOSE = (0.1, 0.25, 0.5)  # of the mean distance to the nearest 50: the same image, one through a codec, much like one
_CHUNK = 2048  # reference images, or generated ones, that are compared at once


def pixel_features(images: Tensor, side: int = 16) -> Tensor:
    """Images (N, C, H, W) as vectors (N, C * side**2): averaged over areas, which small noise and shifts survive."""
    return F.adaptive_avg_pool2d(images.float(), min(side, *images.shape[-2:])).flatten(1)


@dataclass(frozen=True)
class Neighbours:
    """The nearest reference images of every generated image.

    Attributes:
        distance: (G,) to the nearest. mean_distance: (G,) over the 50 nearest (or as many as there are).
        index: (G,) number of the nearest: training images from 0, then the held-out ones.
        training, heldout: numbers of reference images.
    """

    distance: Tensor
    mean_distance: Tensor
    index: Tensor
    training: int
    heldout: int


def nearest_neighbours(generated: Tensor, training: Iterable[Tensor], heldout: Iterable[Tensor]) -> Neighbours:
    """Euclidean nearest neighbours among training and held-out images, which are read once, chunk by chunk.

    Args:
        generated: features (G, D). training, heldout: chunks of features (n, D) of the same kind; a list of one tensor
            will do, and a generator keeps the memory independent of the number of images.

    Raises:
        ValueError: features of another length, NaN or infinity; fewer than 50 training or held-out images.
    """
    if generated.ndim != 2 or not len(generated):
        raise ValueError(f"generated features have shape {tuple(generated.shape)}; expected (G, D) with G >= 1.")
    generated = _finite(generated, "generated").float()
    centre = generated.mean(0)
    queries = generated - centre  # small numbers: differences of large squares would lose digits
    best, where = generated.new_full((len(generated), 0), 0.0), torch.zeros(len(generated), 0, dtype=torch.long)
    counts: list[int] = []
    for kind, chunks in (("training", training), ("held-out", heldout)):
        first = sum(counts)
        seen = first
        for chunk in chunks:
            if chunk.ndim != 2 or chunk.shape[1] != generated.shape[1]:
                raise ValueError(
                    f"{kind} features have shape {tuple(chunk.shape)}, generated ones {tuple(generated.shape)}; compute"
                    " both by the same extractor from images of one size."
                )
            for references in _finite(chunk, kind).float().split(_CHUNK):
                best, where = _merged(queries, references - centre, seen, best, where)
                seen += len(references)
        counts.append(seen - first)
    if min(counts) < _NEIGHBOURS:
        raise ValueError(f"{counts[0]} training and {counts[1]} held-out images: give at least {_NEIGHBOURS} of each.")
    return Neighbours(best[:, 0], best.mean(1), where[:, 0], *counts)


def _merged(queries: Tensor, references: Tensor, first: int, best: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest so far, distances (G, k) ascending and numbers (G, k), joined with those among more references."""
    numbers = torch.arange(first, first + len(references))
    distances, indices = [], []
    for rows in torch.arange(len(queries)).split(_CHUNK):
        both = torch.cat([best[rows], torch.cdist(queries[rows], references)], 1)
        found = both.topk(min(_NEIGHBOURS, both.shape[1]), dim=1, largest=False)
        distances.append(found.values)
        names = torch.cat([where[rows], numbers.expand(len(rows), -1)], 1)
        indices.append(names.gather(1, found.indices))
    return torch.cat(distances), torch.cat(indices)


def _finite(features: Tensor, kind: str) -> Tensor:
    if not torch.isfinite(features).all():
        raise ValueError(f"{kind} features hold NaN or infinity; an image was broken or the extractor failed.")
    return features


@dataclass(frozen=True)
class CloseImages:
    """Generated images that are conspicuously close to a reference image, and which references these are.

    Attributes:
        threshold: close is a distance below this share of the mean distance to the 50 nearest reference images, which
            makes up for regions where all images are alike (Carlini et al., arXiv:2301.13188, Section 4.2).
        generated: such generated images.
        references: different reference images that they are close to; training: the training images among these.
        p: how often chance alone brings so many training images among them.
    """

    threshold: float
    generated: int
    references: int
    training: int
    p: float


@dataclass(frozen=True)
class CopyingResult:
    """Are generated images nearer to training images than to held-out ones of the same kind?

    Attributes:
        share: of the generated images whose nearest reference image is a training image; low, high: its interval.
        expected: the share if training had ignored which set an image was in: training / (training + heldout).
        share_p: how often chance alone brings a share this large.
        close: at three thresholds, the smallest first.
        confidence: of the interval. generated, training, heldout: numbers of images.
    """

    share: float
    low: float
    high: float
    expected: float
    share_p: float
    close: tuple[CloseImages, ...]
    confidence: float
    generated: int
    training: int
    heldout: int

    @property
    def flagged(self) -> bool:
        """Is there a sign of copying that chance would bring less than once in a thousand times?"""
        looks = [self.share_p, *(close.p for close in self.close)]
        return min(looks) < FLAG / len(looks)


def copying(neighbours: Neighbours, confidence: float = 0.95) -> CopyingResult:
    """Judges nearest neighbours.

    Both tests hold the reference images and their closeness fixed and ask how they fall into training and held-out
    images. Several generated images near one reference image are one fact, not several: the test of close images counts
    reference images (Fisher's exact test), the interval of the share takes as many draws as the reference images are
    worth (Kish's effective sample size), and its p-value takes the variance of drawing them without replacement.
    """
    training, generated = neighbours.training, len(neighbours.index)
    total = training + neighbours.heldout
    weights = torch.bincount(neighbours.index, minlength=total).double()
    inside = float(weights[:training].sum())
    squares = float(weights.square().sum())
    share, effective = inside / generated, generated**2 / squares
    low, high = rate_bounds(share * effective, effective, (1 - confidence) / 2)
    variance = training * neighbours.heldout / (total * (total - 1)) * (squares - generated**2 / total)
    excess = inside - generated * training / total
    share_p = float(stats.norm.sf(excess / math.sqrt(variance))) if variance > 0 else 1.0
    close = []
    for threshold in _CLOSE:
        found = neighbours.distance < threshold * neighbours.mean_distance
        references = neighbours.index[found].unique()
        copied = int((references < training).sum())
        p = float(stats.hypergeom.sf(copied - 1, total, training, len(references)))
        close.append(CloseImages(threshold, int(found.sum()), len(references), copied, p))
    return CopyingResult(
        share=round(share, 4),
        low=round(low, 4),
        high=round(high, 4),
        expected=round(training / total, 4),
        share_p=share_p,
        close=tuple(close),
        confidence=confidence,
        generated=generated,
        training=training,
        heldout=neighbours.heldout,
    )


@dataclass(frozen=True)
class ExtractionResult:
    """Can images be drawn out of the model by giving it their beginning?

    Attributes:
        prefix: tokens that were given; completed: tokens that the model had to guess, each time its likeliest one.
        exact_members, exact_others: images whose completion was right in every token, of how many (members, others).
        matched_members, matched_others: share of the completed tokens that were right.
        exact_p: how often chance alone brings so many exact completions among the members (Fisher's exact test).
        attack: the share of right tokens as an attack on membership.
    """

    prefix: int
    completed: int
    exact_members: int
    exact_others: int
    members: int
    others: int
    matched_members: float
    matched_others: float
    exact_p: float
    attack: MembershipResult

    @property
    def flagged(self) -> bool:
        """Are members completed better, beyond what chance brings once in a thousand times?"""
        return self.exact_p < FLAG / 2 or self.attack.low > 0.5


@torch.no_grad()
def completions(model: Any, rows: Tensor, prefix: int, batch_size: int = 256) -> Tensor:
    """Greedy completions (N, T - prefix) of rows (N, 1 + T), given the start token and `prefix` image tokens."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    length = rows.shape[1]
    done = [
        model.generate(some[:, : 1 + prefix].to(device), do_sample=False, max_length=length, use_cache=True).cpu()
        for some in rows.split(batch_size)
    ]
    model.train(training)
    return torch.cat(done)[:, 1 + prefix :]


def extraction(model: Any, members: Tensor, others: Tensor, prefix: int | None = None) -> ExtractionResult:
    """Gives the model the beginning of images and looks how many tokens of the rest it knows (arXiv:2012.07805).

    Args:
        model: a causal language model with `generate`.
        members: rows (N, 1 + T) it was trained on; others: rows (M, 1 + T) of the same kind that it was not.
        prefix: image tokens that are given, in [1, T); default a quarter of them, the coarse scales.

    Raises:
        ValueError: a prefix out of range, or too few rows (see `membership.attack_result`).
    """
    length = members.shape[1] - 1
    prefix = max(1, length // 4) if prefix is None else prefix
    if not 1 <= prefix < length:
        raise ValueError(f"prefix={prefix} must be in [1, {length}): the tokens of an image that are given.")
    right = [completions(model, rows, prefix) == rows[:, 1 + prefix :] for rows in (members, others)]
    exact = [int(some.all(1).sum()) for some in right]
    matched = [some.double().mean(1) for some in right]
    attack = attack_result("completion of a prefix", matched[0], matched[1], confidence=1 - FLAG)
    exact_p = float(stats.hypergeom.sf(exact[0] - 1, len(members) + len(others), len(members), sum(exact)))
    return ExtractionResult(
        prefix=prefix,
        completed=length - prefix,
        exact_members=exact[0],
        exact_others=exact[1],
        members=len(members),
        others=len(others),
        matched_members=round(float(matched[0].mean()), 4),
        matched_others=round(float(matched[1].mean()), 4),
        exact_p=exact_p,
        attack=attack,
    )


__all__ = [
    "EVIDENCE",
    "FLAG",
    "CopyingResult",
    "ExtractionResult",
    "Neighbours",
    "completions",
    "copying",
    "extraction",
    "nearest_neighbours",
    "pixel_features",
]
