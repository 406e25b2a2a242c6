"""One application of the mechanism: the sum of the clipped gradients over a constant, noised once."""

import pytest
import torch
from torch import nn

from hf_spectral_dp.privacy.clipping import PerExampleClipper
from hf_spectral_dp.privacy.mechanism import NoisyClippedMean
from hf_spectral_dp.privacy.noise import GaussianNoise


def built(noise_multiplier: float, micro_batch_size: int = 2) -> tuple[nn.Linear, NoisyClippedMean]:
    torch.manual_seed(0)
    layer = nn.Linear(3, 4)
    return layer, NoisyClippedMean(PerExampleClipper(layer, 0.5), noise_multiplier, 10.0, micro_batch_size)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 100])
def test_without_noise_it_is_the_clipped_sum_over_the_constant(micro_batch_size):
    layer, mechanism = built(0.0, micro_batch_size)
    rows = torch.randn(7, 3)
    expected = torch.zeros(4, 3)
    for row in rows:
        weight, bias = torch.autograd.grad(layer(row).square().sum(), [layer.weight, layer.bias])
        norm = float(torch.sqrt(weight.square().sum() + bias.square().sum()))
        expected += weight * min(1.0, 0.5 / norm) / 10
    released = mechanism.release(rows, lambda some: layer(some).square().sum(1))
    torch.testing.assert_close(released["weight"], expected)


@pytest.mark.parametrize("count", [0, 1, 9])
def test_the_noise_depends_on_nothing_but_the_constants(count):
    """Its scale is that of the empty batch, and it is added once, however many micro-batches there are."""
    layer, mechanism = built(2.0)
    rows, calls, add = torch.randn(count, 3), [], mechanism.noise.add_
    mechanism.noise.add_ = lambda tensors: (calls.append(1), add(tensors))[1]
    assert mechanism.noise.standard_deviation == pytest.approx(2 * 0.5, rel=2e-5)
    signal = built(0.0)[1].release(rows, lambda some: layer(some).square().sum(1) * 0)
    drawn = [
        torch.cat([x.flatten() for x in mechanism.release(rows, lambda some: layer(some).sum(1) * 0).values()])
        for _ in range(100)
    ]
    assert all(not value.any() for value in signal.values()) and len(calls) == 100
    # 1,600 draws: five standard errors are 9 %.
    assert float(torch.stack(drawn).std()) == pytest.approx(2 * 0.5 / 10, rel=0.09)


def test_an_interrupted_release_leaves_nothing_behind():
    layer, mechanism = built(0.0, micro_batch_size=1)
    seen = []

    def interrupted(rows):
        seen.append(rows)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return layer(rows).sum(1)

    with pytest.raises(KeyboardInterrupt):
        mechanism.release(torch.randn(5, 3), interrupted)
    assert not any(value.any() for value in mechanism.release(torch.zeros(0, 3), interrupted).values())


def test_only_the_first_process_adds_noise(monkeypatch):
    reduced = []
    monkeypatch.setattr("hf_spectral_dp.privacy.mechanism.dist.all_reduce", reduced.append)
    layer, first = built(1.0)
    second = NoisyClippedMean(first.clipper, 1.0, 10.0, 2, rank=1, world_size=2)
    released = second.release(torch.zeros(0, 3), lambda rows: layer(rows).sum(1))
    assert not any(value.any() for value in released.values())
    assert len(reduced) == len(released) == 2


@pytest.mark.parametrize("divisor", [0.0, -1.0, float("inf"), float("nan")])
def test_an_impossible_divisor_is_refused(divisor):
    with pytest.raises(ValueError, match="public expected batch size"):
        NoisyClippedMean(PerExampleClipper(nn.Linear(2, 1), 1.0), 1.0, divisor, 1)


def test_the_noise_is_the_default_generator():
    assert type(built(1.0)[1].noise) is GaussianNoise
