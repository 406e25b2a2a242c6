"""What an evaluation costs: seconds and peak memory of `evaluate_images`, from encoded images to rows.

Every case runs in a process of its own, from JPEG bytes to figures with intervals and floors, on the threads that
OMP_NUM_THREADS allows; processor seconds are those of all threads. "2048 features" stands for extractors as wide as
Inception-v3: a random projection of the pixels takes its place, so its row tells what the statistics of that width
cost, and leaves out the network's own forward pass.
"""

import argparse
import io
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.report import write_report
from hf_spectral_dp import SpectralImageProcessor
from hf_spectral_dp.metrics.evaluation import evaluate_images, read_images
from hf_spectral_dp.metrics.features import FeatureExtractor, PublicFeatures


class Projection:
    """2048 random projections of the pixels."""

    name, fingerprint, dim = "random projection", "0", 2048

    def __init__(self, size: int):
        self.matrix = torch.randn(3 * size * size, self.dim, generator=torch.Generator().manual_seed(0)) / size

    def __call__(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.matrix


def encoded(count: int, size: int, seed: int) -> Iterator[dict]:
    """Rows of JPEG bytes: smooth random colours with some noise, every one another image."""
    generator = np.random.default_rng(seed)
    for _ in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((size, size))
        noisy = np.asarray(coarse, np.int16) + generator.integers(-12, 13, (size, size, 3))
        file = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        yield {"image": {"bytes": file.getvalue(), "path": None}}


def in_this_process(count: int, size: int, wide: bool) -> None:
    """Evaluates `count` images against as many; prints seconds, processor seconds, peak bytes and what was measured."""
    processor = SpectralImageProcessor(image_size=size, num_channels=3)
    extractor: FeatureExtractor = Projection(size) if wide else PublicFeatures()
    real, generated = (read_images(encoded(count, size, seed), processor) for seed in (0, 1))
    start, used = time.perf_counter(), time.process_time()
    rows = evaluate_images(real, generated, extractor)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    used = time.process_time() - used
    print(json.dumps([seconds, used, peak, [row["metric"] for row in rows if row["value"] is not None]]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer images; ends within 50 seconds on two cores")
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels")
    parser.add_argument("--out", help="file for the JSON report")
    arguments = parser.parse_args()
    cases = [(2_500, False), (10_000, False), (10_000, True)]
    if arguments.quick:
        cases = [(600, False), (1_200, False)]
    rows = []
    for count, wide in cases:
        call = f"from benchmarks.evaluation import in_this_process as run; run({count}, {arguments.size}, {wide})"
        done = subprocess.run([sys.executable, "-c", call], check=True, capture_output=True, text=True)
        seconds, used, peak, metrics = json.loads(done.stdout.splitlines()[-1])
        rows.append(
            {
                "check": "2048 features" if wide else "public-features",
                "n_real": count,
                "n": count,
                "side": arguments.size,
                "seconds": round(seconds, 1),
                "processor_seconds": round(used, 1),
                "peak_gib": round(peak / 2**30, 2),
                "metrics": len(metrics),
            }
        )
    write_report("python -m benchmarks.evaluation" + " --quick" * arguments.quick, rows, arguments.out)


if __name__ == "__main__":
    main()
