"""Audits of this installation: `DPTrainer` itself is run on canaries, and on rows to memorise, and then attacked.

Beside each attack stands its positive control: the same run with the noise removed, which the attack must catch.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PrinterCallback

from .configuration_spectral import SpectralConfig
from .feature_rows import RowsInMemory
from .metrics.membership import MembershipResult, auroc_limit, membership_inference
from .modeling_spectral import SpectralTokenizerForCausalLM
from .privacy.audit import mechanism_audit, one_run_lower_bound
from .trainer import DPTrainer
from .training_args import DPTrainingArguments

_DELTA = 1e-5


def tiny_model() -> SpectralTokenizerForCausalLM:
    """Twelve tokens of 16 codes on three scales, ten classes."""
    config = SpectralConfig(
        image_size=16, num_channels=1, levels=2, patch_sizes=[2, 2, 4], codebook_sizes=[16, 16, 16], num_classes=10,
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    return SpectralTokenizerForCausalLM(config)


def random_rows(config: SpectralConfig, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Legal rows (count, 1 + T) for a model with classes: one of them, then uniform codes of each position's scale."""
    layout = config.layout
    columns = [torch.randint(config.num_classes, (count,), generator=generator) + layout.codes]
    for index in layout.scale_of_position:
        scale = layout.scales[index]
        columns.append(torch.randint(scale.codes, (count,), generator=generator) + scale.first_id)
    return torch.stack(columns, 1)


class _WithCanaries(nn.Module):
    """A model beside a table with one parameter for each canary.

    A row that starts with -1 - k is canary k: its loss is a thousand times parameter k, so that its clipped gradient
    is the clipping norm in a coordinate of its own (a Dirac canary). One that starts with -1 - (number of canaries)
    is a canary that was left out: its loss is the constant zero, which adds nothing to any sum, as if the row were
    not there, while the number of rows stays what it is.
    """

    def __init__(self, model: SpectralTokenizerForCausalLM, canaries: int):
        super().__init__()
        self.model = model
        self.table = nn.Embedding(canaries + 1, 1)
        nn.init.zeros_(self.table.weight)
        layout = model.config.layout
        legal = [layout.scales[index].first_id for index in layout.scale_of_position]
        self.register_buffer("filler", torch.tensor([model.config.null_token_id, *legal]), persistent=False)

    def per_example_loss(self, input_ids: Tensor) -> Tensor:
        number = -1 - input_ids[:, 0]
        losses = self.model.per_example_loss(torch.where(number[:, None] < 0, input_ids, self.get_buffer("filler")))
        left_out = number == self.table.num_embeddings - 1
        canary = 1e3 * self.table(number.clamp_min(0))[:, 0]
        return torch.where(number < 0, losses, torch.where(left_out, torch.zeros_like(losses), canary))


def _train(model: Any, rows: Tensor, epsilon: float, noise: bool, device: str, **arguments: Any) -> DPTrainer:
    """One run of `DPTrainer`, in a folder that is thrown away; `noise=False` is the non-private twin of that run."""
    with tempfile.TemporaryDirectory() as folder:
        args = DPTrainingArguments(
            output_dir=folder, target_epsilon=epsilon, target_delta=_DELTA, report_to="none", disable_tqdm=True,
            save_strategy="no", logging_strategy="no", use_cpu=device == "cpu", lr_scheduler_type="constant",
            **arguments,
        )  # fmt: skip
        trainer = DPTrainer(model, args, RowsInMemory(rows))
        trainer.remove_callback(PrinterCallback)
        if not noise:
            trainer._mechanism.noise.standard_deviation = 0.0
        trainer.train()
    return trainer


@dataclass(frozen=True)
class OneRunAudit:
    """The result of `one_run_audit`.

    Attributes:
        claimed: epsilon that the run reports, at delta. lower_bound: what the attack shows, at `confidence`.
        accuracy: of guessing all canaries; for understanding only.
    """

    claimed: float
    delta: float
    lower_bound: float
    confidence: float
    canaries: int
    accuracy: float

    @property
    def refuted(self) -> bool:
        return self.lower_bound > self.claimed


def one_run_audit(
    epsilon: float, noise: bool = True, canaries: int = 2000, confidence: float = 0.95, device: str = "cpu"
) -> OneRunAudit:
    """Trains once by `DPTrainer` with canaries that fair coins put in, and guesses the coins from the final weights.

    Poisson batches, clipping, noise, ledger, optimizer and the reported epsilon are those of any run; the model is a
    small `SpectralTokenizerForCausalLM` on random rows, beside the canaries' parameters. Plain SGD sums the noisy
    gradients, so the distance a canary's parameter went is the best that the final weights say about it.

    Args:
        epsilon: what the run may spend, at delta = 1e-5. With 2,000 canaries an epsilon up to about 6 can be refuted.
        noise: False removes it: the twin that must be caught.
        canaries: more of them see more; each is one row beside 200 ordinary ones.
        confidence: that the lower bound is one; see `privacy.audit.one_run_lower_bound` for what that means.
        device: "cpu" or "cuda", where the run takes place.
    """
    with torch.random.fork_rng():
        torch.seed()
        model = tiny_model()
        ordinary = random_rows(model.config, 200)
    included = np.random.default_rng().random(canaries) < 0.5
    rows = torch.zeros(canaries, ordinary.shape[1], dtype=torch.long)
    rows[:, 0] = torch.from_numpy(np.where(included, -1 - np.arange(canaries), -1 - canaries))
    audited = _WithCanaries(model, canaries)
    trainer = _train(
        audited, torch.cat([ordinary, rows]), epsilon, noise, device, sampling_rate=0.5, max_steps=10,
        micro_batch_size=1024, optim="sgd", learning_rate=1.0,
    )  # fmt: skip
    scores = -audited.table.weight.detach()[:canaries, 0].double().cpu().numpy()
    guesses = scores > np.median(scores)
    return OneRunAudit(
        claimed=trainer.epsilon_spent,
        delta=_DELTA,
        lower_bound=round(one_run_lower_bound(scores, included, _DELTA, confidence), 4),
        confidence=confidence,
        canaries=canaries,
        accuracy=round(float((guesses == included).mean()), 4),
    )


def membership_audit(
    epsilon: float, noise: bool = True, steps: int = 300, rows: int = 200, device: str = "cpu"
) -> list[MembershipResult]:
    """Trains by `DPTrainer` on random rows, which can only be memorised, and attacks by membership inference.

    Held out is another draw of as many rows. Without noise the same run overfits: the twin that must be caught.
    """
    with torch.random.fork_rng():
        torch.seed()
        model = tiny_model()
        members, others = random_rows(model.config, rows), random_rows(model.config, rows)
    _train(
        model, members, epsilon, noise, device, sampling_rate=0.5, max_steps=steps, micro_batch_size=256,
        learning_rate=1e-2,
    )  # fmt: skip
    return membership_inference(model, members, others)


@dataclass(frozen=True)
class AuditRow:
    """One audit beside its positive control.

    Attributes:
        audit: what was attacked. quantity: what the figures are.
        claimed: the figure that the claim allows. shown: what the attack shows, a lower bound.
        refuted: shown is more than claimed, or something else was found (`found`).
        control: the broken twin. control_shown: the same figure of it. control_caught: the attack noticed it.
    """

    audit: str
    quantity: str
    claimed: float
    shown: float
    confidence: float
    refuted: bool
    found: list[str]
    control: str
    control_shown: float
    control_caught: bool


def audit_installation(
    epsilons: Sequence[float] = (1.0, 2.0, 4.0), quick: bool = False, device: str = "cpu"
) -> Iterator[AuditRow]:
    """Runs all audits on the code that this installation trains with, and yields each as it ends.

    `quick`: 2 * 10^4 trials in place of 10^5 for the mechanism, which notices noise that is 2 % too small by its
    scale, but only about 10 % by a bound on epsilon, and half the steps to memorise.
    """
    trials, lone = (20_000, 60) if quick else (100_000, 200)
    right, weak = (mechanism_audit(used, 1.0, trials, lone, device=device) for used in (1.0, 0.9))
    yield AuditRow(
        f"one release, {trials:,} trials per side", "epsilon", right.claimed_epsilon, right.epsilon_lower_bound,
        right.confidence, right.refuted, [finding.check for finding in right.findings if finding.refuted],
        "noise x 0.9", weak.epsilon_lower_bound, weak.refuted,
    )  # fmt: skip
    for epsilon in epsilons:
        private, twin = (one_run_audit(epsilon, noise, device=device) for noise in (True, False))
        yield AuditRow(
            f"one training run, {private.canaries:,} canaries", "epsilon", private.claimed, private.lower_bound,
            private.confidence, private.refuted, [], "no noise", twin.lower_bound, twin.refuted,
        )  # fmt: skip
    epsilon = max(epsilons)
    for private_, twin_ in zip(
        *(membership_audit(epsilon, noise, 100 if quick else 300, device=device) for noise in (True, False)),
        strict=True,
    ):
        limit = round(auroc_limit(epsilon, _DELTA), 4)
        yield AuditRow(
            f"membership inference: {private_.attack}", "AUROC", limit, private_.low, private_.confidence,
            private_.low > limit, [], "no noise", twin_.low, twin_.caught,
        )  # fmt: skip


__all__ = [
    "AuditRow",
    "OneRunAudit",
    "audit_installation",
    "membership_audit",
    "one_run_audit",
    "random_rows",
    "tiny_model",
]
