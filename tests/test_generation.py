"""`hf-spectral-dp generate` draws what the pipeline draws, and writes nothing on bad input."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model
from PIL import Image
from text_parts import text_encoder, text_model

from hf_spectral_dp import DPSpectralPipeline, SpectralImageProcessor
from hf_spectral_dp.cli import main
from hf_spectral_dp.generation import image_grid

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    DPSpectralPipeline(tiny_model(), SpectralImageProcessor(image_size=16, num_channels=1)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("temperature", [0.7, [1.0, 0.5, 0.1]])
def test_the_files_are_the_images_of_the_pipeline(saved, tmp_path, capsys, temperature):
    given = ["--temperature", *map(str, temperature if isinstance(temperature, list) else [temperature])]
    options = ["--class_labels", "3", "7", "--num_images", "2", "--seed", "5", *given, "--top_p", "0.9"]
    assert main(["generate", str(saved), "--out", str(tmp_path / "out" / "deep"), *options]) == 0
    assert "4 images in" in capsys.readouterr().out
    generator = torch.Generator().manual_seed(5)
    pipeline = DPSpectralPipeline.from_pretrained(saved)
    how = {"num_images": 2, "generator": generator, "temperature": temperature, "top_p": 0.9}
    expected = pipeline(class_labels=[3, 7], **how).images
    names = ["00000_label3.png", "00001_label3.png", "00002_label7.png", "00003_label7.png"]
    assert sorted(path.name for path in (tmp_path / "out" / "deep").iterdir()) == [*names, "grid.png"]
    for name, image in zip(names, expected, strict=True):
        assert np.array_equal(Image.open(tmp_path / "out" / "deep" / name), image)
    assert Image.open(tmp_path / "out" / "deep" / "grid.png").size == (2 * 68 + 4, 2 * (68 + 14) + 4)


def test_every_class_by_default_and_prompts_for_a_model_with_text(saved, tmp_path):
    assert main(["generate", str(saved), "--out", str(tmp_path / "classes"), "--num_images", "1"]) == 0
    assert len(list((tmp_path / "classes").glob("*_label?.png"))) == 10
    processor = SpectralImageProcessor(image_size=16, num_channels=1)
    pipeline = DPSpectralPipeline(text_model(1), processor, None, *text_encoder(tmp_path / "encoder"))
    pipeline.save_pretrained(tmp_path / "text")
    given = ["--prompt", "a red circle", "a blue square", "--negative_prompt", "green", "--guidance_scale", "2"]
    assert main(["generate", str(tmp_path / "text"), "--out", str(tmp_path / "prompts"), *given]) == 0
    assert len(list((tmp_path / "prompts").iterdir())) == 2 * 4 + 1


def test_a_grid_by_hand():
    """Two images of one pixel, 64 times enlarged, side by side with 4 pixels around them."""
    sheet = np.asarray(image_grid([Image.new("L", (1, 1), value) for value in (0, 90)], columns=2))
    assert sheet.shape == (72, 140, 3)
    assert (sheet[4:68, 4:68] == 0).all() and (sheet[4:68, 72:136] == 90).all()
    assert (sheet[:4] == 255).all() and (sheet[:, 68:72] == 255).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--class_labels", "10"], "num_classes=10"),
        (["--num_images", "0"], "num_images=0"),
        (["--temperature", "0"], "temperature=0.0 must be > 0"),
        (["--prompt", "a cat"], "prompt"),
        (["--negative_prompt", "a cat"], "negative_prompt"),
        (["--device", "foo"], "device='foo' cannot be used here (Expected one of cpu, cuda"),
        (["--device", "cuda:99"], "device='cuda:99' cannot be used here"),
        (["--revision", "main"], "--revision main is for a Hub id"),
        (["--seed", str(2**64)], "--seed 18446744073709551616 has more than 64 bits"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(saved, tmp_path, capsys, options, message):
    assert main(["generate", str(saved), "--out", str(tmp_path / "out"), *options]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_files_are_left_alone_and_a_missing_pipeline_is_named(saved, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    assert main(["generate", str(saved), "--out", str(tmp_path / "mine")]) == 1
    assert "holds other files; name a new folder" in capsys.readouterr().err
    assert main(["generate", str(saved / "none"), "--out", str(tmp_path / "out")]) == 1
    assert "none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
