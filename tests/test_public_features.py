"""The public networks that images are seen through: what their features are, and that the bundled eye was trained."""

import json

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageToImage

from hf_spectral_dp import bundled_model
from hf_spectral_dp.metrics.features import PublicFeatures
from hf_spectral_dp.metrics.public_features import (
    CHECKPOINT,
    EYE,
    SHIFT,
    PublicFeatureConfig,
    PublicFeatureNetwork,
    random_views,
)
from hf_spectral_dp.super_resolution import upscale_to


def eye() -> PublicFeatureNetwork:
    """A small one with statistics of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = PublicFeatureNetwork(PublicFeatureConfig(16, (2, 3, 4, 5), 7, "resnet9"))
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        network.feature_mean.normal_()
        network.feature_scale.uniform_(0.5, 2)
    return network.eval()


def test_a_resnet9_is_what_its_plan_says():
    """By hand, from its weights in order: conv, norm, relu; largest of 2 x 2; residual blocks of two convolutions."""
    network = eye()
    state = iter((name, values) for name, values in network.state_dict().items() if "feature_" not in name)
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def layer(hidden: Tensor) -> Tensor:
        values = dict(next(state) for _ in range(6))
        kernel, scale, shift, mean, variance, _ = values.values()
        hidden = F.conv2d(hidden, kernel, padding=1)
        return F.relu(F.batch_norm(hidden, mean, variance, scale, shift))

    def double(hidden: Tensor) -> Tensor:
        return hidden + layer(layer(hidden))

    second = double(F.max_pool2d(layer(layer(images)), 2))
    third = F.max_pool2d(layer(second), 2)
    fourth = double(F.max_pool2d(layer(third), 2))
    weight, bias = (next(state)[1] for _ in range(2))
    with torch.no_grad():
        assert torch.allclose(network(images), F.linear(fourth.amax((2, 3)), weight, bias), atol=1e-5)
        seen = network.pooled(network.maps(network.prepare(images)))
    assert torch.allclose(seen, torch.cat([third.mean((2, 3)), fourth.mean((2, 3)), fourth.amax((2, 3))], 1), atol=1e-5)
    assert seen.shape[1] == network.feature_mean.numel() == 4 + 5 + 5


@torch.no_grad()
def test_its_features_are_those_of_an_image_and_of_its_mirror_image():
    network = eye()
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    alone = [network.scaled(network.maps(network.prepare(some))) for some in (images, images.flip(-1))]
    assert not torch.allclose(*alone, atol=1e-3)
    assert torch.allclose(network.features(images), (alone[0] + alone[1]) / 2, atol=1e-6)
    assert torch.allclose(network.features(images), network.features(images.flip(-1)), atol=1e-6)


@torch.no_grad()
def test_features_beside_maps_are_those_without(tmp_path):
    eye().save_pretrained(tmp_path)
    extractor, images = PublicFeatures(tmp_path), torch.rand(3, 3, 16, 16) * 2 - 1
    assert torch.equal(extractor.maps(images)[0], extractor(images))


@torch.no_grad()
@pytest.mark.parametrize("folder", [CHECKPOINT, EYE], ids=lambda folder: folder.name)
def test_a_bundled_network_works_as_it_is_loaded_by_default(folder):
    """In half precision, as it was saved."""
    network, images = PublicFeatureNetwork.from_pretrained(folder).eval(), torch.rand(3, 3, 16, 16) * 2 - 1
    exact = PublicFeatureNetwork.from_pretrained(folder, dtype=torch.float32).eval().features(images)
    found = network.features(images)
    assert network.dtype == torch.float16 and found.dtype == torch.float32
    assert torch.allclose(found, exact, atol=0.05 * float(exact.abs().max()))


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"architecture": "vgg"}, "architecture='vgg' is unknown; choose 'strided' or 'resnet9'"),
        ({"architecture": "resnet9", "widths": (2, 3, 4)}, "are 3; 'resnet9' has four"),
        ({"architecture": "resnet9", "widths": (2, 3, 4, 5), "image_size": 12}, "image_size=12 is halved three times"),
    ],
)
def test_a_shape_that_is_none_is_refused(fields, rule):
    with pytest.raises(ValueError, match=rule.replace("(", r"\(")):
        PublicFeatureConfig(**fields)


@torch.no_grad()
def test_a_network_saved_before_there_were_two_kinds_is_read_as_it_was(tmp_path):
    network = PublicFeatureNetwork(PublicFeatureConfig(16, (2, 2, 3, 4, 5), 7)).eval()
    network.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields.pop("architecture") == "strided"
    (tmp_path / "config.json").write_text(json.dumps(fields))
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(PublicFeatureNetwork.from_pretrained(tmp_path).features(images), network.features(images))


@torch.no_grad()
def test_the_bundled_eye_knows_squares_of_a_photo_behind_a_codec_again():
    """Whose neighbour in features, among squares as they are, is the same square; far more often than by chance."""
    photo = torch.from_numpy(load_sample_images().images[0].copy()).permute(2, 0, 1).float() / 127.5 - 1
    squares = photo.unfold(1, 64, 64).unfold(2, 64, 64).flatten(1, 2).transpose(0, 1)[:40]
    model = AutoModelForCausalLM.from_pretrained(bundled_model("photos")).eval()
    detail = AutoModelForImageToImage.from_pretrained(bundled_model("photos-super-resolution")).eval()
    shown = upscale_to(64, detail, model.decode(model.codec.encode(squares)))
    network = PublicFeatureNetwork.from_pretrained(EYE, dtype=torch.float32).eval()
    sharp, coarse = (F.normalize(network.features(some), dim=1) for some in (squares, shown))
    known = (coarse @ sharp.T).argmax(1) == torch.arange(len(squares))
    assert known.float().mean() > 0.5


def test_views_are_cuts_of_the_image_or_its_mirror_image_with_a_mirrored_border():
    images = torch.arange(2 * 3 * 32 * 32, dtype=torch.float32).view(2, 3, 32, 32)
    shown = random_views(images.repeat(50, 1, 1, 1), torch.Generator().manual_seed(0))
    looks = set()
    for index, view in enumerate(shown):
        image = images[index % 2]
        cuts = {
            (flipped, y, x): wide[:, y : y + 32, x : x + 32]
            for flipped, look in ((False, image), (True, image.flip(-1)))
            for wide in [F.pad(look[None], [SHIFT] * 4, mode="reflect")[0]]
            for y in range(2 * SHIFT + 1)
            for x in range(2 * SHIFT + 1)
        }
        found = [key for key, cut in cuts.items() if torch.equal(cut, view)]
        assert found, index
        looks.add(found[0])
    assert {flipped for flipped, _, _ in looks} == {False, True}
    assert len({y for _, y, _ in looks}) > SHIFT and len({x for _, _, x in looks}) > SHIFT
