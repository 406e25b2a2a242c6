"""Train on generated, test on real: what the images are worth for a task.

Three small classifiers of different kinds learn from generated images only and are tested once on real ones. Which of
their checkpoints is tested is chosen on generated images that were kept apart, which looks at no private image. Whoever
has private images for validation may use them for that instead, at a stated epsilon; simply taking the checkpoint that
is best on private images would leak, and would overstate the result.

Accuracies on real test images are facts about these images. No guarantee covers them unless the images are public.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..privacy.audit import rate_bounds
from ..privacy.selection import private_choice

LARGEST_SIDE = 32
"""Larger images are averaged down to about this side in pixels before they are classified: a task, not a photograph."""

_CHECKPOINTS = 4  # equally spaced, the last at the end
_HELD_OUT = 10  # one generated image in ten is for validation


class _Residual(nn.Module):
    """`images + f(images)`."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return images + self.layers(images)


def _convolution(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, padding=1), *_activation(outputs)]


def _activation(width: int) -> list[nn.Module]:
    return [nn.GroupNorm(4, width), nn.ReLU()]


def _decision(width: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, classes)]


def _convolutional(channels: int, classes: int) -> nn.Module:
    """Three convolutions with pooling and one linear layer, in the manner of VGG (arXiv:1409.1556)."""
    blocks: list[nn.Module] = []
    for inputs, outputs in ((channels, 24), (24, 48), (48, 96)):
        blocks += [*_convolution(inputs, outputs), nn.MaxPool2d(2)]
    return nn.Sequential(*blocks, *_decision(96, classes))


def _residual(channels: int, classes: int) -> nn.Module:
    """Two residual stages (ResNet, arXiv:1512.03385)."""
    blocks: list[nn.Module] = []
    for inputs, outputs in ((channels, 24), (24, 48)):
        inner = [*_convolution(outputs, outputs), nn.Conv2d(outputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs)]
        blocks += [*_convolution(inputs, outputs, stride=2), _Residual(*inner), nn.ReLU()]
    return nn.Sequential(*blocks, *_decision(48, classes))


def _mixer(channels: int, classes: int) -> nn.Module:
    """Patches of 4 x 4 pixels, mixed in space and in channels in turn (ConvMixer, arXiv:2201.09792)."""
    blocks: list[nn.Module] = [nn.Conv2d(channels, 64, 4, stride=4), nn.GELU(), nn.GroupNorm(4, 64)]
    for _ in range(3):
        blocks.append(_Residual(nn.Conv2d(64, 64, 5, padding=2, groups=64), nn.GELU(), nn.GroupNorm(4, 64)))
        blocks += [nn.Conv2d(64, 64, 1), nn.GELU(), nn.GroupNorm(4, 64)]
    return nn.Sequential(*blocks, *_decision(64, classes))


def _wide(channels: int, classes: int) -> nn.Module:
    """Two stages of twice the width, normalised before each convolution (wide ResNet, arXiv:1605.07146)."""
    blocks: list[nn.Module] = []
    for inputs, outputs in ((channels, 48), (48, 96)):
        first, second = ([*_activation(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)] for _ in range(2))
        blocks += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), _Residual(*first, *second)]
    return nn.Sequential(*blocks, *_activation(96), *_decision(96, classes))


def _grouped(channels: int, classes: int) -> nn.Module:
    """Two stages whose convolutions work on eight groups of channels side by side (ResNeXt, arXiv:1611.05431)."""
    blocks: list[nn.Module] = []
    for inputs, outputs in ((channels, 48), (48, 96)):
        inner = [nn.Conv2d(outputs, outputs, 1), *_activation(outputs)]
        inner += [nn.Conv2d(outputs, outputs, 3, padding=1, groups=8), *_activation(outputs)]
        inner += [nn.Conv2d(outputs, outputs, 1), nn.GroupNorm(4, outputs)]
        blocks += [*_convolution(inputs, outputs, stride=2), _Residual(*inner), nn.ReLU()]
    return nn.Sequential(*blocks, *_decision(96, classes))


ARCHITECTURES: dict[str, Callable[[int, int], nn.Module]] = {
    "convolutional": _convolutional,
    "residual": _residual,
    "mixer": _mixer,
    "wide": _wide,
    "grouped": _grouped,
}
"""Name of a classifier to what builds it from numbers of channels and classes. For images of at least 8 pixels."""

DIFFERENT = ("convolutional", "residual", "mixer")
"""Three architectures that have little in common, and take little time."""

PUBLISHED = ("residual", "wide", "grouped")
"""The kinds of which DPImageBench (arXiv:2503.14681) takes the mean: ResNet, wide ResNet and ResNeXt; smaller ones."""


@dataclass(frozen=True)
class ClassAccuracy:
    """Share of the test images of one class that are recognised: mean over the classifiers, with its interval.

    Attributes:
        label: the class. n: its test images; 0 leaves the accuracy at 0 and the interval at [0, 1].
    """

    label: int
    accuracy: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class UtilityResult:
    """How well one kind of classifier, trained on generated images, does on real ones.

    Attributes:
        architecture: a key of `ARCHITECTURES`.
        accuracies: on all test images, in [0, 1]; one per seed.
        accuracy: their mean. spread: their standard deviation (0 for one seed): chance of training.
        low, high: 95 % interval of the mean, for other test images of the same kind: chance of the test images. By
            Clopper-Pearson for one classifier; a mean over several varies less, so it is then wider than it need be.
        per_class: for every class in order.
        n: test images.
    """

    architecture: str
    accuracies: tuple[float, ...]
    accuracy: float
    spread: float
    low: float
    high: float
    per_class: tuple[ClassAccuracy, ...]
    n: int

    @classmethod
    def of(cls, architecture: str, right: Tensor, labels: Tensor, classes: int) -> "UtilityResult":
        """The result of which seed has which test image right (seeds, n) bool; labels: classes (n,) of the images."""

        def share(which: Tensor) -> tuple[float, float, float, int]:
            n = int(which.sum())
            found = float(right[:, which].double().mean()) if n else 0.0
            low, high = rate_bounds(found * n, n, 0.025) if n else (0.0, 1.0)
            return round(found, 4), round(low, 4), round(high, 4), n

        accuracies = [float(accuracy) for accuracy in right.double().mean(1)]
        _, low, high, n = share(torch.ones_like(labels, dtype=torch.bool))
        return cls(
            architecture=architecture,
            accuracies=tuple(round(accuracy, 4) for accuracy in accuracies),
            accuracy=round(fmean(accuracies), 4),
            spread=round(stdev(accuracies), 4) if len(accuracies) > 1 else 0.0,
            low=low,
            high=high,
            per_class=tuple(ClassAccuracy(label, *share(labels == label)) for label in range(classes)),
            n=n,
        )


def classifier_utility(
    images: Tensor,
    labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    *,
    private_validation: tuple[Tensor, Tensor] | None = None,
    selection_epsilon: float | None = None,
    architectures: Sequence[str] = DIFFERENT,
    seeds: int = 3,
    steps: int = 400,
) -> list[UtilityResult]:
    """Trains each of some architectures from several seeds on generated images and tests each once on real ones.

    A tenth of the generated images of every class is kept apart. Of four equally spaced checkpoints of a training,
    the one with most of these right is tested. The test images choose nothing.

    Formal guarantee: with `private_validation`, which checkpoints are tested is (selection_epsilon, 0)-differentially
    private with respect to these images, under adding or removing one of them: `len(architectures) * seeds` choices by
    `privacy.selection.private_choice`, each at an equal part of it, which add up. It assumes that each image is a unit
    of its own and that none of them is among the test images. It speaks of the choice and of what follows from it, not
    of the test images; and it adds to what training the generator cost, if images of one unit were used for both.

    Args:
        images: (N, C, H, W) float in [-1, 1], generated, N >= 20; labels: (N,) integers from 0. The classifiers are
            trained on the device where they lie.
        test_images: (M, C, H, W) float in [-1, 1], real; test_labels: (M,).
        private_validation: images (K, C, H, W) and labels (K,) to choose on instead; needs `selection_epsilon`.
        selection_epsilon: spent on the choice in all.
        architectures: keys of `ARCHITECTURES`.
        seeds: trainings per architecture, from other weights and batches; steps: of each.

    Raises:
        ValueError: sizes, shapes, labels or values that do not fit, or private images without an epsilon.
    """
    _check(images, labels, test_images, test_labels)
    if len(images) < 2 * _HELD_OUT:
        raise ValueError(
            f"{len(images)} generated images are too few to keep some apart; give {2 * _HELD_OUT} or more."
        )
    if unknown := [name for name in architectures if name not in ARCHITECTURES]:
        raise ValueError(f"architectures={unknown} are unknown; choose among {', '.join(ARCHITECTURES)}.")
    check_selection(private_validation, selection_epsilon)
    if private_validation is not None:
        _check(images, labels, *private_validation)
    images, test_images = _small(images), _small(test_images)
    held_out = _kept_apart(labels)
    validation_images, validation_labels = images[held_out], labels[held_out]
    if private_validation is not None:
        validation_images, validation_labels = _small(private_validation[0]), private_validation[1]
    classes = int(max(labels.max(), test_labels.max())) + 1
    results = []
    for name in architectures:
        right = []
        for seed in range(seeds):
            counts, named = [], []
            for network in _trained(name, images[~held_out], labels[~held_out], classes, steps, seed):
                counts.append(int((guesses(network, validation_images) == validation_labels).sum()))
                named.append(guesses(network, test_images))
            if selection_epsilon is None:
                best = max(range(len(counts)), key=lambda index: (counts[index], index))  # of equals, the last
            else:
                best = private_choice(counts, selection_epsilon / (len(architectures) * seeds))
            right.append(named[best] == test_labels)
        results.append(UtilityResult.of(name, torch.stack(right), test_labels, classes))
    return results


def check_selection(private_validation: object, selection_epsilon: float | None) -> None:
    """Raises ValueError if private images to choose on come without an epsilon for that, or the other way round."""
    if (private_validation is None) != (selection_epsilon is None):
        raise ValueError(
            f"selection_epsilon={selection_epsilon} {'with' if private_validation else 'without'} private_validation:"
            " give both, or neither to choose on generated images, which costs nothing."
        )


def classifier_accuracy(
    train_images: Tensor,
    train_labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    steps: int = 400,
    batch_size: int = 128,
    seed: int = 0,
    architecture: str = "convolutional",
) -> float:
    """Accuracy in [0, 1] on the test images of one small classifier trained on the train images.

    Nothing is chosen on any images: the number of steps and the one-cycle schedule are fixed in advance.

    Args:
        train_images: (N, C, H, W) float in [-1, 1]; train_labels: (N,) integers from 0.
        test_images: (M, C, H, W) float in [-1, 1], same C, H, W; test_labels: (M,).
        steps: optimizer steps; batch_size: images per step; seed: of weights and batches.
        architecture: a key of `ARCHITECTURES`.

    Raises:
        ValueError: shapes that do not fit together, images that are not finite.
    """
    _check(train_images, train_labels, test_images, test_labels)
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    *_, network = _trained(architecture, _small(train_images), train_labels, classes, steps, seed, batch_size)
    return float((guesses(network, _small(test_images)) == test_labels).float().mean())


def _check(images: Tensor, labels: Tensor, test_images: Tensor, test_labels: Tensor) -> None:
    if images.shape[1:] != test_images.shape[1:] or images.ndim != 4:
        raise ValueError(
            f"train images {tuple(images.shape)} and test images {tuple(test_images.shape)} must both be (N, C, H, W)"
            " with the same C, H, W."
        )
    if len(images) != len(labels) or len(test_images) != len(test_labels) or not len(labels) or not len(test_labels):
        raise ValueError(
            f"{len(images)} images with {len(labels)} labels to train on, {len(test_images)} with {len(test_labels)} to"
            " test on: one label per image, and at least one."
        )
    for kind, some in (("train", images), ("test", test_images)):
        if not torch.isfinite(some).all():
            raise ValueError(f"a {kind} image holds NaN or infinity; images are finite numbers in [-1, 1].")
    for kind, some in (("train", labels), ("test", test_labels)):
        if some.is_floating_point() or int(some.min()) < 0:
            raise ValueError(f"{kind} labels must be integers from 0; the smallest is {some.min().item()}.")


def _kept_apart(labels: Tensor) -> Tensor:
    """Marks one image in ten of every class, (N,) bool, in whatever order the images come.

    Neither every tenth image nor a random tenth will do: classes in turn, or a shuffle by the same seed, can put a
    whole class there.
    """
    marked = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    marked[labels.argsort(stable=True)[_HELD_OUT - 1 :: _HELD_OUT]] = True
    return marked


def _small(images: Tensor) -> Tensor:
    """Averages blocks of pixels until the longer side is at most about `LARGEST_SIDE`."""
    block = round(max(images.shape[-2:]) / LARGEST_SIDE)
    return F.avg_pool2d(images, block) if block > 1 else images


def _trained(
    architecture: str, images: Tensor, labels: Tensor, classes: int, steps: int, seed: int, batch_size: int = 128
) -> Iterator[nn.Module]:
    """One network in evaluation mode at each of its checkpoints; it changes when the next one is asked for."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = ARCHITECTURES[architecture](images.shape[1], classes)
    network.to(images.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # 1.4 times as fast
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    checkpoints = {steps * (index + 1) // _CHECKPOINTS for index in range(_CHECKPOINTS)}
    for step in range(1, steps + 1):
        chosen = torch.randint(len(images), (batch_size,), generator=generator).to(images.device)
        batch = images[chosen].contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(network(batch), labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step in checkpoints:
            yield network.eval()
            network.train()


@torch.no_grad()
def guesses(network: nn.Module, images: Tensor) -> Tensor:
    """The class (N,) that a classifier in evaluation mode finds likeliest for each image (N, C, H, W)."""
    return torch.cat([network(batch).argmax(1) for batch in images.split(500)])


__all__ = [
    "ARCHITECTURES",
    "DIFFERENT",
    "PUBLISHED",
    "ClassAccuracy",
    "UtilityResult",
    "check_selection",
    "classifier_accuracy",
    "classifier_utility",
    "guesses",
]
