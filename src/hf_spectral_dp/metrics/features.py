"""What turns images into the vectors that metrics compare: one protocol, and an extractor for every kind of weights.

The default, `PublicFeatures`, is shipped and needs no download. The others take weights from a local path, or from a
Hub id that was downloaded before; nothing is fetched unless `allow_download=True` says so. A figure from any of them
carries the extractor's name and fingerprint, since figures of different extractors cannot be compared.
"""

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPModel, Dinov2Model
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .public_features import CHECKPOINT, PublicFeatureNetwork


@runtime_checkable
class FeatureExtractor(Protocol):
    """What a metric needs to know of an extractor; any object with these four is one.

    Attributes:
        name: short name, such as "public-features"; it stands beside every figure.
        fingerprint: hexadecimal hash of the weights.
        dim: number D of features.
    """

    name: str
    fingerprint: str
    dim: int

    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, D), float32 on the CPU, of images (B, 1 or 3, H, W) in [-1, 1]."""
        ...


@runtime_checkable
class TextExtractor(FeatureExtractor, Protocol):
    """An extractor whose image features can be compared with those of texts."""

    def text_features(self, texts: list[str]) -> Tensor:
        """Features (B, D), float32 on the CPU, of texts; their cosine with image features measures agreement."""
        ...


class PublicFeatures:
    """The shipped extractor: features of three depths of a small network trained on public photos.

    Args:
        weights: folder of a `PublicFeatureNetwork` of your own, trained by `examples/train_features.py`.
        device: where the network runs.

    Raises:
        FileNotFoundError: no such folder.
    """

    name = "public-features"

    def __init__(self, weights: str | Path = CHECKPOINT, device: str | torch.device = "cpu"):
        if not Path(weights).is_dir():
            raise FileNotFoundError(f"weights={str(weights)!r} is no folder; give one, or leave it out.")
        network = PublicFeatureNetwork.from_pretrained(weights, dtype=torch.float32, local_files_only=True)
        self.network: PublicFeatureNetwork = network.to(device, memory_format=torch.channels_last).eval()
        self.fingerprint = _fingerprint(self.network)
        self.dim = self.network.feature_mean.numel()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.network.features(images).cpu()

    @torch.no_grad()
    def maps(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Features (B, D), and the feature maps (B, C, h, w) of three depths they are the means of, on the CPU."""
        features, maps = self.network.seen(images)
        return features.cpu(), [found.cpu() for found in maps]


class InceptionFeatures:
    """The 2048 features of Inception-v3 that the Frechet Inception distance is defined on (Heusel et al., 2017).

    Args:
        weights: the TorchScript file of the original network (`inception-2015-12-05.pt`, as clean-fid and StyleGAN use
            it): a module that takes uint8 images (B, 3, H, W), resizes them itself, and is called with
            `return_features=True`. TorchScript is a program: load files you trust only.
        device: where the network runs.

    Raises:
        FileNotFoundError: no such file. None is ever downloaded.
    """

    name = "inception-v3"
    dim = 2048

    def __init__(self, weights: str | Path, device: str | torch.device = "cpu"):
        path = Path(weights)
        if not path.is_file():
            raise FileNotFoundError(
                f"weights={str(path)!r} is no file; give the path of inception-2015-12-05.pt (TorchScript), which this"
                " package neither ships nor downloads, or use PublicFeatures()."
            )
        with path.open("rb") as file:
            self.fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
        self.device = torch.device(device)
        self.network = torch.jit.load(str(path), map_location=self.device).eval()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        levels = ((images.to(self.device).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return self.network(levels.expand(-1, 3, -1, -1), return_features=True).float().cpu()


class ClipFeatures:
    """Image and text embeddings of a CLIP model (Radford et al., 2021), as CMMD and CLIP scores are defined on.

    Args:
        weights: local folder, or a Hub id such as "openai/clip-vit-large-patch14-336" (that of the CMMD paper).
        allow_download: fetch the Hub id if it is not here yet; False (default) never touches the network.
        device: where the model runs.

    Raises:
        OSError: not here, and `allow_download` is False.
    """

    def __init__(self, weights: str | Path, allow_download: bool = False, device: str | torch.device = "cpu"):
        self.model = _pretrained(CLIPModel, weights, allow_download).to(device)
        self.name = f"clip:{Path(weights).name}"
        self.fingerprint = _fingerprint(self.model)
        self.dim = self.model.config.projection_dim
        side = self.model.config.vision_config.image_size
        self.normalise = _Normalise(weights, side, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, allow_download)
        self._tokenizer_of = (weights, allow_download)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        pixels = self.normalise(images.to(self.model.device))
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return self.model.visual_projection(pooled).float().cpu()

    @torch.no_grad()
    def text_features(self, texts: list[str]) -> Tensor:
        weights, allow_download = self._tokenizer_of
        tokenizer = AutoTokenizer.from_pretrained(weights, local_files_only=not allow_download)
        tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.model.device)
        pooled = self.model.text_model(**tokens).pooler_output
        return self.model.text_projection(pooled).float().cpu()


class DinoFeatures:
    """The class token of DINOv2 (Oquab et al., 2023), which follows human judgement best (Stein et al., 2306.04675).

    Args:
        weights: local folder, or a Hub id such as "facebook/dinov2-large".
        allow_download: fetch the Hub id if it is not here yet; False (default) never touches the network.
        device: where the model runs.

    Raises:
        OSError: not here, and `allow_download` is False.
    """

    def __init__(self, weights: str | Path, allow_download: bool = False, device: str | torch.device = "cpu"):
        self.model = _pretrained(Dinov2Model, weights, allow_download).to(device)
        self.name = f"dinov2:{Path(weights).name}"
        self.fingerprint = _fingerprint(self.model)
        self.dim = self.model.config.hidden_size
        side = 224 // self.model.config.patch_size * self.model.config.patch_size
        self.normalise = _Normalise(weights, side, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, allow_download)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=self.normalise(images.to(self.model.device))).pooler_output.float().cpu()


def load_extractor(
    spec: str = "public", allow_download: bool = False, device: str | torch.device = "cpu"
) -> FeatureExtractor:
    """An extractor from one string, as scripts take it.

    Args:
        spec: "public", "public:FOLDER", "inception:FILE", "clip:FOLDER_OR_ID" or "dinov2:FOLDER_OR_ID".
        allow_download: see `ClipFeatures`; Inception is never downloaded.

    Raises:
        ValueError: an unknown kind, or one without its weights.
    """
    kind, _, weights = spec.partition(":")
    if kind == "public":
        return PublicFeatures(weights or CHECKPOINT, device=device)
    if weights and kind == "inception":
        return InceptionFeatures(weights, device)
    if weights and kind == "clip":
        return ClipFeatures(weights, allow_download, device)
    if weights and kind == "dinov2":
        return DinoFeatures(weights, allow_download, device)
    raise ValueError(
        f"extractor {spec!r} is not known; use public, inception:FILE, clip:FOLDER_OR_ID or dinov2:FOLDER_OR_ID."
    )


class _Normalise:
    """Images in [-1, 1] as a vision transformer takes them: resized to its side, with its own mean and deviation.

    Side, mean and deviation are those of its preprocessor_config.json, or else the given ones, usual for its kind.
    """

    def __init__(
        self, weights: str | Path, side: int, mean: Sequence[float], deviation: Sequence[float], allow_download: bool
    ):
        settings: dict[str, Any] = {}
        with contextlib.suppress(OSError):  # a folder that holds a model alone
            settings, _ = BaseImageProcessor.get_image_processor_dict(weights, local_files_only=not allow_download)
        sizes = settings.get("crop_size") or settings.get("size") or side
        self.side = int(sizes.get("height", side)) if isinstance(sizes, dict) else int(sizes)
        self.mean = torch.tensor(settings.get("image_mean", mean)).view(3, 1, 1)
        self.deviation = torch.tensor(settings.get("image_std", deviation)).view(3, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, side, side) of images (B, 1 or 3, H, W): the whole image, resized, not cropped."""
        pixels = F.interpolate(images.float(), (self.side, self.side), mode="bicubic", antialias=True)
        shares = (pixels.clamp(-1, 1) + 1) / 2
        return (shares.expand(-1, 3, -1, -1) - self.mean.to(images.device)) / self.deviation.to(images.device)


def _pretrained(kind: Any, weights: str | Path, allow_download: bool) -> Any:
    try:
        return kind.from_pretrained(weights, dtype=torch.float32, local_files_only=not allow_download).eval()
    except OSError as error:
        if allow_download:
            raise
        raise OSError(
            f"{str(weights)!r} is neither a folder with a {kind.__name__} nor a Hub id that was downloaded before; give"
            " a folder, or allow_download=True to fetch it."
        ) from error


def _fingerprint(network: nn.Module) -> str:
    """SHA-256 of names and values of all weights."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(np.ascontiguousarray(value.detach().cpu().numpy()).tobytes())
    return digest.hexdigest()


__all__ = [
    "ClipFeatures",
    "DinoFeatures",
    "FeatureExtractor",
    "InceptionFeatures",
    "PublicFeatures",
    "TextExtractor",
    "load_extractor",
]
