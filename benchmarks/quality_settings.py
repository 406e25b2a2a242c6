"""How much the quality benchmark trains and measures, and with which settings; where those come from."""

from dataclasses import dataclass
from typing import Any

from benchmarks.quality_data import ImageSet
from hf_spectral_dp.metrics.utility import DIFFERENT, PUBLISHED

TRAINED = ("ours", "raster", "pixels", "pixels16", "diffusion")


@dataclass(frozen=True)
class Size:
    """How much is trained and measured.

    Attributes:
        private, test, public: images. each: images generated per class.
        public_steps: of `public_batch` public images each, for every model that is not bundled.
        steps, batch: of DP training. twin_steps: of `public_batch` private images each, at epsilon inf.
        classifier_steps, seeds: of each of the three `architectures`, on images averaged over blocks of side `block`;
            no steps, no classifiers. large_steps: of those of `quality_classifiers` instead, where images have colours.
        compared: images for distances.
        widths, denoising_steps: of the diffusion model. diffusion_share: of the public steps that it takes.
        micro_batch: private rows in one pass, for speed only.
        wide: colour images start from the wide public model, and all end with its network; ours trains in bfloat16.
        photos, taught: public photos from which a private critic chooses those that ours learns the classes from, and
            the steps of that; none, no critic. See `quality_critic`.
        detail_steps: of ours where images count: of super-resolution on public photos weighed by the private mean.
    """

    private: int
    test: int
    public: int
    each: int
    public_steps: int
    steps: int
    batch: int
    twin_steps: int
    classifier_steps: int
    seeds: int
    block: int
    compared: int
    widths: tuple[int, int]
    denoising_steps: int
    diffusion_share: float = 1.0
    architectures: tuple[str, ...] = DIFFERENT
    public_batch: int = 64
    micro_batch: int = 64
    wide: bool = False
    photos: int = 0
    taught: int = 0
    detail_steps: int = 0
    large_steps: int = 0

    @property
    def for_figures(self) -> dict[str, Any]:
        """How `figures` is to measure."""
        names = ("classifier_steps", "architectures", "seeds", "block", "compared", "large_steps")
        return {name: getattr(self, name) for name in names}


SIZES = {
    "quick": Size(600, 300, 700, 20, 8, 4, 64, 8, 6, 1, 2, 100, (16, 32), 4, photos=700, taught=4),
    "small": Size(20000, 3000, 4000, 100, 250, 24, 512, 250, 150, 1, 2, 1000, (16, 32), 20),
    # Half the public rows of the bundled model of photos; a row of diffusion costs more than one of the others.
    "photos": Size(20000, 1500, 44000, 500, 4000, 60, 2048, 2000, 0, 1, 2, 1000, (16, 32), 20, 0.6),
    # The like on a GPU, minutes per method: four times the rows, diffusion of 16 times the size.
    "photos-gpu": Size(
        20000, 1500, 44000, 500, 4000, 240, 2048, 2000, 0, 1, 2, 1000, (64, 128), 50, public_batch=256,
        micro_batch=2048, wide=True, detail_steps=1600,
    ),  # fmt: skip
    # Four times the steps of "photos", and classifiers that learn from photos what is in them.
    "objects": Size(
        50000, 10000, 44000, 2000, 4000, 240, 2048, 2000, 2000, 1, 1, 2000, (16, 32), 20, 0.6, PUBLISHED,
        photos=44000, taught=1500, large_steps=3000,
    ),  # fmt: skip
    "objects-gpu": Size(
        50000, 10000, 44000, 2000, 6000, 240, 2048, 4000, 2000, 1, 1, 2000, (64, 128), 50, 2.0, PUBLISHED,
        public_batch=256, micro_batch=2048, wide=True, photos=44000, taught=1500, large_steps=3000,
    ),  # fmt: skip
    # As many generated images as the published comparisons take (DPImageBench: 60,000), and the same kinds of networks.
    "medium": Size(
        60000, 10000, 20000, 6000, 3000, 240, 4000, 4000, 3000, 1, 1, 2000, (32, 64), 20, architectures=PUBLISHED
    ),
    "full": Size(
        60000, 10000, 60000, 2000, 8000, 400, 4096, 20000, 2000, 3, 1, 10000, (64, 128), 50, architectures=PUBLISHED
    ),
}

# Settings of DP training. Token models: those of the bundled demo, chosen on 6,000 digits of the MNIST test split: no
# private row was looked at, but MNIST's test images are not untouched. Ours and its rivals share them; no rival was
# tuned by itself. A diffusion model's gradients are small: a small clipping norm, and Adam, blind to their scale.
TOKENS = {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.25, "ema_decay": 0.9}
SETTINGS: dict[str, dict[str, Any]] = dict.fromkeys(TRAINED, TOKENS) | {
    "diffusion": {"optim": "adamw_torch", "learning_rate": 1e-3, "ema_decay": 0.9, "clipping_norm": 0.05},
}


def photo_settings(method: str, epsilon: float, steps: int) -> dict[str, Any]:
    """What differs for colour images: a schedule that ends in small steps, and steps that fit the noise.

    Each token model chose its own rates, of 0.15 and 0.3 at epsilon 1 and of 0.25, 0.5 and 1 at 10, by the loss on
    held-out public pictograms (Noto emoji, as far from the public photos as faces are), after the steps of size
    "photos" with the noise of a batch of 2,048 in 20,000 rows; all three chose the same. At epsilon 1 more steps help
    up to 120, at half the rate (2.84 nats after 60, 2.81 after 120 for ours; 240 at the whole rate end at 3.20).
    """
    schedule: dict[str, Any] = {"lr_scheduler_type": "cosine", "warmup_steps": 5, "max_steps": steps}
    if epsilon < 4:
        schedule["max_steps"] = min(steps, 120)
    if method != "diffusion":
        schedule["learning_rate"] = 0.5 if epsilon >= 4 else 0.15 if schedule["max_steps"] > 60 else 0.3
    return schedule


def temperature(method: str, images: ImageSet, scales: int) -> float | list[float]:
    """Of sampling, per scale for ours: for colour images the best on public pictograms after such private training.

    Each token model chose its own by the Frechet distance to pictograms, the same at epsilon 1 and 10. Noise in the
    weights makes distributions flatter than they were; but 64 pixels do best at 1. Ours does best with varied coarse
    tokens and nearly the likeliest details: a distance of 124 at 1, 0.3, 0.1, of 166 at 0.9 for all.
    """
    if images.channels == 1:
        return 1.0
    return [1.0, 0.3, *[0.1] * scales][:scales] if method == "ours" else {"raster": 0.95}.get(method, 1.0)


def scale_weights(scales: int) -> list[float]:
    """Of the scales of ours in the loss of private training on colour images whose classes matter, coarse to fine.

    On public pictograms, after private training at epsilon 1 and 10, of the weights that were tried these leave coarse
    images nearest to real ones at little cost to the details, which are drawn nearly as the likeliest.
    """
    return [1.0, 0.5, *[0.25] * scales][:scales]
