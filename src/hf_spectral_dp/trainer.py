"""A `transformers.Trainer` whose every optimizer step is one differentially private release.

The Hugging Face loop stays as it is: optimizer, schedule, callbacks and checkpoints work as users know them. What
changes is where batches come from (`privacy.sampling`), what `training_step` does (charge the ledger,
add up clipped per-example gradients, add noise once, write `p.grad`) and what is logged (nothing that the guarantee
does not cover).
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, get_last_checkpoint

from .batches import BatchLoader, count_units
from .privacy.budget import accountant_version, event_to_dict
from .privacy.clipping import PerExampleClipper
from .privacy.ledger import PrivacyLedger
from .privacy.noise import GaussianNoise, describe_randomness
from .training_args import DPTrainingArguments

LEDGER = "privacy_ledger.jsonl"
_STATE = "privacy_state.json"
_AVERAGE = "averaged_weights.safetensors"
_PUBLIC_LOGS = {"learning_rate", "epoch", "train_runtime", "train_steps_per_second"}
_MECHANISMS = {
    "poisson": "DP-SGD (Poisson-subsampled Gaussian mechanism)",
    "truncated_poisson": "DP-SGD (Gaussian mechanism on truncated Poisson batches)",
    "single_pass": "DP-SGD (Gaussian mechanism, each row in one batch of a pass)",
}
_SOFTWARE = ("hf_spectral_dp", "torch", "transformers", "dp-accounting", "randomgen", "peft")


class DPTrainer(Trainer):
    """Trains a causal language model with differential privacy.

    Args:
        model: a model with `per_example_loss(input_ids) -> (B,)`, such as `SpectralTokenizerForCausalLM`. Its weights
            must be public: they are what the guarantee starts from.
        args: `DPTrainingArguments`.
        train_dataset: a `TokenStore`, or anything with `len`, `dataset[indices] -> {"input_ids": (b, 1 + T)}` and a
            `fingerprint`. One row is one privacy unit; with an attribute `units`, the unit of every row, a person is,
            and contributes one of its rows whenever it is sampled. With `sampling="single_pass"` also a stream: any
            iterable of {"input_ids": (1 + T,)}, in which None keeps the place of a row that cannot be used, and of
            `args.num_examples` rows. Such a run cannot be resumed.
        callbacks, optimizers: as in transformers.

    Formal guarantee: the sequence of all weights, of all checkpoints and of everything logged is
    (`privacy_report()["guarantee"]["epsilon"]`, delta)-differentially private for one unit of `train_dataset` under
    `plan.adjacency`, by `PrivacyPlan` and post-processing. Assumptions: the number of units and all arguments are
    public and were not chosen by looking at the rows; the model was not trained on them before; `per_example_loss` of a
    row depends on that row and the weights alone; the time a step takes is not observed; `privacy_ledger.jsonl` and the
    checkpoints' optimizer states are covered by the guarantee, the token store is not.

    Raises:
        ValueError: data that cannot be sampled as `args.sampling` says, arguments that cannot work, or a trainable
            parameter whose per-example gradient no rule gives; all before any row is read.
    """

    args: DPTrainingArguments

    def __init__(
        self,
        model: PreTrainedModel,
        args: DPTrainingArguments,
        train_dataset: Any,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ):
        if not isinstance(args, DPTrainingArguments):
            raise ValueError(f"args is a {type(args).__name__}; DPTrainer needs DPTrainingArguments.")
        self.plan = args.plan(count_units(train_dataset, args))
        self._batches = BatchLoader(
            train_dataset, self.plan, args.process_index, args.world_size, lambda: self._charged
        )
        if not hasattr(model, "per_example_loss"):
            raise ValueError(f"{type(model).__name__} has no per_example_loss(input_ids) -> (B,); give it one.")
        args.max_steps = self.plan.steps
        if args.lora_rank:
            targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
            model = get_peft_model(model, LoraConfig(r=args.lora_rank, target_modules=targets))
        self._clipper = PerExampleClipper(model, args.clipping_norm)
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, callbacks=callbacks, optimizers=optimizers
        )
        self._public = {name: parameter.detach().clone() for name, parameter in self._clipper.parameters.items()}
        self._average = {name: value.float().clone() for name, value in self._public.items()} if args.ema_decay else {}
        self._noise = GaussianNoise(self.plan.noise_multiplier * self._clipper.sensitivity)
        self._ledger: PrivacyLedger | None = None  # held by the first process only
        self._charged = 0
        self._head = ""
        self.remove_callback(ProgressCallback)
        if not args.disable_tqdm:
            self.add_callback(_EpsilonBar(self.plan.target_epsilon))
        if self._average:
            self.add_callback(_Averaging(self._follow))

    # -- the loop's hooks ----------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Trains, then applies `ema_decay` and `public_interpolation` to the weights of `self.model`.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the last one of `output_dir`. The ledger of the
                first run goes on; steps that a crash lost stay paid.

        Raises:
            ValueError: `get_train_dataloader` was replaced, or a run with sampling="single_pass" is resumed.
            LedgerError: a new run in a folder that already holds a ledger, or a resumed run whose ledger is missing,
                altered, or of another plan or data set.
        """
        self._batches.check(self.get_train_dataloader())
        found = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        if resume_from_checkpoint and not found:
            raise ValueError(f"output_dir={self.args.output_dir!r} holds no checkpoint to resume from.")
        if found and self.plan.sampling == "single_pass":
            raise ValueError(
                "sampling='single_pass' cannot be resumed: where the stream stood is not known, and a row must not be"
                " used twice in a pass. The last checkpoint is private as it is; or start a new run and add up both."
            )
        checkpoint = Path(str(found)) if found else None
        if self.is_world_process_zero():
            self._ledger = self._open_ledger(checkpoint)
            self._charged, self._head = self._ledger.charged, self._ledger.head
        self._charged = self._from_first(self._charged)
        if checkpoint is not None and self._average:
            self._average = load_file(checkpoint / _AVERAGE)
        try:
            output = super().train(resume_from_checkpoint=str(checkpoint) if checkpoint else None, **kwargs)
        finally:
            if self._ledger is not None:
                self._ledger.close()
        self._postprocess()
        return TrainOutput(output.global_step, float("nan"), self._publishable(output.metrics))

    def get_train_dataloader(self) -> Any:
        """The `BatchLoader` of the plan: one item per step. `train` refuses any other loader."""
        return self._batches

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """One application of the mechanism: charge, clip, sum, add noise, divide by the public expected batch size.

        Returns:
            Zero. The loss of private rows is private and not part of what the guarantee covers.

        Raises:
            ValueError: `inputs` is not the batch that the plan's sampler drew last, or it was used already. Nothing is
                charged then.
        """
        self._batches.accept(inputs)
        model.train()
        bare = self.accelerator.unwrap_model(model)  # no gradient reaches autograd, so DDP has nothing to reduce
        self._charge()
        for rows in inputs["input_ids"].split(self.args.micro_batch_size):
            self._clipper.add(partial(self._losses, bare, rows.to(self.args.device)), len(rows))
        sums = self._clipper.take()
        if self.is_world_process_zero():
            self._noise.add_(sums.values())
        if self.args.world_size > 1:
            for total in sums.values():
                dist.all_reduce(total)
        for name, parameter in self._clipper.parameters.items():
            parameter.grad = (sums[name] / self.plan.expected_batch_size).to(parameter.dtype)
        return torch.zeros((), device=self.args.device)

    def _losses(self, model: Any, rows: Tensor) -> Tensor:
        with self.compute_loss_context_manager():
            return model.per_example_loss(rows)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> None:
        """Not logged: it would say little, being nearly all noise."""

    def floating_point_ops(self, inputs: Any) -> int:
        """0: a count by realised batches would publish their sizes."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs what is public, and the epsilon spent so far."""
        super().log({**self._publishable(logs), "epsilon": self.epsilon_spent}, None)

    def _publishable(self, logs: Mapping[str, float]) -> dict[str, float]:
        return {key: value for key, value in logs.items() if key in _PUBLIC_LOGS}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if not self.args.should_save:
            return
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self._average:
            save_file(self._average, folder / _AVERAGE)
        # Last, so that a checkpoint without this file is known to be incomplete.
        (folder / _STATE).write_text(json.dumps({"ledger_head": self._head, "charged": self._charged}), "utf-8")

    # -- the mechanism -------------------------------------------------------------------------------------------

    def _open_ledger(self, checkpoint: Path | None) -> PrivacyLedger:
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        header = {
            "plan": self.plan.to_dict(),
            "clipping_norm": self.args.clipping_norm,
            "data": str(getattr(self.train_dataset, "fingerprint", "stream")),
            "trainable": sorted(self._clipper.parameters),
        }
        if checkpoint is None:
            return PrivacyLedger.create(folder / LEDGER, header, self.plan.steps)
        try:
            state = json.loads((checkpoint / _STATE).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"checkpoint {checkpoint} is incomplete: no readable {_STATE}; resume from an earlier one."
            ) from error
        return PrivacyLedger.open(folder / LEDGER, header, self.plan.steps, expected_head=state["ledger_head"])

    def _charge(self) -> None:
        """Pays for the coming release, durably, before its noise is drawn; all processes wait for it."""
        failure: Exception | None = None
        charged = -1
        if self._ledger is not None:
            try:
                charged, self._head = self._ledger.charge(), self._ledger.head
            except Exception as error:
                failure = error
        charged = self._from_first(charged)
        if failure is not None:
            raise failure
        if charged < 0:
            raise RuntimeError("the first process could not charge the privacy ledger; see its error.")
        self._charged = charged

    def _from_first(self, value: int) -> int:
        """The first process's value, on all processes."""
        if self.args.world_size == 1:
            return value
        tensor = torch.tensor(value, device=self.args.device)
        dist.broadcast(tensor, 0)
        return int(tensor)

    @torch.no_grad()
    def _follow(self) -> None:
        """Moves the average towards the current weights."""
        for name, average in self._average.items():
            average.lerp_(self._clipper.parameters[name].float(), 1 - self.args.ema_decay)

    @torch.no_grad()
    def _postprocess(self) -> None:
        for name, parameter in self._clipper.parameters.items():
            public = self._public[name].float()
            trained = self._average[name] if self._average else parameter.float()
            parameter.copy_(public + self.args.public_interpolation * (trained - public))

    # -- results -------------------------------------------------------------------------------------------------

    @property
    def epsilon_spent(self) -> float:
        """Epsilon of all steps charged so far, at the plan's delta, rounded up."""
        return self.plan.epsilon(self._charged)

    def merged_model(self) -> PreTrainedModel:
        """The trained model, adapters merged into its weights."""
        model: Any = self.accelerator.unwrap_model(self.model)
        return model.merge_and_unload() if isinstance(model, PeftModel) else model

    def privacy_report(self) -> dict[str, Any]:
        """What was guaranteed and by which mechanism, for the steps that really ran; plain JSON values for the card."""
        plan, args, charged = self.plan, self.args, self._charged
        post_processing = ["weights of all steps are covered: optimizer, schedule and checkpoints are post-processing"]
        if args.ema_decay:
            post_processing.append(f"exponential moving average of the weights, decay {args.ema_decay:g}")
        if args.public_interpolation != 1:
            post_processing.append(f"public weights + {args.public_interpolation:g} * (trained - public weights)")
        return {
            "schema_version": 1,
            "guarantee": {
                "epsilon": plan.epsilon(charged),
                "delta": plan.delta,
                "unit": getattr(self.train_dataset, "unit", "one row of the training data (one image with its label)"),
                "adjacency": plan.adjacency,
                "accountant": "PLD",
                "accountant_version": accountant_version(),
                "profile": plan.profile(charged),
                "epsilon_without_amplification": plan.epsilon_without_amplification(charged),
            },
            "mechanism": {
                "name": _MECHANISMS[plan.sampling],
                "sampling": plan.sampling,
                "sampling_rate": plan.sampling_rate,
                "max_batch_size": plan.max_batch_size,
                "num_examples": plan.num_examples,
                "expected_batch_size": plan.expected_batch_size,
                "noise_multiplier": plan.noise_multiplier,
                "clipping_norm": args.clipping_norm,
                "planned_steps": plan.steps,
                "charged_steps": charged,
                "normalisation": "noisy clipped sum divided by the public expected batch size",
                "randomness": describe_randomness(),
                "event": event_to_dict(plan.event(charged)),
            },
            "training": {
                "trainable_parameters": sum(parameter.numel() for parameter in self._clipper.parameters.values()),
                "adapter": {"type": "lora", "rank": args.lora_rank} if args.lora_rank else None,
                "optimizer": str(getattr(args.optim, "value", args.optim)),
                "learning_rate": args.learning_rate,
                "lr_scheduler": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
                "processes": args.world_size,
            },
            "post_processing": post_processing,
            "ledger": {"records": charged, "head": self._head},
            "software": {name: metadata.version(name) for name in _SOFTWARE},
        }


class _Averaging(TrainerCallback):
    """Calls `follow` after every optimizer step."""

    def __init__(self, follow: Callable[[], None]):
        self._follow = follow

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._follow()


class _EpsilonBar(ProgressCallback):
    """Progress bar that shows the epsilon spent so far."""

    def __init__(self, target_epsilon: float):
        super().__init__()
        self._target = target_epsilon

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs:
            self.training_bar.set_postfix_str(f"epsilon {logs['epsilon']:.2f} of {self._target:g}")


__all__ = ["DPTrainer", "LEDGER"]
