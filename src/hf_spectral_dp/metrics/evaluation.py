"""Generated images against real ones: one function, one row per metric, with its interval and its floor.

The floor is what real images score in the place of the generated ones: no generator can be told to be better. Nothing
here is covered by a privacy guarantee: figures on private images are functions of these, so think before publishing.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..image_decoding import UndecodableImageError, decode_image, undecoded
from ..image_processing_spectral import SpectralImageProcessor
from .distances import (
    KernelMatrices,
    band_error,
    check_enough,
    frechet_distances,
    gaussian_kernel,
    mean_pair_distance,
    neighbourhoods,
    polynomial_kernel,
    style_distance,
)
from .features import FeatureExtractor, PublicFeatures
from .statistics import GROUPS, Batch, ImageStatistics, Sums, bootstrap_counts, collect, interval, jackknife

BETTER = {
    "frechet_distance": "lower",
    "kernel_distance": "lower",
    "cmmd": "lower",
    "precision": "higher",
    "density": "higher",
    "recall": "higher",
    "coverage": "higher",
    "style_distance": "lower",
    "wavelet_energy_error": "lower",
    "diversity": "floor",
    "text_agreement": "higher",
}
"""Every metric, and where a good generator lies: lower, higher, or as near to the floor as can be."""

Row = dict[str, Any]


def evaluate_images(
    real: Iterable[Batch] | Tensor,
    generated: Iterable[Batch] | Tensor,
    extractor: FeatureExtractor | None = None,
    *,
    resamples: int = 200,
    reservoir: int = 5_000,
    confidence: float = 0.95,
    neighbours: int = 5,
    seed: int = 0,
    progress: bool = False,
) -> list[Row]:
    """Compares a stream of generated images with a stream of real ones; memory does not depend on their numbers.

    Args:
        real, generated: batches (B, 1 or 3, H, W) in [-1, 1], or one tensor (N, ...); all images of one shape. A batch
            may be a tuple (images, captions): with an extractor that reads text, agreement is measured too.
            `read_images` makes such streams from rows of a data set.
        extractor: of the features; default `PublicFeatures()`, which needs no download. Style and diversity always use
            the latter, since they need its feature maps.
        resamples: of the bootstrap. reservoir: feature rows kept of either set for figures of pairs of images (kernel
            distances, precision to coverage); others use all images. neighbours: k of precision to coverage.
        confidence: of the intervals, for independent images. seed: of samples and resamples.

    Returns:
        One row per metric, plain values: {"metric", "value", "low", "high", "floor", "n", "n_real", "better",
        "extractor", "note"}. `floor` is the figure of real images in the place of the generated ones (two halves of
        the real set; distances that shrink with n are scaled to n). `better`: see `BETTER`. Where a figure cannot be
        had (too few images for a covariance), value, low, high and floor are None and `note` says why.

    Raises:
        ValueError: too few images, images of mixed shapes, NaN, values outside [-1, 1], real images that are all
            alike. TypeError: integer images.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1.")
    if resamples < 20 or reservoir < 50:
        raise ValueError(f"resamples={resamples}, reservoir={reservoir}: use at least 20 and 50.")
    perceptual = extractor if isinstance(extractor, PublicFeatures) else PublicFeatures()
    extractor = perceptual if extractor is None else extractor
    first = collect(real, extractor, perceptual, reservoir, seed, "real images", progress=progress)
    if float(first.rows.var(0).max()) == 0:
        raise ValueError("all real images are alike: no distance to them means anything; check the source.")
    second = collect(generated, extractor, perceptual, reservoir, seed + 1, "generated images", progress=progress)
    if first.shape != second.shape:
        raise ValueError(f"real images are {first.shape}, generated {second.shape}; resize all to one shape.")
    rows = [
        _frechet_row(first, second, confidence),
        *_pair_rows(first, second, resamples, neighbours, confidence, torch.Generator().manual_seed(seed)),
        *_mean_rows(first, second, confidence),
    ]
    label, perceptual_label = (f"{some.name}@{some.fingerprint[:12]}" for some in (extractor, perceptual))
    labels = {"style_distance": perceptual_label, "diversity": perceptual_label, "wavelet_energy_error": "haar"}
    return [row | {"extractor": labels.get(row["metric"], label), "note": row.get("note", "")} for row in rows]


def _row(
    metric: str, figures: tuple[float, float, float], floor: float | None, n: int, n_real: int, note: str = ""
) -> Row:
    value, low, high = (float(figure) for figure in figures)
    named = {"metric": metric, "value": value, "low": low, "high": high, "floor": floor, "n": n, "n_real": n_real}
    return named | {"better": BETTER[metric], "note": note}


def _null_scale(real: ImageStatistics, generated: ImageStatistics) -> float:
    """How much a squared distance of equal laws shrinks from the two halves of the real set to the sets themselves.

    For independent images its mean is proportional to 1/m + 1/n in leading order.
    """
    first, second = (half.count for half in real.halves())
    return (1 / real.count + 1 / generated.count) / (1 / first + 1 / second)


def _frechet_row(real: ImageStatistics, generated: ImageStatistics, confidence: float) -> Row:
    dim = real.rows.shape[1]
    smallest = min(real.without(0).count, generated.without(0).count)
    try:
        check_enough(smallest, dim)
    except ValueError as error:
        note = f"With a tenth left out for the interval: {error}"
        nothing = dict.fromkeys(("value", "low", "high", "floor"))
        return _row("frechet_distance", (0, 0, 0), None, generated.count, real.count, note) | nothing
    whole, other = real.all().moments, generated.all().moments
    # A bootstrap would repeat rows, which makes covariances look degenerate and pulls every resample up.
    value, *some = frechet_distances(whole, [other, *(generated.without(group).moments for group in range(GROUPS))])
    others = frechet_distances(other, [real.without(group).moments for group in range(GROUPS)])
    low, high = interval(value, [some, others], confidence)
    halves = [half.moments for half in real.halves()]
    floor, note = None, f"No floor: half of the real images are no more than {dim} features."
    if min(half.count for half in halves) > dim:
        floor, note = frechet_distances(halves[0], halves[1:])[0] * _null_scale(real, generated), ""
    return _row("frechet_distance", (value, max(0.0, low), high), floor, generated.count, real.count, note)


def _pair_rows(
    real: ImageStatistics,
    generated: ImageStatistics,
    resamples: int,
    neighbours: int,
    confidence: float,
    generator: torch.Generator,
) -> Iterator[Row]:
    """Rows of the metrics on pairs of images, from the samples of both sets, cut to the same number."""
    count = min(len(real.rows), len(generated.rows))
    first, second = real.rows[:count], generated.rows[:count]
    halves = real.rows[: len(real.rows) // 2], real.rows[len(real.rows) // 2 :]
    half = min(map(len, halves))
    draws = bootstrap_counts(resamples, count, generator), bootstrap_counts(resamples, count, generator)

    def ends(values: Tensor) -> tuple[float, float]:
        low, high = values.double().quantile(torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2]).double())
        return float(low), float(high)

    for metric, kernel in (("kernel_distance", polynomial_kernel), ("cmmd", gaussian_kernel)):
        matrices: KernelMatrices = kernel(first, second)
        figures = (matrices.distance(), *ends(matrices.resampled(*draws)))
        yield _row(metric, figures, kernel(halves[0][:half], halves[1][:half]).distance(), count, count)
    found = neighbourhoods(first, second, neighbours)
    floors = neighbourhoods(halves[0][:half], halves[1][:half], neighbours)
    for metric in ("precision", "density", "recall", "coverage"):
        each: Tensor = getattr(found, metric)
        figures = (float(each.mean()), *ends(draws[0] @ each / count))
        yield _row(metric, figures, float(getattr(floors, metric).mean()), count, count)


def _mean_rows(real: ImageStatistics, generated: ImageStatistics, confidence: float) -> Iterator[Row]:
    """Rows of the metrics on means over all images."""
    counts = generated.count, real.count
    scale = _null_scale(real, generated) ** 0.5  # these are distances, not squared ones

    def style(first: Sums, second: Sums) -> float:
        return style_distance(first.mean("gram"), second.mean("gram"), real.channels)

    def bands(first: Sums, second: Sums) -> float:
        return band_error(first.mean("bands"), second.mean("bands"))

    def diversity(_: Sums, second: Sums) -> float:
        return mean_pair_distance(second.mean("embedding"), float(second.mean("square")), second.count)

    def agreement(_: Sums, second: Sums) -> float:
        return float(second.mean("agreement"))

    for metric, figure in (("style_distance", style), ("wavelet_energy_error", bands)):
        value, low, high = jackknife(real, generated, figure, confidence)
        yield _row(metric, (value, max(0.0, low), high), figure(*real.halves()) * scale, *counts)
    whole = real.all()
    yield _row("diversity", jackknife(real, generated, diversity, confidence), diversity(whole, whole), *counts)
    if "agreement" in generated.sums:
        figures = jackknife(real, generated, agreement, confidence)
        floor = agreement(whole, whole) if "agreement" in real.sums else None
        yield _row("text_agreement", figures, floor, *counts, "" if floor else "No floor: no captions of real images.")


def read_images(
    rows: Iterable[Mapping[str, Any]],
    processor: SpectralImageProcessor,
    image_column: str = "image",
    caption_column: str | None = None,
    batch_size: int = 128,
) -> Iterator[Batch]:
    """Batches of images, with captions if their column is named, from rows as `image_sources.load_images` gives them.

    Images that cannot be read are left out, and a warning at the end says how many.
    """
    images: list[Any] = []
    captions: list[str] = []
    unreadable = 0

    def batch() -> Batch:
        pixels = processor(images)["pixel_values"]
        return (pixels, list(captions)) if caption_column is not None else pixels

    for row in undecoded(rows):
        try:
            images.append(decode_image(row[image_column]))
        except UndecodableImageError:
            unreadable += 1
            continue
        if caption_column is not None:
            captions.append(str(row[caption_column]))
        if len(images) == batch_size:
            yield batch()
            images.clear()
            captions.clear()
    if images:
        yield batch()
    if unreadable:
        warnings.warn(f"{unreadable} images could not be read and were left out of the evaluation.", stacklevel=2)


__all__ = ["BETTER", "Row", "evaluate_images", "read_images"]
