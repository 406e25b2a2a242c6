"""Private critics in the quality benchmark: as examples/train.py has them, on rows in memory.

Where classes count, a critic of classes is trained at three tenths of the budget by `DPTrainer` on features of the
private images; it chooses the public photos from which the public model learns the classes, and later among generated
images. (The classes are learned in one cycle of the rate, as all that is public here; in the example's job the rate
warms up and falls as a cosine.) Where only the images count, a tenth of the budget is for their mean: by it
super-resolution learns detail, if a size asks for it, and images are chosen among those drawn.
"""

import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.quality_methods import Cost, TokenGenerator, train_publicly
from hf_spectral_dp import ClassCritic, DPTrainer, MeanCritic
from hf_spectral_dp.feature_rows import RowsInMemory, critic_arguments, draw_choices, mean_arguments
from hf_spectral_dp.metrics.features import PublicFeatures
from hf_spectral_dp.metrics.public_features import EYE
from hf_spectral_dp.super_resolution_training import MENDING, mend_towards, public_squares
from hf_spectral_dp.trainer import LEDGER

CHOICES = 8  # images of which the private mean keeps one
CLASS_ATTEMPTS = 20  # images drawn for each at most, until the critic of classes takes one for its class
CLASS_SHARE = 0.3  # of epsilon, for the private critic of classes
MEAN_SHARE = 0.1  # of epsilon, for the private mean
SHARE = 0.1  # of the photos that are learned from for each class
TEMPERATURE = 1.0
"""Of sampling, for all scales: the nearest to the public photos that the critic chose, which looks at no private image.

After private training at epsilon 10 their Frechet distance is 245 at 1, 0.3, 0.1 (coarse to fine; best for
pictograms), 84 at 1, 0.8, 0.8, 64 at 1, and 111 at 0.8. Where the critic keeps one of five, they are 92, 79 and 73 at
1 for the coarse tokens and 0.8, 0.9, 1 for the others.
"""


def photo_rows(generator: TokenGenerator, photos: Tensor) -> Tensor:
    """Token rows without class of photos (N, C, S, S) of the model's own size."""
    config, codec = generator.model.config, generator.model.codec
    tokens = torch.cat([codec.encode(some.to(generator.model.device)).cpu() for some in photos.split(1000)])
    return torch.cat([torch.full((len(tokens), 1), config.null_token_id), tokens], 1)


def features(generator: TokenGenerator, critic: ClassCritic, rows: Tensor) -> Tensor:
    """What the critic sees (N, D), on the CPU, of rows, shown as the generator shows its images."""
    return torch.cat([critic.features(generator.decoded(some)).cpu() for some in rows.split(1000)])


def learn_classes(
    generator: TokenGenerator, rows: Tensor, photos: Tensor, epsilon: float, delta: float, steps: int, folder: Path
) -> tuple[str, Cost]:
    """Trains a critic within `CLASS_SHARE` of epsilon, teaches the generator the classes, gives it the critic.

    Args:
        rows: private token rows. photos: public, of the model's own size.
        steps: of ordinary training, of 128 rows each.
        folder: of the critic's run.

    Returns:
        The critic's ledger, for `earlier_ledgers` of the training that follows, and what the ordinary training took.
    """
    model, classes = generator.model, generator.model.config.num_classes
    critic = ClassCritic.on(PublicFeatures(EYE).network, classes).to(model.device)
    public_rows, mirrored = photo_rows(generator, photos), photo_rows(generator, photos.flip(-1))
    public = features(generator, critic, public_rows)
    critic.fit(public)
    arguments = critic_arguments(
        str(folder), CLASS_SHARE * epsilon, delta, disable_tqdm=True, logging_strategy="no",
        use_cpu=model.device.type == "cpu",
    )  # fmt: skip
    labels = model.labels_of(rows[:, :1]).float()
    DPTrainer(critic, arguments, RowsInMemory(torch.cat([labels, features(generator, critic, rows)], 1))).train()
    generator.critic, generator.attempts, generator.temperature = critic.eval(), CLASS_ATTEMPTS, TEMPERATURE
    chosen = critic.likeliest(public.to(model.device), SHARE).cpu()
    taught = torch.cat([public_rows[chosen.flatten()], mirrored[chosen.flatten()]])
    taught[:, 0] = torch.arange(classes).repeat_interleave(chosen.shape[1]).repeat(2) + model.config.layout.codes
    cost = train_publicly(generator, taught, steps, batch_size=128, learning_rate=1.5e-3, hide=0.1)
    return str(folder / LEDGER), cost


def mean_rows(images: Tensor, device: str) -> Tensor:
    """What a `MeanCritic` is trained on: features (N, D), on the CPU, of private images; the same at every epsilon."""
    network = PublicFeatures().network.to(device)
    with torch.no_grad():
        return torch.cat([network.features(some.to(device)).cpu() for some in images.split(500)])


def private_mean(
    rows: Tensor, epsilon: float, delta: float, folder: Path, device: str
) -> tuple[MeanCritic, list[str]]:
    """A critic that knows the mean of private images, within `MEAN_SHARE` of epsilon (exactly, if that is inf).

    Args:
        rows: `mean_rows` of the images.

    Returns:
        It, before it can choose (see `choose_by`), and its ledgers, for the training that follows.
    """
    critic = MeanCritic.on(PublicFeatures().network).to(device)
    if math.isinf(epsilon):
        critic.per_example_loss(rows.to(device)).mean().backward()
        for values in (critic.sums.weight, critic.sums.bias):
            values.data, values.grad = -values.grad, None
        return critic, []
    arguments = mean_arguments(
        str(folder), MEAN_SHARE * epsilon, delta, disable_tqdm=True, logging_strategy="no", use_cpu=device == "cpu"
    )
    DPTrainer(critic, arguments, RowsInMemory(rows)).train()
    return critic.eval(), [str(folder / LEDGER)]


def mend(critic: MeanCritic, generator: TokenGenerator, cost: Cost, photos: Tensor, steps: int) -> Cost:
    """Lets the super-resolution of the trained generator learn from public photos that the mean weighs.

    As `mend_towards` does it, from photos (N, C, S, S) in [-1, 1]. Returns the cost, with what this took added.
    """
    enlarge, model = generator.upscaler, generator.model
    assert isinstance(enlarge, partial)  # of `quality.upscaler`, as all of ours are
    network, *sizes = enlarge.args
    start, pixels = time.perf_counter(), ((photos + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    images = public_squares(map(Image.fromarray, pixels), model.config.image_size, model.config.num_channels, seed=0)
    with FlopCounterMode(display=False) as counter:
        critic.features(images[:1].to(critic.device).float())
    flops = len(images) * counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:  # after eight steps it comes round; their look is counted, too
        mend_towards(critic, network, model, images[:16], generator.temperature, replace(MENDING, steps=8))
    flops += steps * counter.get_total_flops() / 8
    schedule = replace(MENDING, steps=steps, bf16=True)
    mended = mend_towards(critic, network, model, images, generator.temperature, schedule)
    generator.upscaler, generator.detail_steps = partial(enlarge.func, mended, *sizes), steps
    return replace(cost, seconds=cost.seconds + time.perf_counter() - start, flops=cost.flops + flops)


def choose_by(critic: MeanCritic, generator: TokenGenerator, cost: Cost, private: int) -> Cost:
    """Lets the critic choose among `CHOICES` images of the trained generator; its cost, with what this took added.

    `private`: images that the mean is of, which a public network looked at.
    """
    seed, classes = torch.Generator(generator.model.device).manual_seed(1), generator.model.config.num_classes
    features = draw_choices(lambda count: generator.sample(torch.arange(count) % classes, seed), critic, CHOICES)
    critic.fit(features)
    with FlopCounterMode(display=False) as counter:
        images = generator.sample(torch.zeros(4, dtype=torch.long), seed)
        drawn = counter.get_total_flops() / 4
        critic.features(images.to(critic.device))
    looked = counter.get_total_flops() / 4 - drawn
    generator.critic, generator.attempts = critic, CHOICES
    choices = features.shape[0] * CHOICES
    return replace(cost, flops=cost.flops + choices * (drawn + looked) + private * looked)
