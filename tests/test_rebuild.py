"""What a public network is made of: some images of all kinds, and the command on its card, which makes it again."""

import argparse
import shlex
from pathlib import Path

import pretrain_codec
import pytest
import rebuild
import train_super_resolution
from datasets import Dataset, load_dataset
from PIL import Image
from rebuild import rebuild_command, some_of


@pytest.fixture
def sorted_by_class(tmp_path) -> Path:
    """Twenty images of each of three classes, which are shades; and one that is broken."""
    for shade in (0, 100, 200):
        (tmp_path / "photos" / f"shade{shade}").mkdir(parents=True)
        for index in range(20):
            Image.new("L", (8, 8), shade + index).save(tmp_path / "photos" / f"shade{shade}" / f"{index:02}.png")
    (tmp_path / "photos" / "shade0" / "broken.png").write_bytes(b"no image")
    return tmp_path / "photos"


def test_some_images_are_of_all_classes_and_the_same_for_the_same_seed(sorted_by_class):
    def drawn(count: int, seed: int) -> list[int]:
        images = pretrain_codec.public_images(str(sorted_by_class), "train", "image", count, seed)
        return [image.getpixel((0, 0)) for image in images]

    some = drawn(30, 0)
    assert some == drawn(30, 0) != drawn(30, 1) and 29 <= len(set(some)) <= 30
    assert {shade // 100 for shade in some} == {0, 1, 2} and len(set(drawn(100, 1))) == 60
    with pytest.raises(ValueError, match=r"image_column='photo' is not a column of the data; .*'image'"):
        next(pretrain_codec.public_images(str(sorted_by_class), "train", "photo", 3, 0))
    options = {
        "public": str(sorted_by_class), "split": "train", "image_column": "image", "size": 8, "channels": 1,
        "white_level": 65535,
    }  # fmt: skip
    images = train_super_resolution.public_images(argparse.Namespace(**options, images=30, seed=0))[:, 0, 0, 0]
    assert sorted(images) == sorted(some) and {shade // 100 for shade in images[:10]} == {0, 1, 2}  # the held-out ones


def test_of_a_stream_no_more_is_read_than_it_takes(tmp_path, monkeypatch):
    Dataset.from_dict({"image": [bytes([n]) for n in range(200)]}).to_parquet(tmp_path / "train.parquet")
    stream = load_dataset(str(tmp_path), split="train", streaming=True, cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(rebuild, "load_images", lambda *names: stream)
    monkeypatch.setattr(rebuild, "_BUFFER", 50)
    first, again, other = ([row["image"][0] for row in some_of("owner/name", "train", 20, n)] for n in (0, 0, 1))
    assert first == again != other and len(set(first)) == 20 and max(first) < 70 and first != sorted(first)


def test_the_command_gives_back_the_options_it_was_made_of():
    options = {
        "out": "runs/my eye", "public": "Tiny ImageNet", "widths": [1, 2], "bf16": True, "start": None, "text": "",
        "mirror": False, "weight": 0.0,
    }  # fmt: skip
    words = shlex.split(rebuild_command("train_eye.py", options))
    assert words[:2] == ["python", "examples/train_eye.py"] and words[-2:] == ["--out", "runs/my eye"]
    parser = argparse.ArgumentParser()
    parser.add_argument("--widths", type=int, nargs="+")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--weight", type=float)
    for name in ("--public", "--out"):
        parser.add_argument(name)
    known = {name: options[name] for name in ("public", "widths", "bf16", "weight", "out")}
    assert vars(parser.parse_args(words[2:])) == known
