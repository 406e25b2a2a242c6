"""Public classifiers of photos that a smaller network learns from: it repeats what they say of every photo.

What a large network makes of a photo tells more than its label: what else the photo is like (G. Hinton et al.,
"Distilling the knowledge in a neural network", arXiv:1503.02531).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_spectral_dp.metrics.efficientnet import LITE, lite, prepared
from hf_spectral_dp.private_marks import refuse_uncounted

LITE_SIDE = 160  # of the images that it sees: small photos hold no more, and at 224 it takes six times as long
TEMPERATURE = 2.0


def teacher_of(name: str) -> Callable[[Tensor], Tensor]:
    """A public classifier: what gives logits (B, K) to photos, uint8 (B, 3, S, S).

    Args:
        name: folder or Hub id of an image classifier of transformers; or `LITE`.

    Raises:
        ImportError: `LITE` is not installed.
        ValueError: the classifier came out of a private run, which this training would not count.
    """
    if name == LITE:
        network = lite()[0].to(memory_format=torch.channels_last)
        return lambda photos: network(prepared(photos.float() / 127.5 - 1, LITE_SIDE))
    model = AutoModelForImageClassification.from_pretrained(name).eval()
    refuse_uncounted(f"--teacher {name}", model)
    processor = AutoImageProcessor.from_pretrained(name)
    return lambda photos: model(**processor(images=photos, return_tensors="pt")).logits


@torch.no_grad()
def opinions(teacher: Callable[[Tensor], Tensor], photos: Tensor) -> Tensor:
    """Logits (N, K), half precision, that the teacher gives to photos, uint8 (N, 3, S, S)."""
    answers = []
    for some in tqdm(photos.split(100), "asking the teacher", unit="100 photos"):
        with torch.autocast("cpu", torch.bfloat16):
            answers.append(teacher(some).half())
    return torch.cat(answers)


def disagreement(logits: Tensor, answers: Tensor) -> Tensor:
    """Kullback-Leibler divergence from the teacher's distribution to the network's, both at `TEMPERATURE`.

    Times its square, by which the gradient is as large as that of the labels (section 2 of the paper). Both (B, K).
    """
    ours, theirs = (F.log_softmax(values.float() / TEMPERATURE, 1) for values in (logits, answers))
    return TEMPERATURE**2 * F.kl_div(ours, theirs, log_target=True, reduction="batchmean")
