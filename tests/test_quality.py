"""The quality benchmark: private images stay out of everything public, and its rivals train by the real mechanism."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForImageToImage

from benchmarks import quality, quality_critic
from benchmarks.judge import seen
from benchmarks.quality import SIZES, Folders, photo_settings, public_generator, temperature
from benchmarks.quality_data import IMAGE_SETS, check_public
from benchmarks.quality_figures import coarse_distance, figures
from benchmarks.quality_methods import DiffusionGenerator, TokenGenerator, train_privately, train_publicly
from hf_spectral_dp import SpectralConfig, bundled_model
from hf_spectral_dp.bundled import CHECKPOINTS
from hf_spectral_dp.feature_rows import draw_choices
from hf_spectral_dp.metrics.features import PublicFeatures
from hf_spectral_dp.metrics.utility import DIFFERENT
from hf_spectral_dp.super_resolution import upscale, upscale_to

ROOT = Path(__file__).parents[1]
PUBLIC_FIELDS = ("prior", "prior_source", "super_resolution", "super_resolution_source", "public", "public_source")


def public_claims() -> dict[str, str]:
    """Everything in the repository that says from which public images something was made, by where it says so."""
    claims = {f"IMAGE_SETS[{name!r}]": images.public for name, images in IMAGE_SETS.items()}
    for path in (ROOT / "examples" / "configs").glob("*.yaml"):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        parts = config["model"] | config.get("critic", {})
        claims |= {f"{path.name}: {field}": str(parts[field]) for field in PUBLIC_FIELDS if field in parts}
    for path in CHECKPOINTS.glob("*/README.md"):
        claims[f"{path.parent.name}/README.md"] = path.read_text(encoding="utf-8")
    return claims


def test_no_config_calls_a_private_set_public():
    # A prior may be *named* after the private images it is meant for: runs/prior-faces.
    claims = {where: claim for where, claim in public_claims().items() if not claim.startswith("runs/")}
    assert len(claims) >= 12
    for where, claim in claims.items():
        try:
            check_public(claim)
        except ValueError as error:
            raise AssertionError(where) from error


@pytest.mark.parametrize("source", ["../shared/data/mnist", "uoft-cs/CIFAR10", "photos, and faces of the same people"])
def test_a_private_set_is_noticed(source):
    with pytest.raises(ValueError, match="plays a private set"):
        check_public(source)


def digits(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 1, 16, 16, generator=generator) * 2 - 1, torch.arange(count) % 2


def generators(images: torch.Tensor):
    torch.manual_seed(0)
    size = dict(num_channels=1, num_classes=2, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    ours = SpectralConfig(image_size=16, levels=2, patch_sizes=[2, 2], codebook_sizes=[8, 8], **size)
    raster = SpectralConfig(image_size=32, levels=1, patch_sizes=[4], codebook_sizes=[8], **size)
    pixels = SpectralConfig(image_size=16, levels=2, patch_sizes=[1], codebook_sizes=[8], **size)

    def enlarged(coarse: torch.Tensor) -> torch.Tensor:
        return coarse if coarse.shape[-1] == 16 else upscale("bicubic", coarse, 16 // coarse.shape[-1])

    return {
        "ours": TokenGenerator.from_public_images(ours, images, enlarged),
        "raster": TokenGenerator.from_public_images(raster, images, enlarged, enlarge=2),
        "pixels": TokenGenerator.from_public_images(pixels, images, enlarged),
        "diffusion": DiffusionGenerator(1, 16, 8, 2, enlarged, 2, (8, 16)),
    }


def test_raster_tokens_are_patches_of_pixels():
    """Showing every pixel as a 2 x 2 block makes the approximation band the image: one token per 4 x 4 pixels."""
    images, labels = digits(40)
    raster = generators(images)["raster"]
    for index in range(8):  # code words that are patches of the first image
        row, column = divmod(index, 4)
        patch = images[0, 0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        raster.model.codec.codebook(0)[index] = 2 * patch.flatten()
    rows = raster.rows(images[:1], labels[:1])
    assert rows[0, 1:9].tolist() == list(range(8))
    torch.testing.assert_close(raster.decoded(rows)[0, 0, :8], images[0, 0, :8])


def test_every_method_trains_with_and_without_privacy():
    images, labels = digits(64)
    for name, generator in generators(images).items():
        rows = generator.rows(images, labels)
        assert train_publicly(generator, rows, 2, batch_size=8, hide=0.5).flops > 0
        before = {key: value.clone() for key, value in generator.model.state_dict().items()}
        cost = train_privately(
            generator, rows, 2.0, 1e-3, max_steps=2, expected_batch_size=16, micro_batch_size=16, learning_rate=0.1
        )
        assert cost.epsilon is not None and 0 < cost.epsilon <= 2, name
        changed = {key for key, value in generator.model.state_dict().items() if not torch.equal(value, before[key])}
        if name == "diffusion":  # only what DP latent diffusion trains
            assert changed and all("attentions" in key or "class_embedding" in key for key in changed)
        else:
            assert "lm_head.weight" in changed
        drawn = generator.sample(torch.tensor([0, 1, 1]), torch.Generator().manual_seed(0))
        assert drawn.shape == (3, 1, 16, 16) and bool((drawn.abs() <= 1).all()), name


def test_the_denoiser_reads_labels_and_hides_them():
    images, _ = digits(50)
    generator = generators(images)["diffusion"]
    rows = generator.rows(images, torch.full((50,), 1))
    assert set(generator.hide_labels(rows, 1.0)[:, 0].tolist()) == {-1.0}
    assert torch.equal(generator.hide_labels(rows, 0.0), rows)
    assert math.isclose(float(rows[0, 1]), float(images[0, 0, :2, :2].mean()), abs_tol=1e-6)


def test_classes_start_from_what_is_known_without_labels():
    for name, generator in generators(digits(40)[0]).items():
        generator.name_classes()
        if isinstance(generator, DiffusionGenerator):
            table, null, classes = generator.model.unet.class_embedding.weight, 2, [0, 1]
        else:
            config = generator.model.config
            table, null = generator.model.model.embed_tokens.weight, config.null_token_id
            classes = config.class_token_ids
        assert all(torch.equal(table[label], table[null]) for label in classes), name
        assert bool(table[null].any()), name


def test_the_coarse_distance_sees_colours_and_no_detail():
    real = torch.rand(200, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    grain = torch.tensor([[0.2, -0.2], [-0.2, 0.2]]).repeat(8, 8)
    (same,), (darker,) = coarse_distance(real, real + grain), coarse_distance(real, real - 0.1)
    assert same["value"] == pytest.approx(0, abs=1e-3)
    assert darker["value"] == pytest.approx(64 * 0.01, rel=1e-2)  # the shift of 64 means
    assert not list(coarse_distance(real[:60], real))


def test_a_judge_is_asked_about_the_images_that_are_compared():
    """Through the features that all other distances are taken of, it finds the same distance."""
    generator = torch.Generator().manual_seed(0)
    real, drawn = (torch.rand(90, 3, 64, 64, generator=generator) * scale - 1 for scale in (2.0, 1.6))
    labels, faces = torch.arange(90) % 2, IMAGE_SETS["faces"]
    judge = (PublicFeatures(), seen(PublicFeatures(), real))
    rows = {
        row["metric"]: row
        for row in figures((drawn, labels), (real, labels), faces, 0, DIFFERENT, 1, 2, 80, judges=[judge])
    }
    judged, known = rows["kernel_distance, public-features"], rows["kernel_distance"]
    assert judged["value"] == pytest.approx(known["value"], rel=1e-3)
    assert judged["low"] < judged["value"] < judged["high"] and judged["n"] == 80


def photos() -> tuple[torch.Tensor, torch.Tensor]:
    """Noise of the size of faces, without labels."""
    return torch.rand(40, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1, torch.full((40,), -1)


@pytest.mark.parametrize(("name", "wide"), [("faces", False), ("faces", True), ("cifar10", False), ("faces128", True)])
def test_rivals_of_colour_images_end_with_the_bundled_network(name, wide):
    """At its own side of 64, whatever side they are compared at; CIFAR-10 by the small one but on a GPU."""
    images = IMAGE_SETS[name]
    pixels, labels = photos()
    public = torch.nn.functional.interpolate(pixels, (images.size, images.size), mode="area"), labels
    size = replace(SIZES["quick"], public_steps=1, wide=wide)
    folder = bundled_model(f"photos{'-wide' * (wide or name != 'cifar10')}-super-resolution")
    network = AutoModelForImageToImage.from_pretrained(folder).eval()
    for method, side in {"ours": 16, "raster": images.size, "pixels": 8, "pixels16": 16, "diffusion": 16}.items():
        generator, cost = public_generator(method, name, images, public, size, Folders())
        assert (cost.flops == 0) == (method == "ours"), method
        coarse = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
        with torch.no_grad():
            averaged = torch.nn.functional.avg_pool2d(coarse, side // 16) if method == "raster" else coarse
            detailed = generator.upscaler(coarse)
            expected, plain = (
                torch.nn.functional.avg_pool2d(made, 64 // images.size)
                if images.size < 64
                else upscale_to(images.size, "bicubic", made)
                for made in (upscale_to(64, how, averaged) for how in (network, "bicubic"))
            )
        torch.testing.assert_close(detailed, expected, msg=method)
        assert detailed.shape == (2, 3, images.size, images.size)
        assert not torch.allclose(detailed, plain, atol=0.01)
        if method == "ours":
            assert generator.model.config.hidden_size == (192 if wide else 64)
            rows = generator.rows(public[0][:2], torch.tensor([0, 1]))
            assert generator.model.decode(rows[:, 1:]).shape == coarse.shape
            blocks = torch.nn.functional.avg_pool2d(public[0][:2], images.size // 16)
            assert (generator.model.decode(rows[:, 1:]) - blocks).abs().mean() < 0.2  # what the codec was shown


def test_a_public_model_that_was_kept_is_found_with_its_codec(tmp_path):
    images, public = IMAGE_SETS["faces"], photos()
    size, labels = replace(SIZES["quick"], public_steps=1), torch.tensor([0, 1])
    for method in ("pixels", "diffusion"):
        made, cost = public_generator(method, "faces", images, public, size, Folders(keep=tmp_path))
        found, same_cost = public_generator(method, "faces", images, public, size, Folders(keep=tmp_path))
        assert (same_cost.seconds, same_cost.flops) == (cost.seconds, cost.flops)
        rows = [generator.rows(public[0], torch.zeros(40, dtype=torch.long)) for generator in (made, found)]
        assert torch.equal(*rows), method
        drawn = [generator.sample(labels, torch.Generator().manual_seed(0)) for generator in (made, found)]
        torch.testing.assert_close(*drawn)
    assert len(list(tmp_path.iterdir())) == 2


def test_sizes_for_a_gpu_start_from_the_wide_model():
    assert {name for name, size in SIZES.items() if size.wide} == {name for name in SIZES if name.endswith("-gpu")}


def test_schedules_fit_the_noise():
    """At epsilon 1 no more steps than help, at a lower rate where they are more; the diffusion model keeps its own."""
    settings = {(e, n): photo_settings("ours", e, n) for e in (1.0, 10.0) for n in (60, 240)}
    assert [settings[key]["max_steps"] for key in settings] == [60, 120, 60, 240]
    assert [settings[key]["learning_rate"] for key in settings] == [0.3, 0.15, 0.5, 0.5]
    assert "learning_rate" not in photo_settings("diffusion", 1.0, 60)


@pytest.mark.parametrize("scales", [1, 2, 3, 4])
def test_ours_has_a_temperature_per_scale(scales):
    faces, grey = IMAGE_SETS["faces"], IMAGE_SETS["mnist"]
    assert temperature("ours", faces, scales) == [1.0, 0.3, 0.1, 0.1][:scales]
    assert temperature("pixels16", faces, 1) == temperature("ours", grey, scales) == 1.0


def test_every_row_says_how_its_images_were_made(monkeypatch):
    """The whole benchmark on noise in the place of digits: what was drawn has settings, real images have none."""
    generator = torch.Generator().manual_seed(0)

    def noise(images, data, split, count=40):
        return torch.rand(40, 1, 32, 32, generator=generator) * 2 - 1, torch.arange(40) % 10

    tiny = replace(
        SIZES["quick"], each=4, public_steps=1, steps=1, batch=8, twin_steps=1, classifier_steps=1, compared=40,
        denoising_steps=1,
    )  # fmt: skip
    monkeypatch.setattr(quality, "private_images", noise)
    monkeypatch.setattr(quality, "public_images", noise)
    monkeypatch.setitem(quality.SIZES, "quick", tiny)
    methods = ["ours", "ceiling", "floor", "diffusion"]
    rows = list(quality.compare("mnist", methods, [8.0, math.inf], "quick", Path(), None, Folders()))
    made = {(row["method"], row["epsilon"]): row for row in rows}
    assert made.keys() == {
        ("ceiling", "inf"), ("floor", 0.0), ("ours", 8.0), ("ours", "inf"), ("diffusion", 8.0), ("diffusion", "inf")
    }  # fmt: skip
    assert 0 < made["ours", 8.0]["epsilon_spent"] <= 8 and made["ours", "inf"]["epsilon_spent"] is None
    for (method, _), row in made.items():
        if method == "ceiling":
            assert "temperature" not in row and "denoising_steps" not in row
        elif method == "diffusion":
            assert row["denoising_steps"] == 1
        else:
            assert (row["temperature"], row["attempts"], row["critic"]) == (1.0, quality.ATTEMPTS, False)


def test_where_only_images_count_ours_learns_detail_and_chooses_by_the_private_mean(monkeypatch):
    """Within one budget, the twin by the exact mean; where classifiers learn it is the other critic's turn."""
    generator = torch.Generator().manual_seed(0)

    def noise(images, data, split, count=12):
        return torch.rand(12, 3, 64, 64, generator=generator) * 2 - 1, torch.arange(12) % 2

    tiny = replace(
        SIZES["photos"], each=6, public_steps=1, steps=1, batch=4, micro_batch=4, twin_steps=1, compared=12,
        detail_steps=2,
    )  # fmt: skip
    monkeypatch.setattr(quality, "private_images", noise)
    monkeypatch.setattr(quality, "public_images", noise)
    monkeypatch.setattr(quality, "figures", lambda *given, **settings: iter([{"metric": "none"}]))
    monkeypatch.setitem(quality.SIZES, "photos", tiny)
    monkeypatch.setattr(quality_critic, "draw_choices", partial(draw_choices, count=4))
    monkeypatch.setattr(quality_critic, "CHOICES", 2)
    monkeypatch.setattr(quality_critic, "MENDING", replace(quality_critic.MENDING, batch_size=2))
    rows = list(quality.compare("faces", ["ours", "floor"], [8.0, math.inf], "photos", Path(), None, Folders()))
    drawn = {(row["method"], row["epsilon"]): row for row in rows if row["metric"] == "images per second"}
    for key in (("ours", 8.0), ("ours", "inf")):
        assert (drawn[key]["critic"], drawn[key]["attempts"], drawn[key]["detail_steps"]) == ("MeanCritic", 2, 2)
    floor = drawn["floor", 0.0]
    assert (floor["critic"], floor["attempts"]) == (False, 1) and "detail_steps" not in floor
    assert 7.9 < drawn["ours", 8.0]["epsilon_spent"] <= 8 and drawn["ours", "inf"]["epsilon_spent"] is None
