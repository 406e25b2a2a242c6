"""Trains the network through which a private critic of classes looks, on PUBLIC labelled photos.

    python examples/train_eye.py --public path/or/hub-id --label_column label --codec bundled:photos \
        --super_resolution bundled:photos-super-resolution --teacher google/efficientnet-b0 --out runs/eye

The network (a residual one of nine layers) learns to tell the classes of small photos, most of them as a codec and its
super-resolution network show them: coarse, as all that a generator draws. With a teacher, a public classifier that sees
the photos as they are, it learns to say what that says, too. What it then sees of private images tells their classes
apart in few numbers. Name the folder as `network` in the `critic` section of a config.
Never give it the sensitive images, nor images of the same people: nothing here is differentially private.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from job_config import located
from rebuild import parsed, rebuild_command
from teachers import disagreement, opinions, teacher_of
from torch import Tensor, nn
from tqdm.auto import tqdm
from train_features import accuracy, add_photos, add_words, public_images, scale_features
from transformers import AutoModelForCausalLM, AutoModelForImageToImage

from hf_spectral_dp.metrics.efficientnet import LITE
from hf_spectral_dp.metrics.public_features import PublicFeatureConfig, PublicFeatureNetwork, random_views
from hf_spectral_dp.private_marks import refuse_uncounted
from hf_spectral_dp.super_resolution import upscale_to

SHARP = 0.4  # share of images that are seen as they are

LESSON = " It learned from their labels, and from what the public classifier\n`{}` says of them as they are."
CARD = """---
library_name: hf_spectral_dp
license: {license}
tags: [feature-extraction, image-generation, differential-privacy]
---
# Public eye for private critics of classes

`PublicFeatureNetwork` of the kind "resnet9", {parameters:,} parameters, half precision; {dim} features of images of
side {size}, each averaged with that of the mirror image. It knows objects in coarse images and overlooks what distances
have to see: measure with `public-features` instead.

**Training data:** {images:,} images of `{public}` (split {split}) with {classes} classes. No private image was used:
not for training, not for the choice of a checkpoint (the last one is taken), not for the scaling of the features.

**Training:** {steps:,} steps of {batch_size} images, {minutes:.0f} minutes; {share:.0%} of the images as the codec
`{codec}` and its network show them.{lesson}
Top-1 accuracy on {held_out:,} held-out public images: {accuracy:.1%} as they are, {coarse:.1%} through the codec.

**Terms:** these weights are under {license} as far as they are ours to license. The images they were trained on are not
ours: {terms}.
The weights hold no image; whether terms of images bind weights trained on them is not settled everywhere. Who must be
sure trains their own on images with terms they like, by the command below.

**Rebuild:** `{command}`
"""


@torch.no_grad()
def through_codec(images: Tensor, model, detail, size: int) -> Tensor:
    """uint8 images (n, 3, size, size) of uint8 images (n, 3, S, S), as codec and super-resolution network show them."""
    shown = []
    for some in tqdm(images.split(500), "through the codec", unit="500 images"):
        tokens = model.codec.encode((some.float() / 127.5 - 1).to(model.device))
        enlarged = upscale_to(model.config.image_size, detail, model.decode(tokens))
        shown.append(as_bytes(F.interpolate(enlarged, (size, size), mode="area")))
    return torch.cat(shown)


def as_bytes(images: Tensor) -> Tensor:
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def batches(kinds: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches in [-1, 1] without end: a random view of one of the looks of each image, and which these are.

    Args:
        kinds: uint8 (3, N, 3, S, S): images as they are, through the codec, and their mirror images through the codec.
    """
    odds = torch.tensor([SHARP, (1 - SHARP) / 2, (1 - SHARP) / 2])
    while True:
        for chosen in torch.randperm(kinds.shape[1], generator=generator).split(batch_size):
            kind = torch.multinomial(odds, len(chosen), replacement=True, generator=generator)
            yield random_views(kinds[kind, chosen].float() / 127.5 - 1, generator), chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_photos(parser)
    parser.add_argument(
        "--codec", default="bundled:photos", help="public model whose codec the images are seen through"
    )
    parser.add_argument("--super_resolution", default="bundled:photos-super-resolution", help="what goes with it")
    parser.add_argument(
        "--teacher",
        help="public classifier of photos that the network learns from, too: a folder or Hub id of transformers, or"
        f" {LITE} (the extra `judge`)",
    )
    add_words(parser)
    parser.add_argument("--size", type=int, default=32, help="side of the images that the network sees")
    parser.add_argument("--widths", type=int, nargs=4, default=[32, 64, 128, 256])
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--learning_rate", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    arguments = parsed(parser)
    torch.manual_seed(arguments.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(located(arguments.codec)).to(device).eval()
    refuse_uncounted(f"--codec {arguments.codec}", model)
    if model.config.num_channels != 3:
        parser.error(f"--codec {arguments.codec} is for grey images; the eye is for colour photos.")
    detail = AutoModelForImageToImage.from_pretrained(located(arguments.super_resolution)).to(device).eval()
    refuse_uncounted(f"--super_resolution {arguments.super_resolution}", detail)
    teacher = teacher_of(arguments.teacher) if arguments.teacher else None
    size, side = arguments.size, model.config.image_size

    photos, labels, classes = public_images(arguments, side)
    scaled = (some.float() / 127.5 - 1 for some in photos.split(500))
    small = torch.cat([as_bytes(F.interpolate(some, (size, size), mode="area")) for some in scaled])
    looks = [small, *(through_codec(some, model, detail, size) for some in (photos, photos.flip(-1)))]
    held_out = min(2_000, len(photos) // 10)
    kinds, test = torch.stack([look[held_out:] for look in looks]), [look[:held_out] for look in looks]
    named = labels[held_out:]
    known = None if teacher is None else opinions(teacher, photos[held_out:])

    network = PublicFeatureNetwork(PublicFeatureConfig(size, tuple(arguments.widths), classes, "resnet9"))
    network.to(device, memory_format=torch.channels_last)
    # Says what the teacher says; of use in training only.
    repeat = None if known is None else nn.Linear(arguments.widths[-1], known.shape[1]).to(device)
    rate, weights = arguments.learning_rate, [*network.parameters(), *([] if repeat is None else repeat.parameters())]
    optimizer = torch.optim.SGD(weights, rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, arguments.steps + 1, pct_start=0.2)
    drawn = batches(kinds, arguments.batch_size, torch.Generator().manual_seed(arguments.seed))
    start = time.perf_counter()
    for _, (some, which) in zip(progress := tqdm(range(arguments.steps), "steps"), drawn, strict=False):
        with torch.autocast(device.type, torch.bfloat16):
            seen = network.summary(some.to(device))
            logits, repeated = network.classifier(seen), None if repeat is None else repeat(seen)
        loss = F.cross_entropy(logits.float(), named[which].to(device), label_smoothing=0.1)
        if repeated is not None:
            loss = loss + disagreement(repeated, known[which].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    minutes = (time.perf_counter() - start) / 60
    network.cpu().eval()
    network.half().float()  # what is measured is what is shipped
    scale_features(network, kinds[1, :10_000])
    right, coarse = (accuracy(network, test[look], labels[:held_out]) for look in (0, 1))
    network.half().save_pretrained(arguments.out)
    options = vars(arguments) | {"public": arguments.name or arguments.public, "name": None, "terms": None}
    card = CARD.format(
        license=arguments.license, terms=arguments.terms, parameters=network.num_parameters(), size=size,
        dim=network.feature_mean.numel(), images=kinds.shape[1], public=options["public"], split=arguments.split,
        classes=classes, steps=arguments.steps, batch_size=arguments.batch_size, minutes=minutes,
        lesson=LESSON.format(arguments.teacher) if arguments.teacher else "",
        share=1 - SHARP, codec=arguments.codec, held_out=held_out, accuracy=right, coarse=coarse,
        command=rebuild_command("train_eye.py", options),
    )  # fmt: skip
    Path(arguments.out, "README.md").write_text(card, encoding="utf-8")
    print(f"top-1 accuracy {right:.1%}, {coarse:.1%} through the codec, on held-out photos; saved to {arguments.out}")


if __name__ == "__main__":
    main()
