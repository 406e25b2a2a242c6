"""How fast images become tokens: batched, against loops over images with PyWavelets and the same codec.

All take the same 32x32 float images and give the same tokens (checked). "per-image pywt" calls `pywt.wavedec2` and
`SpectralCodec.quantise` for each image; `ratio` is to it. "per-image pywt, NumPy codec" is written as well as a loop
can be: code word norms computed once, one NumPy product per scale. Timings are medians of interleaved rounds, so that a
slow moment of the machine hits all. The last rows build whole token stores from a stream and give the growth of
resident memory between 2,000 and 20,000 images.
"""

import argparse
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pywt
import torch

from benchmarks.report import write_report
from hf_spectral_dp import SpectralConfig, SpectralTokenizerForCausalLM
from hf_spectral_dp.codec import SpectralCodec
from hf_spectral_dp.image_processing_spectral import SpectralImageProcessor
from hf_spectral_dp.token_store import build_token_store

BATCH = 256


def smooth_images(number: int, channels: int, seed: int = 0) -> np.ndarray:
    """Random images (number, channels, 32, 32) in [-1, 1] with a falling spectrum, as photographs have."""
    noise = np.random.default_rng(seed).standard_normal((number, channels, 32, 17, 2), dtype=np.float32)
    radius = np.hypot(np.fft.fftfreq(32)[:, None], np.fft.rfftfreq(32)[None]) + 1 / 32
    images = np.fft.irfft2((noise[..., 0] + 1j * noise[..., 1]) / radius, s=(32, 32))
    return (images / np.abs(images).max((1, 2, 3), keepdims=True)).astype(np.float32)


def filled_codec(config: SpectralConfig, images: np.ndarray) -> SpectralCodec:
    """A codec whose code words are patches of the images: speed does not depend on how they were chosen."""
    codec = SpectralCodec(config)
    for index, patches in enumerate(codec.patches(torch.from_numpy(images))):
        points = patches.flatten(0, 1)
        chosen = torch.from_numpy(np.random.default_rng(index).permutation(len(points))[: len(codec.codebook(index))])
        codec.codebook(index).copy_(points[chosen])
    return codec


def cut(codec: SpectralCodec, image: np.ndarray) -> list[np.ndarray]:
    """The patches (tokens, patch_dim) per scale of one image (C, 32, 32), by PyWavelets."""
    config = codec.config
    bands = pywt.wavedec2(image, config.wavelet, mode="periodization", level=config.levels, axes=(-2, -1))
    stacks = [bands[0], *(np.concatenate(detail) for detail in bands[1:])]
    patches = []
    for stack, scale in zip(stacks, codec.layout.scales, strict=False):
        g, p = scale.grid, scale.patch
        grid = stack.reshape(scale.channels, g, p, g, p).transpose(1, 3, 0, 2, 4)
        patches.append(grid.reshape(scale.tokens, scale.patch_dim))
    return patches


def per_image(codec: SpectralCodec) -> Callable[[np.ndarray], np.ndarray]:
    """Tokenises (B, C, 32, 32) one image at a time, with the codec's own quantiser."""

    def tokenise(images: np.ndarray) -> np.ndarray:
        rows = [codec.quantise([torch.from_numpy(p)[None] for p in cut(codec, image)]) for image in images]
        return torch.cat(rows).numpy()

    return tokenise


def per_image_numpy(codec: SpectralCodec) -> Callable[[np.ndarray], np.ndarray]:
    """The same without torch, whose calls cost more than what they do to one image."""
    tables = []
    for index, scale in enumerate(codec.layout.scales):
        words = codec.codebook(index).numpy()
        tables.append((words.T, (words**2).sum(1) / 2, scale.first_id))

    def tokenise(images: np.ndarray) -> np.ndarray:
        rows = []
        for image in images:
            pairs = zip(cut(codec, image), tables, strict=True)
            rows.append(np.concatenate([(norm - p @ word).argmin(1) + first for p, (word, norm, first) in pairs]))
        return np.stack(rows)

    return tokenise


def batched(codec: SpectralCodec) -> Callable[[np.ndarray], np.ndarray]:
    """Tokenises (B, C, 32, 32) in batches, as the token store does."""

    def tokenise(images: np.ndarray) -> np.ndarray:
        batches = torch.from_numpy(images).split(BATCH)
        return torch.cat([codec.encode(batch) for batch in batches]).numpy()

    return tokenise


def speed_rows(channels: int, rounds: int) -> list[dict]:
    """Images per second of both ways on the default layout."""
    config = SpectralConfig(num_channels=channels)
    images = smooth_images(8 * BATCH, channels)
    codec = filled_codec(config, images)
    methods = {
        "per-image pywt": per_image(codec),
        "per-image pywt, NumPy codec": per_image_numpy(codec),
        "ours": batched(codec),
    }
    few = images[:BATCH]
    expected = methods["ours"](few)
    agreement = {method: float((tokenise(few) == expected).mean()) for method, tokenise in methods.items()}
    if min(agreement.values()) < 0.999:  # two ways may round a tie differently
        raise AssertionError(f"the ways agree on {min(agreement.values()):.2%} of the tokens only.")
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(rounds):
        for method, tokenise in methods.items():
            batch = images if method == "ours" else few
            start = time.perf_counter()
            tokenise(batch)
            seconds[method].append((time.perf_counter() - start) / len(batch))
    rates = {method: 1 / statistics.median(times) for method, times in seconds.items()}
    return [
        {
            "method": method,
            "images_per_second": round(rate, 1),
            "ratio": round(rate / rates["per-image pywt"], 2),
            "channels": channels,
            "tokens": config.layout.length,
            "agreement": agreement[method],
        }
        for method, rate in rates.items()
    ]


def stream(number: int) -> Iterator[dict]:
    """That many 32x32 grey images, made as they are asked for."""
    generator = np.random.default_rng(0)
    for _ in range(number):
        yield {"image": generator.integers(0, 256, (32, 32), dtype=np.uint8)}


def store_in_this_process(number: int) -> None:
    """Builds a store of `number` images; prints images per second and this process' growth in resident bytes."""
    import psutil

    model = SpectralTokenizerForCausalLM(SpectralConfig())
    processor = SpectralImageProcessor(image_size=32)
    with tempfile.TemporaryDirectory() as folder:
        build_token_store(stream(2 * BATCH), model, processor, Path(folder) / "warm", progress=False)
        gc.collect()
        before = psutil.Process().memory_info().rss
        start = time.perf_counter()
        build_token_store(stream(number), model, processor, Path(folder) / "store", progress=False)
        rate = number / (time.perf_counter() - start)
        gc.collect()
        print(rate, psutil.Process().memory_info().rss - before)


def memory_rows() -> list[dict]:
    """One process per size, so that one does not reuse what the other had asked for."""
    rows = []
    for number in (2_000, 20_000):
        code = f"from benchmarks.tokenize import store_in_this_process as build; build({number})"
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        rate, growth = map(float, done.stdout.split())
        rows.append(
            {
                "method": f"token store of {number} images, from arrays to disk",
                "images_per_second": round(rate, 1),
                "resident_growth_mib": round(growth / 2**20, 2),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds; ends within 50 seconds on two cores")
    parser.add_argument("--out", help="file for the JSON report")
    arguments = parser.parse_args()
    rounds = 7 if arguments.quick else 41
    rows = [row for channels in (1, 3) for row in speed_rows(channels, rounds)] + memory_rows()
    write_report("python -m benchmarks.tokenize" + " --quick" * arguments.quick, rows, arguments.out)


if __name__ == "__main__":
    main()
