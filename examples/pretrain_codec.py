"""Fits the wavelet token codec on PUBLIC images and saves an untrained model around it.

    python examples/pretrain_codec.py --public glyphs --channels 1 --num_classes 10 --out runs/codec
    python examples/pretrain_codec.py --public path/or/hub-id --size 64 --levels 3 --out runs/codec-photos

The codec is frozen afterwards: whatever it learned is in every model that is made with it. So never give it the
sensitive images, nor images of the same people. Prints, per scale, the share of the energy that quantisation loses and
the share of code words in use, measured on held-out public images.
"""

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from rebuild import parsed, some_of

from hf_spectral_dp import SpectralConfig, SpectralImageProcessor, SpectralTokenizerForCausalLM
from hf_spectral_dp.image_decoding import readable
from hf_spectral_dp.image_processing_spectral import WHITE_LEVEL


def public_images(source: str, split: str, column: str, count: int, seed: int) -> Iterator[Any]:
    """At most `count` public images: drawn strokes ("glyphs"), or some of a folder or Hub data set."""
    if source == "glyphs":
        from public_glyphs import render_digits

        return iter(render_digits(count, seed)[0])
    return (image for image, _ in readable(some_of(source, split, count, seed), column))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--public", required=True, help="'glyphs' (drawn digits), an image folder, or a Hub id")
    parser.add_argument("--split", default="train")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--images", type=int, default=10_000, help="fit on so many, taken at random by --seed")
    parser.add_argument("--size", type=int, default=32, help="side of the images; divisible by 2**levels")
    parser.add_argument("--pad", type=int, default=0, help="black border inside size, e.g. 2 for 28x28 digits")
    parser.add_argument("--channels", type=int, default=3, choices=(1, 3))
    parser.add_argument("--wavelet", default="haar", help="an orthogonal PyWavelets filter")
    parser.add_argument("--levels", type=int, default=3)
    parser.add_argument("--patch_sizes", type=int, nargs="+", default=[2, 2, 2], help="per scale, coarse to fine")
    parser.add_argument("--white_level", type=int, default=WHITE_LEVEL, help="white in 16 bits; 4095 if 12 are used")
    parser.add_argument("--codebook_sizes", type=int, nargs="+", default=[128, 128, 256])
    parser.add_argument("--num_classes", type=int, default=0, help="0: unconditional")
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--num_hidden_layers", type=int, default=4)
    parser.add_argument("--num_attention_heads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    arguments = parsed(parser)
    torch.manual_seed(arguments.seed)

    config = SpectralConfig(  # refuses what cannot work, before any image is read
        image_size=arguments.size,
        num_channels=arguments.channels,
        wavelet=arguments.wavelet,
        levels=arguments.levels,
        patch_sizes=arguments.patch_sizes,
        codebook_sizes=arguments.codebook_sizes,
        num_classes=arguments.num_classes,
        hidden_size=arguments.hidden_size,
        intermediate_size=round(arguments.hidden_size * 8 / 3 / 32) * 32,
        num_hidden_layers=arguments.num_hidden_layers,
        num_attention_heads=arguments.num_attention_heads,
    )
    processor = SpectralImageProcessor(
        image_size=arguments.size,
        num_channels=arguments.channels,
        pad=arguments.pad,
        white_level=arguments.white_level,
    )
    images = public_images(arguments.public, arguments.split, arguments.image_column, arguments.images, arguments.seed)
    # Few at once: photos as they were taken are a thousand times as large.
    parts = iter(lambda: list(itertools.islice(images, 50)), [])
    pixels = torch.cat([processor(some)["pixel_values"] for some in parts])
    if arguments.public != "glyphs":  # in the order of their classes, maybe: those held out must be of all
        pixels = pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(arguments.seed))]
    held_out = max(1, len(pixels) // 10)
    model = SpectralTokenizerForCausalLM(config)
    report = model.codec.fit(pixels[held_out:], seed=arguments.seed)
    test = pixels[:held_out]
    target = torch.nn.functional.avg_pool2d(test, config.image_size // config.coarse_size)
    error = (model.decode(model.codec.encode(test)) - target).square().mean()
    for index, (lost, used) in enumerate(zip(report["relative_error"], report["used"], strict=True)):
        print(f"scale {index}: {lost:.1%} of the energy lost, {used:.0%} of the code words used")
    print(f"held-out public images: PSNR {10 * np.log10(4 / float(error)):.2f} dB at {config.coarse_size} pixels")
    model.save_pretrained(arguments.out)
    processor.save_pretrained(arguments.out)
    print(f"{config.layout.length} tokens per image, {model.num_parameters():,} parameters; saved to {arguments.out}")


if __name__ == "__main__":
    main()
