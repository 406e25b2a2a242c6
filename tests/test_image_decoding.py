"""Decoding: every form an image comes in, and walls for the ones that mean harm."""

import io
import os
import zlib

import numpy as np
import pytest
from conftest import encoded
from PIL import Image

from benchmarks import hostile_images
from hf_spectral_dp import image_decoding
from hf_spectral_dp.image_decoding import UndecodableImageError, decode_image, readable


@pytest.fixture(scope="module")
def levels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, 12, 10), dtype=np.uint8)


def test_decoding_accepts_what_data_sets_hold(levels, tmp_path):
    content = encoded(levels[0])
    path = tmp_path / "image.png"
    path.write_bytes(content)
    values = [content, bytearray(content), str(path), path, Image.fromarray(levels[0])]
    values += [{"bytes": content, "path": None}, {"bytes": None, "path": str(path)}]
    for value in values:
        np.testing.assert_array_equal(np.asarray(decode_image(value)), levels[0])
    assert decode_image(levels) is levels


def test_an_image_is_turned_upright(levels):
    for orientation, turned in ((3, np.rot90(levels[0], 2)), (6, np.rot90(levels[0], -1)), (8, np.rot90(levels[0]))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        np.testing.assert_array_equal(np.asarray(decode_image(encoded(levels[0], exif=exif))), turned)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [0, 1, 9, 255])
def test_an_orientation_that_is_none_turns_nothing(levels, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert decode_image(encoded(levels[0], kind, exif=exif)).size == (10, 12)


def test_broken_metadata_make_no_pixel_unreadable(levels):
    plain = np.asarray(decode_image(encoded(levels[0], "JPEG")))
    content = encoded(levels[0], "JPEG", exif=b"Exif\0\0" + bytes(range(200)), icc_profile=b"junk" * 100, comment=b"x")
    np.testing.assert_array_equal(np.asarray(decode_image(content)), plain)


def test_a_jpeg_keeps_its_colours_without_its_metadata():
    """Adobe's segment says how four channels are to be read, and stays."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels, "CMYK").save(file, "JPEG", quality=95)
    expected = Image.open(io.BytesIO(file.getvalue()))
    np.testing.assert_array_equal(np.asarray(decode_image(file.getvalue())), np.asarray(expected))


def test_a_reader_that_is_kept_busy_is_stopped(levels, monkeypatch):
    content = b"P5 #" + b"a" * 100_000 + b"\n2 2 255\nabcd"  # Pillow reads comments byte by byte
    assert decode_image(content).size == (2, 2)
    monkeypatch.setattr(image_decoding, "MAX_SECONDS", 0.005)
    with pytest.raises(UndecodableImageError, match="more than 0.005 seconds"):
        decode_image(content)


def test_a_file_that_is_too_large_is_not_read(levels, tmp_path, monkeypatch):
    content = encoded(levels[0])
    (tmp_path / "image.png").write_bytes(content)
    monkeypatch.setattr(image_decoding, "MAX_BYTES", len(content))
    assert decode_image(tmp_path / "image.png").size == (10, 12)
    monkeypatch.setattr(image_decoding, "MAX_BYTES", len(content) - 1)
    with pytest.raises(UndecodableImageError, match="exceed MAX_BYTES"):
        decode_image(tmp_path / "image.png")


def test_tags_segments_and_tiles_have_their_limits(levels, monkeypatch):
    tags = [(256, 4, 1, 10), (257, 4, 1, 12), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
    tags += [(322, 4, 1, 16), (323, 4, 1, 16), (324, 4, 1, 146), (325, 4, 1, 256), (37724, 7, 5000, 402)]
    tiff, jpeg = hostile_images.tiff(tags, bytes(256 + 5000)), encoded(levels[0], "JPEG")
    for content, limit, bound, message in (
        (tiff, "_MAX_TAGS", 4000, "tags take more than 4000 bytes"),
        (tiff, "_MAX_TILE", 255, "tiles of 16x16 pixels exceed 255"),
        (jpeg, "_MAX_SEGMENTS", 2, "too many segments"),
    ):
        assert decode_image(content).size == (10, 12)
        monkeypatch.setattr(image_decoding, limit, bound)
        with pytest.raises(UndecodableImageError, match=message):
            decode_image(content)
        monkeypatch.undo()


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "image.png")
    with pytest.raises(UndecodableImageError, match="no regular file"):
        decode_image(tmp_path / "image.png")


def bomb() -> bytes:
    """A PNG of a few kilobytes that claims 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + checksum

    side = (60_000).to_bytes(4, "big")
    header = chunk(b"IHDR", side + side + b"\x08\x00\x00\x00\x00")
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND", b"")


def scans(count: int) -> bytes:
    """A JPEG whose last scan comes many times; each is a walk over all blocks that costs a few bytes."""
    content = encoded(np.full((64, 64), 99, np.uint8), "JPEG", progressive=True)
    start = content.rindex(b"\xff\xda")
    return content[:start] + content[start:-2] * count + b"\xff\xd9"


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        b"not an image",
        {"bytes": None, "path": None},
        "/no/such/image.png",
        "unknown-store://image.png",
        "a\0b.png",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n",
        bomb(),
        encoded(np.zeros((64, 64), np.uint8))[:-30],
        encoded(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8), "JPEG")[:400],
        encoded(np.zeros((64, 64), np.uint8), "ICO"),  # an icon may hold an image of another size than it says
        scans(200),
    ],
)
def test_what_is_no_image_is_said_to_be_none(value):
    with pytest.raises(UndecodableImageError):
        decode_image(value)


def test_the_pixel_limit_is_exact():
    content = encoded(np.zeros((10, 10), np.uint8))
    assert decode_image(content, max_pixels=100).size == (10, 10)
    with pytest.raises(UndecodableImageError, match="max_pixels=99"):
        decode_image(content, max_pixels=99)


def test_a_source_without_a_readable_image_is_refused_in_words():
    broken = [{"image": b"no image"}, {"image": b"nor this"}]
    with pytest.raises(ValueError, match=r"no image in 'image' can be read \(2 rows, the first: .+\)"):
        list(readable(broken, "image"))
    with pytest.raises(ValueError, match=r"can be read \(there are no rows\)"):
        list(readable([], "image"))
