"""A `transformers.Trainer` that lets nothing out which the guarantee does not cover.

Everything that leaves a run by itself passes here: the log (so `trainer_state.json`, the progress bar and all trackers,
which get what `log` gets), the metrics that `train` returns, model cards and uploads. What may pass is an allow-list.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from .saving_trainer import SavingTrainer
from .training_args import DPTrainingArguments

PUBLIC_LOGS = {"learning_rate", "epoch", "epsilon"}
"""What is logged. Not the run time: how long steps take tells how large their batches were."""

UNPROTECTED_LOSS = "unprotected_loss"
"""The name of the training loss in the log, where `log_private_loss=True` puts it there."""


def _refused(name: str, reason: str) -> Callable[..., Any]:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(f"DPTrainer.{name} is refused: {reason}.")

    refuse.__doc__ = f"Refused: {reason}."
    return refuse


class QuietTrainer(SavingTrainer):
    """Logs `PUBLIC_LOGS` and nothing else, measures nothing on private rows, uploads nothing.

    Formal guarantee: what `log`, `trainer_state.json`, trackers and the metrics of `train` hold is a function of the
    arguments, the plan and the number of steps, never of a row. With `log_private_loss=True` the mean loss of the
    realised batches is logged too, under `UNPROTECTED_LOSS`; nothing covers it, and report, card and ledger say so.
    Assumption: no callback of the user's reads the rows (`train_dataloader` and the model in training reach them all).
    """

    args: DPTrainingArguments
    _loss = 0.0
    _rows = 0

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_callback(_NothingLearnedBeside())

    @property
    def epsilon_spent(self) -> float:
        """Epsilon of all steps charged so far."""
        raise NotImplementedError

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs what is public, and the epsilon spent so far."""
        public = {**self.publishable(logs), "epsilon": self.epsilon_spent}
        if self._rows:
            public[UNPROTECTED_LOSS] = self._loss / self._rows
            self._loss, self._rows = 0.0, 0
        super().log(public, None)  # with a start time it would add the throughput in tokens

    def publishable(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Those of the metrics that depend on no private row."""
        return {key: value for key, value in metrics.items() if key in PUBLIC_LOGS}

    def note(self, losses: Tensor) -> None:
        """Takes note of the losses of private rows for the log, if the user asked for that."""
        if self.args.log_private_loss:
            self._loss += float(losses.detach().sum())
            self._rows += len(losses)

    def check_quiet(self) -> None:
        """Before a run: arguments may have been changed since they were made, and what leaks is said aloud.

        Raises:
            ValueError: an argument that would break the guarantee or publish what it does not cover.
        """
        self.args.refuse_what_breaks_the_guarantee(self.callback_handler.callbacks)
        if self.args.log_private_loss:
            warnings.warn(
                f"log_private_loss=True: the loss on private rows is logged as {UNPROTECTED_LOSS!r}. The guarantee does"
                " not cover it; the card will say so. Do not publish logs, checkpoints or trackers of this run.",
                stacklevel=3,
            )

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> None:
        """Not logged: it would say little, being nearly all noise."""

    def floating_point_ops(self, inputs: Any) -> int:
        """0: a count by realised batches would publish their sizes."""
        return 0

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Not counted: the number of tokens is the number of rows in the realised batches."""

    _ON_ROWS = "a figure on private images is not covered by the guarantee; evaluate the images the model generates"
    evaluate = _refused("evaluate", _ON_ROWS)
    predict = _refused("predict", _ON_ROWS)
    prediction_step = _refused("prediction_step", _ON_ROWS)
    evaluation_loop = _refused("evaluation_loop", _ON_ROWS)
    hyperparameter_search = _refused(
        "hyperparameter_search",
        "every trial would spend privacy that no ledger counts; tune on public images",
    )

    _UPLOAD = (
        "the folder of a run holds the ledger and optimizer states; save a DPSpectralPipeline with its PrivacyCard and"
        " call its push_to_hub"
    )
    push_to_hub = _refused("push_to_hub", _UPLOAD)
    init_hf_repo = _refused("init_hf_repo", _UPLOAD)
    _push_from_checkpoint = _refused("_push_from_checkpoint", _UPLOAD)
    create_model_card = _refused(
        "create_model_card", "its draft knows nothing of privacy; make a PrivacyCard from privacy_report()"
    )


class _NothingLearnedBeside(TrainerCallback):
    """Stops before the optimizer step if the forward passes wrote to a buffer or to a frozen weight.

    What a layer estimates from the rows it sees (running means of a batch norm, a codebook that follows its inputs) is
    saved with the model and passes by clipping and noise. Codec and normalisation are public since nothing moves them.
    (Who writes through `.data` goes unnoticed, as torch itself would not notice.)
    """

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._before = _versions(model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        changed = sorted(name for name, version in _versions(model).items() if self._before.get(name) != version)
        if changed:
            raise ValueError(
                f"{changed[0]} changed while private rows passed through the model; what it learned from them is not"
                " covered by the guarantee. Use a layer without running statistics, or freeze them with eval()."
            )


def _versions(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Of each buffer and frozen weight: which tensor it is, and how often that was written to."""
    frozen = [(name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad]
    return {name: (id(tensor), tensor._version) for name, tensor in [*frozen, *model.named_buffers()]}


__all__ = ["PUBLIC_LOGS", "UNPROTECTED_LOSS", "QuietTrainer"]
