"""Trains the small public super-resolution network on PUBLIC images: area-averaged image in, image out.

    python examples/train_super_resolution.py --public glyphs --channels 1 --size 32 --out runs/sr-glyphs
    python examples/train_super_resolution.py --public path/or/hub-id --size 64 --out runs/sr-photos

With --codec, the folder of a codec or prior, the network sees what that codec makes of the images instead of exact
averages, and may mend what quantisation broke; use it with the same codec only.
Never give it the sensitive images, nor images of the same people: nothing here is differentially private.
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from hf_spectral_dp.super_resolution import SpectralSuperResolution, SpectralSuperResolutionConfig, upscale

CARD = """---
library_name: transformers
pipeline_tag: image-to-image
license: {license}
tags: [super-resolution, hf_spectral_dp]
---
# Public super-resolution network (x{scale})

Adds detail to area-averaged images with {channels} channel(s): `SpectralSuperResolution`, {parameters} parameters.
{promise}

**Training data:** {data}. No private image was used, so applying it to the output of a differentially private model
is post-processing.

**Quality** on {held_out} held-out public images of side {size}, PSNR in dB: {psnr:.2f}; bicubic: {bicubic:.2f};
nearest: {nearest:.2f}.

**Rebuild:** `{command}`
"""


def square(image: Image.Image, size: int, channels: int, rng: np.random.Generator) -> np.ndarray:
    """A random square of `image`, uint8 (size, size, channels): half the time the whole image, area-averaged."""
    image = image.convert("L" if channels == 1 else "RGB")
    side = min(image.size)
    if side > size and rng.random() < 0.5:
        side = int(rng.integers(size, side + 1))
    left, top = (int(rng.integers(extent - side + 1)) for extent in image.size)
    resample = Image.Resampling.BOX if side >= size else Image.Resampling.BICUBIC
    small = image.resize((size, size), resample, box=(left, top, left + side, top + side))
    return np.asarray(small).reshape(size, size, channels)


def public_images(arguments: argparse.Namespace) -> np.ndarray:
    """uint8 images (n, size, size, channels), n <= --images."""
    rng = np.random.default_rng(arguments.seed)
    size, channels = arguments.size, arguments.channels
    if arguments.public == "glyphs":
        from public_glyphs import render_digits

        digits, _ = render_digits(arguments.images, arguments.seed)
        before = (size - digits.shape[1]) // 2
        margin = (before, size - digits.shape[1] - before)
        padded = np.pad(digits, ((0, 0), margin, margin))[..., None]
        return np.repeat(padded, channels, axis=-1)
    from hf_spectral_dp.token_store import load_images

    rows = load_images(arguments.public, arguments.split)
    squares = (square(row[arguments.image_column], size, channels, rng) for row in rows)
    return np.stack(list(tqdm(itertools.islice(squares, arguments.images), "reading", total=arguments.images)))


def batches(images: torch.Tensor, batch_size: int, generator: torch.Generator, mirror: bool) -> Iterator[torch.Tensor]:
    """Endless random batches in [-1, 1], mirrored at random if `mirror`."""
    while True:
        chosen = images[torch.randint(len(images), (batch_size,), generator=generator)].float() / 127.5 - 1
        yield chosen.flip(-1) if mirror and torch.rand((), generator=generator) < 0.5 else chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--public", required=True, help="'glyphs', an image folder, or a Hub data set id")
    parser.add_argument("--split", default="train")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--license", default="apache-2.0")
    parser.add_argument("--out", required=True)
    parser.add_argument("--codec", help="folder of the codec whose images are to be upscaled and mended")
    parser.add_argument("--scale", type=int, default=2, choices=(2, 4))
    parser.add_argument("--channels", type=int, default=3, choices=(1, 3))
    parser.add_argument("--size", type=int, default=64, help="side of the training images in pixels")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--features", type=int, default=32)
    parser.add_argument("--num_blocks", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)

    codec = AutoModelForCausalLM.from_pretrained(arguments.codec).codec if arguments.codec else None

    def coarse(target: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(target, arguments.scale) if codec is None else codec.decode(codec.encode(target))

    images = torch.from_numpy(public_images(arguments)).permute(0, 3, 1, 2).contiguous()
    held_out = max(1, min(200, len(images) // 10))
    test, images = images[:held_out].float() / 127.5 - 1, images[held_out:]
    model = SpectralSuperResolution(
        SpectralSuperResolutionConfig(
            num_channels=arguments.channels,
            scale=arguments.scale,
            features=arguments.features,
            num_blocks=arguments.num_blocks,
            keep_average=codec is None,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, arguments.learning_rate, arguments.steps + 1)
    source = batches(images, arguments.batch_size, torch.Generator().manual_seed(arguments.seed), codec is None)
    progress = tqdm(range(arguments.steps), "training")
    for step in progress:
        target = next(source)
        if codec is None and step % 4 == 3 and arguments.size % (2 * arguments.scale) == 0:
            target = F.avg_pool2d(target, 2)  # the network also meets images half as large
        loss = F.l1_loss(model(coarse(target)), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(l1=f"{loss.item():.4f}")

    def psnr(backend) -> float:
        with torch.no_grad():
            error = F.mse_loss(upscale(backend, coarse(test), arguments.scale), test)
        return float(10 * torch.log10(4 / error))

    model.eval()
    model.save_pretrained(arguments.out)
    given = {name: value for name, value in vars(arguments).items() if name != "out" and value is not None}
    options = " ".join(f"--{name} {value}" for name, value in given.items())
    card = CARD.format(
        scale=arguments.scale,
        channels=arguments.channels,
        size=arguments.size,
        license=arguments.license,
        parameters=model.num_parameters(),
        promise="Averaging its output over blocks gives back its input exactly."
        if codec is None
        else "It also mends what the codec that it was trained with broke: use it with that codec only.",
        data=f"{len(images)} images of `{arguments.public}` (split {arguments.split})"
        if arguments.public != "glyphs"
        else f"{len(images)} digits drawn by `examples/public_glyphs.py` (seed {arguments.seed})",
        held_out=held_out,
        psnr=psnr(model),
        bicubic=psnr("bicubic"),
        nearest=psnr("nearest"),
        command=f"python examples/train_super_resolution.py {options} --out {arguments.out}",
    )
    Path(arguments.out, "README.md").write_text(card, encoding="utf-8")
    print(f"PSNR {psnr(model):.2f} dB, bicubic {psnr('bicubic'):.2f} dB; saved to {arguments.out}")


if __name__ == "__main__":
    main()
