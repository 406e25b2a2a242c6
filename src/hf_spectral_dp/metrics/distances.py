"""Distances between two sets of images, as functions of their features or of their features' moments.

Every function is pure and takes float tensors on the CPU. `evaluation.evaluate_images` calls them on streams, with
intervals and floors.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """What a Frechet distance needs of a set: its number of rows, mean (D,) and unbiased covariance (D, D), float64."""

    count: int
    mean: Tensor
    covariance: Tensor

    @classmethod
    def of_sums(cls, count: int, total: Tensor, products: Tensor) -> "Moments":
        """From the sum (D,) of `count` rows and the sum (D, D) of their outer products, float64."""
        mean = total / count
        return cls(count, mean, (products - count * torch.outer(mean, mean)) / (count - 1))

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Of a feature matrix (n, D), n at least 2."""
        rows = checked(features).double()
        centred = rows - rows.mean(0)
        return cls(len(rows), rows.mean(0), centred.T @ centred / (len(rows) - 1))


def checked(features: Tensor, name: str = "features") -> Tensor:
    """`features` if they are a finite matrix of at least two rows.

    Raises:
        ValueError: another shape, fewer rows, NaN or infinity.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"{name} has shape {tuple(features.shape)}; expected (n, D) with n of at least 2.")
    if not torch.isfinite(features).all():
        bad = int((~torch.isfinite(features)).any(1).sum())
        raise ValueError(f"{name}: {bad} of {len(features)} rows hold NaN or infinity; leave those images out.")
    return features


def _pair(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    if first.shape[-1] != second.shape[-1]:
        raise ValueError(f"{first.shape[-1]} and {second.shape[-1]} features: both sets need the same extractor.")
    return checked(first, "the first set"), checked(second, "the second set")


# Frechet distance


def frechet_distance(real: Moments | Tensor, generated: Moments | Tensor) -> float:
    """Squared Wasserstein-2 distance of Gaussians with the moments of both sets (Heusel et al., 1706.08500).

    |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2)). On Inception features this is FID. It is biased upwards, about
    as 1/n, so compare only figures of the same numbers of images, beside the floor.

    Args:
        real, generated: moments, or feature matrices (n, D).

    Raises:
        ValueError: no more rows than features: the covariance is singular and the figure would mostly tell n.
    """
    real, generated = (some if isinstance(some, Moments) else Moments.of(some) for some in (real, generated))
    for some in (real, generated):
        check_enough(some.count, len(some.mean))
    return _frechet(real, generated, _root(real.covariance))


def check_enough(count: int, dim: int) -> None:
    """Raises ValueError unless `count` rows give a covariance of `dim` features."""
    if count <= dim:
        raise ValueError(
            f"{count} images for the covariance of {dim} features: more images than features are needed. Use more, or"
            " kernel_distance, which is unbiased for any number."
        )


def _root(covariance: Tensor) -> Tensor:
    """Symmetric square root (D, D) of a positive semi-definite matrix; rounding below zero counts as zero."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def _frechet(first: Moments, second: Moments, root: Tensor) -> float:
    """The distance, given the square root of the first covariance: tr((C1 C2)^(1/2)) = tr((R1 C2 R1)^(1/2))."""
    product = root @ second.covariance @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    shift = (first.mean - second.mean).square().sum()
    return max(0.0, float(shift + first.covariance.trace() + second.covariance.trace() - 2 * cross))


def frechet_distances(moments: Moments, others: list[Moments]) -> list[float]:
    """Distances of one set to many, for the price of one square root and one spectrum each."""
    root = _root(moments.covariance)
    return [_frechet(moments, other, root) for other in others]


# Kernel distances. All are U-statistics: the mean over pairs of different rows, so zero on average for equal laws.


@dataclass(frozen=True)
class KernelMatrices:
    """Kernel values within the first set (m, m), within the second (n, n), and between them (m, n)."""

    first: Tensor
    second: Tensor
    between: Tensor

    def distance(self) -> float:
        """The unbiased squared maximum mean discrepancy (Gretton et al., JMLR 2012, equation 3); may be negative."""
        m, n = self.between.shape

        def total(matrix: Tensor) -> float:
            return float(matrix.sum(dtype=torch.float64))

        def inner(matrix: Tensor) -> float:
            return (total(matrix) - total(matrix.diagonal())) / (len(matrix) * (len(matrix) - 1))

        return inner(self.first) + inner(self.second) - 2 * total(self.between) / (m * n)

    def resampled(self, first: Tensor, second: Tensor) -> Tensor:
        """Distances (R,) of R resamples, given how often each drew every row: counts (R, m) and (R, n).

        A row drawn twice is no pair with itself, so repeated rows do not pull the distance up.
        """

        def inner(matrix: Tensor, counts: Tensor) -> Tensor:
            own = counts.square() @ matrix.diagonal()
            pairs = counts.sum(1).square() - counts.square().sum(1)
            return (((counts @ matrix) * counts).sum(1) - own) / pairs

        between = ((first @ self.between) * second).sum(1) / (first.sum(1) * second.sum(1))
        return inner(self.first, first) + inner(self.second, second) - 2 * between


def polynomial_kernel(first: Tensor, second: Tensor) -> KernelMatrices:
    """k(x, y) = (x.y / D + 1)^3, the kernel of KID (Binkowski et al., 1801.01401), of features (m, D) and (n, D)."""
    dim = first.shape[1]

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / dim + 1) ** 3

    return KernelMatrices(kernel(first, first), kernel(second, second), kernel(first, second))


def gaussian_kernel(first: Tensor, second: Tensor, sigma: float = 10.0) -> KernelMatrices:
    """1000 exp(-|x - y|^2 / (2 sigma^2)) of features of length 1, as in CMMD (Jayasumana et al., 2401.09603)."""
    first, second = (some / some.norm(dim=1, keepdim=True).clamp_min(1e-12) for some in (first, second))

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return 1000 * torch.exp((x @ y.T - 1) / sigma**2)  # |x - y|^2 = 2 - 2 x.y for unit vectors

    return KernelMatrices(kernel(first, first), kernel(second, second), kernel(first, second))


def kernel_distance(real: Tensor, generated: Tensor) -> float:
    """Unbiased squared MMD with the polynomial kernel; on Inception features this is KID, over one subset of all rows.

    Args:
        real: features (m, D); generated: features (n, D). Memory grows with m^2 + n^2 + m n.

    Raises:
        ValueError: fewer than two rows, NaN, or different D.
    """
    first, second = _pair(real, generated)
    return polynomial_kernel(first.double(), second.double()).distance()


def cmmd(real: Tensor, generated: Tensor) -> float:
    """Unbiased squared MMD with the Gaussian kernel of CMMD, scaled by 1000, on features of length 1.

    The paper's code keeps the diagonal, which adds about 1000 (1 - mean k) / n; this estimate leaves it out.

    Args:
        real: features (m, D); generated: features (n, D), of CLIP for figures like the paper's.

    Raises:
        ValueError: fewer than two rows, NaN, or different D.
    """
    first, second = _pair(real, generated)
    return gaussian_kernel(first.double(), second.double()).distance()


# Neighbours


@dataclass(frozen=True)
class Neighbourhoods:
    """What each image contributes to the four figures of `neighbourhoods`: means of these are the figures.

    Attributes:
        precision, density: per generated image (n,). recall, coverage: per real image (m,).
    """

    precision: Tensor
    density: Tensor
    recall: Tensor
    coverage: Tensor


def neighbourhoods(real: Tensor, generated: Tensor, k: int = 5) -> Neighbourhoods:
    """Precision and recall (Kynkaanniemi et al., 1904.06991), density and coverage (Naeem et al., 2002.09797).

    An image's ball reaches to its k-th nearest neighbour in its own set. Precision: share of generated images in some
    real ball. Density: real balls around a generated image, divided by k. Recall: share of real images in some
    generated ball. Coverage: share of real balls that hold a generated image.

    Args:
        real: features (m, D); generated: features (n, D); k: neighbours, fewer than m and n.

    Raises:
        ValueError: too few rows for k, NaN, or different D.
    """
    real, generated = _pair(real, generated)
    if not 1 <= k < min(len(real), len(generated)):
        raise ValueError(f"k={k} needs more than {k} images in both sets; they have {len(real)} and {len(generated)}.")

    def radii(rows: Tensor) -> Tensor:
        return torch.cdist(rows, rows).kthvalue(k + 1).values  # the nearest is the row itself

    real_radii, generated_radii = radii(real), radii(generated)
    between = torch.cdist(real, generated)  # (m, n)
    inside = between <= real_radii[:, None]
    return Neighbourhoods(
        precision=inside.any(0).float(),
        density=inside.sum(0).float() / k,
        recall=(between <= generated_radii[None]).any(1).float(),
        coverage=inside.any(1).float(),
    )


# What single images look like, averaged over a set


def gram_matrices(maps: list[Tensor]) -> Tensor:
    """Flattened Gram matrices (B, sum of C^2) of feature maps (B, C, h, w), each divided by h w (Gatys, 1508.06576)."""
    grams = []
    for found in maps:
        rows = found.flatten(2)
        grams.append((rows @ rows.transpose(1, 2) / rows.shape[2]).flatten(1))
    return torch.cat(grams, 1)


def style_distance(real: Tensor, generated: Tensor, channels: list[int]) -> float:
    """Mean over depths of |G_real - G_generated| / |G_real| (Frobenius), G the mean Gram matrix of a set.

    Args:
        real, generated: means (sum of C^2,) of `gram_matrices`; channels: C of each depth.
    """
    sizes = [size**2 for size in channels]
    parts = zip(real.split(sizes), generated.split(sizes), strict=True)
    ratios = [float((ours - theirs).norm() / ours.norm().clamp_min(1e-12)) for ours, theirs in parts]
    return sum(ratios) / len(ratios)


def perceptual_embedding(maps: list[Tensor]) -> Tensor:
    """Vectors (B, sum of C h w) whose squared distances are perceptual distances of the images.

    As in LPIPS (Zhang et al., 1801.03924), before its learned weights: per depth, the mean over places of the squared
    distance of feature vectors scaled to length 1; summed over depths.
    """
    return torch.cat(
        [(found / found.norm(dim=1, keepdim=True).clamp_min(1e-10) / math.sqrt(found[0, 0].numel())).flatten(1)
         for found in maps],
        dim=1,
    )  # fmt: skip


def mean_pair_distance(mean: Tensor, mean_square: float, count: int) -> float:
    """Mean squared distance over all pairs of different rows, from their mean and mean squared length."""
    return 2 * count / (count - 1) * max(0.0, mean_square - float(mean.square().sum()))


def band_error(real: Tensor, generated: Tensor) -> float:
    """Mean over bands of |E_real - E_generated| / (E_real + E_generated), in [0, 1]; bands empty in both count 0.

    Args:
        real, generated: mean energies (bands,) of the wavelet detail bands.
    """
    return float(((real - generated).abs() / (real + generated).clamp_min(1e-12)).mean())


__all__ = [
    "KernelMatrices",
    "Moments",
    "Neighbourhoods",
    "band_error",
    "check_enough",
    "checked",
    "cmmd",
    "frechet_distance",
    "frechet_distances",
    "gaussian_kernel",
    "gram_matrices",
    "kernel_distance",
    "mean_pair_distance",
    "neighbourhoods",
    "perceptual_embedding",
    "polynomial_kernel",
    "style_distance",
]
