"""Trains the small public super-resolution network on PUBLIC images: area-averaged image in, image out.

    python examples/train_super_resolution.py --public glyphs --channels 1 --size 32 --out runs/sr-glyphs
    python examples/train_super_resolution.py --public path/or/hub-id --size 64 --out runs/sr-photos
    python examples/train_super_resolution.py --public path/or/hub-id --size 64 --codec runs/codec-photos \
        --adversarial 0.1 --out runs/sr-photos

With --codec, the folder of a codec or prior, half of what the network sees is what that codec makes of the images, the
rest averages of its side and of half of it, and it may mend what quantisation broke; use it with the same codec only.
It doubles as often as it takes from there to --size.

The mean absolute error alone gives blurred images: the median of all details that would fit. With --adversarial a
second network (PatchGAN, arXiv:1611.07004), shown images beside their coarse versions, learns to tell true ones from
enlarged ones, and the first learns to be taken for true: sharp details, at the price of a larger error. It takes many
thousands of steps; few leave a grain on everything. --start goes on from a network of an earlier run, with a new judge
that learns alone at first.
Never give it the sensitive images, nor images of the same people: nothing here is differentially private.
"""

import argparse
import copy
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils import spectral_norm
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from hf_spectral_dp import SpectralTokenizerForCausalLM
from hf_spectral_dp.image_sources import load_images, readable, undecoded
from hf_spectral_dp.super_resolution import SpectralSuperResolution, SpectralSuperResolutionConfig, upscale, upscale_to

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

**Training:** {steps:,} steps of {batch_size} images.

**Quality** on {held_out} held-out public images of side {size}, PSNR in dB: {psnr:.2f}; bicubic: {bicubic:.2f};
nearest: {nearest:.2f}.

**Rebuild:** `{command}`
"""


def square(image: Image.Image, size: int, channels: int, rng: np.random.Generator) -> np.ndarray:
    """A random square of `image`, uint8 (size, size, channels): half the time the whole image, area-averaged.

    The other squares are of any side down to half of `size`, and enlarged where they are smaller. Photos that were made
    small are sharp everywhere; a network that saw no others puts detail where skin, sky and walls have none.
    """
    image = image.convert("L" if channels == 1 else "RGB")
    side = min(image.size)
    if rng.random() < 0.5:
        side = int(rng.integers(min(side, size // 2), side + 1))
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
    rows = undecoded(load_images(arguments.public, arguments.split))
    squares = (square(photo, size, channels, rng) for photo, _ in readable(rows, arguments.image_column))
    return np.stack(list(tqdm(itertools.islice(squares, arguments.images), "reading", total=arguments.images)))


def batches(images: torch.Tensor, batch_size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless random batches in [-1, 1], half of them mirrored."""
    while True:
        places = torch.randint(len(images), (batch_size,), generator=generator).to(images.device)
        chosen = images[places].float() / 127.5 - 1
        yield chosen.flip(-1) if torch.rand((), generator=generator) < 0.5 else chosen


@torch.no_grad()
def redrawn(prior: SpectralTokenizerForCausalLM, tokens: torch.Tensor, temperature: Sequence[float]) -> torch.Tensor:
    """Tokens (B, T) whose details are what the prior draws at a temperature per scale, each given the true ones before.

    A model that takes nearly the likeliest details shows smoother images than any photo's tokens do. The coarsest scale
    stays, so that the true image is still what is to be found.
    """
    layout = prior.config.layout
    start = prior.start_tokens(None, len(tokens))[:, None]
    logits = prior(torch.cat([start, tokens[:, :-1]], 1), use_cache=False).logits.float()
    sharper = logits / logits.new_tensor([temperature[index] for index in layout.scale_of_position])[:, None]
    drawn = torch.distributions.Categorical(logits=sharper).sample()
    kept = layout.scales[0].tokens
    return torch.cat([tokens[:, :kept], drawn[:, kept:]], 1)


def one_cycle(share: float, rise: float) -> float:
    """Learning rate over its largest, after this share of a training: up along a cosine until `rise`, then down."""
    return (
        (1 - math.cos(math.pi * share / rise)) / 2
        if share < rise
        else (1 + math.cos(math.pi * (share - rise) / (1 - rise))) / 2
    )


class Discriminator(nn.Module):
    """Tells true images (B, C, S, S), given their coarse versions at the same size, from enlarged ones, place by place.

    A hinge loss with spectral normalisation (arXiv:1802.05957) and, for the other side, the distances of its own
    hidden features between the enlarged image and the true one, which hold training steady (arXiv:1711.11585). No
    stage sees some pixels more often than others, as a stride of 2 under a kernel of 3 would: where the judge looks
    harder, the enlarged image takes on a grain.
    """

    def __init__(self, channels: int, width: int = 24):
        super().__init__()
        widths = [2 * channels, width, 2 * width, 4 * width, 16 * width // 3]
        kernels = [(3, 1, 1), *[(4, 2, 1)] * 3]  # size, stride, padding
        self.stages = nn.ModuleList(
            spectral_norm(nn.Conv2d(before, after, *kernel))
            for before, after, kernel in zip(widths, widths[1:], kernels, strict=False)
        )
        self.out = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, images: torch.Tensor, beside: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        hidden, found = torch.cat([images, beside], 1), []
        for stage in self.stages:
            hidden = F.leaky_relu(stage(hidden), 0.2)
            found.append(hidden)
        return self.out(hidden), found

    def of_enlarged(self, images: torch.Tensor, true: torch.Tensor, beside: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the enlarging network wants small: how false its images look, and how unlike the true ones."""
        verdict, found = self(images, beside)
        with torch.no_grad():
            wanted = self(true, beside)[1]
        return -verdict.mean(), torch.stack([F.l1_loss(a, b) for a, b in zip(found, wanted, strict=True)]).sum()

    def loss(self, images: torch.Tensor, true: torch.Tensor, beside: torch.Tensor) -> torch.Tensor:
        """What this network wants small."""
        false, right = self(torch.cat([images.detach(), true]), beside.repeat(2, 1, 1, 1))[0].chunk(2)
        return F.relu(1 + false).mean() + F.relu(1 - right).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--public", required=True, help="'glyphs', an image folder, or a Hub data set id")
    parser.add_argument("--split", default="train")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--license", default="apache-2.0")
    parser.add_argument("--out", required=True)
    parser.add_argument("--codec", help="folder of the codec whose images are to be upscaled and mended")
    parser.add_argument("--prior", help="folder of a public prior of that codec, whose details are to be mended too")
    parser.add_argument("--temperature", type=float, nargs="+", default=[1.0, 0.3, 0.1], help="of these, per scale")
    parser.add_argument("--start", help="folder of a network to go on from, whose shape it keeps; with --adversarial")
    parser.add_argument("--scale", type=int, default=2, choices=(2, 4))
    parser.add_argument("--channels", type=int, default=3, choices=(1, 3))
    parser.add_argument("--size", type=int, default=64, help="side of the training images in pixels")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--minutes", type=float, help="train so long instead, with rates that follow the clock")
    parser.add_argument("--save_steps", type=int, help="save what there is after every so many steps, as OUT-1000, ...")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--adversarial", type=float, default=0.0, help="weight of looking true; 0.1 is usual, 0 none")
    parser.add_argument("--judge_width", type=int, default=24, help="channels of the judge's first stage")
    parser.add_argument("--bf16", action="store_true", help="twice as fast on GPUs and processors with AMX")
    parser.add_argument("--features", type=int, default=32)
    parser.add_argument("--num_blocks", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.start and not arguments.adversarial:
        parser.error(f"--start {arguments.start} without --adversarial: give the weight of looking true, 0.1 is usual.")
    if arguments.prior and not arguments.codec:
        parser.error(f"--prior {arguments.prior} without --codec: give the codec whose tokens it draws.")
    torch.manual_seed(arguments.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    codec = AutoModelForCausalLM.from_pretrained(arguments.codec).codec.to(device) if arguments.codec else None
    prior = AutoModelForCausalLM.from_pretrained(arguments.prior).to(device).eval() if arguments.prior else None
    if prior is not None and len(arguments.temperature) != (scales := len(prior.config.layout.scales)):
        parser.error(f"--temperature {arguments.temperature} for a prior of {scales} scales; give one for each.")

    def coarse(target: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(target, arguments.scale) if codec is None else codec.decode(codec.encode(target))

    def shown(target: torch.Tensor, step: int) -> torch.Tensor:
        """What the network is to enlarge at this step."""
        if prior is not None and step % 2:
            return codec.decode(redrawn(prior, codec.encode(target), arguments.temperature))
        if codec is None or step % 4 < 2:
            return coarse(target)
        block = arguments.size // codec.config.coarse_size
        return F.avg_pool2d(target, 2 * block if (step % 8 > 4 if prior is not None else step % 4 == 3) else block)

    task = {"num_channels": arguments.channels, "scale": arguments.scale, "keep_average": codec is None}
    if arguments.start:
        model = SpectralSuperResolution.from_pretrained(arguments.start).train()
        if (found := {name: getattr(model.config, name) for name in task}) != task:
            parser.error(f"--start {arguments.start} is made for {found}, the task is {task}; start from one for it.")
    else:
        shape = {"features": arguments.features, "num_blocks": arguments.num_blocks}
        model = SpectralSuperResolution(SpectralSuperResolutionConfig(**task, **shape))
    images = torch.from_numpy(public_images(arguments)).permute(0, 3, 1, 2).contiguous().to(device)
    held_out = max(1, min(200, len(images) // 10))
    test, images = images[:held_out].float() / 127.5 - 1, images[held_out:]
    judge = Discriminator(arguments.channels, arguments.judge_width) if arguments.adversarial else None
    for network in (model, *([judge] if judge else [])):
        network.to(device, memory_format=torch.channels_last)  # on a CPU 1.15 times as fast
    # Share of the training before the judge is asked: by absolute error alone, or of the judge alone where the network
    # knows its task.
    warm = 1 / (40 if arguments.start else 10)
    learns_from, judge_from = (warm, 0.0) if arguments.start else (0.0, 0.9 * warm)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=arguments.learning_rate, betas=(0.5, 0.99) if judge else (0.9, 0.999)
    )
    judging = torch.optim.Adam(judge.parameters(), lr=4e-4, betas=(0.5, 0.99)) if judge else None
    average = copy.deepcopy(model) if judge else model  # adversarial training goes round in circles
    source = batches(images, arguments.batch_size, torch.Generator().manual_seed(arguments.seed))
    progress = tqdm(itertools.count(), "training", total=None if arguments.minutes else arguments.steps)
    began, steps = time.monotonic(), 0
    for step in progress:
        share = (time.monotonic() - began) / (60 * arguments.minutes) if arguments.minutes else step / arguments.steps
        if share >= 1:
            break
        steps = step + 1
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * one_cycle(share, 0.1 if arguments.start else 0.3)
        target = next(source).contiguous(memory_format=torch.channels_last)
        if codec is None and step % 4 == 3 and arguments.size % (2 * arguments.scale) == 0:
            target = F.avg_pool2d(target, 2)  # the network also meets images half as large
        small, side = shown(target, step), target.shape[-1]
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16):
            enlarged = upscale_to(side, model, small).float()
            loss = error = F.l1_loss(enlarged, target)
            beside = F.interpolate(small, (side, side))
            if judge and share >= warm:
                judge.requires_grad_(False)  # it learns from its own loss below
                false, unlike = judge.of_enlarged(enlarged, target, beside)
                loss = error + arguments.adversarial * false + unlike / 2
        if share >= learns_from:
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        if judge and judging and share >= judge_from:
            judge.requires_grad_(True)
            with torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16):
                wrong = judge.loss(enlarged, target, beside)
            judging.zero_grad()
            wrong.backward()
            judging.step()
        if judge:
            with torch.no_grad():
                for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
                    mean.lerp_(weight, 0.01 if share > warm else 1.0)
        if arguments.save_steps and steps % arguments.save_steps == 0:
            average.save_pretrained(f"{arguments.out}-{steps}")
        if step % 50 == 0:
            progress.set_postfix(l1=f"{error.item():.4f}")
    model = average

    def psnr(backend) -> float:
        with torch.no_grad():
            small = coarse(test)
            error = F.mse_loss(
                upscale(backend, small, test.shape[-1] // small.shape[-1])
                if isinstance(backend, str)
                else upscale_to(test.shape[-1], backend, small),
                test,
            )
        return float(10 * torch.log10(4 / error))

    model.eval()
    model.save_pretrained(arguments.out)
    given = {name: value for name, value in vars(arguments).items() if name != "out"}
    if prior is None:
        del given["temperature"]
    words = (
        f"--{name}" if value is True else f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in given.items()
        if value is not None and value is not False
    )
    options = " ".join(words)
    card = CARD.format(
        scale=arguments.scale,
        channels=arguments.channels,
        size=arguments.size,
        license=arguments.license,
        steps=steps,
        batch_size=arguments.batch_size,
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
