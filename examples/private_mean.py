"""A private mean of the images, by which the pipeline chooses among what it draws.

Run by train.py when a config has a `critic` section of `kind: mean`. One noisy sum over all private images, at a part
of the budget, says what a public network sees in them on average (`hf_spectral_dp.mean_critic`). After private training
the critic learns from generated images with which odds to keep one of several; that is post-processing. With `public`
photos in the section the super-resolution network first goes on learning from them, weighed so that they have the
private mean, which is post-processing, too (`hf_spectral_dp.super_resolution_training`). Writes to the output folder,
beside train.py's:

    critic/             the critic, which the pipeline saves again
    critic_training/    its ledger: keep that private
    super_resolution/   the network after it learned, which the pipeline saves again
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from critics import ledger_of, trained
from job_config import located
from PIL import Image
from torch import Tensor

from hf_spectral_dp import DPSpectralPipeline, DPTrainingArguments, MeanCritic
from hf_spectral_dp.feature_rows import ImageFeatureRows, draw_choices
from hf_spectral_dp.image_decoding import readable
from hf_spectral_dp.image_sources import load_images
from hf_spectral_dp.metrics.features import PublicFeatures
from hf_spectral_dp.metrics.public_features import CHECKPOINT
from hf_spectral_dp.super_resolution import SpectralSuperResolution, upscale_to
from hf_spectral_dp.super_resolution_training import MENDING, eight_bits, mend_towards, public_squares
from hf_spectral_dp.token_store import TokenStore
from hf_spectral_dp.whole_files import new_folder


def mean_of(
    section: dict[str, Any],
    images: Any,
    columns: dict[str, Any],
    processor: Any,
    store: TokenStore,
    args: DPTrainingArguments,
    output: Path,
) -> tuple[MeanCritic, str]:
    """A critic that knows the mean of the private images, and its ledger.

    A run that goes on finds it in its folder. A crash before it was saved has spent its budget: its ledger refuses to
    begin again, and a new run needs a folder and a budget of its own.

    Args:
        section: the config's `critic`.
        images, columns: the private data and the names of their columns, as `store` was made of them.
        processor: of the images. args: the arguments of the private training that follows.
        output: the run's folder.
    """  # fmt: skip
    folder = output / "critic"
    ledger = str(ledger_of(output))
    if folder.exists():
        return MeanCritic.from_pretrained(folder), ledger
    critic = MeanCritic.on(PublicFeatures(located(section["network"]) if "network" in section else CHECKPOINT).network)
    columns = {name: column for name, column in columns.items() if name not in ("label_column", "class_names")}
    rows = ImageFeatureRows(store, images, processor, critic.features, **columns)
    return trained(critic, rows, section, args, output), ledger


def public_photos(section: dict[str, Any], white_level: int) -> Iterator[Image.Image]:
    """Those that the mean weighs, as the config's `critic` names them; what cannot be read is passed over."""
    rows = load_images(section["public"], section.get("public_split", "train"))
    return (eight_bits(photo, white_level) for photo, _ in readable(rows, "image"))


def mended(
    section: dict[str, Any],
    critic: MeanCritic,
    detail: SpectralSuperResolution,
    model: Any,
    temperature: Any,
    white_level: int,
    args: DPTrainingArguments,
    output: Path,
) -> SpectralSuperResolution:
    """The super-resolution network after it learned from the section's public photos; a run that goes on finds it.

    Args:
        section: the config's `critic`, with `public`.
        critic, model: after their private training. detail: the public network. temperature: of drawing.
        white_level: of photos of 16 bits.
        args: of the private training. output: the run's folder.
    """
    folder = output / "super_resolution"
    if folder.exists():
        return SpectralSuperResolution.from_pretrained(folder)
    images = public_squares(
        public_photos(section, white_level), model.config.image_size, model.config.num_channels, args.seed
    )
    schedule = replace(MENDING, steps=section.get("public_steps", MENDING.steps), bf16=args.bf16, seed=args.seed)
    parts = [part.to(args.device) for part in (critic, detail, model)]
    learned = mend_towards(*parts, images, temperature, schedule).cpu()
    for part in parts:
        part.cpu()
    new_folder(folder, learned.save_pretrained)
    return learned


def learn_to_choose(pipeline: DPSpectralPipeline, seed: int) -> None:
    """Lets the pipeline's critic look at what the pipeline draws, and find with which odds to keep it."""
    model, critic, detail = pipeline.model, pipeline.critic, pipeline.super_resolution
    classes, generator = model.config.num_classes, torch.Generator().manual_seed(seed)

    def draw(count: int) -> Tensor:
        labels = torch.arange(count) % classes if classes else None
        each = 1 if classes else count
        coarse = pipeline(None, labels, each, generator=generator, output_type="latent", attempts=1).images
        return torch.cat([upscale_to(model.config.image_size, detail, some) for some in coarse.split(100)])

    pipeline.set_progress_bar_config(disable=True)
    critic.fit(draw_choices(draw, critic, pipeline.config.attempts))
    pipeline.set_progress_bar_config(disable=False)
