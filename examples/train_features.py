"""Trains the feature extractor of the metrics on PUBLIC labelled photos: a small network that tells their classes.

    python examples/train_features.py --public path/or/hub-id --label_column label --out runs/public-features

Its features measure how close generated images are to real ones, so never give it the sensitive images, nor images of
the same people: nothing here is differentially private. Colours, sharpness and noise are not varied in training, for a
network that learned to overlook them could not measure them. Run `python -m benchmarks.features` on the result.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from rebuild import parsed, rebuild_command, some_of
from torch import Tensor

from hf_spectral_dp import SpectralImageProcessor
from hf_spectral_dp.image_decoding import readable
from hf_spectral_dp.metrics.public_features import PublicFeatureConfig, PublicFeatureNetwork

CARD = """---
library_name: hf_spectral_dp
license: {license}
tags: [feature-extraction, image-generation, evaluation]
---
# Public features for the metrics of generated images

`PublicFeatureNetwork`, {parameters:,} parameters, half precision; {dim} features of three depths per image. What its
distances say of known degradations is in `benchmarks/results/features.json`. They are not Inception distances and
must not be compared with published ones.

**Training data:** {images:,} images of `{public}` (split {split}) with {classes} classes. No private image was used:
not for training, not for the choice of a checkpoint (the last one is taken), not for the scaling of the features.

**Training:** {epochs} epochs, {minutes:.0f} minutes of processor time. Top-1 accuracy on {held_out:,} held-out public
images: {accuracy:.1%}.

**Terms:** these weights are under {license} as far as they are ours to license. The images they were trained on are not
ours: {terms}. The weights hold no
image; whether terms of images bind weights trained on them is not settled everywhere. Who must be sure trains their own
on images with terms they like, by the command below, and measures with `--extractor public:FOLDER`.

**Rebuild:** `{command}`
"""


def add_photos(parser: argparse.ArgumentParser) -> None:
    """The options that say which labelled photos; `public_images` reads them."""
    parser.add_argument("--public", required=True, help="an image folder, or a Hub data set id, with labels")
    parser.add_argument("--split", default="train")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--label_column", default="label")


def add_words(parser: argparse.ArgumentParser) -> None:
    """The options that say how many of the photos are read, and what the card says of them."""
    parser.add_argument("--license", default="apache-2.0")
    parser.add_argument("--terms", default="see their source", help="of use of the images, for the card")
    parser.add_argument("--images", type=int, default=200_000, help="read at most so many, taken at random by --seed")
    parser.add_argument("--name", help="what the card calls the images; default: what --public says")


def public_images(arguments: argparse.Namespace, size: int) -> tuple[Tensor, Tensor, int]:
    """uint8 images (n, 3, size, size), their classes (n,) from 0, and how many classes there are.

    In a random order that is the same every time. Classes are numbered in the order of their labels.
    """
    source, label_column = arguments.public, arguments.label_column
    processor = SpectralImageProcessor(image_size=size, num_channels=3)
    rows, pixels, labels = some_of(source, arguments.split, arguments.images, arguments.seed), [], []
    for picture, row in readable(rows, arguments.image_column):
        if row.get(label_column) is None:
            raise SystemExit(
                f"{source}: row {len(labels)} has no label in {label_column!r}; --label_column names one of"
                f" {', '.join(map(str, row))}, and every photo needs a class."
            )
        image = processor(picture)["pixel_values"]
        pixels.append(((image + 1) * 127.5).round().to(torch.uint8))
        labels.append(row[label_column])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    classes = {label: number for number, label in enumerate(sorted(set(labels)))}
    return torch.cat(pixels)[order], torch.tensor([classes[label] for label in labels])[order], len(classes)


def batches(
    images: Tensor, labels: Tensor, side: int, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of random batches in [-1, 1]: random squares of that side, mirrored at random."""
    room = images.shape[-1] - side
    for chosen in torch.randperm(len(images), generator=generator).split(batch_size):
        some = images[chosen]
        corners = torch.randint(room + 1, (len(some), 2), generator=generator).tolist()
        cut = torch.stack([image[:, y : y + side, x : x + side] for image, (y, x) in zip(some, corners, strict=True)])
        mirrored = torch.rand(len(cut), generator=generator) < 0.5
        cut[mirrored] = cut[mirrored].flip(-1)
        yield cut.float() / 127.5 - 1, labels[chosen]


@torch.no_grad()
def scale_features(model: PublicFeatureNetwork, images: Tensor) -> None:
    """Sets the scaling that gives every feature mean 0 and variance 1 over uint8 images (n, 3, H, W)."""
    scaled = (some.float() / 127.5 - 1 for some in images.split(500))
    pooled = torch.cat([model.pooled(model.maps(model.prepare(some))) for some in scaled]).double()
    model.feature_mean.copy_(pooled.mean(0))
    model.feature_scale.copy_(1 / pooled.std(0).clamp_min(1e-6))


@torch.no_grad()
def accuracy(model: PublicFeatureNetwork, images: Tensor, labels: Tensor) -> float:
    guesses = torch.cat([model(some.float() / 127.5 - 1).argmax(1) for some in images.split(500)])
    return float((guesses == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_photos(parser)
    add_words(parser)
    parser.add_argument("--size", type=int, default=64, help="side of the images, a multiple of 16")
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    arguments = parsed(parser)
    torch.manual_seed(arguments.seed)

    images, labels, classes = public_images(arguments, arguments.size)
    held_out = min(2_000, len(images) // 10)
    test, test_labels, images, labels = images[:held_out], labels[:held_out], images[held_out:], labels[held_out:]
    model = PublicFeatureNetwork(PublicFeatureConfig(arguments.size, arguments.widths, classes))
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, weight_decay=0.05)
    steps = arguments.epochs * -(-len(images) // arguments.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, arguments.learning_rate, steps + 1)
    generator = torch.Generator().manual_seed(arguments.seed)
    start = time.process_time()
    for epoch in range(arguments.epochs):
        total, steps = 0.0, 0
        # Squares of three quarters of the side take half the time; the last epoch sees whole images.
        side = arguments.size if epoch == arguments.epochs - 1 else arguments.size * 3 // 4
        for some, targets in batches(images, labels, side, arguments.batch_size, generator):
            with torch.autocast("cpu", torch.bfloat16):
                logits = model.classify(some)
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total, steps = total + loss.item(), steps + 1
        seconds = time.process_time() - start
        print(f"epoch {epoch}: loss {total / steps:.3f} after {seconds:.0f} s of processor time", flush=True)
    minutes = (time.process_time() - start) / 60
    model.eval()
    model.half().float()  # what is measured is what is shipped
    scale_features(model, images[:10_000])
    right = accuracy(model, test, test_labels)
    model.half().save_pretrained(arguments.out)
    options = vars(arguments) | {"public": arguments.name or arguments.public, "name": None, "terms": None}
    card = CARD.format(
        license=arguments.license,
        terms=arguments.terms,
        parameters=model.num_parameters(),
        dim=sum(arguments.widths[2:]),
        images=len(images),
        public=options["public"],
        split=arguments.split,
        classes=classes,
        epochs=arguments.epochs,
        minutes=minutes,
        held_out=held_out,
        accuracy=right,
        command=rebuild_command("train_features.py", options),
    )
    Path(arguments.out, "README.md").write_text(card, encoding="utf-8")
    print(f"top-1 accuracy {right:.1%} on held-out public images; saved to {arguments.out}")


if __name__ == "__main__":
    main()
