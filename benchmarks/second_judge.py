"""Committed sample grids beside real images, through a network that none of them was trained or chosen with.

    python -m benchmarks.second_judge --out benchmarks/results/second_judge.json

The distances of `benchmarks.quality` are taken on features of the shipped network, which is small, and which the
super-resolution network and the critic were also chosen by. This one is EfficientNet-Lite0, trained on ImageNet by
others; see `judge`. It sees what stands in the grids, the first 60 images of each, so nothing has to be trained again;
the kernel distance is unbiased for so few, and its interval is over both sets. Beside them: as many real training
images, the best that any generator could score, and those through codec and super-resolution. Grids of CIFAR-10 whose
critic looked through `public-eye` are left out: that eye learned from this network. Needs the package's `judge` extra.
`python -m benchmarks.quality --judge` asks it about all images that are drawn.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.judge import LiteFeatures, judged, seen
from benchmarks.quality import SIZES, Folders, public_generator
from benchmarks.quality_data import IMAGE_SETS, private_images
from benchmarks.report import write_report
from hf_spectral_dp.metrics.features import FeatureExtractor, PublicFeatures

RESULTS = Path(__file__).parent / "results"
COUNT = 60  # images in a grid
NAME = re.compile(r"quality_(faces|cifar10)(_gpu|_[0-9]+_steps)?_([a-z0-9]+)_([0-9.]+|inf)\.png")


def cut(path: Path, side: int) -> Tensor:
    """The images (N, 3, side, side) of a grid, in [-1, 1], row by row."""
    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
    tiles = pixels.unfold(1, side, side).unfold(2, side, side)  # (3, rows, columns, side, side)
    return tiles.permute(1, 2, 0, 3, 4).flatten(0, 1)[:COUNT].float() / 127.5 - 1


def pictures(name: str, data: Path) -> Iterator[tuple[str, str, str, Tensor]]:
    """Method, epsilon, where from, and images (60, 3, S, S): controls that are made here, and the committed grids."""
    images = IMAGE_SETS[name]
    train = private_images(images, data, "train", COUNT)
    yield "real", "inf", "training images", train[0]
    generator, _ = public_generator("ours", name, images, train, SIZES["quick"], Folders())
    yield "ceiling", "inf", "training images", generator.decoded(generator.rows(*train)).clamp(-1, 1)
    for path in sorted(RESULTS.glob("quality_*.png")):
        if (found := NAME.fullmatch(path.name)) and found[1] == name:
            yield found[3], found[4], path.name, cut(path, images.size)


def judgements(names: list[str], data: Path) -> Iterator[dict[str, Any]]:
    """The rows of the benchmark."""
    judges: list[FeatureExtractor] = [LiteFeatures(), PublicFeatures()]
    for name in names:
        images = IMAGE_SETS[name]
        test, _ = private_images(images, data, images.test_split, 1500)
        real = [seen(judge, test) for judge in judges]
        for method, epsilon, source, drawn in pictures(name, data):
            for judge, known in zip(judges, real, strict=True):
                shared = {"dataset": name, "epsilon": epsilon, "method": method, "metric": "kernel_distance"}
                yield shared | judged(judge, known, drawn) | {"source": source}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", choices=("faces", "cifar10"), default=["faces", "cifar10"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="one folder per image set")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    command = "python -m benchmarks.second_judge"
    if arguments.datasets != parser.get_default("datasets"):
        command += f" --datasets {' '.join(arguments.datasets)}"
    write_report(command, list(judgements(arguments.datasets, arguments.data)), arguments.out)


if __name__ == "__main__":
    main()
