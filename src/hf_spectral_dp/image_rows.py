"""Which images of a data set become rows, in order, batch by batch; every image is read once and held for one batch.

Token rows and feature rows of the same data both come from here, so that row i of either is of the same image.
"""

import gc
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from .image_decoding import decode_batch, undecoded
from .privacy.units import FirstRows

Example = tuple[Any, ...]
"""Image, label, captions and person of one row; None where no column names them."""


def total_of(dataset: Any) -> int | None:
    """Number of examples, None where it is not known beforehand."""
    try:
        return len(dataset)
    except TypeError:
        return None


def examples_of(dataset: Any, columns: tuple[str | None, ...]) -> Iterator[Example]:
    """The wanted columns. Images of a `datasets` source come encoded: a broken file harms only itself."""
    features = getattr(dataset, "features", None)
    if features is not None:
        wanted = dict.fromkeys(column for column in columns if column is not None)
        dataset = undecoded(dataset.select_columns(list(wanted)))
    rows: Iterable[Mapping[str, Any]] = iter(dataset)
    finished = False
    try:
        for row in rows:
            yield tuple(None if column is None else row[column] for column in columns)
        finished = True
    finally:
        if not finished:
            # A Parquet stream of datasets 5 that is left half read can hang the interpreter at exit (its read-ahead
            # threads hold Python files); closing the chain of generators and collecting them lets the threads end.
            if hasattr(rows, "close"):
                rows.close()
            del rows
            gc.collect()


def batches_of(examples: Iterator[Example], size: int) -> Iterator[list[Example]]:
    while batch := list(itertools.islice(examples, size)):
        yield batch


def kept_of(
    batch: list[Example], image_processor: Any, units: FirstRows | None
) -> tuple[Tensor | None, list[Example], list[str]]:
    """Pixel values (b, C, S, S) and examples of the rows of a batch, and why other images could not be decoded.

    `units`, which remembers earlier batches, leaves out what is beyond the limit of a person.
    """
    pixels, kept, reasons = decode_batch([image for image, *_ in batch], image_processor)
    if units is not None and pixels is not None:
        few = units.keep([batch[index][-1] for index in kept])
        pixels, kept = pixels[few], [kept[position] for position in few]
    return pixels, [batch[index] for index in kept], reasons


__all__ = ["Example", "batches_of", "examples_of", "kept_of", "total_of"]
