"""The script that trains the network of private critics: what it shows it, and what it writes."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import train_eye
from conftest import one_private
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pictures

from hf_spectral_dp import SpectralConfig, SpectralTokenizerForCausalLM
from hf_spectral_dp.metrics.features import PublicFeatures
from hf_spectral_dp.super_resolution import SpectralSuperResolution, SpectralSuperResolutionConfig


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """60 photos, red or blue under noise, with a codec and a network for them."""
    folder = tmp_path_factory.mktemp("parts")
    rng, pictures = np.random.default_rng(0), []
    for index in range(60):
        pixels = rng.integers(0, 100, (16, 16, 3), dtype=np.uint8)
        pixels[..., 2 * (index % 2)] += 150
        pictures.append(Pictures.fromarray(pixels))
    rows = {"image": pictures, "colour": ["red", "blue"] * 30}
    (folder / "photos").mkdir()
    features = Features({"image": Image(), "colour": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(folder / "photos" / "train.parquet")
    config = SpectralConfig(
        image_size=16, num_channels=3, levels=3, patch_sizes=[1, 1], codebook_sizes=[8, 8], hidden_size=16,
        intermediate_size=32, num_hidden_layers=1,
    )  # fmt: skip
    model = SpectralTokenizerForCausalLM(config)
    pixels = torch.from_numpy(np.stack([np.array(some) for some in pictures])).permute(0, 3, 1, 2)
    model.codec.fit(pixels / 127.5 - 1)
    model.save_pretrained(folder / "codec")
    shape = SpectralSuperResolutionConfig(num_channels=3, scale=2, features=4, num_blocks=1, keep_average=False)
    SpectralSuperResolution(shape).save_pretrained(folder / "detail")
    return folder


def run(parts: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **options) -> None:
    given = {
        "public": parts / "photos", "label_column": "colour", "codec": parts / "codec", "name": "colours",
        "super_resolution": parts / "detail", "size": 8, "widths": "2 4 4 4", "steps": 30, "batch_size": 20,
        "out": out,
    } | options  # fmt: skip
    words = [word for name, value in given.items() for word in (f"--{name}", *str(value).split())]
    monkeypatch.setattr(sys, "argv", ["train_eye.py", *words])
    train_eye.main()


def test_it_learns_classes_and_its_card_says_how_to_do_it_again(parts, tmp_path, monkeypatch, capsys):
    run(parts, tmp_path / "eye", monkeypatch)
    network = PublicFeatures(tmp_path / "eye").network
    assert network.config.architecture == "resnet9" and network.config.num_classes == 2
    card = (tmp_path / "eye" / "README.md").read_text(encoding="utf-8")
    assert "54 images of `colours` (split train) with 2 classes" in card
    assert f"--public colours --split train --image_column image --label_column colour --codec {parts}/codec" in card
    assert "--widths 2 4 4 4 --steps 30" in card and "--name" not in card
    assert "top-1 accuracy 100.0%" in capsys.readouterr().out  # of six held-out ones, which are red or blue


def test_batches_hold_all_looks_and_move_images_but_little():
    """Each look is one grey: how often it comes is its share; what moves is a mark, by four pixels at most."""
    kinds = torch.stack([torch.full((50, 3, 16, 16), level, dtype=torch.uint8) for level in (0, 100, 200)])
    kinds[:, :, :, 8, 8] = 255
    drawn = train_eye.batches(kinds, 50, torch.Generator().manual_seed(0))
    seen, shifts = [], set()
    for _ in range(40):
        images, which = next(drawn)
        assert sorted(which.tolist()) == list(range(50))
        seen.append(((images[:, 0].flatten(1).median(1).values + 1) * 127.5).round())
        shifts |= {tuple(place) for place in (images[:, 0] == 1).nonzero()[:, 1:].tolist()}
    shares = [(torch.cat(seen) == level).float().mean() for level in (0, 100, 200)]
    assert torch.allclose(torch.stack(shares), torch.tensor([0.4, 0.3, 0.3]), atol=0.04)
    rows, columns = ({place[axis] for place in shifts} for axis in (0, 1))
    assert rows == set(range(4, 13)) and columns == set(range(3, 13))  # mirrored, 8 is 7


def test_a_private_codec_is_no_public_one(parts, tmp_path, monkeypatch):
    one_private(tmp_path, "--codec")
    with pytest.raises(ValueError, match="--codec .* came out of the private run 'abababababab'"):
        run(parts, tmp_path / "eye", monkeypatch, codec=tmp_path / "private")
    assert not (tmp_path / "eye").exists()


def test_it_learns_what_a_teacher_says(parts, tmp_path, monkeypatch):
    """It comes to agree with a teacher that tells red from blue, though all photos have one label."""
    seen, measure, photos_of = [], train_eye.disagreement, train_eye.public_images

    def colour(photos: torch.Tensor) -> torch.Tensor:
        red = photos[:, 0].float().mean((1, 2)) > photos[:, 2].float().mean((1, 2))
        return torch.where(red[:, None], torch.tensor([3.0, -3.0]), torch.tensor([-3.0, 3.0]))

    def of_one_class(*given: object) -> tuple:
        photos, labels, _ = photos_of(*given)
        return photos, torch.zeros_like(labels), 1

    monkeypatch.setattr(train_eye, "teacher_of", lambda name: colour)
    monkeypatch.setattr(train_eye, "public_images", of_one_class)
    monkeypatch.setattr(train_eye, "disagreement", lambda *given: seen.append(measure(*given)) or seen[-1])
    run(parts, tmp_path / "eye", monkeypatch, teacher="colour", steps=60)
    assert sum(seen[-5:]) < sum(seen[:5]) / 4
    card = (tmp_path / "eye" / "README.md").read_text(encoding="utf-8")
    assert "the public classifier\n`colour` says" in card and "--teacher colour" in card
