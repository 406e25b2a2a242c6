"""Training a super-resolution network on PUBLIC images: sharp details, and codecs that it mends.

The mean absolute error alone gives blurred images: the median of all details that would fit. A second network
(PatchGAN, arXiv:1611.07004), shown images beside their coarse versions, learns to tell true ones from enlarged ones,
and the first learns to be taken for true: sharp details, at the price of a larger error. Nothing here is
differentially private. But the private mean of a `MeanCritic` may say how often the network sees which public image
(`mend_towards`): what it learns is then a function of that release, and post-processing.
"""

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import spectral_norm
from tqdm.auto import tqdm

from .codec import SpectralCodec
from .image_processing_spectral import WHITE_LEVEL, image_levels
from .mean_critic import MeanCritic
from .modeling_spectral import SpectralTokenizerForCausalLM
from .private_marks import UNRECORDED, marks
from .super_resolution import SpectralSuperResolution, upscale_to


def square(image: Image.Image, size: int, channels: int, rng: np.random.Generator) -> np.ndarray:
    """A random square of `image`, uint8 (size, size, channels): half the time the whole image, area-averaged.

    The other squares are of any side down to half of `size`, and enlarged where they are smaller. Photos that were made
    small are sharp everywhere; a network that saw no others puts detail where skin, sky and walls have none.
    """
    image = eight_bits(image).convert("L" if channels == 1 else "RGB")
    side = min(image.size)
    if rng.random() < 0.5:
        side = int(rng.integers(min(side, size // 2), side + 1))
    left, top = (int(rng.integers(extent - side + 1)) for extent in image.size)
    resample = Image.Resampling.BOX if side >= size else Image.Resampling.BICUBIC
    small = image.resize((size, size), resample, box=(left, top, left + side, top + side))
    return np.asarray(small).reshape(size, size, channels)


def eight_bits(image: Image.Image, white_level: int = WHITE_LEVEL) -> Image.Image:
    """The image in eight bits and without transparency, as `SpectralImageProcessor` sees it; Pillow would clip."""
    levels = image_levels(image, 0.0, white_level)
    if isinstance(levels, Image.Image):
        return levels
    eight = levels.round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(eight[..., 0] if eight.shape[-1] == 1 else eight)


def squares(
    images: Iterable[Image.Image], size: int, channels: int, rng: np.random.Generator, each: int = 1
) -> Iterator[np.ndarray]:
    """`each` random squares of every image; see `square`."""
    return (square(image, size, channels, rng) for image in images for _ in range(each))


@torch.no_grad()
def redrawn(prior: SpectralTokenizerForCausalLM, tokens: Tensor, temperature: Sequence[float]) -> Tensor:
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


@dataclass(frozen=True)
class Coarse:
    """What a network is to enlarge.

    Attributes:
        scale: of the network, by which images are averaged where there is no codec.
        codec: half of what is seen is what it makes of the images, the rest averages of its side and of half of it.
        prior: of that codec; half of what is seen has the details that it draws (`redrawn`, at `temperature`).
    """

    scale: int
    codec: SpectralCodec | None = None
    prior: SpectralTokenizerForCausalLM | None = None
    temperature: Sequence[float] = (1.0, 0.3, 0.1)

    def of(self, target: Tensor) -> Tensor:
        """The coarse version of images (B, C, S, S)."""
        return F.avg_pool2d(target, self.scale) if self.codec is None else self.codec.decode(self.codec.encode(target))

    def at(self, step: int, target: Tensor) -> tuple[Tensor, Tensor]:
        """What the network is to enlarge at this step, and to what: `target`, or its averages."""
        if self.codec is None:
            if step % 4 == 3 and target.shape[-1] % (2 * self.scale) == 0:
                target = F.avg_pool2d(target, 2)  # the network also meets images half as large
            return self.of(target), target
        if self.prior is not None and step % 2:
            return self.codec.decode(redrawn(self.prior, self.codec.encode(target), self.temperature)), target
        if step % 4 < 2:
            return self.of(target), target
        block = target.shape[-1] // self.codec.config.coarse_size
        halved = step % 8 > 4 if self.prior is not None else step % 4 == 3
        return F.avg_pool2d(target, 2 * block if halved else block), target


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
    harder, the enlarged image takes on a grain. Nor may it look away: a normalised network answers to what it sees in
    proportion, and fine detail is faint, so it is shown once more by itself, amplified.
    """

    AMPLIFIED = 4.0  # what differs from the mean of the 3 x 3 pixels around

    def __init__(self, channels: int, width: int = 24):
        super().__init__()
        widths = [3 * channels, width, 2 * width, 4 * width, 16 * width // 3]
        kernels = [(3, 1, 1), *[(4, 2, 1)] * 3]  # size, stride, padding
        self.stages = nn.ModuleList(
            spectral_norm(nn.Conv2d(before, after, *kernel))
            for before, after, kernel in zip(widths, widths[1:], kernels, strict=False)
        )
        self.out = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, images: Tensor, beside: Tensor) -> tuple[Tensor, list[Tensor]]:
        around = F.avg_pool2d(F.pad(images, (1,) * 4, mode="replicate"), 3, stride=1)
        hidden, found = torch.cat([images, beside, self.AMPLIFIED * (images - around)], 1), []
        for stage in self.stages:
            hidden = F.leaky_relu(stage(hidden), 0.2)
            found.append(hidden)
        return self.out(hidden), found

    def of_enlarged(self, images: Tensor, true: Tensor, beside: Tensor) -> tuple[Tensor, ...]:
        """What the enlarging network wants small: how false its images look, and how unlike the true ones."""
        verdict, found = self(images, beside)
        with torch.no_grad():
            wanted = self(true, beside)[1]
        return -verdict.mean(), torch.stack([F.l1_loss(a, b) for a, b in zip(found, wanted, strict=True)]).sum()

    def loss(self, images: Tensor, true: Tensor, beside: Tensor) -> Tensor:
        """What this network wants small."""
        false, right = self(torch.cat([images.detach(), true]), beside.repeat(2, 1, 1, 1))[0].chunk(2)
        return F.relu(1 + false).mean() + F.relu(1 - right).mean()


@dataclass(frozen=True)
class Schedule:
    """How long, how fast and against which judge a network learns.

    Attributes:
        steps: of `batch_size` images each; minutes: train so long instead, with rates that follow the clock.
        learning_rate: the largest; it rises and falls along a cosine.
        adversarial: weight of looking true; 0.1 is usual, at 0 there is no judge. judge_width: channels of its first
            stage.
        goes_on: the network knows its task: the judge, new, learns alone in the first `judge_alone` of the training.
        bf16: matrix products in bfloat16; twice as fast on GPUs and on processors with AMX.
        seed: of the choice of images.
    """

    steps: int = 2_000
    minutes: float | None = None
    batch_size: int = 32
    learning_rate: float = 1e-3
    adversarial: float = 0.0
    judge_width: int = 24
    goes_on: bool = False
    judge_alone: float = 1 / 40
    bf16: bool = False
    seed: int = 0


def _batches(images: Tensor, odds: Tensor | None, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Endless random batches in [-1, 1], half of them mirrored."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        if odds is None:
            places = torch.randint(len(images), (batch_size,), generator=generator)
        else:
            places = torch.multinomial(odds, batch_size, replacement=True, generator=generator)
        chosen = images[places.to(images.device)].float() / 127.5 - 1
        yield chosen.flip(-1) if torch.rand((), generator=generator) < 0.5 else chosen


def train_super_resolution(
    network: SpectralSuperResolution,
    images: Tensor,
    coarse: Coarse,
    schedule: Schedule,
    odds: Tensor | None = None,
    kept: Callable[[SpectralSuperResolution, int], Any] | None = None,
) -> tuple[SpectralSuperResolution, int]:
    """Trains `network`, in place, on the device where it is, to bring coarse versions of PUBLIC images back to them.

    Args:
        network: to train. It, codec and prior are on one device.
        images: uint8 (N, C, S, S), there or on the CPU.
        coarse: what it sees of them.
        schedule: how long and how fast.
        odds: (N,) on the CPU, how often each image is seen, in any unit; None: all alike.
        kept: called after every step with the network as it then stands and the number of steps.

    Returns:
        The trained network and the number of steps. With a judge it is the mean over the last steps, since
        adversarial training goes round in circles.
    """
    device = next(network.parameters()).device
    judge = Discriminator(images.shape[1], schedule.judge_width) if schedule.adversarial else None
    for one in (network.train(), *([judge] if judge else [])):
        one.to(device, memory_format=torch.channels_last)  # on a CPU 1.15 times as fast
    # Share of the training before the judge is asked: by absolute error alone, or of the judge alone where the network
    # knows its task.
    warm = schedule.judge_alone if schedule.goes_on else 1 / 10
    learns_from, judge_from = (warm, 0.0) if schedule.goes_on else (0.0, 0.9 * warm)
    betas = (0.5, 0.99) if judge else (0.9, 0.999)
    optimizer = torch.optim.AdamW(network.parameters(), lr=schedule.learning_rate, betas=betas)
    judging = torch.optim.Adam(judge.parameters(), lr=4e-4, betas=(0.5, 0.99)) if judge else None
    average = copy.deepcopy(network) if judge else network
    source = _batches(images, odds, schedule.batch_size, schedule.seed)
    progress = tqdm(itertools.count(), "super-resolution", total=None if schedule.minutes else schedule.steps)
    began, steps = time.monotonic(), 0
    for step in progress:
        passed = (time.monotonic() - began) / 60
        share = passed / schedule.minutes if schedule.minutes else step / schedule.steps
        if share >= 1:
            break
        steps = step + 1
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * one_cycle(share, 0.1 if schedule.goes_on else 0.3)
        small, target = coarse.at(step, next(source).to(device, memory_format=torch.channels_last))
        side = target.shape[-1]
        with torch.autocast(device.type, torch.bfloat16, enabled=schedule.bf16):
            with torch.set_grad_enabled(share >= learns_from):
                enlarged = upscale_to(side, network, small).float()
            loss = error = F.l1_loss(enlarged, target)
            beside = F.interpolate(small, (side, side))
            if judge and share >= warm:
                judge.requires_grad_(False)  # it learns from its own loss below
                false, unlike = judge.of_enlarged(enlarged, target, beside)
                loss = error + schedule.adversarial * false + unlike / 2
        if share >= learns_from:
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
        if judge and judging and share >= judge_from:
            judge.requires_grad_(True)
            with torch.autocast(device.type, torch.bfloat16, enabled=schedule.bf16):
                wrong = judge.loss(enlarged, target, beside)
            judging.zero_grad()
            wrong.backward()
            judging.step()
        if judge:
            with torch.no_grad():
                for mean, weight in zip(average.parameters(), network.parameters(), strict=True):
                    mean.lerp_(weight, 0.01 if share > warm else 1.0)
        if kept is not None:
            kept(average, steps)
        if step % 50 == 0:
            progress.set_postfix(l1=f"{error.item():.4f}")
    return average.eval(), steps


MENDING = Schedule(
    steps=1_600, batch_size=16, learning_rate=2e-4, adversarial=0.03, judge_width=32, goes_on=True, judge_alone=0.08
)
"""Of `mend_towards`: twenty minutes of a CPU core for the large bundled network."""
SQUARES = 3  # of every public photo
MEMORY = 2_000_000_000  # bytes of them


def public_squares(photos: Iterable[Image.Image], size: int, channels: int, seed: int) -> Tensor:
    """What `mend_towards` learns from: `SQUARES` random squares of each photo, uint8 (N, C, size, size).

    They stop at `MEMORY` bytes: at side 64 and in colour, at 54,000 photos.
    """
    drawn = squares(photos, size, channels, np.random.default_rng(seed), SQUARES)
    found = itertools.islice(drawn, MEMORY // (channels * size**2))
    return torch.stack([torch.from_numpy(one).permute(2, 0, 1) for one in found])


def mend_towards(
    critic: MeanCritic,
    network: SpectralSuperResolution,
    model: SpectralTokenizerForCausalLM,
    images: Tensor,
    temperature: float | Sequence[float],
    schedule: Schedule = MENDING,
) -> SpectralSuperResolution:
    """A network for what `model` draws, which saw public images as often as it takes for them to have the private mean.

    It learns which detail the private images have, as far as public photos have it, too (of faces: skin, eyes, hair),
    and to mend what codec and model do to images. No private image is looked at: what comes out is a function of the
    critic's mean, the model, public images and random numbers, so whatever guarantee covers mean and model together
    covers it as well. It is no public network any more, as its config says (`private_runs`: those of all three), and no
    part of a control that stands for epsilon 0.

    Args:
        critic: after its private training.
        network: public; it goes on from there, on a copy. It, `critic` and `model` are on one device.
        model: after its private training, if it is to be mended what that did.
        images: PUBLIC ones, uint8 (N, C, S, S) of the model's size; see `public_squares`.
        temperature: with which images are drawn, one for all scales or one for each.
        schedule: how long and how fast.

    Returns:
        The new network, on the same device.
    """
    device = model.device
    features = [critic.features(some.to(device).float() / 127.5 - 1).cpu() for some in images.split(500)]
    scales = len(model.config.layout.scales)
    each = temperature if isinstance(temperature, Sequence) else [temperature] * scales
    coarse = Coarse(network.config.scale, model.codec, model.eval(), each)
    mended, _ = train_super_resolution(
        copy.deepcopy(network), images, coarse, schedule, critic.odds(torch.cat(features))
    )
    unrecorded = [] if marks(critic) else [UNRECORDED]  # a mean that no ledger counts, whatever made the others
    mended.config.private_runs = [*unrecorded, *marks(critic, model, network)]
    return mended


__all__ = [
    "MENDING",
    "Coarse",
    "Discriminator",
    "Schedule",
    "eight_bits",
    "mend_towards",
    "one_cycle",
    "public_squares",
    "redrawn",
    "square",
    "squares",
    "train_super_resolution",
]
