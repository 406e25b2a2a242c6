"""What per-example clipping refuses: weights it did not know of, and examples that see each other."""

import random

import numpy as np
import pytest
import torch
from clipping_parts import MODELS, losses_of, token_rows
from torch import nn

from hf_spectral_dp.privacy.clipping import PerExampleClipper
from hf_spectral_dp.privacy.mechanism import NoisyClippedMean


def test_a_weight_that_is_unfrozen_later_is_refused():
    """Nothing would clip its gradient, and an optimizer would take it as it is."""
    model = nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 1))
    clipper, x = PerExampleClipper(model, 1.0), torch.randn(4, 3)
    clipper.add(lambda: model(x)[:, 0], 4)
    model[0].requires_grad_(True)
    for refused in (clipper.check_known, lambda: clipper.add(lambda: model(x)[:, 0], 4)):
        with pytest.raises(ValueError, match="0.weight was frozen, or another tensor.*choose what is trained before"):
            refused()
    assert model[0].weight.grad is None
    model[0].requires_grad_(False)
    model[1] = nn.Linear(3, 1)
    with pytest.raises(ValueError, match="1.weight was frozen, or another tensor"):
        clipper.add(lambda: model(x)[:, 0], 4)


@pytest.mark.parametrize("name", MODELS)
def test_examples_that_stand_apart_pass(name):
    model, ids = MODELS[name](), token_rows(2, 9)
    clipper = PerExampleClipper(model, 1.0)
    clipper.check_apart(lambda some: losses_of(model, ids[some]))
    assert not any(total.any() for total in clipper.take().values())


def test_examples_that_see_each_other_are_found():
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 3), 10 * torch.randn(2, 4)
    sequences = nn.Sequential(nn.Linear(4, 4), nn.Tanh())  # read as (length, batch, 4), length and batch being 2
    deep = torch.randn(2, 2, 4)
    for module, losses in (
        (layer, lambda some: layer(x[some]).square().sum(1) / len(some)),
        (layer, lambda some: layer(x[some][None])[0].square().sum(1)),  # all in the place of the first example
        (layer, lambda some: layer(x[some] - x[some].mean(0)).square().sum(1)),
        (sequences, lambda some: sequences(deep[some].transpose(0, 1)).transpose(0, 1).square().sum((1, 2))),
    ):
        with pytest.raises(ValueError, match="depends on the examples beside it|dimension to be the example"):
            PerExampleClipper(module, 1.0).check_apart(losses)


def test_a_loss_that_is_random_by_itself_passes():
    """As that of a diffusion model, whose noise and time are other ones each time."""
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    PerExampleClipper(layer, 1.0).check_apart(lambda some: layer(x[some] * torch.rand(len(some), 1)).square().sum(1))


def test_a_coin_that_examples_share_is_refused():
    """Which examples share one depends on the others: in pairs these gradients add up, and one more cancels them."""
    layer, x = nn.Linear(1, 1, bias=False), torch.ones(2, 1)
    kept = {
        "torch": lambda x: torch.rand(()) < 0.5,
        "torch, one mask for all": lambda x: torch.rand(1, 4) < 0.5,
        "NumPy": lambda x: np.random.rand() < 0.5,
        "Python": lambda x: random.random() < 0.5,
    }
    for coin in kept.values():
        with pytest.raises(ValueError, match="draws at random for several examples at once"):
            PerExampleClipper(layer, 1.0).check_coins(lambda some, coin=coin: (layer(x[some]) * coin(some)).sum(1))

    def sums(rows: torch.Tensor) -> float:
        mechanism = NoisyClippedMean(PerExampleClipper(layer, 1.0), 0.0, 1.0, micro_batch_size=2)
        found = [mechanism.release(rows, lambda x: layer(x)[:, 0] * (torch.rand(()) < 0.5)) for _ in range(50)]
        return float(torch.cat([release["weight"] for release in found]).std())

    pairs = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(50)[:, None]
    assert sums(pairs) > 5 and sums(torch.cat([torch.ones(1, 1), pairs])) < 3


@pytest.mark.parametrize("name", MODELS)
def test_coins_of_each_example_pass(name):
    model, ids = MODELS[name](), token_rows(2, 9)
    PerExampleClipper(model, 1.0).check_coins(lambda some: losses_of(model, ids[some]))
    layer, x = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)), torch.randn(2, 5, 4)
    clipper = PerExampleClipper(layer, 1.0)
    for drawn in (torch.rand, lambda n: torch.from_numpy(np.random.rand(n)).float(),
                  lambda n: torch.tensor([random.random() for _ in range(n)])):  # fmt: skip
        clipper.check_coins(lambda some, drawn=drawn: layer(x[some]).sum((1, 2)) * drawn(len(some)))
    assert not any(total.any() for total in clipper.take().values())
