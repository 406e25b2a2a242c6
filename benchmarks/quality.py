"""What the images of a private generator are worth at a given epsilon, beside every control that tells why.

    python -m benchmarks.quality --dataset mnist --epsilon 1 10 inf --size small --out quality.json

All methods see the same private rows, spend the same (epsilon, delta) under the same accountant by the same trainer,
see public images of the same kind, and are measured by the same code. The methods:

    ours           coarse wavelet tokens, then public super-resolution; critics as quality_critic says
    ceiling        (a) real private images through codec and super-resolution: the best ours could do
    floor          (b) the public model of ours without any private training
    raster         (d) tokens of full-resolution patches in raster order, the kind of DP-LlamaGen
    pixels         (e) plain pixels of 8 x 8 as tokens, no wavelets; enlarged by public super-resolution
    pixels16       (e) the same of 16 x 16: 256 tokens
    diffusion      (f) diffusion on area-averaged images, attention trained, the kind of DP-LDM; enlarged likewise
    real           real private images themselves

Epsilon inf is (c), the non-private twin of each. Nothing is chosen on test images. Figures of `ceiling`, `real` and
epsilon inf are facts about private images that no guarantee covers.

The sizes say how much is trained, and every row repeats it: "quick" shows that all of it runs; "small" gives every
method the same number of private examples, for a quarter of an hour of one core; "photos" is the like for colour
images, "objects" for images whose classes are to be told apart; "medium" takes a night, and "full" and those that
end in "-gpu" are for a GPU. Ours starts from the bundled public model where there is one; the others are trained on
public images in the run, as the row says.

    python -m benchmarks.quality --dataset mnist --size medium --pipeline runs/mnist/pipeline

measures instead, as "ours", a pipeline that examples/train.py made, at the epsilon that its card states.

    python -m benchmarks.quality --dataset faces --size photos --keep runs/public --out faces.json

Colour images start from the bundled public model of photos and all end with the network that goes with it: pixels and
diffusion from their own side, raster tokens from averages of the side that ours has. Model and network make images of
side 64; CIFAR-10 is shown to the codec with every pixel as a block of 2 x 2, and compared at 32 by averages; faces of
side 128 ("faces128") are shown as averages, and doubled once more bicubically. Other codecs and networks of public
photos may be given as folders.
"""

import argparse
import copy
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageToImage

from benchmarks.judge import judges_of, seen
from benchmarks.quality_critic import choose_by, learn_classes, mean_rows, mend, private_mean
from benchmarks.quality_data import IMAGE_SETS, ImageSet, Labelled, private_images, public_images
from benchmarks.quality_figures import figures, save_grid
from benchmarks.quality_methods import (
    Cost,
    DiffusionGenerator,
    Generator,
    TokenGenerator,
    train_privately,
    train_publicly,
)
from benchmarks.quality_settings import (
    SETTINGS,
    SIZES,
    TRAINED,
    Size,
    photo_settings,
    scale_weights,
    temperature,
)
from benchmarks.report import write_report
from hf_spectral_dp import DPSpectralPipeline, PrivacyCard, SpectralConfig, SpectralTokenizerForCausalLM, bundled_model
from hf_spectral_dp.metrics.features import FeatureExtractor
from hf_spectral_dp.super_resolution import upscale_to

METHODS = ("ours", "ceiling", "floor", "raster", "pixels", "pixels16", "diffusion", "real")
DELTA = 1e-5
ATTEMPTS = 5  # of every token model, where classifiers learn from its images
PHOTOS = ("photos", "photos-super-resolution", "photos-super-resolution")
WIDE_PHOTOS = ("photos-wide", "photos-wide-super-resolution", "photos-wide-super-resolution")
FACES = ("photos", *WIDE_PHOTOS[1:])
BUNDLED = {
    "mnist": ("digits-fine", "digits-fine-super-resolution", "digits-super-resolution"),
    "faces": FACES,
    "faces128": FACES,
    "cifar10": PHOTOS,
}
"""By image set: public model of ours, the network that goes with its codec, and the one that all others end with.

The sizes for a GPU take `WIDE_PHOTOS` for colour images.
"""


def upscaler(network: Any, size: int, compared_at: int, coarse: Tensor) -> Tensor:
    """Coarse images at the full size: by `network` as often as it takes, or bicubically if there is none.

    They come out at `compared_at`: by averages where that is less, bicubically where it is more. The bundled network
    saw no larger images than its `size`; docs/experiments.md says what its doubling once more would cost.
    """
    with torch.no_grad():
        detailed = upscale_to(size, network, coarse)
        if compared_at < size:
            return torch.nn.functional.avg_pool2d(detailed, size // compared_at)
        return upscale_to(compared_at, "bicubic", detailed)


def configuration(images: ImageSet, **fields: Any) -> SpectralConfig:
    """The transformer that all token models of an image set share; that of the bundled one, where there is one."""
    width = {"hidden_size": 128, "intermediate_size": 352} if images.channels == 1 else {}
    return SpectralConfig(
        num_channels=images.channels, num_classes=images.classes, num_hidden_layers=3, num_attention_heads=4,
        **{"hidden_size": 64, "intermediate_size": 160} | width | fields,
    )  # fmt: skip


@dataclass(frozen=True)
class Folders:
    """Where public models lie: the codec of ours, a super-resolution network, and those that this benchmark trains."""

    codec: Path | None = None
    super_resolution: Path | None = None
    keep: Path | None = None


def public_generator(
    method: str, name: str, images: ImageSet, public: Labelled, size: Size, folders: Folders, device: str = "cpu"
) -> tuple[Generator, Cost]:
    """A generator that knows public images only, and what its public training took (nothing if it is bundled)."""
    torch.manual_seed(0)
    pixels, labels = public
    side = images.size
    shipped = WIDE_PHOTOS if size.wide and images.channels == 3 else BUNDLED.get(name)
    bundled = None if folders.codec is not None else shipped
    trained_at = SpectralConfig.from_pretrained(bundled_model(bundled[0])).image_size if bundled else side
    if bundled and method == "ours":
        model = AutoModelForCausalLM.from_pretrained(bundled_model(bundled[0]))
        network = AutoModelForImageToImage.from_pretrained(bundled_model(bundled[1])).to(device).eval()
        if model.config.num_classes != images.classes:
            model = model.with_classes(images.classes)
        detailed = partial(upscaler, network, trained_at, side)
        return TokenGenerator(model.to(device), detailed, trained_at / side), Cost(0.0, 0.0)
    known = bundled_model(bundled[2]) if bundled else folders.super_resolution
    network = None if known is None else AutoModelForImageToImage.from_pretrained(known).to(device).eval()
    enlarged = partial(upscaler, network, trained_at, side)
    kept = folders.keep / f"{name}_{method}_{size.public_steps}.pt" if folders.keep is not None else None
    found = kept is not None and kept.exists()
    generator: Generator
    if method == "diffusion":
        generator = DiffusionGenerator(
            images.channels, side, min(16, side // 2), images.classes, enlarged, size.denoising_steps, size.widths
        )
    elif method == "ours" and folders.codec is not None:
        generator = TokenGenerator(AutoModelForCausalLM.from_pretrained(folders.codec), enlarged)
    else:
        codes = min(256 if images.channels == 1 else 512, len(pixels) // 4)
        plain = {"image_size": side, "patch_sizes": [1], "codebook_sizes": [32 if images.channels == 1 else codes]}
        fields: dict[str, dict[str, Any]] = {
            "ours": {"image_size": side, "levels": 3, "patch_sizes": [2] * 3, "codebook_sizes": [codes] * 3},
            "raster": {
                "image_size": 2 * side, "levels": 1, "patch_sizes": [4 if images.channels == 1 else 8],
                "codebook_sizes": [codes],
            },
            "pixels": plain | {"levels": (side // 8).bit_length() - 1},
            "pixels16": plain | {"levels": (side // 16).bit_length() - 1},
        }  # fmt: skip
        config, enlarge = configuration(images, **fields[method]), 2 if method == "raster" else 1
        if found:  # its codec, too
            generator = TokenGenerator(SpectralTokenizerForCausalLM(config), enlarged, enlarge)
        else:
            generator = TokenGenerator.from_public_images(config, pixels, enlarged, enlarge)
        if method == "raster" and images.channels == 3 and network is not None:
            generator.upscaler = lambda drawn: enlarged(torch.nn.functional.adaptive_avg_pool2d(drawn, 16))
    generator.model.to(device)
    if kept is not None and found:
        state, *figures = torch.load(kept, weights_only=True, map_location=device)
        generator.model.load_state_dict(state)
        return generator, Cost(*figures)
    # A row of 256 tokens costs more than four times what one of 64 does.
    share = {"diffusion": size.diffusion_share, "pixels16": 0.5}.get(method, 1)
    steps = max(1, round(size.public_steps * share))
    cost = train_publicly(generator, generator.rows(pixels, labels), steps, size.public_batch, hide=0.1)
    if int(labels.max()) < 0:
        generator.name_classes()
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save([generator.model.state_dict(), cost.seconds, cost.flops], kept)
    return generator, cost


def sources(
    name: str,
    methods: list[str],
    epsilons: list[float],
    size: Size,
    images: ImageSet,
    private: Labelled,
    public: Labelled,
    folders: Folders,
    device: str,
    data: Path,
) -> Iterator[tuple[str, float, Generator | Labelled, Cost, Cost]]:
    """Every method at every epsilon: name, epsilon, images or what draws them, costs of public and DP training."""
    free = Cost(0.0, 0.0)
    if "real" in methods:
        count = images.classes * size.each  # as many as are generated
        yield "real", math.inf, (private[0][:count], private[1][:count]), free, free
    for method in TRAINED:
        if method not in methods and not (method == "ours" and {"floor", "ceiling"} & set(methods)):
            continue
        base, before = public_generator(method, name, images, public, size, folders, device)
        if isinstance(base, TokenGenerator):
            base.temperature = temperature(method, images, len(base.model.config.layout.scales))
            base.attempts = ATTEMPTS if size.classifier_steps else 1  # class labels matter where classifiers learn
        rows, photos = base.rows(*private), None
        if method == "ours" and size.photos and images.channels == 3:
            side = base.model.config.image_size
            photos, _ = public_images(replace(images, size=side), data, size.photos)
        if method == "ours" and "ceiling" in methods:
            some = rows[: images.classes * size.each]
            yield "ceiling", math.inf, (base.decoded(some), private[1][: len(some)]), before, free
        if method == "ours" and "floor" in methods:
            yield "floor", 0.0, base, before, free
        likeness = method == "ours" and images.channels == 3 and not size.classifier_steps  # images count, not classes
        shown = mean_rows(private[0], device) if likeness and method in methods else None
        for epsilon in epsilons if method in methods else []:
            generator, prepared, ledgers = copy.deepcopy(base), before, None
            with tempfile.TemporaryDirectory() as folder:
                if shown is not None:
                    mean, ledgers = private_mean(shown, epsilon, DELTA, Path(folder) / "mean", device)
                if math.isinf(epsilon):
                    cost = train_publicly(generator, rows, size.twin_steps, size.public_batch, learning_rate=1e-3)
                else:
                    settings = SETTINGS[method] | {
                        "max_steps": size.steps,
                        "expected_batch_size": size.batch,
                        "micro_batch_size": size.micro_batch,
                    }
                    if images.channels == 3:
                        settings |= photo_settings(method, epsilon, size.steps)
                        if method == "ours" and size.classifier_steps:  # as for `attempts`
                            settings["scale_weights"] = scale_weights(len(base.model.config.layout.scales))
                    if method == "ours" and size.wide:
                        settings["bf16"] = device != "cpu"
                    if method == "ours" and photos is not None:
                        ledger, prepared = learn_classes(
                            generator, rows, photos, epsilon, DELTA, size.taught, Path(folder)
                        )
                        ledgers = [ledger]
                    cost = train_privately(generator, rows, epsilon, DELTA, earlier_ledgers=ledgers, **settings)
            if shown is not None:
                if size.detail_steps:
                    cost = mend(mean, generator, cost, public[0], size.detail_steps)
                cost = choose_by(mean, generator, cost, len(private[0]))
            yield method, epsilon, generator, prepared, cost


def compare(
    name: str,
    methods: list[str],
    epsilons: list[float],
    title: str,
    data: Path,
    grids: Path | None,
    folders: Folders,
    device: str = "cpu",
    steps: int | None = None,
    judges: Sequence[FeatureExtractor] = (),
) -> Iterator[dict[str, Any]]:
    """The rows of the benchmark."""
    images, size = IMAGE_SETS[name], SIZES[title]
    size = size if steps is None else replace(size, steps=steps)
    private = private_images(images, data, "train", size.private)
    test = private_images(images, data, images.test_split, size.test)
    public = public_images(images, data, size.public)
    asked = [(judge, seen(judge, test[0][: size.compared].clamp(-1, 1))) for judge in judges]
    labels = torch.arange(images.classes).repeat(size.each)
    for method, epsilon, source, before, cost in sources(
        name, methods, epsilons, size, images, private, public, folders, device, data
    ):
        start = time.perf_counter()
        made = not isinstance(source, tuple)
        drawn = (source.sample(labels, torch.Generator(device).manual_seed(0)), labels) if made else source
        seconds = time.perf_counter() - start
        shared = {
            "dataset": name,
            "epsilon": "inf" if math.isinf(epsilon) else epsilon,
            "method": method,
            "seconds": round(cost.seconds, 1),
            "flops": cost.flops,
            "public_seconds": round(before.seconds, 1),
            "public_flops": before.flops,
            "epsilon_spent": cost.epsilon,
        } | ({"steps": cost.steps, "batch": cost.batch} if cost.steps else {})
        if made:
            shared |= source.sampling | ({"scale_weights": cost.scale_weights} if cost.scale_weights else {})
            rate = len(labels) / seconds
            yield shared | {"metric": "images per second", "value": rate, "low": None, "high": None, "n": len(labels)}
        for row in figures(drawn, test, images, **size.for_figures, device=device, judges=asked):
            yield shared | row | {"size": title}
        if grids is not None and method not in ("ceiling", "real"):  # these are private images
            save_grid(drawn[0], images, grids / f"quality_{name}_{method}_{epsilon:g}.png")


def measured(folder: Path, name: str, title: str, data: Path, grids: Path | None) -> Iterator[dict[str, Any]]:
    """The rows of a trained pipeline."""
    images, size = IMAGE_SETS[name], SIZES[title]
    report = PrivacyCard.load(folder).report
    test = private_images(images, data, images.test_split, size.test)
    pipeline = DPSpectralPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    start = time.perf_counter()
    drawn = pipeline(
        class_labels=list(range(images.classes)), num_images=size.each, generator=torch.Generator().manual_seed(0),
        output_type="pt", batch_size=500,
    ).images  # fmt: skip
    seconds = time.perf_counter() - start
    labels = torch.arange(images.classes).repeat_interleave(size.each)
    bordered = torch.nn.functional.pad(drawn * 2 - 1, [images.pad] * 4, value=-1)
    mixed = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    mechanism, training = report["mechanism"], report["training"]
    shared = {
        "dataset": name,
        "epsilon": report["claim"]["epsilon"],
        "method": "ours",
        "steps": mechanism["charged_steps"],
        "batch": report["sampling"]["expected_batch_size"],
        "private": report["adjacency"]["num_units"],
        "trainable_parameters": training["trainable_parameters"],
        "attempts": pipeline.config.attempts,
    }
    rate = len(labels) / seconds
    yield shared | {"metric": "images per second", "value": rate, "low": None, "high": None, "n": len(labels)}
    for row in figures((bordered[mixed], labels[mixed]), test, images, **size.for_figures | {"seeds": 1}):
        yield shared | row | {"size": title}
    if grids is not None:
        in_turn = bordered.unflatten(0, (images.classes, size.each)).transpose(0, 1).flatten(0, 1)
        save_grid(in_turn, images, grids / f"quality_{name}_pipeline_{shared['epsilon']:g}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=tuple(IMAGE_SETS), default="mnist")
    parser.add_argument("--epsilon", type=float, nargs="+", default=[1.0, 10.0, math.inf], help="inf: without privacy")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    parser.add_argument("--steps", type=int, help="of DP training, instead of the size's: what little training gives")
    parser.add_argument("--quick", action="store_true", help="the same as --size quick")
    parser.add_argument("--pipeline", type=Path, help="measure this trained pipeline only")
    parser.add_argument("--codec", type=Path, help="colour: folder of the public codec of ours")
    parser.add_argument("--super_resolution", type=Path, help="colour: folder of the public network that all end with")
    parser.add_argument("--keep", type=Path, help="folder where public models are kept, and found by a later run")
    parser.add_argument("--judge", action="store_true", help="also ask networks of others (the extra `judge`)")
    parser.add_argument("--device", default="cpu", help="where models are trained and sampled: cpu or cuda")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="one folder per image set")
    parser.add_argument("--out", type=Path, help="JSON file; sample grids are put beside it")
    arguments = parser.parse_args()
    size = "quick" if arguments.quick else arguments.size
    torch.set_num_threads(min(2, torch.get_num_threads()))  # small tensors: more threads only wait for each other
    grids = arguments.out.parent if arguments.out and size != "quick" else None
    command = f"python -m benchmarks.quality --dataset {arguments.dataset} --size {size}"
    if arguments.pipeline:
        rows = measured(arguments.pipeline, arguments.dataset, size, arguments.data, grids)
        command += f" --pipeline {arguments.pipeline}"
    else:
        folders = Folders(arguments.codec, arguments.super_resolution, arguments.keep)
        rows = compare(
            arguments.dataset, arguments.methods, arguments.epsilon, size, arguments.data, grids, folders,
            arguments.device, arguments.steps, judges_of(arguments.dataset) if arguments.judge else (),
        )  # fmt: skip
        command += f" --epsilon {' '.join(f'{epsilon:g}' for epsilon in arguments.epsilon)}"
        for name in ("codec", "super_resolution", "keep", "steps", "device"):
            if getattr(arguments, name) not in (None, "cpu"):
                command += f" --{name} {getattr(arguments, name)}"
        if arguments.judge:
            command += " --judge"
        if len(arguments.methods) < len(METHODS):
            command += f" --methods {' '.join(arguments.methods)}"
    write_report(command, list(rows), arguments.out)


if __name__ == "__main__":
    main()
