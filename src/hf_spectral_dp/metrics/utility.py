"""Train on generated, test on real: what the images are worth for a task."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _SmallConvNet(nn.Module):
    """Three convolutions with group normalisation and one linear layer; any image of at least 8 pixels."""

    def __init__(self, channels: int, classes: int, width: int = 24):
        super().__init__()
        blocks: list[nn.Module] = []
        for inputs, outputs in ((channels, width), (width, 2 * width), (2 * width, 4 * width)):
            blocks += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.ReLU(), nn.MaxPool2d(2)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(4 * width * 4, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.blocks(images), 2).flatten(1))


def classifier_accuracy(
    train_images: Tensor,
    train_labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    steps: int = 400,
    batch_size: int = 128,
    seed: int = 0,
) -> float:
    """Accuracy in [0, 1] on the test images of a small convolutional network trained on the train images.

    Nothing is chosen on the test images: the number of steps and the one-cycle schedule are fixed in advance. With
    generated images for training and real ones for testing this is "train on synthetic, test on real".

    Args:
        train_images: (N, C, H, W) float in [-1, 1]; train_labels: (N,) integers from 0.
        test_images: (M, C, H, W) float in [-1, 1], same C, H, W; test_labels: (M,).
        steps: optimizer steps; batch_size: images per step; seed: of weights and batches.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if train_images.shape[1:] != test_images.shape[1:] or train_images.ndim != 4:
        raise ValueError(
            f"train images {tuple(train_images.shape)} and test images {tuple(test_images.shape)} must both be"
            " (N, C, H, W) with the same C, H, W."
        )
    if len(train_images) != len(train_labels) or len(test_images) != len(test_labels) or not len(train_labels):
        raise ValueError(
            f"{len(train_images)} images with {len(train_labels)} labels to train on, {len(test_images)} with"
            f" {len(test_labels)} to test on: one label per image, and at least one."
        )
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = _SmallConvNet(train_images.shape[1], classes)
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(train_images), (batch_size,), generator=generator)
        loss = F.cross_entropy(network(train_images[chosen]), train_labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    with torch.no_grad():
        guesses = torch.cat([network(batch).argmax(1) for batch in test_images.split(500)])
    return float((guesses == test_labels).float().mean())


__all__ = ["classifier_accuracy"]
