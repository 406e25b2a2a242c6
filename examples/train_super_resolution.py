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
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rebuild import parsed, rebuild_command, some_of
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from hf_spectral_dp.image_decoding import readable
from hf_spectral_dp.image_processing_spectral import WHITE_LEVEL
from hf_spectral_dp.private_marks import refuse_uncounted
from hf_spectral_dp.super_resolution import SpectralSuperResolution, SpectralSuperResolutionConfig, upscale, upscale_to
from hf_spectral_dp.super_resolution_training import Coarse, Schedule, eight_bits, squares, train_super_resolution

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


def public_images(arguments: argparse.Namespace) -> np.ndarray:
    """uint8 images (n, size, size, channels) in a random order, n <= --images."""
    rng = np.random.default_rng(arguments.seed)
    size, channels = arguments.size, arguments.channels
    if arguments.public == "glyphs":
        from public_glyphs import render_digits

        digits, _ = render_digits(arguments.images, arguments.seed)
        before = (size - digits.shape[1]) // 2
        margin = (before, size - digits.shape[1] - before)
        padded = np.pad(digits, ((0, 0), margin, margin))[..., None]
        return np.repeat(padded, channels, axis=-1)
    rows = some_of(arguments.public, arguments.split, arguments.images, arguments.seed)
    photos = (eight_bits(photo, arguments.white_level) for photo, _ in readable(rows, arguments.image_column))
    images = np.stack(list(tqdm(squares(photos, size, channels, rng), "reading", total=arguments.images)))
    return images[rng.permutation(len(images))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--public", required=True, help="'glyphs', an image folder, or a Hub data set id")
    parser.add_argument("--split", default="train")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--white_level", type=int, default=WHITE_LEVEL, help="white in 16 bits; 4095 if 12 are used")
    parser.add_argument("--license", default="apache-2.0")
    parser.add_argument("--out", required=True)
    parser.add_argument("--codec", help="folder of the codec whose images are to be upscaled and mended")
    parser.add_argument("--prior", help="folder of a public prior of that codec, whose details are to be mended too")
    parser.add_argument("--temperature", type=float, nargs="+", default=[1.0, 0.3, 0.1], help="of these, per scale")
    parser.add_argument("--start", help="folder of a network to go on from, whose shape it keeps; with --adversarial")
    parser.add_argument("--scale", type=int, default=2, choices=(2, 4))
    parser.add_argument("--channels", type=int, default=3, choices=(1, 3))
    parser.add_argument("--size", type=int, default=64, help="side of the training images in pixels")
    parser.add_argument("--images", type=int, default=10_000, help="at most so many, taken at random by --seed")
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
    arguments = parsed(parser)
    if arguments.start and not arguments.adversarial:
        parser.error(f"--start {arguments.start} without --adversarial: give the weight of looking true, 0.1 is usual.")
    if arguments.prior and not arguments.codec:
        parser.error(f"--prior {arguments.prior} without --codec: give the codec whose tokens it draws.")
    torch.manual_seed(arguments.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    named = {name: folder for name in ("codec", "prior") if (folder := getattr(arguments, name))}
    models = {name: AutoModelForCausalLM.from_pretrained(folder).to(device).eval() for name, folder in named.items()}
    for name, model in models.items():
        refuse_uncounted(f"--{name} {named[name]}", model)
    codec, prior = models["codec"].codec if "codec" in models else None, models.get("prior")
    if prior is not None and len(arguments.temperature) != (scales := len(prior.config.layout.scales)):
        parser.error(f"--temperature {arguments.temperature} for a prior of {scales} scales; give one for each.")

    coarse = Coarse(arguments.scale, codec, prior, arguments.temperature)
    task = {"num_channels": arguments.channels, "scale": arguments.scale, "keep_average": codec is None}
    if arguments.start:
        model = SpectralSuperResolution.from_pretrained(arguments.start)
        refuse_uncounted(f"--start {arguments.start}", model)
        if (found := {name: getattr(model.config, name) for name in task}) != task:
            parser.error(f"--start {arguments.start} is made for {found}, the task is {task}; start from one for it.")
    else:
        shape = {"features": arguments.features, "num_blocks": arguments.num_blocks}
        model = SpectralSuperResolution(SpectralSuperResolutionConfig(**task, **shape))
    images = torch.from_numpy(public_images(arguments)).permute(0, 3, 1, 2).contiguous().to(device)
    held_out = max(1, min(200, len(images) // 10))
    test, images = images[:held_out].float() / 127.5 - 1, images[held_out:]
    schedule = Schedule(
        steps=arguments.steps, minutes=arguments.minutes, batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate, adversarial=arguments.adversarial, judge_width=arguments.judge_width,
        goes_on=bool(arguments.start), bf16=arguments.bf16, seed=arguments.seed,
    )  # fmt: skip

    def kept(network: SpectralSuperResolution, steps: int) -> None:
        if arguments.save_steps and steps % arguments.save_steps == 0:
            network.save_pretrained(f"{arguments.out}-{steps}")

    model, steps = train_super_resolution(model.to(device), images, coarse, schedule, kept=kept)

    def psnr(backend) -> float:
        with torch.no_grad():
            small = coarse.of(test)
            error = F.mse_loss(
                upscale(backend, small, test.shape[-1] // small.shape[-1])
                if isinstance(backend, str)
                else upscale_to(test.shape[-1], backend, small),
                test,
            )
        return float(10 * torch.log10(4 / error))

    model.save_pretrained(arguments.out)
    options = vars(arguments) | ({} if prior is not None else {"temperature": None})
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
        command=rebuild_command("train_super_resolution.py", options),
    )
    Path(arguments.out, "README.md").write_text(card, encoding="utf-8")
    print(f"PSNR {psnr(model):.2f} dB, bicubic {psnr('bicubic'):.2f} dB; saved to {arguments.out}")


if __name__ == "__main__":
    main()
