"""The checkpoints inside the package: small, safe to load, with a card that says how to rebuild them, and trained."""

from pathlib import Path

import pytest
import torch
from public_glyphs import render_digits
from sklearn.datasets import load_sample_images
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageToImage

from hf_spectral_dp import bundled_model
from hf_spectral_dp.bundled import CHECKPOINTS
from hf_spectral_dp.super_resolution import upscale, upscale_to

ROOT = Path(__file__).parents[1]
ALLOWED = {"model.safetensors", "config.json", "generation_config.json", "preprocessor_config.json", "README.md"}


def checkpoints() -> list[Path]:
    return sorted(path for path in CHECKPOINTS.iterdir() if path.is_dir())


def test_they_are_small_and_hold_nothing_but_weights_configs_and_a_card():
    files = [path for folder in checkpoints() for path in folder.rglob("*")]
    assert sum(path.stat().st_size for path in files) <= 31 * 2**20  # half of it the wide model of photos
    assert {path.name for path in files} <= ALLOWED


def test_a_name_that_is_none_of_theirs_is_refused_with_theirs():
    for name in ("photographs", "../checkpoints/photos", ""):
        with pytest.raises(ValueError, match="is no model that comes with the package; use one of digits, .*photos"):
            bundled_model(name)


@pytest.mark.parametrize("folder", checkpoints(), ids=lambda folder: folder.name)
def test_their_cards_name_the_public_source_and_the_scripts_that_rebuild_them(folder):
    card = (folder / "README.md").read_text(encoding="utf-8")
    commands = [line.strip(" *`") for line in card.splitlines() if "python examples/" in line]
    scripts = [command.split("python ")[1].split()[0] for command in commands]
    assert scripts and all((ROOT / script).is_file() for script in scripts)
    assert "license: apache-2.0" in card
    assert "examples/public_glyphs.py" in card or "`tiny_imagenet`" in card
    assert f"--out runs/{folder.name}" in commands[-1]


def test_the_digits_are_trained():
    images, labels = render_digits(60, seed=987_654)  # no image of the training seeds
    processor = AutoImageProcessor.from_pretrained(bundled_model("digits"))
    model = AutoModelForCausalLM.from_pretrained(bundled_model("digits")).eval()
    pixels = processor(list(images))["pixel_values"]
    tokens = model.codec.encode(pixels)
    low = torch.nn.functional.avg_pool2d(pixels, 2)
    assert (model.decode(tokens) - low).square().mean() < 0.1 * (low - low.mean()).square().mean()
    rows = torch.cat([model.start_tokens(torch.from_numpy(labels))[:, None], tokens], 1)
    wrong = torch.cat([model.start_tokens(torch.from_numpy((labels + 1) % 10))[:, None], tokens], 1)
    with torch.no_grad():
        loss, other = model.per_example_loss(rows), model.per_example_loss(wrong)
    assert loss.mean() < 2.5  # a uniform guess costs 5.6 to 6.2 nats per token
    assert (loss < other).float().mean() > 0.9  # and it knows the classes
    network = AutoModelForImageToImage.from_pretrained(bundled_model("digits-super-resolution"))
    detailed = upscale(network, low)
    plain = torch.nn.functional.interpolate(low, scale_factor=2, mode="bicubic")
    assert (detailed - pixels).square().mean() < 0.5 * (plain - pixels).square().mean()


@pytest.mark.parametrize("name", ["photos", "photos-wide"])
def test_the_photos_are_trained(name):
    """On squares of the two photos that come with scikit-learn, which are in no training set of ours."""
    squares = [
        photo[top : top + side, left : left + side]
        for photo in load_sample_images().images
        for side in (128, 256)
        for top in range(0, 427 - side, 64)
        for left in range(0, 640 - side, 128)
    ]
    processor = AutoImageProcessor.from_pretrained(bundled_model(name))
    model = AutoModelForCausalLM.from_pretrained(bundled_model(name)).eval()
    pixels = processor(squares)["pixel_values"]
    tokens = model.codec.encode(pixels)
    low = torch.nn.functional.avg_pool2d(pixels, 4)
    assert (model.decode(tokens) - low).square().mean() < 0.1 * (low - low.mean((2, 3), keepdim=True)).square().mean()
    generator = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(scale.tokens, generator=generator) + scale.first_position
                       for scale in model.config.layout.scales])  # fmt: skip
    start = model.start_tokens(None, len(tokens))[:, None]
    with torch.no_grad():
        loss = model.per_example_loss(torch.cat([start, tokens], 1))
        mixed = model.per_example_loss(torch.cat([start, tokens[:, order]], 1))
        network = AutoModelForImageToImage.from_pretrained(bundled_model(f"{name}-super-resolution")).eval()
        detailed = upscale_to(64, network, model.decode(tokens))
    assert loss.mean() < 4.9  # a uniform guess costs 6.35 nats per token
    assert (loss < mixed).float().mean() > 0.9  # and it knows how places hang together

    def contrast(images: torch.Tensor) -> float:
        return float(images.diff(dim=-1).abs().mean())

    plain = upscale_to(64, "bicubic", model.decode(tokens))
    assert abs(contrast(detailed) - contrast(pixels)) < 0.5 * abs(contrast(plain) - contrast(pixels))


def test_both_models_of_photos_speak_the_same_tokens():
    small, wide = (AutoModelForCausalLM.from_pretrained(bundled_model(name)) for name in ("photos", "photos-wide"))
    assert small.config.layout == wide.config.layout
    for index in range(len(small.config.layout.scales)):
        assert torch.equal(small.codec.codebook(index), wide.codec.codebook(index))
