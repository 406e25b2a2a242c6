"""What a user asks of a private training run; everything else is `transformers.TrainingArguments`."""

import dataclasses
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from types import NoneType
from typing import Any, get_args, get_type_hints

from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from .privacy.budget import SAMPLING, PrivacyBudget, PrivacyPlan
from .privacy.ledger import LedgerError, read_ledger

# The trackers of transformers that can upload checkpoints: the variable that decides, and what holds without it.
_UPLOADS = {
    "wandb": ("WANDB_LOG_MODEL", "false"),
    "comet_ml": ("COMET_LOG_ASSETS", "false"),
    "mlflow": ("HF_MLFLOW_LOG_ARTIFACTS", "false"),
    "dagshub": ("HF_DAGSHUB_LOG_ARTIFACTS", "false"),
    "clearml": ("CLEARML_LOG_MODEL", "true"),
    "dvclive": ("HF_DVCLIVE_LOG_MODEL", "false"),
    "swanlab": ("SWANLAB_LOG_MODEL", "false"),
}
_OFF = ("", "0", "false", "f", "n", "no", "none", "off")
_KINDS: dict[frozenset[type], tuple[type, str]] = {
    frozenset([int]): (Integral, "a whole number"),
    frozenset([float]): (Real, "a number"),
    frozenset([bool]): (bool, "true or false"),
}
_WORSE = {"log_private_loss": True, "noise": "philox"}  # what a claim together with an earlier run inherits from it


@dataclass
class DPTrainingArguments(TrainingArguments):
    """Arguments of `DPTrainer`.

    What fixes the guarantee: `target_epsilon`, `target_delta`, `clipping_norm`, `expected_batch_size` or
    `sampling_rate`, `sampling` with `max_batch_size`, and `max_steps` or `num_train_epochs` (an epoch is
    1 / sampling_rate steps; with sampling="single_pass" it is one pass). With `earlier_ledgers` it is the guarantee of
    this run and of those together; they must have ended. `micro_batch_size` changes speed and memory only. Learning
    rate, schedule and optimizer are those of transformers; they cost no privacy as long as they were not chosen by
    looking at the private data.

    Raises:
        ValueError: a value that cannot work, or a transformers option that would break the guarantee or publish what
            it does not cover; names the field, its value, the rule and the remedy.
    """

    target_epsilon: float | None = field(
        default=None, metadata={"help": "Epsilon that the run and all earlier ones may spend, e.g. 8. Required."}
    )
    target_delta: float | None = field(
        default=None, metadata={"help": "Delta, below 1/N. Default: the smaller of 1/(10 N) and N**-1.1."}
    )
    clipping_norm: float = field(
        default=1.0, metadata={"help": "Largest Euclidean norm of one example's gradient; longer ones are scaled."}
    )
    expected_batch_size: float | None = field(
        default=None, metadata={"help": "Mean number of examples per step; the real number varies. Larger is better."}
    )
    sampling_rate: float | None = field(
        default=None, metadata={"help": "Probability of each example to enter a step; instead of expected_batch_size."}
    )
    sampling: str = field(
        default="poisson",
        metadata={
            "help": "How batches are formed: poisson; truncated_poisson, which cuts batches to max_batch_size; or"
            " single_pass, which takes a stream in its order and claims no amplification.",
            "choices": list(SAMPLING),
        },
    )
    max_batch_size: int | None = field(
        default=None, metadata={"help": "Largest batch of truncated_poisson, some deviations above the expected one."}
    )
    num_examples: int | None = field(
        default=None, metadata={"help": "Rows of a stream without a length, for single_pass; a public number."}
    )
    earlier_ledgers: list[str] | None = field(
        default=None,
        metadata={
            "help": "Ledgers of earlier private runs on the same data with the same privacy unit. What they spent is"
            " part of target_epsilon, and the claim is that of all runs together. They must have ended."
        },
    )
    per_device_train_batch_size: int = field(
        default=0, metadata={"help": "Not to be given: expected_batch_size and micro_batch_size are what it would be."}
    )
    max_grad_norm: float = field(
        default=0.0, metadata={"help": "Not to be given: each example's gradient is clipped, to clipping_norm."}
    )
    micro_batch_size: int = field(
        default=128, metadata={"help": "Examples per forward pass and process; for memory and speed only."}
    )
    scale_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "Weights of the scales in the loss of a row, coarse to fine, e.g. 1 0.5 0.25: where noise is what"
            " limits, the coarse tokens are the ones worth the budget. None: all tokens alike."
        },
    )
    ema_decay: float = field(
        default=0.0, metadata={"help": "Decay of an exponential moving average of the weights; 0 is none. Free."}
    )
    lora_rank: int = field(
        default=0, metadata={"help": "Train low-rank adapters of this rank on all linear layers (PEFT); 0 trains all."}
    )

    secure_mode: bool = field(
        default=False,
        metadata={
            "help": "On a GPU, draw the noise on the CPU by a cryptographic generator; slower. Without it the GPU's own"
            " fast generator draws it, keyed by the operating system. On a CPU the cryptographic one is always used."
        },
    )
    log_private_loss: bool = field(
        default=False,
        metadata={"help": "Log the mean loss of private rows. The guarantee does not cover it, and the card says so."},
    )

    def __post_init__(self):
        self._check_kinds()
        # One loader item is one Poisson batch, one DP event and one optimizer step.
        if self.per_device_train_batch_size not in (0, self.micro_batch_size):
            raise ValueError(
                f"per_device_train_batch_size={self.per_device_train_batch_size} cannot be used with DPTrainer: leave"
                " it out (or 0); give expected_batch_size for the mean batch of a step, and micro_batch_size="
                f"{self.micro_batch_size} for what fits into memory."
            )
        self.per_device_train_batch_size = self.micro_batch_size
        self.ignore_data_skip = True  # a resumed run draws fresh Poisson batches, and pays for them
        super().__post_init__()
        if self.target_epsilon is None:
            raise ValueError("target_epsilon=None: say how much privacy the run may spend, e.g. target_epsilon=8.0.")
        self.budget = PrivacyBudget(self.target_epsilon, self.target_delta)
        if (self.expected_batch_size is None) == (self.sampling_rate is None):
            raise ValueError(
                f"expected_batch_size={self.expected_batch_size} and sampling_rate={self.sampling_rate}: give exactly"
                " one of them."
            )
        for name in ("expected_batch_size", "sampling_rate", "clipping_norm"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value} must be positive and finite.")
        if self.sampling_rate is not None and self.sampling_rate > 1:
            raise ValueError(f"sampling_rate={self.sampling_rate} is a probability: at most 1.")
        if self.sampling not in SAMPLING:
            raise ValueError(f"sampling={self.sampling!r} has no proof; choose one of {', '.join(SAMPLING)}.")
        if (self.max_batch_size is None) == (self.sampling == "truncated_poisson"):
            raise ValueError(
                f"max_batch_size={self.max_batch_size} with sampling={self.sampling!r}: truncated_poisson needs it, and"
                " nothing else takes it."
            )
        if self.num_examples is not None and (self.sampling != "single_pass" or self.num_examples < 1):
            raise ValueError(
                f"num_examples={self.num_examples} with sampling={self.sampling!r}: it is the number, at least 1, of"
                " rows of a stream for single_pass; other data are counted."
            )
        if self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size={self.micro_batch_size} must be at least 1.")
        if (weights := self.scale_weights) is not None and not (
            isinstance(weights, list | tuple)
            and all(isinstance(weight, Real) and 0 <= weight < math.inf for weight in weights)
            and sum(weights) > 0
        ):
            raise ValueError(f"scale_weights={weights!r} must be finite, at least 0, and not all 0: a list of numbers.")
        if isinstance(self.earlier_ledgers, str | os.PathLike):
            raise ValueError(f"earlier_ledgers={str(self.earlier_ledgers)!r} must be a list of files.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must be in [0, 1); 0 switches averaging off.")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank={self.lora_rank} must be 0 (train all weights) or positive.")
        self.refuse_what_breaks_the_guarantee()

    def _check_kinds(self) -> None:
        """Refuses text where a number or a yes or no belongs, as quotes in a YAML file make of it."""
        for name, hint in get_type_hints(type(self)).items():
            kinds, value = frozenset(get_args(hint) or [hint]) - {NoneType}, getattr(self, name)
            if kinds in _KINDS and value is not None:
                kind, word = _KINDS[kinds]
                if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
                    raise ValueError(f"{name}={value!r} must be {word}, without quotes.")

    def refuse_what_breaks_the_guarantee(self, callbacks: Iterable[Any] = ()) -> None:
        """Raises ValueError for an option of transformers that cannot be used; also after arguments were changed.

        Args:
            callbacks: of the trainer. A tracker among them counts as one that `report_to` names.
        """
        refused = [
            ("max_grad_norm", 0.0, "clipping the noisy mean would only add bias; clipping_norm is for each example"),
            ("gradient_accumulation_steps", 1, "one step is one Poisson batch; use a larger expected_batch_size"),
            ("fp16", False, "its loss scaling acts before clipping; use bf16=True or float32"),
            ("mixed_precision", ("no", "bf16"), "its loss scaling acts before clipping; use bf16 or float32"),
            ("torch_compile", False, "the loss of a row asks the model as it is, so nothing would be compiled"),
            ("save_only_model", False, "a run that goes on needs the optimizer; release the finished pipeline instead"),
            ("save_strategy", ("no", "steps"), "to the loop a run is one epoch, saved at its end; save by steps"),
            ("logging_strategy", ("no", "steps"), "to the loop a run is one epoch; log by steps"),
            ("auto_find_batch_size", False, "repeated steps would not be charged; set micro_batch_size"),
            ("load_best_model_at_end", False, "choosing a checkpoint on private data is not covered by the guarantee"),
            ("do_eval", False, "a loss on private data is not covered; evaluate the images the model generates"),
            ("push_to_hub", False, "checkpoints hold optimizer states; publish the finished pipeline instead"),
            ("save_on_each_node", False, "one process saves for all; use a folder that all nodes share"),
            ("label_smoothing_factor", 0.0, "it is not applied to the per-example loss"),
            ("debug", [], "it prints what layers make of private rows"),
            ("include_num_input_tokens_seen", "no", "the count of tokens is that of the rows in the batches drawn"),
        ]
        for name, allowed, reason in refused:
            if getattr(self, name, allowed) not in (allowed if isinstance(allowed, tuple) else (allowed,)):
                raise ValueError(f"{name}={getattr(self, name)!r} cannot be used with DPTrainer: {reason}.")
        if self.deepspeed or self.fsdp:
            raise ValueError(
                "deepspeed and fsdp are not supported by DPTrainer, which saves and averages whole weights: run plain"
                " data parallelism, or NoisyClippedMean in a loop of your own on a model split by fully_shard (FSDP2)."
            )
        kinds = tuple(type(callback) for callback in callbacks)
        for tracker, (variable, default) in _UPLOADS.items():
            value = os.environ.get(variable, default)
            listens = tracker in self.report_to or INTEGRATION_TO_CALLBACK[tracker] in kinds
            if listens and value.lower() not in _OFF:
                raise ValueError(
                    f"{variable}={value!r} lets {tracker} upload checkpoints, which hold optimizer states; set"
                    f" {variable}=false."
                )

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled, into `training_args.bin` for instance: all but tokens of the Hub, which are passwords."""
        return {name: None if name.endswith("_token") else value for name, value in self.__dict__.items()}

    def earlier_runs(self, persons: bool | None = None) -> list[dict[str, Any]]:
        """What `earlier_ledgers` say now, one entry for each run that was charged, those that they counted included.

        Args:
            persons: whether a privacy unit of this run is a person rather than a row; None if that is not known yet.

        Returns:
            [{"plan": its `PrivacyPlan`, of which all steps count (see `claimed` there), "clipping_norm",
            "ledger_head"}, ...], with "log_private_loss" or "noise" where the run was looser in these than a run is by
            default.

        Raises:
            LedgerError: a ledger is missing or altered, states no plan, counts a run that another one counts, or is of
                a run with another kind of privacy unit than `persons` says.
        """
        runs: list[dict[str, Any]] = []
        for path in self.earlier_ledgers or ():
            ledger = read_ledger(path)
            header = ledger["header"]
            try:
                plan = PrivacyPlan.from_dict(header["plan"])
                before = [
                    {"plan": run, **sealed}
                    for run, sealed in zip(plan.earlier, header.get("earlier_runs", ()), strict=True)
                ]
                own = {
                    "plan": dataclasses.replace(plan, earlier=()),
                    "clipping_norm": float(header["clipping_norm"]),
                    "ledger_head": ledger["head"],
                    **{name: value for name, value in _WORSE.items() if header.get(name) == value},
                }
                if ledger["max_charges"] != plan.steps:
                    raise ValueError(f"max_charges={ledger['max_charges']} of a plan of {plan.steps} steps")
            except (KeyError, TypeError, ValueError) as error:
                raise LedgerError(
                    f"{path} does not say what its charges cost ({error!r}); name the ledger of a DPTrainer run, or one"
                    " whose header holds clipping_norm and, as plan, PrivacyPlan.to_dict()."
                ) from error
            if persons is not None and bool(header.get("persons")) != persons:
                kinds = {False: "a row", True: "all rows of a person"}
                raise LedgerError(
                    f"{path}: the privacy unit of that run is {kinds[not persons]}, of this one {kinds[persons]}; their"
                    " guarantees are not of the same thing, so no sum of them holds. Train both on rows with, or both"
                    " without, unit_column."
                )
            for run in [*before, *([own] if ledger["charged"] else [])]:
                if run["ledger_head"] in [known["ledger_head"] for known in runs]:
                    raise LedgerError(
                        f"{path} counts the run that ends at {run['ledger_head'][:12]}..., which is counted already;"
                        " name every run once in earlier_ledgers, and none that another of them counts."
                    )
                runs.append(run)
        return runs

    def plan(self, num_examples: int, earlier: Sequence[PrivacyPlan] | None = None) -> PrivacyPlan:
        """The calibrated plan for that many private units: how much noise this run needs.

        Args:
            num_examples: units of the private data.
            earlier: plans of the earlier runs; by default those of `earlier_runs()`.

        Raises:
            ValueError: no data, a batch larger than these, delta not below 1/N, no number of steps, or earlier runs
                that do not fit or leave nothing of the budget.
            LedgerError: as `earlier_runs`.
        """
        if num_examples < 1:
            raise ValueError(f"num_examples={num_examples} must be at least 1; check the source of the private data.")
        if self.expected_batch_size is not None and self.expected_batch_size > num_examples:
            raise ValueError(
                f"expected_batch_size={self.expected_batch_size:g} is larger than the data, num_examples="
                f"{num_examples}; choose at most {num_examples}."
            )
        if self.expected_batch_size is not None:
            rate = self.expected_batch_size / num_examples
        else:
            rate = float(self.sampling_rate or 0)
        steps = self.max_steps
        if steps <= 0 and self.sampling == "single_pass":
            steps = math.ceil(self.num_train_epochs) * math.ceil(num_examples / max(round(rate * num_examples), 1))
        elif steps <= 0:
            steps = math.ceil(self.num_train_epochs / rate)
        return self.budget.calibrate(
            num_examples=num_examples,
            sampling_rate=rate,
            steps=steps,
            sampling=self.sampling,
            max_batch_size=self.max_batch_size,
            earlier=[run["plan"] for run in self.earlier_runs()] if earlier is None else earlier,
        )


__all__ = ["DPTrainingArguments"]
