"""Train on one set, test on another: right where the sets agree, at chance where they do not."""

import pytest
import torch

from hf_spectral_dp.metrics import utility
from hf_spectral_dp.metrics.utility import ARCHITECTURES, DIFFERENT, PUBLISHED, classifier_accuracy, classifier_utility


def stripes(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Class 0: horizontal stripes, class 1: vertical ones, both in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (count,), generator=generator)
    wave = torch.sign(torch.sin(torch.arange(16.0)))
    horizontal, vertical = wave[:, None].expand(16, 16), wave[None].expand(16, 16)
    images = torch.where(labels.view(-1, 1, 1).bool(), vertical, horizontal)[:, None]
    return (images + torch.randn(images.shape, generator=generator)).clamp(-1, 1), labels


def test_learns_what_the_sets_share_and_repeats_itself():
    train, test = stripes(200, 0), stripes(100, 1)
    state = torch.random.get_rng_state()
    accuracy = classifier_accuracy(*train, *test, steps=40)
    assert accuracy > 0.95
    assert torch.equal(torch.random.get_rng_state(), state)
    assert classifier_accuracy(*train, *test, steps=40) == accuracy


def test_every_architecture_learns_and_every_class_has_its_result():
    train, (images, labels) = stripes(300, 0), stripes(100, 1)
    results = classifier_utility(*train, images, labels, architectures=list(ARCHITECTURES), seeds=2, steps=24)
    assert [result.architecture for result in results] == list(ARCHITECTURES) and len(results) == 5
    for result in results:
        assert result.accuracy > 0.9 and len(result.accuracies) == 2 and result.n == 100
        assert result.low <= result.accuracy <= result.high
        assert [one.n for one in result.per_class] == [int((labels == label).sum()) for label in (0, 1)]
        by_class = sum(one.accuracy * one.n for one in result.per_class) / 100
        assert by_class == pytest.approx(result.accuracy, abs=1e-3)


def test_three_architectures_unless_others_are_asked_for():
    train, test = stripes(60, 0), stripes(60, 1)
    assert [one.architecture for one in classifier_utility(*train, *test, seeds=1, steps=4)] == list(DIFFERENT)
    assert {*DIFFERENT, *PUBLISHED} == {*ARCHITECTURES} and len(PUBLISHED) == 3


@pytest.mark.parametrize("order", ["in turn", "one after the other", "shuffled by seed 0"])
def test_of_every_class_a_tenth_is_kept_apart(order):
    labels = torch.arange(400) % 10 if order == "in turn" else torch.arange(10).repeat_interleave(40)
    if order == "shuffled by seed 0":
        labels = labels[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    assert labels[utility._kept_apart(labels)].bincount().tolist() == [4] * 10


def test_classes_in_turn_are_all_learned():
    """Ten classes in the order 0 to 9, again and again: what is kept apart must not be one class."""
    labels = torch.arange(400) % 10
    images = torch.full((400, 1, 16, 16), -1.0)
    for index, label in enumerate(labels.tolist()):
        images[index, :, label + 2 : label + 5, :] = 1.0
    images += 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    (result,) = classifier_utility(images, labels, images, labels, architectures=["convolutional"], seeds=1, steps=80)
    assert min(one.accuracy for one in result.per_class) > 0.5


def test_a_class_that_was_never_generated_scores_nothing():
    images, labels = stripes(200, 0)
    only = labels == 0
    (result,) = classifier_utility(
        images[only], labels[only], *stripes(60, 1), architectures=["convolutional"], seeds=1, steps=8
    )
    assert [one.accuracy for one in result.per_class] == [1.0, 0.0] and result.spread == 0


def test_the_choice_looks_at_generated_images_or_at_private_ones_for_epsilon(monkeypatch):
    """The test images choose nothing; private images choose only through the private choice, at equal parts."""
    asked = []
    monkeypatch.setattr(utility, "private_choice", lambda counts, epsilon: asked.append((counts, epsilon)) or 0)
    train, test, validation = stripes(200, 0), stripes(60, 1), stripes(50, 2)
    options = {"architectures": ["convolutional", "residual"], "seeds": 2, "steps": 12}
    chosen = classifier_utility(*train, *test, private_validation=validation, selection_epsilon=1.0, **options)
    assert [epsilon for _, epsilon in asked] == [0.25] * 4 and all(len(counts) == 4 for counts, _ in asked)
    assert all(0 <= count <= 50 for counts, _ in asked for count in counts)
    assert chosen != classifier_utility(*train, *test, **options)  # the first checkpoint is not the best one
    assert len(asked) == 4
    flipped = test[0], 1 - test[1]
    for one, other in zip(
        classifier_utility(*train, *test, **options), classifier_utility(*train, *flipped, **options), strict=True
    ):
        assert one.accuracy == pytest.approx(1 - other.accuracy)
    with pytest.raises(ValueError, match="selection_epsilon=None with private_validation"):
        classifier_utility(*train, *test, private_validation=validation)


def test_large_images_are_averaged():
    images = torch.rand(3, 1, 96, 96)
    small = utility._small(images)
    assert small.shape == (3, 1, 32, 32)
    torch.testing.assert_close(small[0, 0, 0, 0], images[0, 0, :3, :3].mean())


def test_labels_that_mean_nothing_give_chance():
    images, labels = stripes(200, 0)
    meaningless = torch.empty_like(labels)
    for label in (0, 1):  # half of each class, exactly: a random shuffle always keeps some correlation to learn
        members = (labels == label).nonzero()[:, 0]
        meaningless[members] = torch.arange(len(members)) % 2
    assert 0.2 < classifier_accuracy(images, meaningless, *stripes(400, 1), steps=40) < 0.8


def test_shapes_that_do_not_fit_are_refused():
    images, labels = stripes(10, 0)
    with pytest.raises(ValueError, match="same C, H, W"):
        classifier_accuracy(images, labels, images[..., :8], labels)
    with pytest.raises(ValueError, match="one label per image"):
        classifier_accuracy(images, labels[:5], images, labels)
    with pytest.raises(ValueError, match="NaN"):
        classifier_accuracy(images * float("nan"), labels, images, labels)
    with pytest.raises(ValueError, match="integers from 0"):
        classifier_accuracy(images, labels - 1, images, labels)
    with pytest.raises(ValueError, match="10 generated images are too few"):
        classifier_utility(images, labels, images, labels)
    with pytest.raises(ValueError, match="unknown"):
        classifier_utility(*stripes(20, 0), images, labels, architectures=["resnet"])
