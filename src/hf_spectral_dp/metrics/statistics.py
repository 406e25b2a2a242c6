"""What is kept of a stream of images for its evaluation: sums and a sample, whose size does not depend on the stream.

Images are dealt at random into ten groups of equal size (up to one image), and every sum is kept per group. Leaving out
one group at a time gives intervals (the delete-a-group jackknife), and five groups against the other five are two sets
of real images, whose distance is the floor of a figure. A uniform sample of feature rows is kept for figures of pairs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from ..wavelets import dwt2
from .distances import Moments, gram_matrices, perceptual_embedding
from .features import FeatureExtractor, PublicFeatures, TextExtractor

GROUPS = 10
_SMALLEST = 2 * GROUPS
_SIDE = 4  # smallest band of a wavelet decomposition

Batch = Tensor | tuple[Tensor, Sequence[str]]
"""Images (B, C, H, W) in [-1, 1], or these with one caption each."""


@dataclass(frozen=True)
class Sums:
    """Sums over `count` images, float64: of features (D,), of their products (D, D) and of other vectors by name."""

    count: int
    sums: dict[str, Tensor]

    def mean(self, name: str) -> Tensor:
        return self.sums[name] / self.count

    @property
    def moments(self) -> Moments:
        """Mean and covariance of the features."""
        return Moments.of_sums(self.count, self.sums["features"], self.sums["products"])


@dataclass(frozen=True)
class ImageStatistics:
    """What is known of a set of images.

    Attributes:
        shape: (C, H, W) of every image.
        counts: images in each group (GROUPS,).
        sums: sums over each group, (GROUPS, ...) float64: "features" (D,), "products" (D, D) of features, "bands",
            "gram", "embedding" and, where captions came with the images, "agreement" (1,).
        rows: a uniform sample of feature rows (at most `reservoir`, D), float32, in random order.
        channels: C of each depth of the perceptual maps.
    """

    shape: tuple[int, int, int]
    counts: Tensor
    sums: dict[str, Tensor]
    rows: Tensor
    channels: list[int]

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    def all(self) -> Sums:
        return self.of(range(GROUPS))

    def of(self, groups: Iterable[int]) -> Sums:
        """Sums over some of the groups."""
        chosen = list(groups)
        return Sums(int(self.counts[chosen].sum()), {name: value[chosen].sum(0) for name, value in self.sums.items()})

    def without(self, group: int) -> Sums:
        return self.of(other for other in range(GROUPS) if other != group)

    def halves(self) -> tuple[Sums, Sums]:
        """Sums over the first and the other five groups."""
        return self.of(range(GROUPS // 2)), self.of(range(GROUPS // 2, GROUPS))


def collect(
    stream: Iterable[Batch] | Tensor,
    extractor: FeatureExtractor,
    perceptual: PublicFeatures,
    reservoir: int = 5_000,
    seed: int = 0,
    name: str = "images",
    batch_size: int = 128,
    progress: bool = False,
) -> ImageStatistics:
    """Reads a stream once.

    Args:
        stream: batches of any sizes, or one tensor (N, C, H, W).
        extractor: of the features; perceptual: of style and perceptual distances.
        reservoir: how many feature rows to keep; seed: of groups and sample; name: what errors call the stream.
        batch_size: images per forward pass.

    Raises:
        ValueError: fewer than 20 images, images of different shapes, not 1 or 3 channels, smaller than 8 pixels, NaN,
            or values outside [-1, 1].
        TypeError: integer images.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(GROUPS, dtype=torch.long)
    sums: dict[str, Tensor] = {}
    rows, keys = torch.zeros(0, extractor.dim), torch.zeros(0, dtype=torch.float64)
    shape: tuple[int, ...] | None = None
    channels: list[int] = []
    seen = 0
    with tqdm(desc=name, unit="image", disable=not progress) as bar:
        for images, captions in _batches(stream, batch_size):
            shape = _check(images, shape, seen, name)
            vectors, channels = _vectors(images, captions, extractor, perceptual, name)
            features = vectors["features"]
            if not torch.isfinite(features).all():
                raise ValueError(f"{name}: features of images {seen} to {seen + len(images) - 1} are not finite.")
            members = _deal(seen, len(images), generator)
            membership = torch.nn.functional.one_hot(members, GROUPS)
            counts += membership.sum(0)
            for key, value in vectors.items():
                # A batch is summed in its own precision, which is exact enough for a hundred terms, and then added up.
                added = (membership.T.to(value.dtype) @ value).double()
                sums[key] = sums[key] + added if key in sums else added
            if "products" not in sums:
                sums["products"] = torch.zeros(GROUPS, extractor.dim, extractor.dim, dtype=torch.float64)
            for group in members.unique().tolist():
                some = features[members == group]
                sums["products"][group].addmm_(some.T, some)
            rows, keys = _sample(rows, keys, features, reservoir, generator)
            seen += len(images)
            bar.update(len(images))
    if shape is None or seen < _SMALLEST:
        raise ValueError(f"{name}: {seen} images; at least {_SMALLEST} are needed for a figure with an interval.")
    order = keys.argsort()
    return ImageStatistics((shape[0], shape[1], shape[2]), counts, sums, rows[order], channels)


def _batches(stream: Iterable[Batch] | Tensor, size: int) -> Iterator[tuple[Tensor, Sequence[str] | None]]:
    for batch in [stream] if isinstance(stream, Tensor) else stream:
        images, captions = batch if isinstance(batch, tuple) else (batch, None)
        if captions is not None and len(captions) != len(images):
            raise ValueError(f"{len(captions)} captions for {len(images)} images: give one for each.")
        for start in range(0, len(images), size):
            yield images[start : start + size], captions[start : start + size] if captions is not None else None


def _check(images: Tensor, shape: tuple[int, ...] | None, seen: int, name: str) -> tuple[int, ...]:
    """The shape of all images, if these have it and are what they should be."""
    where = f"{name} {seen} to {seen + len(images) - 1}"
    if images.ndim != 4 or images.shape[1] not in (1, 3) or min(images.shape[2:]) < 2 * _SIDE:
        raise ValueError(
            f"{where}: shape {tuple(images.shape)}; expected (B, 1 or 3, H, W) with sides of at least {2 * _SIDE}."
        )
    if not images.is_floating_point():
        raise TypeError(f"{where}: {images.dtype}; expected floats in [-1, 1]: images.float() / 127.5 - 1 for uint8.")
    if shape is not None and tuple(images.shape[1:]) != shape:
        raise ValueError(f"{where} are {tuple(images.shape[1:])}, those before {shape}; resize all to one shape.")
    if not torch.isfinite(images).all():
        raise ValueError(f"{where}: NaN or infinity in the pixels; leave those images out.")
    low, high = float(images.min()), float(images.max())
    if low < -1.001 or high > 1.001:
        raise ValueError(f"{where}: values from {low:.4g} to {high:.4g}; scale images to [-1, 1].")
    return tuple(images.shape[1:])


def _vectors(
    images: Tensor,
    captions: Sequence[str] | None,
    extractor: FeatureExtractor,
    perceptual: PublicFeatures,
    name: str,
) -> tuple[dict[str, Tensor], list[int]]:
    """Per image the vectors that are summed up, and the channels of the perceptual maps."""
    features, maps = perceptual.maps(images)
    if extractor is not perceptual:
        features = extractor(images)
        if features.shape != (len(images), extractor.dim):
            raise ValueError(
                f"{name}: extractor {extractor.name!r} gave {tuple(features.shape)} for {len(images)} images and"
                f" dim={extractor.dim}."
            )
    vectors = {
        "features": features.double(),
        "bands": band_energies(images),
        "gram": gram_matrices(maps),
        "embedding": perceptual_embedding(maps),
    }
    vectors["square"] = vectors["embedding"].square().sum(1, keepdim=True)
    if captions is not None and isinstance(extractor, TextExtractor):
        texts = extractor.text_features(list(captions))
        cosine = torch.nn.functional.cosine_similarity(features, texts)
        vectors["agreement"] = 100 * cosine.clamp_min(0)[:, None]
    return vectors, [found.shape[1] for found in maps]


def band_energies(images: Tensor) -> Tensor:
    """Mean squares (B, 3 levels) of the Haar detail bands of images (B, C, H, W): horizontal, vertical and diagonal.

    As many levels as leave bands of 4 pixels, at most 4; the last rows and columns that do not divide are left out.
    """
    height, width = images.shape[2:]
    levels = max(level for level in range(1, 5) if level == 1 or min(height, width) >> level >= _SIDE)
    unit = 2**levels
    bands = dwt2(images[..., : height // unit * unit, : width // unit * unit].float(), levels)
    return torch.stack([band.square().mean((1, 2, 3)) for detail in bands.details for band in detail], 1)


def _deal(seen: int, count: int, generator: torch.Generator) -> Tensor:
    """Groups (count,) of the next images: every ten of a batch go to all ten groups, in random order."""
    rounds = -(-count // GROUPS)
    return torch.rand(rounds, GROUPS, generator=generator).argsort(1).flatten()[:count]


def _sample(
    rows: Tensor, keys: Tensor, features: Tensor, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The rows with the `size` smallest random keys: a uniform sample of all that was seen."""
    keys = torch.cat([keys, torch.rand(len(features), generator=generator, dtype=torch.float64)])
    rows = torch.cat([rows, features.float()])
    if len(rows) <= size:
        return rows, keys
    kept = keys.topk(size, largest=False).indices
    return rows[kept], keys[kept]


Figure = Callable[[Sums, Sums], float]


def bootstrap_counts(resamples: int, count: int, generator: torch.Generator) -> Tensor:
    """How often each of `count` rows is drawn in each resample, (resamples, count) float32."""
    drawn = torch.randint(count, (resamples, count), generator=generator)
    return torch.zeros(resamples, count).scatter_add_(1, drawn, torch.ones(resamples, count))


def jackknife(
    real: ImageStatistics, generated: ImageStatistics, figure: Figure, confidence: float
) -> tuple[float, float, float]:
    """Value of a figure of two sets, and its interval by leaving out one group of either at a time.

    Assumes independent images and a smooth figure. The half-width is Student's quantile for nine degrees of freedom
    times the root of the sum of both variances.
    """
    whole, other = real.all(), generated.all()
    value = figure(whole, other)
    left_out = [
        [figure(real.without(group), other) for group in range(GROUPS)],
        [figure(whole, generated.without(group)) for group in range(GROUPS)],
    ]
    return value, *interval(value, left_out, confidence)


def interval(value: float, left_out: Sequence[Sequence[float]], confidence: float) -> tuple[float, float]:
    """Interval of a figure from its values with one group of a set left out, for each set."""
    variance = 0.0
    for figures in left_out:
        mean = sum(figures) / len(figures)
        variance += (len(figures) - 1) / len(figures) * sum((figure - mean) ** 2 for figure in figures)
    half: Any = stats.t.isf((1 - confidence) / 2, GROUPS - 1) * variance**0.5
    return value - float(half), value + float(half)


__all__ = [
    "GROUPS",
    "Batch",
    "ImageStatistics",
    "Sums",
    "band_energies",
    "bootstrap_counts",
    "collect",
    "interval",
    "jackknife",
]
