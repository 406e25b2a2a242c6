"""The figures of the quality benchmark: what images are worth for a task, and how far they are from real ones."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.judge import FaceFeatures, judged
from benchmarks.quality_classifiers import LARGE, large_utility
from benchmarks.quality_data import ImageSet, Labelled
from hf_spectral_dp.metrics.distances import frechet_distance
from hf_spectral_dp.metrics.evaluation import evaluate_images
from hf_spectral_dp.metrics.features import FeatureExtractor
from hf_spectral_dp.metrics.utility import UtilityResult, classifier_utility
from hf_spectral_dp.privacy.audit import rate_bounds


def figures(
    images: Labelled,
    test: Labelled,
    kind: ImageSet,
    classifier_steps: int,
    architectures: tuple[str, ...],
    seeds: int,
    block: int,
    compared: int,
    device: str = "cpu",
    judges: Sequence[tuple[FeatureExtractor, Tensor]] = (),
    large_steps: int = 0,
) -> Iterator[dict[str, Any]]:
    """Rows {"metric", "value", "low", "high", "n"} for images with labels, against real test images.

    Accuracy is that of classifiers trained on the images and tested on the real ones: per architecture, and their mean
    with the spread over architectures and seeds. Intervals are of 95 % for other test images. Distances compare equal
    numbers of images, at most `compared`. Classifiers see averages over blocks of side `block`, and are trained on
    `device`; `classifier_steps` 0 leaves them out; where images have colours, `large_steps` above 0 takes those of
    `quality_classifiers` for so many. `judges`: whose kernel distances are wanted as well, each with what it has `seen`
    of the test images.
    """
    if classifier_steps:
        smaller = [F.avg_pool2d(_bare(some, kind), block).to(device) for some in (images[0], test[0])]
        labels = [some.to(device) for some in (images[1], test[1])]
        given = (smaller[0], labels[0], smaller[1], labels[1])
        if large_steps and kind.channels == 3:
            results = large_utility(*given, architectures=tuple(LARGE), seeds=seeds, steps=large_steps)
        else:
            results = classifier_utility(*given, architectures=architectures, seeds=seeds, steps=classifier_steps)
        yield from _accuracies(results, len(test[0]))
    drawn, real = images[0], test[0]
    count = min(len(drawn), len(real), compared)
    order = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(0))[:count]
    for row in evaluate_images(real[:count].clamp(-1, 1), drawn[order].clamp(-1, 1), resamples=100):
        note = {"note": row["note"]} if row["note"] else {}
        figures_ = (row["value"], row["low"], row["high"], row["n"])
        yield _row(row["metric"], *figures_) | {"floor": row["floor"], "extractor": row["extractor"]} | note
    yield from coarse_distance(real[:count], drawn[order])
    for extractor, known in judges:
        found = judged(extractor, known[:count], drawn[order].clamp(-1, 1))
        row = _row(f"kernel_distance, {extractor.name}", found["value"], found["low"], found["high"], found["n"])
        yield row | {"extractor": found["extractor"]}
        if isinstance(extractor, FaceFeatures):
            faces = extractor.found(drawn[order].clamp(-1, 1))
            yield _row("faces found", faces / count, *rate_bounds(faces, count, 0.025), count)


def coarse_distance(real: Tensor, drawn: Tensor) -> Iterator[dict[str, Any]]:
    """The Frechet distance of the pixels themselves, averaged to 8 x 8: what private training made, whatever detail
    super-resolution put on it. No row where there are no more images than pixels."""
    first, second = (F.avg_pool2d(some, some.shape[-1] // 8).flatten(1) for some in (real, drawn))
    if min(len(first), len(second)) > first.shape[1]:
        yield _row("frechet_distance at 8 pixels", frechet_distance(first, second), None, None, len(second))


def _accuracies(results: list[UtilityResult], n: int) -> Iterator[dict[str, Any]]:
    for found in results:
        yield _row(f"accuracy, {found.architecture}", found.accuracy, found.low, found.high, found.n)
    accuracies = [accuracy for found in results for accuracy in found.accuracies]
    mean = fmean(accuracies)
    low, high = rate_bounds(mean * n, n, 0.025)
    yield _row("accuracy", mean, low, high, n) | {"spread": stdev(accuracies)}


def _row(metric: str, value: float | None, low: float | None, high: float | None, n: int) -> dict[str, Any]:
    return {"metric": metric, "value": value, "low": low, "high": high, "n": n}


def _bare(images: Tensor, kind: ImageSet) -> Tensor:
    """Without the border that was added to reach a power of two."""
    border = kind.pad
    return images[:, :, border : images.shape[2] - border, border : images.shape[3] - border]


def save_grid(images: Tensor, kind: ImageSet, path: Path, count: int = 60) -> None:
    """The first `count` images, not picked, ten to a row, as PNG."""
    bare = _bare(images[:count], kind)
    pixels = ((bare + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    side, rows = pixels.shape[1], math.ceil(len(pixels) / 10)
    grid = Image.new("L" if kind.channels == 1 else "RGB", (10 * side, rows * side))
    for index, image in enumerate(pixels):
        grid.paste(Image.fromarray(image.squeeze()), (index % 10 * side, index // 10 * side))
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)
