"""A `transformers.Trainer` whose every optimizer step is one differentially private release.

The Hugging Face loop stays as it is: optimizer, schedule, callbacks and checkpoints work as users know them. What
changes is where batches come from (`privacy.sampling`), what `training_step` does (charge the ledger,
add up clipped per-example gradients, add noise once, write `p.grad`) and what is logged (nothing that the guarantee
does not cover).
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, ProgressCallback, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from .batches import BatchLoader, count_units
from .checkpoint_files import CheckpointError, clear_staging, newest_whole, verify
from .privacy.clipping import PerExampleClipper
from .privacy.ledger import LedgerError, PrivacyLedger, read_ledger
from .privacy.mechanism import NoisyClippedMean
from .privacy.noise import secret_coins, system_generator
from .privacy_report import run_report
from .private_marks import UNRECORDED, configured, mark, refuse_uncounted
from .quiet_trainer import QuietTrainer
from .training_args import DPTrainingArguments

logger = logging.getLogger(__name__)

LEDGER = "privacy_ledger.jsonl"
_AVERAGE = "averaged_weights.safetensors"


class DPTrainer(QuietTrainer):
    """Trains a causal language model with differential privacy.

    Args:
        model: a model with `per_example_loss(input_ids) -> (B,)`, such as `SpectralTokenizerForCausalLM`. Its weights
            must be public: they are what the guarantee starts from. With text, the loss takes `text_states` too, and a
            share `model.config.text_dropout` of the rows of every step is shown without. With `args.scale_weights` it
            takes these as well.
        args: `DPTrainingArguments`.
        train_dataset: a `TokenStore`, or anything with `len`, `dataset[indices] -> {"input_ids": (b, 1 + T)}` and a
            `fingerprint`. One row is one privacy unit; with an attribute `units`, the unit of every row, a person is,
            and contributes one of its rows whenever it is sampled. With `sampling="single_pass"` also a stream: any
            iterable of {"input_ids": (1 + T,)}, in which None keeps the place of a row that cannot be used, and of
            `args.num_examples` rows. Such a run cannot be resumed.
        callbacks, optimizers: as in transformers.

    Formal guarantee: the sequence of all weights, of all checkpoints and of everything logged is
    (`privacy_report()["claim"]["epsilon"]`, delta)-differentially private for one unit of `train_dataset` under
    `plan.adjacency`, by `PrivacyPlan` and post-processing. Assumptions: the number of units and all arguments are
    public and were not chosen by looking at the rows; whatever was trained on them before, the model included, was
    trained by the runs of `args.earlier_ledgers`, whose units are the same; a row as the data set gives it, and its
    `per_example_loss`, depend on that row, the weights, releases of those runs and what they draw from the global
    generators of torch, NumPy and Python alone, for that row by itself; their keys are new and secret in every step
    (`privacy.noise.secret_coins`; a generator of one's own with a seed would not be); the text encoder is public, too;
    the time a step takes is not observed, also not as the times of a tracker's records; the checkpoints' optimizer
    states are covered by the guarantee, the token store is not, nor is the file `privacy_ledger.jsonl`, which holds a
    hash of the rows (released is the hash of its last record, which is salted).
    Which rows are shown without text is decided for each by a coin of its own, from the generator that draws batches;
    given all coins, every row is one fixed row, so the guarantee holds for each way they can fall, and by joint
    convexity for the mixture.

    Raises:
        ValueError: data that cannot be sampled as `args.sampling` says, arguments that cannot work, earlier runs that
            do not fit or leave nothing of the budget, or a trainable parameter whose per-example gradient no rule
            gives; all before any row is read.
        TypeError: another argument of `transformers.Trainer`, such as `eval_dataset`.
        LedgerError: a ledger of `args.earlier_ledgers` is missing or altered, or a run would be counted twice.
    """

    args: DPTrainingArguments

    def __init__(
        self,
        model: PreTrainedModel,
        args: DPTrainingArguments,
        train_dataset: Any,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        **others: Any,
    ):
        if others:
            raise TypeError(
                f"DPTrainer takes no {', '.join(others)}: it collates rows itself, and what an evaluation during"
                " training says of images is not covered by the guarantee; examples/evaluate.py measures a pipeline."
            )
        if not isinstance(args, DPTrainingArguments):
            raise ValueError(f"args is a {type(args).__name__}; DPTrainer needs DPTrainingArguments.")
        self._text_dropout, self._coins = _text_dropout(model, train_dataset), system_generator()
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != args.world_size:
            raise ValueError(
                f"{started} processes were started, but this one sees {args.world_size}: each would train alone. On a"
                " machine without GPUs, set use_cpu=True."
            )
        self._persons = getattr(train_dataset, "units", None) is not None
        self._earlier = args.earlier_runs(self._persons)
        self.plan = args.plan(count_units(train_dataset, args), [run["plan"] for run in self._earlier])
        self._batches = BatchLoader(
            train_dataset, self.plan, args.process_index, args.world_size, lambda: self._charged, _text_shape(model)
        )
        if not hasattr(model, "per_example_loss"):
            raise ValueError(f"{type(model).__name__} has no per_example_loss(input_ids) -> (B,); give it one.")
        _check_scale_weights(model, args.scale_weights)
        args.max_steps = self.plan.steps
        if args.lora_rank:
            targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
            model = get_peft_model(model, LoraConfig(r=args.lora_rank, target_modules=targets))
        self._clipper = PerExampleClipper(model, args.clipping_norm)
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, callbacks=callbacks, optimizers=optimizers
        )
        if args.world_size > 1:  # adapters begin at random: all processes begin with those of the first
            for parameter in self._clipper.parameters.values():
                dist.broadcast(parameter.detach(), 0)
        averaged = self._clipper.parameters if args.ema_decay else {}
        self._average = {name: parameter.detach().float().clone() for name, parameter in averaged.items()}
        self._mechanism = NoisyClippedMean(
            self._clipper, self.plan.noise_multiplier, self.plan.expected_batch_size, args.micro_batch_size,
            args.process_index, args.world_size, self.args.device, args.secure_mode,
        )  # fmt: skip
        self._noise = self._mechanism.noise
        self._ledger: PrivacyLedger | None = None  # held by the first process only
        self._charged = 0
        self._apart = False  # whether rows were seen not to see each other
        self._head = ""
        self.remove_callback(ProgressCallback)
        if not args.disable_tqdm:
            self.add_callback(_EpsilonBar(self.plan.target_epsilon))
        if self._average:
            self.add_callback(_Averaging(self._follow))

    # -- the loop's hooks ----------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Trains, then gives `self.model` the averaged weights, if `ema_decay` asks for an average.

        The model's config names the run from its first charge on, in `private_runs`, by the head of its ledger: whoever
        releases the model, or what was made with it, needs a card that counts it. A checkpoint names the run as it then
        stood, which no card counts.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the newest whole one of `output_dir`; True also
                goes on where a ledger is but no checkpoint yet, from the weights of `model`. The ledger of the first
                run goes on: steps that a crash lost stay paid, and repeated ones draw fresh rows and fresh noise.

        Raises:
            ValueError: `get_train_dataloader` was replaced, a run with sampling="single_pass" is resumed, or the model
                came out of a private run that is not among the earlier ones.
            LedgerError: a new run in a folder that already holds a ledger, a resumed run whose ledger is missing,
                altered, behind the checkpoint, or of another plan or data set, or an earlier run that went on.
            CheckpointError: the checkpoint to resume from is damaged, or there is none and the whole budget is charged,
                or one could not be saved.
        """
        self.check_quiet()
        self._clipper.check_known()
        self._batches.check(self.get_train_dataloader())
        self._check_alike()
        if resume_from_checkpoint and self.plan.sampling == "single_pass":
            raise ValueError(
                "sampling='single_pass' cannot be resumed: where the stream stood is not known, and a row must not be"
                " used twice in a pass. The last checkpoint is private as it is; or start a new run, with this run's"
                " ledger in earlier_ledgers."
            )
        step = self.on_first(lambda: self._begin(resume_from_checkpoint))
        self._charged = self.from_first(self._charged)
        if self._charged:  # the checkpoint's weights are loaded before the next charge
            self._mark(self._head or UNRECORDED)
        if resume_from_checkpoint is True:
            checkpoint = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}" if step else None
        else:
            checkpoint = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        try:
            if checkpoint is not None and self._average:
                saved = load_file(checkpoint / _AVERAGE)
                self._average = {name: saved[name].to(value.device) for name, value in self._average.items()}
            output = super().train(resume_from_checkpoint=str(checkpoint) if checkpoint else None, **kwargs)
        finally:
            if self._ledger is not None:
                self._ledger.close()
        self._take_average()
        head = [self._head]
        if self.args.world_size > 1:  # only the first process has it
            dist.broadcast_object_list(head, 0, device=self.args.device)
        self._mark(head[0])
        return TrainOutput(output.global_step, float("nan"), self.publishable(output.metrics))

    def get_train_dataloader(self) -> Any:
        """The `BatchLoader` of the plan: one item per step. `train` refuses any other loader."""
        return self._batches

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """One application of the mechanism: charge, clip, sum, add noise, divide by the public expected batch size.

        Returns:
            Zero. The loss of private rows is private and not part of what the guarantee covers.

        Raises:
            ValueError: `inputs` is not the batch that the plan's sampler drew last, or it was used already, or the
                loss of a row depends on the rows beside it. Nothing is charged then.
        """
        self._batches.accept(inputs)
        model.train()
        bare = self.accelerator.unwrap_model(model)  # no gradient reaches autograd, so DDP has nothing to reduce
        if not self._apart and len(inputs["input_ids"]) > 1:
            self._check_apart(bare, inputs)
        self._charge()
        rows = self._with_some_text(inputs)
        indices = torch.arange(len(rows["input_ids"]))
        released = self._mechanism.release(indices, lambda some: self._noted(self._losses(bare, _some(rows, some))))
        for name, parameter in self._clipper.parameters.items():
            parameter.grad = released[name].to(parameter.dtype)
        return torch.zeros((), device=self.args.device)

    def _with_some_text(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch, in which every row loses its text by a coin of its own."""
        if not self._text_dropout or "text_states" not in inputs:
            return inputs
        shown = self._coins.random(len(inputs["text_states"])) >= self._text_dropout
        return {**inputs, "text_states": inputs["text_states"] * torch.from_numpy(shown)[:, None, None]}

    def _losses(self, model: Any, rows: dict[str, Tensor]) -> Tensor:
        # The model's forward is under autocast; a loss of an adapted model does not go through that one.
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            on_device = {name: values.to(self.args.device) for name, values in rows.items()}
            weighted = {"scale_weights": self.args.scale_weights} if self.args.scale_weights else {}
            return model.per_example_loss(**on_device, **weighted)

    def _noted(self, losses: Tensor) -> Tensor:
        self.note(losses)
        return losses

    def _check_apart(self, model: Any, rows: dict[str, Tensor]) -> None:
        """Once, before a charge: two rows of the first batch that has them, see `PerExampleClipper.check_apart`.

        It refuses a model, whatever the rows; the message says nothing of them, and nothing was released before it.
        What is drawn at random must be drawn for each of them, see `PerExampleClipper.check_coins`.
        """
        model.eval()
        self._clipper.check_apart(lambda some: self._losses(model, _some(rows, some)))
        model.train()
        with secret_coins(self.args.device):
            self._clipper.check_coins(lambda some: self._losses(model, _some(rows, some)))
        self._apart = True

    def _check_alike(self) -> None:
        """Refuses processes with other rows or another plan than the first: its ledger pays for all of them.

        Rows would be counted twice, or sampled more often, if one process had left out an image that the others hold.
        """
        if self.args.world_size == 1:
            return
        facts = json.dumps(self._header(), sort_keys=True).encode()
        seen = torch.tensor(int.from_bytes(hashlib.sha256(facts).digest()[:7]), device=self.args.device)
        least, most = seen.clone(), seen.clone()
        dist.all_reduce(least, dist.ReduceOp.MIN)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        if least != most:
            raise ValueError(
                "the processes do not train the same: rows (fingerprint), plan, arguments or trainable weights differ"
                " between them. Build the token store once, and give every machine a copy of it."
            )

    def seal(self) -> dict[str, Any]:
        return {"ledger_head": self._head, "charged": self._charged}

    def save_more(self, folder: Path) -> None:
        if self._average:
            save_file(self._average, folder / _AVERAGE)

    # -- the mechanism -------------------------------------------------------------------------------------------

    def _begin(self, resume: str | bool | None) -> int:
        """Verifies what to resume from, then opens or creates the ledger; on the first process.

        Returns:
            The step of the checkpoint that resume=True found, 0 if there is none yet or it was not asked for.
        """
        folder = Path(self.args.output_dir)
        path, state = None, None
        if resume is True:
            path, state = newest_whole(folder) or (None, None)
            if path is None and not (folder / LEDGER).exists():
                raise ValueError(f"output_dir={self.args.output_dir!r} holds no checkpoint to resume from, no ledger.")
        elif resume:
            path = Path(resume)
            state = verify(path)
        if state is not None and self._average and _AVERAGE not in state["files"]:
            raise CheckpointError(f"{path} holds no averaged weights; resume with ema_decay=0, as it was saved.")
        if self.args.earlier_runs(self._persons) != self._earlier:
            raise LedgerError(
                "earlier_ledgers were charged since this trainer was made, so its plan counts too little; let those"
                " runs end, then make the trainer again."
            )
        known = [run["ledger_head"] for run in self._earlier]
        if resume and (folder / LEDGER).exists():
            known += read_ledger(folder / LEDGER)["heads"]  # the model may be what this very run left in memory
        refuse_uncounted("the model", self.accelerator.unwrap_model(self.model), known)
        header = self._header()
        if resume:
            head = state["ledger_head"] if state else None
            self._ledger = PrivacyLedger.open(folder / LEDGER, header, self.plan.steps, expected_head=head)
            with suppress(OSError):  # if not now, then at the next save
                clear_staging(folder)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self._ledger = PrivacyLedger.create(folder / LEDGER, header, self.plan.steps)
        self._charged, self._head = self._ledger.charged, self._ledger.head
        if resume and path is None and self._charged >= self.plan.steps:
            self._ledger.close()
            raise CheckpointError(
                f"all {self._charged} steps of {str(folder / LEDGER)!r} are charged and no checkpoint holds what they"
                " made: nothing is left to train, and the model would be the one it began from. What was saved of it"
                " elsewhere is all there is; a new run needs a folder and a budget of its own."
            )
        if resume and path is None:
            logger.warning("no checkpoint yet: %d charged steps are lost, and stay paid", self._charged)
        return int(path.name.rpartition("-")[2]) if resume is True and path else 0

    def _header(self) -> dict[str, Any]:
        """What the ledger says of the run, and what must not change while it goes on; plain JSON values."""
        header = {
            "plan": self.plan.to_dict(),
            "clipping_norm": self.args.clipping_norm,
            "data": str(getattr(self.train_dataset, "fingerprint", "stream")),
            "trainable": {name: list(parameter.shape) for name, parameter in self._clipper.parameters.items()},
            "noise": self._noise.source,
            "log_private_loss": self.args.log_private_loss,
        }
        if self._persons:
            header["persons"] = True
        if self._earlier:
            header["earlier_runs"] = self._sealed_earlier()
        return header

    def _charge(self) -> None:
        """Pays for the coming release, durably, before its noise is drawn; all processes wait for it."""

        def charge() -> int:
            assert self._ledger is not None
            charged = self._ledger.charge()
            self._head = self._ledger.head
            return charged

        self._charged = self.on_first(charge)
        self._mark(self._head or UNRECORDED)  # only the first process has the head, and only it saves

    def _mark(self, run: str) -> None:
        """Writes into the model's config, which every saved copy carries, that private rows shaped it."""
        for part in configured(self.accelerator.unwrap_model(self.model)):
            if any(parameter.requires_grad for parameter in part.parameters()):  # the others stay what they were
                mark(part, [run])

    @torch.no_grad()
    def _follow(self) -> None:
        """Moves the average towards the current weights."""
        for name, average in self._average.items():
            average.lerp_(self._clipper.parameters[name].float(), 1 - self.args.ema_decay)

    @torch.no_grad()
    def _take_average(self) -> None:
        """Gives the model the averaged weights, if there are any: post-processing of what was released."""
        for name, average in self._average.items():
            self._clipper.parameters[name].copy_(average)

    # -- results -------------------------------------------------------------------------------------------------

    @property
    def epsilon_spent(self) -> float:
        """Epsilon of all earlier runs and all steps charged so far, at the plan's delta, rounded up.

        Before the last step it is the bound of `PrivacyPlan.epsilon_so_far`, since every record of a log has it.
        """
        return self.plan.epsilon_so_far(self._charged)

    def _sealed_earlier(self) -> list[dict[str, Any]]:
        """What of the earlier runs the plan does not hold, in its order; plain JSON values."""
        return [{name: value for name, value in run.items() if name != "plan"} for run in self._earlier]

    def merged_model(self) -> PreTrainedModel:
        """The trained model, adapters merged into its weights."""
        model: Any = self.accelerator.unwrap_model(self.model)
        return model.merge_and_unload() if isinstance(model, PeftModel) else model

    def privacy_report(self) -> dict[str, Any]:
        """What was guaranteed and by which mechanism, as the ledger knows it; plain JSON values for the card.

        The claim is that of all planned steps, also where the run ended early: see `PrivacyPlan.claimed`.
        """
        args, post_processing = self.args, []
        if args.ema_decay:
            post_processing.append(f"exponential moving average of the weights, decay {args.ema_decay:g}")
        return run_report(
            self.plan,
            self._charged,
            self._head,
            clipping_norm=args.clipping_norm,
            unit=getattr(self.train_dataset, "unit", "one row of the training data (one image with its label)"),
            person=self._persons,
            noise_source=self._noise.source,
            earlier_runs=self._sealed_earlier(),
            training={
                "trainable_parameters": sum(parameter.numel() for parameter in self._clipper.parameters.values()),
                "adapter": _adapter(self.accelerator.unwrap_model(self.model)),
                "optimizer": str(getattr(args.optim, "value", args.optim)),
                "learning_rate": args.learning_rate,
                "lr_scheduler": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
                "processes": args.world_size,
                "conditioning": getattr(getattr(self.model, "config", None), "conditioning", "none"),
                "private_loss_logged": args.log_private_loss,
            },
            post_processing=post_processing,
        )


def _adapter(model: Any) -> dict[str, Any] | None:
    """Kind and rank of the adapter that is trained, whoever put it in; None without one."""
    config: Any = model.active_peft_config if isinstance(model, PeftModel) else None
    return {"type": config.peft_type.value.lower(), "rank": config.r} if hasattr(config, "r") else None


def _some(rows: dict[str, Tensor], indices: Tensor) -> dict[str, Tensor]:
    return {name: values[indices] for name, values in rows.items()}


def _check_scale_weights(model: Any, scale_weights: list[float] | None) -> None:
    """Raises ValueError unless there is one weight for each of the model's scales, or none at all."""
    layout = getattr(getattr(model, "config", None), "layout", None)
    scales = len(layout.scales) if layout is not None else 0
    if scale_weights is not None and len(scale_weights) != scales:
        raise ValueError(
            f"scale_weights={scale_weights} for a model of {scales} scales; give one for each, coarse to fine."
        )


def _text_shape(model: Any) -> tuple[int, int] | None:
    """(K, width) of the text states that a model takes; None for one without text."""
    slots = getattr(getattr(model, "config", None), "text_slots", 0)
    return (slots, model.config.text_width) if slots else None


def _text_dropout(model: Any, dataset: Any) -> float:
    """The share of rows to show without text; 0 for a model without.

    Raises:
        ValueError: rows with text for a model without, or the other way round, or text states of another shape.
    """
    captions, wanted = getattr(dataset, "captions", None), _text_shape(model) or (0, 0)
    given = (captions.max_text_tokens, captions.text_width) if captions is not None else (0, 0)
    if wanted != given and hasattr(dataset, "captions"):
        raise ValueError(
            f"the rows have (max_text_tokens, text_width) = {given}, the model {wanted}, where (0, 0) is no text; build"
            " the token store with this model and a caption_column, or without one for a model without text."
        )
    return getattr(model.config, "text_dropout", 0.0) if any(wanted) else 0.0


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
