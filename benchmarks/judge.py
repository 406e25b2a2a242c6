"""Judges of images: kernel distances on features of networks of others.

EfficientNet-Lite0, trained on ImageNet, for all images; for faces also what dlib recognises persons by, and how many
faces its detector finds. The package's `judge` extra brings the weights. No generator of faces was trained or chosen
with them. The first was the teacher of `public-eye`, through which critics of classes look: where one chooses images,
it is no stranger.
"""

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_spectral_dp.metrics.distances import polynomial_kernel
from hf_spectral_dp.metrics.efficientnet import LITE, levels, lite, prepared
from hf_spectral_dp.metrics.features import FeatureExtractor
from hf_spectral_dp.metrics.statistics import bootstrap_counts


class LiteFeatures:
    """The 1,280 features (B, D) of EfficientNet-Lite0 of images (B, 1 or 3, H, W) in [-1, 1], seen at `side` pixels.

    Raises:
        SystemExit: the extra `judge`, which brings the weights, is not installed.
    """

    name, dim = LITE, 1280

    def __init__(self, side: int = 224) -> None:
        self.side = side
        try:
            self.network, weights = lite()
        except ImportError as error:
            raise SystemExit(str(error)) from error
        self.fingerprint = hashlib.sha256(weights.read_bytes()).hexdigest()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.network.extract_features(prepared(images, self.side)).mean((2, 3))


class FaceFeatures:
    """What dlib tells persons apart by: 128 features (B, D) of images (B, 3, H, W) of aligned faces, in [-1, 1].

    A residual network that others trained on three million faces (D. King, 2017). It goes by features, not by colour
    or sharpness. A fifth of a second an image, on one core.

    Raises:
        SystemExit: the extra `judge`, which brings the weights, is not installed.
    """

    name, dim = "dlib-face-recognition", 128
    side = 150  # of the images that the network takes
    detector_side, margin = 256, 40  # aligned faces fill the image, and the detector looks for whole heads

    def __init__(self) -> None:
        models = importlib.util.find_spec("face_recognition_models")
        try:
            import dlib
        except ImportError:
            models = None
        if models is None or models.origin is None:
            raise SystemExit("dlib and face_recognition_models are an extra: pip install 'hf-spectral-dp[judge]'.")
        weights = Path(models.origin).parent / "models" / "dlib_face_recognition_resnet_model_v1.dat"
        self.fingerprint = hashlib.sha256(weights.read_bytes()).hexdigest()
        self._network = dlib.face_recognition_model_v1(str(weights))
        self._detector = dlib.get_frontal_face_detector()

    def __call__(self, images: Tensor) -> Tensor:
        return torch.tensor(np.array(self._network.compute_face_descriptor(_arrays(images, self.side))))

    def found(self, images: Tensor) -> int:
        """In how many of the images (B, 3, H, W) the detector, which goes by oriented gradients, finds a face."""
        around = ((self.margin, self.margin), (self.margin, self.margin), (0, 0))
        faces = (np.pad(image, around, mode="edge") for image in _arrays(images, self.detector_side))
        return sum(len(self._detector(face)) > 0 for face in faces)


def judges_of(name: str) -> list[FeatureExtractor]:
    """Who judges the images of an image set of `quality_data`."""
    return [LiteFeatures(), *([FaceFeatures()] if name.startswith("faces") else [])]


def _arrays(images: Tensor, side: int) -> list[np.ndarray]:
    """The same as arrays (side, side, C) of uint8."""
    return list(levels(images, side).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy())


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
