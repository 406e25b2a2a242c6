"""The script that trains a super-resolution network on public images: sharp details, and codecs that it mends."""

import sys

import numpy as np
import pytest
import torch
import train_super_resolution
from conftest import one_private
from PIL import Image
from transformers import AutoModelForImageToImage

from hf_spectral_dp import SpectralConfig, SpectralTokenizerForCausalLM
from hf_spectral_dp.super_resolution import upscale_to


def test_a_prior_needs_its_codec(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--public", "p", "--out", "o", "--prior", "some/prior"])
    with pytest.raises(SystemExit):
        train_super_resolution.main()
    assert "--prior some/prior without --codec" in capsys.readouterr().err


@pytest.mark.parametrize("adversarial", ["0", "0.1"])
def test_a_network_for_what_a_codec_makes_of_images(tmp_path, monkeypatch, adversarial):
    """From tokens of side 4 to images of side 16: twice the same doubling network, which mends as well."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for index in range(40):
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((16, 16)).save(tmp_path / "photos" / f"{index}.png")
    (tmp_path / "photos" / "broken.png").write_bytes(b"no image")  # is passed over
    config = SpectralConfig(
        image_size=16, num_channels=3, levels=3, patch_sizes=[1, 1], codebook_sizes=[8, 8], hidden_size=16,
        intermediate_size=32, num_hidden_layers=1,
    )  # fmt: skip
    model = SpectralTokenizerForCausalLM(config)
    model.codec.fit(torch.rand(40, 3, 16, 16) * 2 - 1)
    model.save_pretrained(tmp_path / "codec")
    options = {
        "public": tmp_path / "photos", "codec": tmp_path / "codec", "out": tmp_path / "out", "size": 16, "steps": 40,
        "batch_size": 4, "features": 4, "num_blocks": 1, "adversarial": adversarial, "learning_rate": 0.01,
    }  # fmt: skip
    given = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["train_super_resolution.py", *given])
    train_super_resolution.main()
    network = AutoModelForImageToImage.from_pretrained(tmp_path / "out").eval()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        enlarged = upscale_to(16, network, model.decode(model.codec.encode(images)))
    assert enlarged.shape == images.shape and bool((enlarged.abs() <= 1).all())
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"--adversarial {float(adversarial)}" in text
    if adversarial == "0":  # trained on the error alone, it beats plain resampling
        figures = text.split("PSNR in dB: ")[1].split()
        assert float(figures[0].rstrip(";")) > float(figures[2].rstrip(";"))
    else:  # a new judge, another folder; the steps in which the judge learns alone leave the network as it is
        given[given.index("--out") + 1] = str(tmp_path / "on")
        monkeypatch.setattr(sys, "argv", ["train_super_resolution.py", *given, "--start", str(tmp_path / "out")])
        sys.argv += ["--save_steps", "40"]
        train_super_resolution.main()
        kept = AutoModelForImageToImage.from_pretrained(tmp_path / "on-40")
        on = AutoModelForImageToImage.from_pretrained(tmp_path / "on").eval()
        changes = [(a - b).abs().max() for a, b in zip(network.parameters(), on.parameters(), strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), on.parameters(), strict=True))
        assert 0 < max(changes) < 0.5 and f"--start {tmp_path / 'out'}" in (tmp_path / "on" / "README.md").read_text()


def test_going_on_without_a_judge_is_refused(monkeypatch, capsys):
    given = ["--public", "glyphs", "--start", "folder", "--out", "out"]
    monkeypatch.setattr(sys, "argv", ["train_super_resolution.py", *given])
    with pytest.raises(SystemExit):
        train_super_resolution.main()
    assert "--start folder without --adversarial" in capsys.readouterr().err


def test_a_network_that_a_private_mean_shaped_is_no_start(tmp_path, monkeypatch):
    config = train_super_resolution.SpectralSuperResolutionConfig(features=4, num_blocks=1, private_runs=["ab" * 32])
    train_super_resolution.SpectralSuperResolution(config).save_pretrained(tmp_path / "mended")
    given = ["--public", "nowhere", "--adversarial", "0.1", "--start", str(tmp_path / "mended"), "--out", "out"]
    monkeypatch.setattr(sys, "argv", ["train_super_resolution.py", *given])
    with pytest.raises(ValueError, match="--start .* came out of the private run 'abababababab'"):
        train_super_resolution.main()


@pytest.mark.parametrize("option", ["--codec", "--prior"])
def test_no_private_model_shapes_a_public_network(tmp_path, monkeypatch, option):
    given = one_private(tmp_path, option, "--codec", "--prior")
    monkeypatch.setattr(sys, "argv", ["train_super_resolution.py", "--public", "nowhere", "--out", "out", *given])
    with pytest.raises(ValueError, match=f"{option} .* came out of the private run 'abababababab'"):
        train_super_resolution.main()


def test_a_network_of_another_task_is_refused_before_any_image_is_read(tmp_path, monkeypatch, capsys):
    config = train_super_resolution.SpectralSuperResolutionConfig(num_channels=1, features=4, num_blocks=1)
    train_super_resolution.SpectralSuperResolution(config).save_pretrained(tmp_path / "grey")
    given = ["--public", "nowhere", "--adversarial", "0.1", "--start", str(tmp_path / "grey"), "--out", "out"]
    monkeypatch.setattr(sys, "argv", ["train_super_resolution.py", *given])
    with pytest.raises(SystemExit):
        train_super_resolution.main()
    assert "'num_channels': 1" in (said := capsys.readouterr().err) and "the task is {'num_channels': 3" in said
