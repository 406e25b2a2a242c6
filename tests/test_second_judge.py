"""The second judge of sample grids: it reads them as they were written."""

import pytest
import torch

from benchmarks import second_judge
from benchmarks.quality_data import IMAGE_SETS
from benchmarks.quality_figures import save_grid


def test_a_grid_is_read_as_it_was_written(tmp_path):
    images = torch.randint(256, (70, 3, 32, 32), generator=torch.Generator().manual_seed(0)) / 127.5 - 1
    save_grid(images, IMAGE_SETS["cifar10"], tmp_path / "grid.png")
    assert torch.allclose(second_judge.cut(tmp_path / "grid.png", 32), images[:60], atol=1e-6)


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
    grids = {path.name for path in second_judge.RESULTS.glob("quality_faces_*.png")}
    assert len(grids) > 10 and all(second_judge.NAME.fullmatch(name) for name in grids)
