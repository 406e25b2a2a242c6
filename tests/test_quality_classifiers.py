"""The larger classifiers of the quality benchmark: what they learn, what they see, and that nothing is chosen."""

import itertools

import pytest
import torch

from benchmarks import quality_classifiers
from benchmarks.quality_classifiers import BATCH, LARGE, _batches, large_utility
from benchmarks.quality_data import IMAGE_SETS
from benchmarks.quality_figures import figures


def striped(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (count, 3, 32, 32) of noise with stripes that lie or stand, and which of both."""
    labels = torch.arange(count) % 2
    stripes = torch.where(torch.arange(32) % 8 < 4, 0.5, -0.5).expand(32, 32)
    images = torch.stack([stripes.T if label else stripes for label in labels])[:, None].repeat(1, 3, 1, 1)
    return (images + 0.3 * torch.randn(images.shape, generator=generator)).clamp(-1, 1), labels


@pytest.mark.parametrize("name", LARGE)
def test_each_learns_what_mirroring_and_moving_leave_as_it_is(name, monkeypatch):
    monkeypatch.setattr(quality_classifiers, "BATCH", 32)  # for speed
    generator = torch.Generator().manual_seed(0)
    seen, unseen = striped(256, generator), striped(40, generator)
    (result,) = large_utility(*seen, *unseen, architectures=[name], seeds=1, steps=60)
    assert result.architecture == name and result.n == 40
    assert result.accuracy > 0.9, result


def test_test_images_neither_choose_nor_change_anything():
    """Whatever is beside them, and whatever their labels, the same are right."""
    generator = torch.Generator().manual_seed(0)
    seen, (test, truth) = striped(128, generator), striped(60, generator)

    def right(some: slice, labels: torch.Tensor) -> float:
        (result,) = large_utility(*seen, test[some], labels[some], architectures=["resnet9"], seeds=1, steps=2)
        return result.accuracy * result.n

    whole = right(slice(None), truth)
    assert right(slice(30), truth) + right(slice(30, None), truth) == pytest.approx(whole, abs=0.01)
    assert right(slice(None), 1 - truth) == pytest.approx(60 - whole, abs=0.01)


def test_every_image_comes_once_before_any_comes_again():
    batches = _batches(3 * BATCH + 5, torch.Generator().manual_seed(0))
    seen = torch.cat([next(batches) for _ in range(3)])
    assert len(seen.unique()) == 3 * BATCH
    assert len(next(batches)) == BATCH
    assert sorted(next(_batches(5, torch.Generator().manual_seed(0))).tolist()) == [0, 1, 2, 3, 4]


def test_the_benchmark_takes_them_for_colour_photos_only():
    """Digits are not mirrored, and have classifiers of their own."""
    labels = torch.arange(40) % 2
    for name, channels, expected in (("cifar10", 3, [*LARGE]), ("mnist", 1, ["residual", "mixer"])):
        images = torch.rand(40, channels, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
        given = {"classifier_steps": 4, "architectures": ("residual", "mixer"), "large_steps": 1}
        rows = figures((images, labels), (images, labels), IMAGE_SETS[name], seeds=1, block=1, compared=40, **given)
        accuracies = [row["metric"] for row in itertools.takewhile(lambda row: "accuracy" in row["metric"], rows)]
        assert accuracies == [*(f"accuracy, {each}" for each in expected), "accuracy"]
