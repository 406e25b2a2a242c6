"""The generators that the quality benchmark compares: ours, two other token models, and a diffusion model.

All have the same three parts: what a private row is, one loss per row, and how images come out. So all are trained by
the same code: without privacy by `train_publicly`, with it by `train_privately`, which is `DPTrainer` with its Poisson
batches, clipping, noise, ledger and accountant.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hf_spectral_dp import DPTrainer, DPTrainingArguments, SpectralConfig, SpectralTokenizerForCausalLM
from hf_spectral_dp.critic import Critic, draw_by_choice
from hf_spectral_dp.feature_rows import RowsInMemory

Upscaler = Callable[[Tensor], Tensor]
"""Brings coarse images to the full size."""


class TokenGenerator:
    """A class-conditional causal model over tokens, in order, of images of some size.

    `config` says which tokens: with all scales it is ours; with one scale of single coefficients it has one token per
    pixel of a small image. `enlarge` 2 shows the codec every pixel as a block of 2 x 2, whose Haar approximation band
    is the image itself: patches of pixels in raster order, the way of models without wavelets; 0.5 shows it averages of
    such blocks. `attempts`: how often images that the model itself or, with one, the `critic` of classes takes for
    another class are drawn again, or among how many the critic chooses, as `DPSpectralPipeline` does; `temperature`
    divides the logits, one for all scales or one for each; see `SpectralTokenizerForCausalLM.sample`. `detail_steps`:
    in which the upscaler learned from public photos that a private mean weighed.
    """

    def __init__(self, model: SpectralTokenizerForCausalLM, upscaler: Upscaler, enlarge: float = 1):
        self.model, self.upscaler, self.enlarge = model, upscaler, enlarge
        self.attempts = 1
        self.detail_steps = 0
        self.critic: Critic | None = None
        self.temperature: float | list[float] = 1.0

    @classmethod
    def from_public_images(cls, config: SpectralConfig, images: Tensor, upscaler: Upscaler, enlarge: float = 1):
        """An untrained model with a codec fitted on public images."""
        generator = cls(SpectralTokenizerForCausalLM(config), upscaler, enlarge)
        generator.model.codec.fit(generator._enlarged(images))
        return generator

    def _enlarged(self, images: Tensor) -> Tensor:
        return images if self.enlarge == 1 else F.interpolate(images, scale_factor=self.enlarge, mode="area")

    def rows(self, images: Tensor, labels: Tensor) -> Tensor:
        """Token rows (N, 1 + T) of images (N, C, S, S); label -1 becomes the null token."""
        codec, config, device = self.model.codec, self.model.config, self.model.device
        tokens = torch.cat([codec.encode(self._enlarged(some.to(device))).cpu() for some in images.split(1000)])
        first = torch.where(labels < 0, config.null_token_id, labels + config.layout.codes)
        return torch.cat([first[:, None], tokens], 1)

    def hide_labels(self, rows: Tensor, share: float) -> Tensor:
        """The rows, a random `share` of them without label."""
        hidden = torch.rand(len(rows), device=rows.device) < share
        return torch.cat([torch.where(hidden, self.model.config.null_token_id, rows[:, 0])[:, None], rows[:, 1:]], 1)

    def decoded(self, rows: Tensor) -> Tensor:
        """Full-size images of rows."""
        some = (part[:, 1:].to(self.model.device) for part in rows.split(500))
        return torch.cat([self.upscaler(self.model.decode(tokens)).cpu() for tokens in some])

    def sample(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Full-size images (N, C, S, S) in [-1, 1] of class labels; the generator is on the model's device."""
        self.model.eval()
        if self.critic is None:
            return torch.cat([self._drawn(some, generator, self.attempts) for some in labels.split(500)])

        def draw(places: Tensor, attempt: int) -> tuple[Tensor, Tensor]:
            images = self._drawn(labels[places], generator, attempts=1)
            return images, images

        return draw_by_choice(self.critic, draw, labels, len(labels), self.attempts, 500, generator)

    @torch.no_grad()
    def _drawn(self, labels: Tensor, generator: torch.Generator, attempts: int) -> Tensor:
        tokens = self.model.sample(labels, generator=generator, temperature=self.temperature, attempts=attempts)
        return self.upscaler(self.model.decode(tokens)).cpu()

    @property
    def sampling(self) -> dict[str, Any]:
        """How images are drawn, for the rows of a report."""
        critic = False if self.critic is None else type(self.critic).__name__
        drawn = {"temperature": self.temperature, "attempts": self.attempts, "critic": critic}
        return drawn | ({"detail_steps": self.detail_steps} if self.detail_steps else {})

    def name_classes(self) -> None:
        """After training on images without labels: every class starts from what is known of the null token."""
        self.model = self.model.with_classes(self.model.config.num_classes)


class Denoiser(nn.Module):
    """A class-conditional diffusion model on small images, with one loss per row.

    A row is float32 (1 + C * side**2,): the label (-1 for none), then the pixels. As in DP latent diffusion
    (arXiv:2305.15759) only attention and the class embedding are trained with privacy; see `train_only_attention`.
    """

    def __init__(self, channels: int, side: int, classes: int, widths: tuple[int, int]):
        super().__init__()
        self.channels, self.side, self.classes = channels, side, classes
        self.unet = UNet2DModel(
            sample_size=side, in_channels=channels, out_channels=channels, layers_per_block=1, norm_num_groups=8,
            block_out_channels=widths, down_block_types=("DownBlock2D", "AttnDownBlock2D"), attention_head_dim=16,
            up_block_types=("AttnUpBlock2D", "UpBlock2D"), num_class_embeds=classes + 1,
        )  # fmt: skip
        self.scheduler = DDIMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", clip_sample=True)

    def per_example_loss(self, input_ids: Tensor) -> Tensor:
        """Mean squared error of the predicted noise at one random time per row, (B,).

        The rows are no token ids; trainers call them so.
        """
        rows = input_ids
        labels = rows[:, 0].long() % (self.classes + 1)
        pixels = rows[:, 1:].view(-1, self.channels, self.side, self.side)
        times, noise = torch.randint(1000, (len(rows),), device=rows.device), torch.randn_like(pixels)
        noisy = self.scheduler.add_noise(pixels, noise, times)
        guess = self.unet(noisy, times, class_labels=labels).sample
        return (guess - noise).square().flatten(1).mean(1)

    @property
    def device(self) -> torch.device:
        return self.unet.device

    def train_only_attention(self) -> None:
        for name, parameter in self.unet.named_parameters():
            parameter.requires_grad_("attentions" in name or "class_embedding" in name)


class DiffusionGenerator:
    """`Denoiser` on area-averaged images of side `side`, upscaled like the coarse images of the others."""

    def __init__(
        self, channels: int, size: int, side: int, classes: int, upscaler: Upscaler, denoising_steps: int,
        widths: tuple[int, int],
    ):  # fmt: skip
        self.model = Denoiser(channels, side, classes, widths)
        self.upscaler, self.block, self.denoising_steps = upscaler, size // side, denoising_steps

    def rows(self, images: Tensor, labels: Tensor) -> Tensor:
        return torch.cat([labels[:, None].float(), F.avg_pool2d(images, self.block).flatten(1)], 1)

    def hide_labels(self, rows: Tensor, share: float) -> Tensor:
        hidden = torch.rand(len(rows), device=rows.device) < share
        return torch.cat([torch.where(hidden, -1.0, rows[:, 0])[:, None], rows[:, 1:]], 1)

    @torch.no_grad()
    def sample(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        model, batches = self.model.eval(), []
        model.scheduler.set_timesteps(self.denoising_steps)
        for some in labels.to(model.device).split(500):
            shape = (len(some), model.channels, model.side, model.side)
            images = torch.randn(shape, generator=generator, device=model.device)
            for step in model.scheduler.timesteps:
                images = model.scheduler.step(model.unet(images, step, class_labels=some).sample, step, images)
                images = images.prev_sample
            batches.append(self.upscaler(images.clamp(-1, 1)).cpu())
        return torch.cat(batches)

    @property
    def sampling(self) -> dict[str, Any]:
        """How images are drawn, for the rows of a report."""
        return {"denoising_steps": self.denoising_steps}

    def name_classes(self) -> None:
        table = self.model.unet.class_embedding.weight
        with torch.no_grad():
            table[:-1] = table[-1].clone()


Generator = TokenGenerator | DiffusionGenerator


@dataclass(frozen=True)
class Cost:
    """What a training took: seconds of wall clock, floating-point operations, epsilon that was spent (None: no DP),
    steps and the (expected) rows of each; and how the scales were weighed in its loss, if they were."""

    seconds: float
    flops: float
    epsilon: float | None = None
    steps: int = 0
    batch: float = 0
    scale_weights: list[float] | None = None


def flops_per_row(model: Any, rows: Tensor) -> float:
    """Floating-point operations of one forward and backward pass for one row, counted by torch on a few rows."""
    some = rows[:8].to(model.device)
    with FlopCounterMode(display=False) as counter:
        model.per_example_loss(some).mean().backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / len(some)


def train_publicly(
    generator: Generator, rows: Tensor, steps: int, batch_size: int = 64, learning_rate: float = 2e-3, hide: float = 0.0
) -> Cost:
    """Ordinary training (AdamW, one cycle), a share `hide` of the labels left out: on public rows, or for the twin."""
    start, model = time.perf_counter(), generator.model.train()
    rows = rows.to(model.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps + 1, pct_start=0.25)
    for _ in range(steps):
        chosen = torch.randint(len(rows), (batch_size,), device=rows.device)
        some = generator.hide_labels(rows[chosen], hide)
        optimizer.zero_grad()
        model.per_example_loss(some).mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - start
    return Cost(seconds, steps * batch_size * flops_per_row(model, rows), steps=steps, batch=batch_size)


def train_privately(generator: Generator, rows: Tensor, epsilon: float, delta: float, **settings: Any) -> Cost:
    """Training by `DPTrainer` within (epsilon, delta); `settings` are fields of `DPTrainingArguments`."""
    model = generator.model
    if isinstance(model, Denoiser):
        model.train_only_attention()
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPTrainingArguments(
            output_dir=folder, target_epsilon=epsilon, target_delta=delta, report_to="none", save_strategy="no",
            disable_tqdm=True, use_cpu=model.device.type == "cpu", logging_strategy="no",
            **{"lr_scheduler_type": "constant_with_warmup"} | settings,
        )  # fmt: skip
        start = time.perf_counter()
        trainer = DPTrainer(model, arguments, RowsInMemory(rows))
        trainer.train()
        seconds = time.perf_counter() - start
        plan = trainer.plan
        flops = flops_per_row(model, rows) * plan.expected_batch_size * plan.steps
        return Cost(
            seconds, flops, trainer.epsilon_spent, plan.steps, plan.expected_batch_size, arguments.scale_weights
        )
