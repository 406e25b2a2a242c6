"""Real images for an evaluation, read into memory as a model takes them: what was left out or changed is counted."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel
from PIL import Image
from torch import Tensor

from .configuration_spectral import SpectralConfig
from .image_decoding import decode_batch, undecoded

_CHUNK = 512  # images that are decoded and brought to the model's shape at once


@dataclass(frozen=True)
class RealImages:
    """Real images as the model takes them, from a source with a name for the report.

    Attributes:
        pixels: (N, C, image_size, image_size) in [-1, 1].
        labels: (N,) integers, or None.
        public: may figures computed from them be published? Only images that nobody protects are.
        unreadable, resized: images left out because they could not be read; brought to the model's shape from another.
    """

    name: str
    pixels: Tensor
    labels: Tensor | None
    public: bool
    unreadable: int
    resized: int = 0

    def check_fits(self, config: SpectralConfig) -> None:
        """Raises ValueError if a model of this configuration has no class for one of the labels.

        Warns of classes without an image: the first images of a source that is sorted by class are of the first ones.
        """
        if self.labels is None:
            return
        highest = int(self.labels.max())
        if absent := sorted({*range(config.num_classes)} - {*self.labels.tolist()}):
            warnings.warn(
                f"{self.name}: none of the {len(self.pixels)} images read is of class {absent[0]}"
                f"{f' and {len(absent) - 1} others' * (len(absent) > 1)}; a source that is sorted by class has to be"
                " read whole, or shuffled.",
                stacklevel=2,
            )
        if config.num_classes and highest >= config.num_classes:
            raise ValueError(
                f"{self.name}: label {highest}, but the model has num_classes={config.num_classes}, numbered from 0;"
                " name the column that it was trained with, or map labels to its numbers."
            )


def read_real_images(
    rows: Iterable[Mapping[str, Any]],
    processor: Any,
    name: str,
    *,
    image_column: str = "image",
    label_column: str | None = None,
    class_names: Sequence[str] | None = None,
    public: bool = False,
    limit: int | None = 10_000,
) -> RealImages:
    """The first `limit` rows (None: all) of a data set as `image_sources.load_images` gives them, less broken images.

    Images of any sizes are brought to the model's side by `processor`, as in training. Images that cannot be decoded,
    and such with NaN or values of an unknown range, are left out; a warning says how many, and why the first was.

    Args:
        class_names: of the model, where it has some: labels that are text, or numbers of a `ClassLabel` such as those
            of sub-folders, are numbered by them, as the model's training rows were.

    Raises:
        ValueError: a limit below 1, no row has the column, a label is no integer from 0 or none of class_names, or no
            image can be read.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} leaves no image of {name}; give at least 1, or None for all.")
    side = processor.image_size - 2 * processor.pad
    parts: list[Tensor] = []
    labels: list[int] = []
    waiting: list[tuple[Any, int]] = []
    reasons: list[str] = []
    read = resized = 0
    feature = (getattr(rows, "features", None) or {}).get(label_column)
    known = feature.names if isinstance(feature, ClassLabel) else None

    def shaped(images: list[Any], **options: Any) -> Any:
        nonlocal resized
        pixels = processor(images, **options)
        resized += sum(_sides(image) != [side, side] for image in images)
        return pixels

    def decode() -> None:
        pixels, kept, broken = decode_batch([image for image, _ in waiting], shaped)
        if pixels is not None:
            parts.append(pixels)
        labels.extend(waiting[index][1] for index in kept)
        reasons.extend(broken)
        waiting.clear()

    for row in undecoded(rows):
        if read == limit:
            break
        for column in (image_column, *([label_column] if label_column else [])):
            if column not in row:
                raise ValueError(f"{name} has no column {column!r}; it has {', '.join(map(str, row))}.")
        label = row[label_column] if label_column else 0
        if label_column and class_names is not None:
            label = known[label] if known is not None and isinstance(label, int) and label < len(known) else label
            if isinstance(label, str):
                if label not in class_names:
                    raise ValueError(
                        f"{name}: label {label!r} in row {read} is none of the model's class_names={list(class_names)}."
                    )
                label = list(class_names).index(label)
        if isinstance(label, bool) or not isinstance(label, int) or label < 0:
            raise ValueError(f"{name}: label {label!r} in row {read} is no integer from 0; map labels to numbers.")
        waiting.append((row[image_column], label))
        read += 1
        if len(waiting) == _CHUNK:
            decode()
    decode()
    if not parts:
        first = f", the first: {reasons[0]}" if reasons else ""
        raise ValueError(
            f"{name} holds no image that can be read: {read} rows, {len(reasons)} broken{first}. Check the source and"
            f" its column {image_column!r}."
        )
    if reasons:
        warnings.warn(
            f"{name}: {len(reasons)} images could not be read and were left out; the first: {reasons[0]}", stacklevel=2
        )
    labelled = torch.tensor(labels) if label_column else None
    return RealImages(name, torch.cat(parts), labelled, public, len(reasons), resized)


def _sides(image: Any) -> list[int]:
    """Width and height of a Pillow image or of pixels, whichever way round."""
    return list(image.size) if isinstance(image, Image.Image) else sorted(np.shape(image))[-2:]


__all__ = ["RealImages", "read_real_images"]
