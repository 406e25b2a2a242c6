"""Images of a saved pipeline into a folder: one PNG each and a labelled overview. The verb `generate` of the CLI."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from .pipeline_spectral import UPSCALING_MODES, DPSpectralPipeline

GENERATE = """\
Draw images from a saved pipeline: one PNG per image, and grid.png, a labelled overview of all.

  hf-spectral-dp generate runs/digits --out images                    every class, 4 images each
  hf-spectral-dp generate owner/name --out images --class_labels 3 7 --num_images 16 --seed 0
  hf-spectral-dp generate owner/name --out images --prompt "a red circle" "a blue square" --guidance_scale 3
  hf-spectral-dp generate owner/name --out images --upscaling none   the coarse images, as the private model drew them

Drawing images costs no privacy: the guarantee on the pipeline's card covers everything that its model can ever produce,
so draw as many as you like. Prompts are not part of the guarantee: a private text typed here is yours to protect.
For a whole dataset of images use `dataset_export.export_dataset` (examples/export_dataset.py)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `generate_files`."""
    parser.add_argument("pipeline", metavar="FOLDER_OR_HUB_ID", help="a saved pipeline, or owner/name on the Hub")
    parser.add_argument("--out", required=True, type=Path, help="folder for the images: a new or an empty one")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument(
        "--class_labels", type=int, nargs="+", help="labels to draw; default all, and none where the model has none"
    )
    parser.add_argument("--prompt", nargs="+", help="texts to draw, for a model that was trained with captions")
    parser.add_argument("--negative_prompt", nargs="+", help="what not to draw: one text for all prompts, or one each")
    parser.add_argument("--num_images", type=int, default=4, help="images per label or prompt; in all without either")
    parser.add_argument("--guidance_scale", type=float, help="above 1: closer to the label or prompt, less variety")
    parser.add_argument(
        "--temperature", type=float, nargs="+", help="below 1: likelier images, less variety; one, or one per scale"
    )
    parser.add_argument("--top_k", type=int, help="draw every token among the k likeliest; 0 means among all")
    parser.add_argument("--top_p", type=float, help="draw every token among the likeliest that hold this probability")
    parser.add_argument("--seed", type=int, help="the same seed and batch size give the same images; default random")
    parser.add_argument("--batch_size", type=int, default=64, help="images drawn at once; lower it if memory runs out")
    parser.add_argument(
        "--upscaling",
        default="model",
        choices=UPSCALING_MODES,
        help="how the coarse private image becomes large: by the pipeline's public model (default), by plain resampling"
        " without new detail, or not at all",
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="such as cpu or cuda:1; default a GPU"
    )


def check_device(name: str) -> None:
    """Raises ValueError for a device that torch does not know or this machine does not have."""
    try:
        torch.empty(1, device=name)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"device={name!r} cannot be used here ({str(error).splitlines()[0]}); take cpu, or a GPU that is there,"
            " such as cuda:0."
        ) from error


def generate_files(arguments: argparse.Namespace) -> list[Path]:
    """Draws the images that the options of `add_arguments` name, and writes them; the last path is that of grid.png.

    Raises:
        ValueError: the folder holds other files, or the pipeline refuses an option. Nothing was written.
        OSError: there is no such pipeline.
    """
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise ValueError(f"--out {arguments.out} holds other files; name a new folder.")
    if arguments.revision is not None and Path(arguments.pipeline).is_dir():
        raise ValueError(f"--revision {arguments.revision} is for a Hub id, but {arguments.pipeline} is a folder.")
    if arguments.seed is not None and not -(2**63) <= arguments.seed < 2**64:
        raise ValueError(f"--seed {arguments.seed} has more than 64 bits, which torch cannot take; name a smaller one.")
    check_device(arguments.device)
    pipe = DPSpectralPipeline.from_pretrained(arguments.pipeline, revision=arguments.revision).to(arguments.device)
    labels = arguments.class_labels
    if labels is None and arguments.prompt is None:
        labels = list(range(pipe.model.config.num_classes)) or None
    generator = torch.Generator(arguments.device)
    if arguments.seed is None:
        generator.seed()
    else:
        generator.manual_seed(arguments.seed)
    negative, temperature = arguments.negative_prompt, arguments.temperature
    images = pipe(
        arguments.prompt,
        labels,
        arguments.num_images,
        negative_prompt=negative[0] if negative and len(negative) == 1 else negative,
        guidance_scale=arguments.guidance_scale,
        temperature=temperature[0] if temperature and len(temperature) == 1 else temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        generator=generator,
        batch_size=arguments.batch_size,
        upscaling=arguments.upscaling,
    ).images
    names = arguments.prompt or [str(label) for label in labels or []]
    captions = [name for name in names for _ in range(arguments.num_images)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, image in enumerate(images):
        label = f"_label{captions[index]}" if labels else ""
        paths.append(arguments.out / f"{index:05d}{label}.png")
        image.save(paths[-1])
    paths.append(arguments.out / "grid.png")
    image_grid(images, arguments.num_images if captions else 8, captions).save(paths[-1])
    return paths


def image_grid(images: Sequence[Image.Image], columns: int, captions: Sequence[str] | None = None) -> Image.Image:
    """Lays images of one size out row by row, small ones enlarged without smoothing, each caption below its image."""
    zoom = max(1, 64 // images[0].width)
    width, height = images[0].width * zoom, images[0].height * zoom
    gap, line = 4, 14 if captions else 0  # pixels; Pillow's default font is 10 pixels high
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + line + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        left, top = gap + index % columns * (width + gap), gap + index // columns * (height + line + gap)
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, top))
        if captions:
            draw.text((left + width / 2, top + height + 1), captions[index], fill="black", anchor="ma")
    return sheet


__all__ = ["GENERATE", "add_arguments", "check_device", "generate_files", "image_grid"]
