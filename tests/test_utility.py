"""Train on one set, test on another: right where the sets agree, at chance where they do not."""

import pytest
import torch

from hf_spectral_dp.metrics.utility import classifier_accuracy


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
