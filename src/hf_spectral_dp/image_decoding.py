"""Images out of whatever a data set holds: one decoder for all, which nothing that an image holds can stop.

Where one broken file must not end a whole run, `undecoded` keeps `datasets` from decoding; `decode_image` does it, one
image at a time, and reports what it cannot read with `UndecodableImageError`.

An image may come from somebody who means harm. Four walls bound what one can cost: the formats that are read at all,
the size of the file, the pixels it unpacks to, and the processor time that reading it takes. Whether an image is
readable depends on that image alone (and, at the last wall, on the machine's speed), so leaving one out moves no row.
"""

import io
import math
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import fsspec
import torch
from datasets import Image as ImageFeature
from PIL import Image, TiffImagePlugin, TiffTags
from torch import Tensor

MAX_PIXELS = 2**25
"""Images with more pixels (5792 x 5792) are not decoded: a small file can unpack to more than the memory."""

MAX_BYTES = 2**28
"""Files above 256 MiB are not decoded: uncompressed, the largest image takes no more in 8 bits."""

MAX_SECONDS = 2.0
"""Processor time after which an image is given up."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".avif", ".ppm", ".pgm")
_MAX_SCANS = 100  # of a JPEG: each is a walk over all blocks that costs the writer a few bytes; ten are usual
_MAX_SEGMENTS = 10_000  # of a JPEG before its first scan
_MAX_TAGS = 2**23  # bytes of a TIFF's tags: as Python numbers they take forty times as much
_MAX_TILE = 2**22  # pixels; a decoder unpacks whole tiles, however little of them is inside the image
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PIXELS_AT_ONCE = 2**22


class UndecodableImageError(ValueError):
    """An image that cannot be turned into pixels: broken, truncated, empty, of unknown format or too large."""


def undecoded(dataset: Any) -> Any:
    """A data set of `datasets` whose images come as their files hold them, for `decode_image`; any other as it is.

    Decoded by `datasets`, one broken file would end the whole stream.
    """
    for name, feature in (getattr(dataset, "features", None) or {}).items():
        if isinstance(feature, ImageFeature):
            dataset = dataset.cast_column(name, ImageFeature(decode=False))
    return dataset


def decode_image(value: Any, max_pixels: int = MAX_PIXELS) -> Any:
    """One image out of whatever a data set holds, upright and fully read.

    Args:
        value: a Pillow image, encoded bytes, a path, the `datasets` struct {"bytes", "path"}, or pixels as an array,
            tensor or nested lists. Encoded: JPEG, PNG, WebP, GIF, BMP, TIFF, JPEG 2000, AVIF or PPM, whatever its name
            says; convert others first.
        max_pixels: largest width times height that is decoded.

    Returns:
        A Pillow image turned upright by its EXIF orientation (first frame of an animation), or the array as given.
        Metadata that cannot be read count as absent.

    Raises:
        UndecodableImageError: the value holds no readable image, or one beyond `max_pixels`, `MAX_BYTES` or
            `MAX_SECONDS`.
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
        image = value if isinstance(value, Image.Image) else _opened(bytes(value))
        _check_size(image, max_pixels)
        image.load()
        _check_size(image, max_pixels)  # a frame may lie beyond the canvas that was announced
        return _upright(image)
    except UndecodableImageError:
        raise
    except Exception as error:  # Pillow's decoders raise almost any type on broken input
        raise UndecodableImageError(f"{type(error).__name__}: {error}") from error


def readable(rows: Iterable[Mapping[str, Any]], image_column: str) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """Every row whose image can be decoded, behind that image; the others are passed over.

    Args:
        rows: a data set of `datasets`, as `load_images` gives it, or rows with images that `decode_image` takes.
        image_column: where they lie.

    Raises:
        ValueError: a row has no such column; or, after the last row, no image could be decoded.
    """
    decoded, reasons = False, []
    for row in undecoded(rows):
        if image_column not in row:
            raise ValueError(f"image_column={image_column!r} is not a column of the data; choose one of {sorted(row)}.")
        try:
            image = decode_image(row[image_column])
        except UndecodableImageError as error:
            reasons.append(str(error))
            continue
        decoded = True
        yield image, row
    if not decoded:
        why = f"{len(reasons)} rows, the first: {reasons[0]}" if reasons else "there are no rows"
        raise ValueError(f"no image in {image_column!r} can be read ({why}); check the folder or the data set.")


def decode_batch(images: Sequence[Any], image_processor: Any) -> tuple[Tensor | None, list[int], list[str]]:
    """Pixel values (b, C, H, W) of the images that can be decoded, their positions, and why the others could not.

    However large the images of a batch, no more than `_PIXELS_AT_ONCE` and one image are held decoded.
    """
    parts: list[Tensor] = []
    kept: list[int] = []
    reasons: list[str] = []
    waiting: list[tuple[int, Any]] = []
    area = 0
    for index, image in enumerate(images):
        try:
            waiting.append((index, decode_image(image)))
        except UndecodableImageError as error:
            reasons.append(str(error))
            continue
        area += _area(waiting[-1][1])
        if area > _PIXELS_AT_ONCE:
            _preprocess(waiting, image_processor, parts, kept, reasons)
            waiting, area = [], 0
    _preprocess(waiting, image_processor, parts, kept, reasons)
    return torch.cat(parts) if parts else None, kept, reasons


def _area(image: Any) -> int:
    if isinstance(image, Image.Image):
        return image.width * image.height
    return math.prod(getattr(image, "shape", (1,)))


def _preprocess(
    images: Sequence[tuple[int, Any]],
    image_processor: Any,
    parts: list[Tensor],
    kept: list[int],
    reasons: list[str],
) -> None:
    """Appends what the processor makes of (position, image) pairs; one without usable pixels harms only itself."""
    if not images:
        return
    try:
        parts.append(image_processor([image for _, image in images], return_tensors="pt")["pixel_values"])
        kept.extend(index for index, _ in images)
    except Exception as error:  # as in decode_image: one image's fault, whatever its type
        if len(images) == 1:
            reasons.append(f"{type(error).__name__}: {error}")
            return
        for pair in images:
            _preprocess([pair], image_processor, parts, kept, reasons)


def _check_size(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise UndecodableImageError(f"{image.width}x{image.height} pixels exceed max_pixels={max_pixels}.")


def _content(path: str) -> bytes:
    """Bytes of a path. A missing or odd file is that one image's fault; a failing store is everyone's, and raises."""
    path = path.removeprefix("file://")
    try:
        # A device or a pipe may never end.
        if "://" not in path and not stat.S_ISREG(os.stat(path).st_mode):
            raise UndecodableImageError("the path names no regular file.")
        with open_path(path) as file:
            return file.read(MAX_BYTES + 1)
    except UndecodableImageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: no path at all, or of an unknown store
        if "://" in path and not isinstance(error, FileNotFoundError | ValueError):
            raise
        raise UndecodableImageError(f"{type(error).__name__}: {error}") from error


class _Encoded(io.BytesIO):
    """An encoded image whose reading is given up after `MAX_SECONDS` of this thread's processor time.

    Pillow asks for bytes again and again, in loops that a flood of small blocks keeps busy.
    """

    def __init__(self, content: bytes):
        super().__init__(content)
        self.left = math.inf  # bytes that may still be read
        self._end = time.thread_time() + MAX_SECONDS

    def read(self, size: int | None = -1) -> bytes:
        if time.thread_time() > self._end:
            raise TimeoutError(f"reading the image takes more than {MAX_SECONDS:g} seconds.")
        content = super().read(size)
        self.left -= len(content)
        if self.left < 0:
            raise ValueError(f"the tags take more than {_MAX_TAGS} bytes.")
        return content


def _opened(content: bytes) -> Image.Image:
    """The image, its header read and found harmless."""
    if len(content) > MAX_BYTES:
        raise UndecodableImageError(f"{len(content)} bytes exceed MAX_BYTES={MAX_BYTES}.")
    if content.startswith(b"\xff\xd8"):
        content = _without_padding(content)
    file = _Encoded(content)
    if content[:2] in (b"II", b"MM"):  # nothing but tags is read when a TIFF is opened
        file.left = _MAX_TAGS
    image = Image.open(file, formats=_formats())
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.getexif()
        for directory in TiffTags.TAGS_V2_GROUPS:  # else these are read with the pixels, whatever their size
            if directory in tags:
                del tags[directory]
        width, length = (image.tag_v2.get(tag, 1) for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH))
        if width * length > _MAX_TILE:
            raise UndecodableImageError(f"tiles of {width}x{length} pixels exceed {_MAX_TILE}.")
    file.left = math.inf
    return image


_MARKER = re.compile(rb"[^\xff]*\xff+([^\xff])", re.DOTALL)


def _without_padding(content: bytes) -> bytes:
    """A JPEG with its segments before the first scan in a row: of metadata the first EXIF and Adobe's colour transform.

    Raises:
        UndecodableImageError: the segments lead nowhere, or there are too many, or more than `_MAX_SCANS` scans.
    """
    parts, position, exif = [b"\xff\xd8"], 2, False
    for _ in range(_MAX_SEGMENTS):
        match = _MARKER.match(content, position)
        if not match:
            break
        marker = match[1][0]
        position = match.end()
        if marker == 0xDA:  # the scans: from here on the decoder reads by itself
            if content.count(b"\xff\xda", position) >= _MAX_SCANS:
                raise UndecodableImageError(f"a JPEG of more than {_MAX_SCANS} scans.")
            return b"".join([*parts, b"\xff\xda", content[position:]])
        if marker in (0x00, 0x01, 0xD8) or 0xD0 <= marker <= 0xD7:
            continue  # alone, without content
        end = position + int.from_bytes(content[position : position + 2], "big")
        first_exif = marker == 0xE1 and not exif and content[position + 2 : position + 6] == b"Exif"
        exif = exif or first_exif
        metadata = 0xE0 <= marker <= 0xEF or marker == 0xFE
        if not metadata or marker == 0xEE or first_exif:
            parts.append(b"\xff" + match[1] + content[position:end])
        position = max(end, position + 2)
    raise UndecodableImageError("a JPEG without a scan, or with one behind too many segments.")


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # broken metadata make no pixel unreadable
        return image
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


@lru_cache
def _formats() -> tuple[str, ...]:
    """The formats of photographs and scans that this Pillow reads, the common ones tried first.

    Not the thirty others: rare decoders have had few eyes on them, icons may hold an image of another size than they
    say, and EPS is handed to a PostScript interpreter.
    """
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def open_path(path: str) -> Any:
    """A file of this machine, or of any store that fsspec knows (Hub, archives)."""
    return open(path, "rb") if "://" not in path else fsspec.open(path, "rb").open()


__all__ = [
    "MAX_BYTES",
    "MAX_PIXELS",
    "MAX_SECONDS",
    "SUFFIXES",
    "UndecodableImageError",
    "decode_batch",
    "decode_image",
    "open_path",
    "readable",
    "undecoded",
]
