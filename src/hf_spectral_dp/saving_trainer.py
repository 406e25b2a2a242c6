"""A `transformers.Trainer` whose checkpoints are whole or not there: one process saves, and one rename ends it."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from .checkpoint_files import CheckpointError, clear_staging, publish, rotate, staging


class SavingTrainer(Trainer):
    """Saves by `checkpoint_files`; a subclass gives the facts of the seal and, if it has any, further files.

    `save_total_limit` deletes older checkpoints after the new one is in place, never before. Also saved is the last
    step of a run that ends before the planned number of steps, of which transformers would lose what came after the
    last interval. Not saved is `rng_state.pth`.
    """

    _staging: Path | None = None  # where a checkpoint is being written

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_callback(_SaveAtTheEnd())

    def seal(self) -> dict[str, Any]:
        """The facts that `checkpoint_files.publish` writes beside the hashes."""
        raise NotImplementedError

    def save_more(self, folder: Path) -> None:
        """Writes further files into a checkpoint."""

    def on_first(self, action: Callable[[], int]) -> int:
        """What `action` returns on the first process (>= 0), on all processes; if it fails there, all of them fail."""
        failure: Exception | None = None
        value = -1
        if self.is_world_process_zero():
            try:
                value = action()
            except Exception as error:
                failure = error
        value = self.from_first(value)
        if failure is not None:
            raise failure
        if value < 0:
            raise RuntimeError("the first process failed; see its error.")
        return value

    def from_first(self, value: int) -> int:
        """The first process's value, on all processes."""
        if self.args.world_size == 1:
            return value
        tensor = torch.tensor(value, device=self.args.device)
        dist.broadcast(tensor, 0)
        return int(tensor)

    def store_flos(self) -> None:
        """Nothing to store, and no word between processes about it while one of them saves."""

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_rng_state(self, output_dir: str) -> None:
        """Not saved: a resumed run draws fresh batches and fresh noise, so nothing could be repeated with it."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Saves to a hidden folder and puts the whole checkpoint in place by one rename; see `checkpoint_files`."""
        self.on_first(lambda: self._save_whole(model, trial))

    def _save_whole(self, model: nn.Module, trial: Any) -> int:
        folder = Path(self.args.output_dir)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            self._staging = staging(folder)
            super()._save_checkpoint(model, trial)
            self.save_more(self._staging / name)
            publish(self._staging / name, folder / name, **self.seal())
        except Exception as error:  # OSError, or what torch and safetensors make of it
            raise CheckpointError(
                f"{folder / name} could not be saved ({error}); nothing half-written counts as a checkpoint, and the"
                " ones before it are as they were. Make room or mend the disk, then go on from the last one with"
                " resume_from_checkpoint=True."
            ) from error
        finally:
            self._staging = None
            with suppress(OSError):  # if not now, then at the next save
                clear_staging(folder)
        rotate(folder, self.args.save_total_limit)
        return 0


class _SaveAtTheEnd(TrainerCallback):
    """Saves the last step of a run that crashes made shorter than planned; transformers saves only the planned one."""

    def __init__(self) -> None:
        self._saved = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved = state.global_step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved = state.global_step

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.save_strategy != SaveStrategy.NO and state.global_step > self._saved:
            control.should_save = True


__all__ = ["SavingTrainer"]
