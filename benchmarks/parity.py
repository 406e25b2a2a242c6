"""Are the distances of `metrics.distances` those of others, and are the kernel distances unbiased?

    python -m benchmarks.parity --out benchmarks/results/parity.json

Features are drawn: correlated and skewed rows, two laws. The same rows go through our functions and through those of
torchmetrics and, where it can be imported (it needs torchvision), of torch-fidelity; `relative_difference` is
|ours - theirs| / theirs. Then many small samples of two laws on six points, whose distance is a finite sum, tell by how
much the mean of an estimate is off: `bias` beside `standard_error` of that mean, and beside the bias of the estimate
that counts a row as a pair with itself, as a control.
"""

import argparse
import warnings
from importlib import metadata, util

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.report import write_report
from hf_spectral_dp.metrics.distances import (
    KernelMatrices,
    cmmd,
    frechet_distance,
    gaussian_kernel,
    kernel_distance,
    neighbourhoods,
    polynomial_kernel,
)

KERNELS = {"kernel_distance": polynomial_kernel, "cmmd": gaussian_kernel}


def features(count: int, dim: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    """Correlated rows (count, dim) of a skewed law."""
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99)) / dim**0.5
    rows = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    return (rows + 0.3 * rows**2) @ mixing * scale + shift


class AsImages(nn.Module):
    """A feature extractor for torchmetrics whose images are the features."""

    def __init__(self, dim: int):
        super().__init__()
        self.num_features = dim

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def of_torchmetrics(real: Tensor, generated: Tensor) -> dict[str, float]:
    """Figures of torchmetrics for features (n, D), D divisible by 6."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    dim, count = real.shape[1], len(generated)
    shape = (3, 2, dim // 6)
    fid = FrechetInceptionDistance(AsImages(dim), input_img_size=shape)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features")
        kid = KernelInceptionDistance(AsImages(dim), subsets=1, subset_size=count, gamma=1 / dim)
    for metric, some in ((fid, real), (kid, real[:count])):
        metric.update(some.view(-1, *shape), real=True)
        metric.update(generated.view(-1, *shape), real=False)
    return {"frechet_distance": float(fid.compute()), "kernel_distance": float(kid.compute()[0])}


def of_torch_fidelity(real: Tensor, generated: Tensor) -> dict[str, float]:
    """Figures of torch-fidelity for features (n, D); its precision and recall with 3 neighbours."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kernel_mmd
    from torch_fidelity.metric_prc import prc_features_to_metric

    one = real[: len(generated)]  # its kernels compare as many
    moments = [fid_features_to_statistics(some) for some in (real, generated)]
    units = [(some / some.norm(dim=1, keepdim=True)).double().numpy() for some in (one, generated)]
    shares = prc_features_to_metric(generated, real, prc_neighborhood=3, prc_batch_size=500, verbose=False)
    return {
        "frechet_distance": float(fid_statistics_to_metric(*moments, verbose=False)["frechet_inception_distance"]),
        "kernel_distance": float(kernel_mmd(one.numpy(), generated.numpy())),
        "cmmd": 1000 * float(kernel_mmd(*units, kid_kernel="rbf", kid_kernel_rbf_sigma=10.0)),
        "precision": float(shares["precision"]),
        "recall": float(shares["recall"]),
    }


LIBRARIES = {"torchmetrics": of_torchmetrics, "torch-fidelity": of_torch_fidelity}


def parity_rows(library: str, counts: list[tuple[int, int]]) -> list[dict]:
    """One row per metric and size: our figure, theirs, and the relative difference."""
    rows = []
    for count, dim in counts:
        real, generated = features(count, dim, 0), features(count, dim, 1, shift=0.2, scale=1.2)
        found = neighbourhoods(real, generated, 3)
        ours = {
            "frechet_distance": frechet_distance(real, generated),
            "kernel_distance": kernel_distance(real, generated),
            "cmmd": cmmd(real, generated),
            "precision": float(found.precision.mean()),
            "recall": float(found.recall.mean()),
        }
        for metric, theirs in LIBRARIES[library](real, generated).items():
            difference = abs(ours[metric] - theirs) / abs(theirs)
            rows.append(
                {
                    "check": f"{metric} as in {library} {metadata.version(library)}",
                    "images": count,
                    "features": dim,
                    "ours": float(f"{ours[metric]:.7g}"),
                    "theirs": float(f"{theirs:.7g}"),
                    "relative_difference": float(f"{difference:.2g}"),
                    "tried": 1,
                    "failed": int(difference > 1e-3),
                }
            )
    return rows


def bias_row(metric: str, same: bool, trials: int, size: int = 8) -> dict:
    """Mean of `trials` estimates from samples of `size` rows of each law, less the distance of the laws."""
    points = features(6, 4, 5).double()
    first = torch.tensor([0.3, 0.2, 0.2, 0.1, 0.1, 0.1], dtype=torch.float64)
    second = first if same else torch.tensor([0.1, 0.1, 0.2, 0.2, 0.2, 0.2], dtype=torch.float64)
    kernel = KERNELS[metric]
    truth = float((first - second) @ kernel(points, points).first @ (first - second))
    generator = torch.Generator().manual_seed(0)
    estimates, naive = np.empty(trials), np.empty(trials)
    for trial in range(trials):
        x, y = (points[law.multinomial(size, True, generator=generator)] for law in (first, second))
        matrices: KernelMatrices = kernel(x, y)
        estimates[trial] = matrices.distance()
        naive[trial] = float(matrices.first.mean() + matrices.second.mean() - 2 * matrices.between.mean())
    bias, error = float(estimates.mean() - truth), float(estimates.std() / trials**0.5)
    return {
        "check": f"{metric} is unbiased: {'equal' if same else 'different'} laws, samples of {size}",
        "tried": trials,
        "failed": int(abs(bias) > 4 * error),
        "truth": float(f"{truth:.5g}"),
        "bias": float(f"{bias:.2g}"),
        "standard_error": float(f"{error:.2g}"),
        "bias_with_diagonal": float(f"{naive.mean() - truth:.2g}"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer trials and rows; a few seconds")
    parser.add_argument("--out", help="file for the JSON report")
    arguments = parser.parse_args()
    counts = [(260, 24)] if arguments.quick else [(260, 24), (2000, 348)]
    rows: list[dict] = []
    for library in LIBRARIES:
        if util.find_spec(library.replace("-", "_")) is None:
            print(f"{library} is not installed; its rows are left out.")
        else:
            rows += parity_rows(library, counts)
    trials = 2_000 if arguments.quick else 20_000
    rows += [bias_row(metric, same, trials) for metric in KERNELS for same in (True, False)]
    write_report("python -m benchmarks.parity" + " --quick" * arguments.quick, rows, arguments.out)


if __name__ == "__main__":
    main()
