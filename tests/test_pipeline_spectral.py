"""Pipeline: the chain is what its parts say, nothing is sampled from bad input, what is saved is what is loaded."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pipeline_parts import coarse_model, network, pipeline, seeded
from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution

from hf_spectral_dp import SpectralTokenizerForCausalLM, modeling_spectral
from hf_spectral_dp.image_processing_spectral import SpectralImageProcessor
from hf_spectral_dp.pipeline_spectral import DPSpectralPipeline
from hf_spectral_dp.super_resolution import upscale


def swin() -> Swin2SRForImageSuperResolution:
    torch.manual_seed(0)
    config = Swin2SRConfig(image_size=8, embed_dim=8, depths=[1], num_heads=[1], window_size=4, mlp_ratio=1.0)
    return Swin2SRForImageSuperResolution(config)


@pytest.fixture
def drawn(monkeypatch) -> list[dict]:
    """The arguments of every call of the model's `sample` that draws tokens, except those that draw again."""
    calls: list[dict] = []
    sample = SpectralTokenizerForCausalLM.sample

    def spy(self, class_labels=None, num_samples=None, *others, num_tokens=None, **options):
        if num_tokens is not None and num_tokens > 0:  # the pipeline says how many; drawing again takes all
            calls.append({"labels": class_labels, "count": num_samples, **options})
        return sample(self, class_labels, num_samples, *others, num_tokens=num_tokens, **options)

    monkeypatch.setattr(SpectralTokenizerForCausalLM, "sample", spy)
    return calls


# -- the chain ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upscaling", ["nearest", "bicubic", "lanczos"])
def test_the_chain_is_sample_decode_enlarge_crop(upscaling):
    pipe = pipeline(scales=1, pad=2)
    images = pipe(class_labels=[3, 7], generator=seeded(), upscaling=upscaling, output_type="pt").images
    tokens = pipe.model.sample(torch.tensor([3, 7]), generator=seeded())
    expected = upscale(upscaling, pipe.model.decode(tokens), 4)[..., 2:14, 2:14]
    torch.testing.assert_close(images, (expected + 1) / 2)


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_super_resolution_is_applied_until_the_image_size(channels, scale):
    pipe = pipeline(scales=1, channels=channels, super_resolution=network(channels, scale))
    coarse = pipe(class_labels=1, num_images=3, generator=seeded(), output_type="latent").images
    images = pipe(class_labels=1, num_images=3, generator=seeded(), output_type="pt").images * 2 - 1
    assert coarse.shape == (3, channels, 4, 4) and images.shape == (3, channels, 16, 16)
    # the network keeps block means, whatever its weights; float32 rounding of a chain of two
    torch.testing.assert_close(F.avg_pool2d(images, 4), coarse, atol=1e-5, rtol=0)
    plain = pipe(class_labels=1, num_images=3, generator=seeded(), output_type="pt", upscaling="nearest").images * 2 - 1
    assert not torch.allclose(images, plain, atol=1e-3)


@pytest.mark.parametrize("channels", [1, 3])
def test_swin2sr_is_applied_until_the_image_size(channels):
    pipe = pipeline(scales=1, channels=channels, super_resolution=swin())
    images = pipe(num_images=2, generator=seeded(), output_type="pt").images * 2 - 1
    coarse = pipe(num_images=2, generator=seeded(), output_type="latent").images
    with torch.no_grad():
        expected = upscale(pipe.super_resolution, upscale(pipe.super_resolution, coarse))
    torch.testing.assert_close(images, expected)


def test_a_model_of_all_scales_needs_no_upscaling():
    pipe = pipeline(scales=3)
    images = pipe(num_images=2, generator=seeded(), output_type="pt").images
    torch.testing.assert_close(images * 2 - 1, pipe(num_images=2, generator=seeded(), output_type="latent").images)


@pytest.mark.parametrize("channels", [1, 3])
def test_output_types_show_the_same_images(channels):
    pipe = pipeline(channels=channels, pad=1)

    def images(output_type, **options):
        return pipe(
            class_labels=5, num_images=3, generator=seeded(), upscaling="bicubic", output_type=output_type, **options
        )

    tensor, array, pictures = images("pt").images, images("np").images, images("pil").images
    assert tensor.shape == (3, channels, 14, 14) and array.shape == (3, 14, 14, channels)
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    for picture, expected in zip(pictures, array, strict=True):
        assert picture.mode == ("L" if channels == 1 else "RGB") and picture.size == (14, 14)
        levels = np.asarray(picture).reshape(14, 14, channels)
        np.testing.assert_array_equal(levels, np.round(expected * 255))
    assert images("pil", return_dict=False)[0] == pictures


def test_none_leaves_the_coarse_image_and_crops_its_share_of_the_border():
    assert pipeline(pad=2)(num_images=1, upscaling="none").images[0].size == (6, 6)
    assert pipeline(pad=2)(num_images=1, output_type="latent").images.shape == (1, 1, 8, 8)


# -- what is sampled ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [[3, 7], (3, 7), torch.tensor([3, 7], dtype=torch.uint8), np.array([3, 7])])
def test_images_come_label_by_label_in_batches(drawn, labels):
    images = pipeline()(class_labels=labels, num_images=3, batch_size=4, output_type="latent").images
    assert images.shape[0] == 6
    assert [call["labels"].tolist() for call in drawn] == [[3, 3, 3, 7], [7, 7]]


def test_one_label_and_no_label(drawn):
    pipe = pipeline()
    pipe(class_labels=4, num_images=2, output_type="latent")
    pipe(num_images=5, batch_size=2, output_type="latent")
    assert drawn[0]["labels"].tolist() == [4, 4]
    assert [(call["labels"], call["count"]) for call in drawn[1:]] == [(None, 2), (None, 2), (None, 1)]


def test_stored_values_hold_unless_the_call_says_otherwise(drawn):
    names = ("guidance_scale", "temperature", "top_k", "top_p", "attempts")
    pipe = pipeline(guidance_scale=2.0, temperature=0.5, top_k=3, top_p=0.9, attempts=2)
    pipe(class_labels=1, output_type="latent")
    pipe(class_labels=1, guidance_scale=1.0, temperature=1.0, top_k=0, top_p=1.0, attempts=1, output_type="latent")
    pipe(output_type="latent")
    values = [[call[name] for name in names] for call in drawn]
    assert values == [[2.0, 0.5, 3, 0.9, 2], [1.0, 1.0, 0, 1.0, 1], [1.0, 0.5, 3, 0.9, 1]]  # last: no class


def test_the_generator_decides_the_images():
    pipe = pipeline()
    first, again, other = (
        pipe(class_labels=[1, 2, 3], num_images=2, generator=seeded(seed), batch_size=4, output_type="latent").images
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_progress_bar_counts_images(capsys):
    pipe = pipeline()
    pipe.set_progress_bar_config(disable=False)
    pipe(num_images=5, batch_size=2, output_type="latent")
    assert "5/5" in capsys.readouterr().err


def test_the_image_is_seen_growing_coarse_to_fine():
    pipe, seen = pipeline(scales=3), []

    def look(pipe, step, timestep, tensors):
        seen.append((step, timestep, pipe.model.decode(tensors["tokens"])))

    final = pipe(
        class_labels=[1, 2, 3], generator=seeded(), output_type="latent", batch_size=2, callback_on_step_end=look
    ).images
    assert [(step, timestep, len(images)) for step, timestep, images in seen] == [
        (0, 4, 2), (1, 8, 2), (2, 12, 2), (0, 4, 1), (1, 8, 1), (2, 12, 1)
    ]  # fmt: skip
    assert torch.equal(torch.cat([seen[2][2], seen[5][2]]), final)
    errors = [(images - final[:2]).square().mean() for _, _, images in seen[:3]]
    assert errors[0] > errors[1] > errors[2] == 0
    for count in (1, 2, 3):
        early = pipe(class_labels=[1, 2], generator=seeded(), output_type="latent", num_scales=count).images
        assert torch.equal(early, seen[count - 1][2])  # the same images, stopped earlier


@torch.no_grad()
def test_tiling_is_switched_on_and_off():
    pipe = pipeline(scales=1, super_resolution=network())
    expected = pipe(class_labels=1, generator=seeded(), output_type="pt").images
    pipe.enable_tiling(tile_size=2, tile_overlap=0)
    seams = pipe(class_labels=1, generator=seeded(), output_type="pt").images
    pipe.enable_tiling(tile_size=2, tile_overlap=6)
    torch.testing.assert_close(
        pipe(class_labels=1, generator=seeded(), output_type="pt").images, expected, atol=1e-5, rtol=0
    )
    pipe.disable_tiling()
    assert torch.equal(pipe(class_labels=1, generator=seeded(), output_type="pt").images, expected)
    assert not torch.equal(seams, expected)


def test_offloading_between_the_two_models_changes_nothing():
    pipe = pipeline(super_resolution=network())
    expected = pipe(class_labels=[1, 2], num_images=2, generator=seeded(), batch_size=3, output_type="pt").images
    pipe.enable_model_cpu_offload(device="cpu")  # the same hooks as on an accelerator
    assert torch.equal(
        pipe(class_labels=[1, 2], num_images=2, generator=seeded(), batch_size=3, output_type="pt").images, expected
    )


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"output_type": "jpeg"}, "output_type='jpeg'.*pil, np, pt, latent"),
        ({"upscaling": "magic"}, "upscaling='magic'.*model, none, nearest, bicubic, lanczos"),
        ({"upscaling": "model"}, "super_resolution=None.*coarse_size=8.*image_size=16.*bicubic"),
        ({"num_images": 0}, "num_images=0"),
        ({"num_images": 2.0}, "num_images=2.0 .*integers"),
        ({"class_labels": "3"}, "class_labels=3 must be an integer"),
        ({"class_labels": [3, None]}, r"class_labels=\[3, None\]"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"class_labels": [*range(9), 10]}, "num_classes=10"),
        ({"class_labels": -1}, "num_classes=10"),
        ({"class_labels": []}, r"class_labels=\[\]"),
        ({"class_labels": [0.5]}, r"class_labels=\[0.5\]"),
        ({"class_labels": True}, "class_labels=True"),
        ({"class_labels": torch.zeros(2, 2, dtype=torch.long)}, "class_labels="),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0"),
        ({"guidance_scale": float("nan"), "class_labels": 1}, "guidance_scale=nan"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_k": 1.5}, "top_k=1.5 a whole number"),
        ({"attempts": 1.5}, "attempts=1.5 a whole number"),
        ({"num_scales": 1.5}, "num_scales=1.5"),
        ({"guidance_scale": "2"}, "guidance_scale='2' must be finite"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"num_scales": 0}, r"num_scales=0 must be in \[1, 2\]"),
        ({"num_scales": 3}, "num_scales=3"),
        ({"generator": [torch.Generator()]}, "generator=.*torch.Generator"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sampled(monkeypatch, inputs, message):
    def draw(*_):
        pytest.fail("a token was drawn")

    monkeypatch.setattr(modeling_spectral, "draw", draw)
    with pytest.raises(ValueError, match=message):
        pipeline()(**{"upscaling": "bicubic", "batch_size": 4, **inputs})


def test_training_mode_is_left_when_built_and_refused_when_called():
    model = coarse_model().train()
    pipe = DPSpectralPipeline(model, SpectralImageProcessor(image_size=16), network().train())
    assert not pipe.model.training and not pipe.super_resolution.training
    model.train()  # as a trainer does that goes on
    with pytest.raises(ValueError, match="training=True.*eval"):
        pipe()


def test_parts_that_do_not_fit_are_refused():
    model, processor = coarse_model(), SpectralImageProcessor(image_size=16)
    with pytest.raises(ValueError, match="image_size=16 in the model but 32"):
        DPSpectralPipeline(model, SpectralImageProcessor(image_size=32))
    with pytest.raises(ValueError, match="num_channels=1 in the model but 3"):
        DPSpectralPipeline(model, SpectralImageProcessor(image_size=16, num_channels=3))
    with pytest.raises(ValueError, match="num_channels=3 in super_resolution but 1"):
        DPSpectralPipeline(model, processor, network(channels=3))
    with pytest.raises(ValueError, match="upscales by 4.*coarse_size=8.*image_size=16"):
        DPSpectralPipeline(model, processor, network(scale=4))
    with pytest.raises(TypeError, match="SpectralTokenizerForCausalLM.*no integer `upscale`"):
        DPSpectralPipeline(model, processor, coarse_model())
    with pytest.raises(TypeError, match="super_resolution is a DPSpectralPipeline, .*upscaling="):
        DPSpectralPipeline(model, processor, DPSpectralPipeline(model, processor))
    with pytest.raises(TypeError, match="merge_and_unload"):
        DPSpectralPipeline(torch.nn.Sequential(model), processor)


# -- saved and loaded --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("super_resolution", [None, network, swin])
def test_what_is_saved_is_what_is_loaded(tmp_path, super_resolution):
    pipe = pipeline(
        pad=2, super_resolution=super_resolution and super_resolution(), guidance_scale=1.5,
        temperature=[0.8, 0.3], top_k=4, attempts=2,
    )  # fmt: skip
    upscaling = "model" if super_resolution else "lanczos"
    expected = pipe(class_labels=[1, 2], num_images=2, generator=seeded(), upscaling=upscaling).images
    pipe.save_pretrained(tmp_path)
    again = DPSpectralPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again(class_labels=[1, 2], num_images=2, generator=seeded(), upscaling=upscaling).images == expected
    names = ("guidance_scale", "temperature", "top_k", "top_p", "attempts")
    assert [again.config[name] for name in names] == [1.5, [0.8, 0.3], 4, 1.0, 2]
    assert type(again.super_resolution) is type(pipe.super_resolution)


def test_half_precision_leaves_the_codec_alone(tmp_path):
    """So that tokens become the same images; everything else is in the precision asked for."""
    pipeline(super_resolution=network()).save_pretrained(tmp_path)
    half = DPSpectralPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert half.model.lm_head.weight.dtype == half.super_resolution.dtype == torch.bfloat16
    assert {buffer.dtype for buffer in half.model.codec.buffers()} == {torch.float32}
    tokens = half.model.sample(torch.tensor([3]), generator=seeded())
    assert torch.equal(half.model.decode(tokens), DPSpectralPipeline.from_pretrained(tmp_path).model.decode(tokens))
    assert half(class_labels=3, generator=seeded()).images[0].size == (16, 16)


@pytest.mark.slow  # a new process imports everything again
def test_a_fresh_process_needs_one_import(tmp_path):
    pipe = pipeline(pad=2, super_resolution=network(), temperature=0.8)
    pipe.save_pretrained(tmp_path / "pipe")
    pipe(class_labels=3, generator=seeded()).images[0].save(tmp_path / "expected.png")
    program = """if True:
        import sys, torch
        from hf_spectral_dp import DPSpectralPipeline
        later = ("datasets", "sklearn", "opacus", "dp_accounting", "jsonschema", "hf_spectral_dp.trainer")
        assert not [name for name in later if name in sys.modules]  # who draws images does not wait for these
        pipe = DPSpectralPipeline.from_pretrained(sys.argv[1])
        pipe(class_labels=3, generator=torch.Generator().manual_seed(0)).images[0].save(sys.argv[2])
    """
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "pipe"), str(tmp_path / "image.png")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert Image.open(tmp_path / "image.png") == Image.open(tmp_path / "expected.png")


def test_the_index_names_importable_modules(tmp_path):
    pipeline(super_resolution=swin()).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["model"] == ["hf_spectral_dp.modeling_spectral", "SpectralTokenizerForCausalLM"]
    assert index["image_processor"] == ["hf_spectral_dp.image_processing_spectral", "SpectralImageProcessor"]
    assert index["super_resolution"] == ["transformers", "Swin2SRForImageSuperResolution"]
