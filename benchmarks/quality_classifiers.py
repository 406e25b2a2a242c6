"""Classifiers of the published kinds for small colour photos: larger than those of the package, trained for longer.

DPImageBench (arXiv:2503.14681) takes the mean of a ResNet, a wide ResNet and a ResNeXt of up to 36 million weights, 200
epochs each. Those of `metrics.utility` are made for a look in a minute, and of photos they learn little. These are
between the two: 0.2 to 0.4 million weights, minutes of a core each; they see images mirrored and moved, as is usual for
photos (the published ones see them as they are).
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_spectral_dp.metrics.public_features import PublicFeatureConfig, PublicFeatureNetwork, random_views
from hf_spectral_dp.metrics.utility import UtilityResult, guesses

BATCH = 128


class _Sum(nn.Module):
    """`shortcut(images) + layers(images)`."""

    def __init__(self, shortcut: nn.Module, *layers: nn.Module):
        super().__init__()
        self.shortcut, self.layers = shortcut, nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.shortcut(images) + self.layers(images)


class _Resnet9(PublicFeatureNetwork):
    """D. Page's residual network for CIFAR-10, as a classifier (ResNet, arXiv:1512.03385)."""

    def __init__(self, classes: int):
        super().__init__(PublicFeatureConfig(32, (16, 32, 64, 128), classes, "resnet9"))

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(images)


def _convolution(inputs: int, outputs: int, side: int = 3, stride: int = 1, groups: int = 1) -> nn.Module:
    return nn.Conv2d(inputs, outputs, side, stride, padding=side // 2, groups=groups, bias=False)


def _activation(width: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(width), nn.ReLU()]


def _decision(width: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]


def _wide_resnet(classes: int) -> nn.Module:
    """Ten layers of twice the width, normalised before each convolution (WRN-10-2, arXiv:1605.07146)."""
    layers: list[nn.Module] = [_convolution(3, 16)]
    for inputs, outputs, stride in ((16, 32, 1), (32, 64, 2), (64, 128, 2)):
        inner = [_convolution(inputs, outputs, 3, stride), *_activation(outputs), _convolution(outputs, outputs)]
        layers += [*_activation(inputs), _Sum(_convolution(inputs, outputs, 1, stride), *inner)]
    return nn.Sequential(*layers, *_activation(128), *_decision(128, classes))


def _resnext(classes: int) -> nn.Module:
    """Four blocks whose convolutions work on eight groups of channels side by side (ResNeXt, arXiv:1611.05431)."""
    layers: list[nn.Module] = [_convolution(3, 32), *_activation(32)]
    for inputs, outputs, stride in ((32, 64, 1), (64, 128, 2), (128, 256, 2), (256, 256, 1)):
        width = outputs // 2
        inner = [_convolution(inputs, width, 1), *_activation(width)]
        inner += [_convolution(width, width, 3, stride, groups=8), *_activation(width)]
        inner += [_convolution(width, outputs, 1), nn.BatchNorm2d(outputs)]
        same = inputs == outputs
        layers += [_Sum(nn.Identity() if same else _convolution(inputs, outputs, 1, stride), *inner), nn.ReLU()]
    return nn.Sequential(*layers, *_decision(256, classes))


LARGE: dict[str, Callable[[int], nn.Module]] = {
    "resnet9": _Resnet9,
    "wide-resnet": _wide_resnet,
    "resnext": _resnext,
}
"""Name of a classifier of colour photos of 32 x 32 to what builds it from the number of classes."""


def large_utility(
    images: Tensor,
    labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    *,
    architectures: Sequence[str],
    seeds: int,
    steps: int,
) -> list[UtilityResult]:
    """As `metrics.utility.classifier_utility`, by those of `LARGE`. Nothing is chosen: the last weights count.

    Args:
        images: (N, 3, 32, 32) in [-1, 1], generated; labels: (N,) integers from 0. The classifiers are trained on the
            device where they lie.
        test_images: (M, 3, 32, 32), real; test_labels: (M,).
        architectures: keys of `LARGE`. seeds: trainings of each. steps: of each, of `BATCH` images.
    """
    results = []
    for name in architectures:
        trained = [_trained(name, images, labels, steps, seed) for seed in range(seeds)]
        right = [guesses(network, test_images) == test_labels for network in trained]
        results.append(UtilityResult.of(name, torch.stack(right), test_labels, int(labels.max()) + 1))
    return results


def _trained(name: str, images: Tensor, labels: Tensor, steps: int, seed: int) -> nn.Module:
    """One of `LARGE`, by the settings that are usual for such networks, in evaluation mode."""
    generator, device = torch.Generator().manual_seed(seed), images.device
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = LARGE[name](int(labels.max()) + 1)
    network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps + 1, pct_start=0.2)
    for chosen, _ in zip(_batches(len(images), generator), range(steps), strict=False):
        batch = random_views(images[chosen], generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            logits = network(batch)
        loss = F.cross_entropy(logits.float(), labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def _batches(count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices (BATCH,) of random images without end, each once before any comes again; of all where they are few."""
    size = min(BATCH, count)
    while True:
        yield from torch.randperm(count, generator=generator)[: count // size * size].split(size)
