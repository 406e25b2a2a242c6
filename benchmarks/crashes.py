"""Kills and breaks real training runs, and looks at what they leave: ledger, checkpoints, and whether a run goes on.

A fork server: this process imports everything once and never trains; every run is a forked child of it that trains a
tiny model with the shipped `DPTrainer`, unchanged. Calls are watched from outside by `sys.setprofile`, which sees every
call and return of a Python or C function, so that a run can be killed between any two of them, or be given an I/O error
instead of a call. Noise draws are counted in memory that parent and child share, outside the ledger.

After every death: `charged >= applied`, at most the planned charges, no folder that looks like a checkpoint and is not
whole. After that the run must go on to its planned end, unless the header of the ledger itself was cut short: then it
is refused with the reason, and nothing had been charged.
"""

import gc
import importlib
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers

from hf_spectral_dp import DPTrainer, DPTrainingArguments, SpectralConfig, SpectralTokenizerForCausalLM
from hf_spectral_dp.checkpoint_files import CheckpointError, newest_whole, verify
from hf_spectral_dp.feature_rows import RowsInMemory
from hf_spectral_dp.privacy.ledger import LedgerError, read_ledger
from hf_spectral_dp.privacy.noise import GaussianNoise
from hf_spectral_dp.self_audit import random_rows
from hf_spectral_dp.trainer import LEDGER

STEPS, ROWS, EPSILON = 4, 24, 1.0
FINISHED, REFUSED, FAILED = 0, 3, 4
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # what a killed process wrote is there, flushed or not
Row = dict[str, Any]

# -- the run ----------------------------------------------------------------------------------------------------------


def config() -> SpectralConfig:
    return SpectralConfig(
        image_size=8, num_channels=1, levels=1, patch_sizes=[2, 4], codebook_sizes=[16, 16], num_classes=10,
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip


def arguments(folder: Path, **changes: Any) -> DPTrainingArguments:
    chosen = {
        "target_epsilon": EPSILON, "expected_batch_size": 12, "max_steps": STEPS, "micro_batch_size": 8,
        "learning_rate": 1e-2, "ema_decay": 0.5, "output_dir": str(folder), "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "steps", "save_steps": 1,
        "save_total_limit": 2,
    }  # fmt: skip
    return DPTrainingArguments(**{**chosen, **changes})


def trainer_in(folder: Path, **changes: Any) -> DPTrainer:
    chosen = config()
    rows = RowsInMemory(random_rows(chosen, ROWS, torch.Generator().manual_seed(0)))
    return DPTrainer(SpectralTokenizerForCausalLM(chosen), arguments(folder, **changes), rows)


@cache
def epsilon_after(steps: int) -> float:
    return arguments(Path("unused")).plan(ROWS).epsilon(steps)


_applied = mmap.mmap(-1, 8)  # shared with children


def own_counter() -> None:
    """A counter for this process and its children alone."""
    global _applied
    _applied = mmap.mmap(-1, 8)


def applied() -> int:
    """Noise draws begun in the run of this moment, over all its children."""
    return int.from_bytes(_applied[:8], "little")


def count(number: int) -> None:
    _applied[:8] = number.to_bytes(8, "little")


def start(action: Callable[[], None], log: Path) -> int:
    """Forks a child that runs `action`; returns its process id. Its exit status says how that ended."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = FAILED
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        draw = GaussianNoise.add_

        def counted(self: GaussianNoise, tensors: Any) -> None:
            count(applied() + 1)
            draw(self, tensors)

        GaussianNoise.add_ = counted  # type: ignore[method-assign]
        action()
        status = FINISHED
    except (LedgerError, CheckpointError) as error:
        print(error)
        status = REFUSED
    except BaseException:
        traceback.print_exc()
    finally:
        sys.setprofile(None)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(child: int) -> int:
    """The exit status of a child, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train(folder: Path, watch: Callable | None = None, earlier: bool = False) -> None:
    """Starts or goes on with the run of `folder`; with `earlier`, from the last checkpoint but one."""
    trainer = trainer_in(folder)
    resume: str | bool | None = (folder / LEDGER).exists() or None
    if earlier:
        resume = str(sorted(folder.glob("checkpoint-*"))[-2])
    sys.setprofile(watch)
    trainer.train(resume_from_checkpoint=resume)
    sys.setprofile(None)


def warm_up(folder: Path) -> float:
    """Imports what a run imports and computes what all runs share; returns the seconds that a run takes then."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # a forked child has the calling thread only
    for steps in range(STEPS + 1):
        epsilon_after(steps)
    names = folder / "modules"

    def run() -> None:
        train(folder / "warm")
        names.write_text("\n".join(sys.modules))

    assert ended(start(run, folder / "log")) == FINISHED, (folder / "log").read_text()
    for name in names.read_text().splitlines():
        if name not in sys.modules and not name.startswith("__"):
            try:
                importlib.import_module(name)
            except Exception:  # a lazy alias; nothing depends on it
                continue
    trainer_in(folder / "unused").model.save_pretrained(folder / "saved")  # fills caches, runs no backward pass
    gc.collect()
    gc.freeze()  # or every child would look through, and so copy, all that was imported
    began = time.monotonic()
    assert ended(start(lambda: train(folder / "timed"), folder / "log")) == FINISHED
    return time.monotonic() - began


# -- where to strike --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """The moment before or after a call of `function` below a frame of `within`.

    `event` is that of `sys.setprofile`; `most`: strike at a random one of the first so many; `torn`: write a part of
    the record first; `after`: the point where the run was killed before; `earlier`: resume from the last checkpoint
    but one, whose successor will be replaced.
    """

    name: str
    event: str
    function: str
    within: str = ""
    most: int = 1
    torn: bool = False
    after: str = ""
    earlier: bool = False


POINTS = [
    # name, event, function, within
    Point("ledger created, no header", "c_call", "write", "PrivacyLedger.create"),
    Point("header torn", "c_call", "write", "PrivacyLedger.create", torn=True),
    Point("header written, not flushed", "c_call", "fsync", "PrivacyLedger.create"),
    Point("header flushed, its folder not", "call", "_sync_folder", "PrivacyLedger.create"),
    Point("before a charge", "call", "PrivacyLedger.charge", most=STEPS),
    Point("charge torn", "c_call", "write", "PrivacyLedger.charge", most=STEPS, torn=True),
    Point("charge written, not flushed", "c_call", "fsync", "PrivacyLedger.charge", most=STEPS),
    Point("charge flushed", "c_return", "fsync", "PrivacyLedger.charge", most=STEPS),
    Point("charged", "return", "PrivacyLedger.charge", most=STEPS),
    Point("rows clipped", "return", "PerExampleClipper.add", most=STEPS),
    Point("before the noise", "call", "GaussianNoise.add_", most=STEPS),
    Point("amid the noise", "call", "_pieces", "GaussianNoise.add_", most=30),
    Point("noise added", "return", "GaussianNoise.add_", most=STEPS),
    Point("gradient written", "return", "DPTrainer.training_step", most=STEPS),
    Point("weights changed", "return", "AcceleratedOptimizer.step", most=STEPS),
    Point("step ended", "return", "CallbackHandler.on_step_end", most=STEPS),
    Point("before a save", "call", "SavingTrainer._save_whole", most=STEPS),
    Point("hidden folder made", "return", "staging", "SavingTrainer._save_whole", most=STEPS),
    Point("weights saved", "return", "Trainer.save_model", most=STEPS),
    Point("optimizer saved", "return", "Trainer._save_optimizer_and_scheduler", most=STEPS),
    Point("trainer state saved", "return", "TrainerState.save_to_json", most=STEPS),
    Point("files written, none flushed", "call", "publish", most=STEPS),
    Point("some files flushed", "c_return", "fsync", "publish", most=8),
    Point("seal computed, not written", "return", "_seal", "publish", most=STEPS),
    Point("seal written, not flushed", "c_return", "BufferedWriter.flush", "publish", most=STEPS),
    Point("seal flushed, folders not", "call", "sync", "publish", most=STEPS),
    Point("before the rename", "c_call", "rename", "publish", most=STEPS),
    Point("renamed, not flushed", "c_return", "rename", "publish", most=STEPS),
    Point("renamed and flushed", "return", "publish", most=STEPS),
    Point("before the rotation", "call", "rotate", most=STEPS),
    Point("old checkpoint moved aside", "c_return", "rename", "rotate", most=STEPS - 2),
    Point("old checkpoint half deleted", "c_return", "unlink", "rotate", most=8 * (STEPS - 2)),
    Point("rotated", "return", "rotate", most=STEPS),
    Point("before the checkpoint is verified", "call", "newest_whole", after="weights changed"),
    Point("checkpoint verified, ledger not open", "return", "newest_whole", after="weights changed"),
    Point("before a repair", "call", "PrivacyLedger._append", "PrivacyLedger.open", after="charge torn"),
    Point("repair torn", "c_call", "write", "PrivacyLedger.open", torn=True, after="charge torn"),
    Point("repair written, not flushed", "c_call", "fsync", "PrivacyLedger.open", after="charge torn"),
    Point("repaired", "return", "PrivacyLedger.open", after="charge torn"),
    Point("leftovers half deleted", "c_return", "unlink", "DPTrainer._begin", after="before the rename"),
    Point("weights loaded", "return", "Trainer._load_from_checkpoint", after="weights changed"),
    Point("optimizer loaded", "return", "Trainer._load_optimizer_and_scheduler", after="weights changed"),
    Point("replaced one moved aside", "c_return", "rename", "publish", after="renamed and flushed", earlier=True),
    Point("trained, not averaged", "return", "Trainer.train"),
    Point("ledger closed", "return", "PrivacyLedger.close"),
]
NAMED = {point.name: point for point in POINTS}


def frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def striking(point: Point, number: int, strike: Callable[[FrameType], None]) -> Callable:
    """A profile function that strikes at the `number`-th time that `point` comes by, once."""
    left = number

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal left
        if event != point.event:
            return
        name = argument.__qualname__ if event.startswith("c_") else frame.f_code.co_qualname
        if name == point.function and (
            not point.within or any(each.f_code.co_qualname == point.within for each in frames(frame))
        ):
            left -= 1
            if left == 0:
                strike(frame)

    return watch


def killing(point: Point, number: int) -> Callable:
    def strike(frame: FrameType) -> None:
        if point.torn:
            line = frame.f_locals["line"]
            os.write(frame.f_locals["self"]._file.fileno(), line[: random.randrange(1, len(line))])
        os.kill(os.getpid(), signal.SIGKILL)

    return striking(point, number, strike)


# -- what must hold ---------------------------------------------------------------------------------------------------


def complaint(folder: Path) -> str:
    """What is wrong with the files of a run, "" if nothing is. A ledger without a header is judged by `goes_on`."""
    if not (folder / LEDGER).exists():
        return "" if applied() == 0 else f"{applied()} applied without a ledger"
    try:
        charged = read_ledger(folder / LEDGER)["charged"]
    except LedgerError as error:
        return "" if "no complete header" in str(error) and applied() == 0 else str(error)
    if not applied() <= charged <= STEPS:
        return f"{applied()} applied, {charged} charged, {STEPS} planned"
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            if verify(checkpoint)["charged"] > charged:
                return f"{checkpoint.name} has more charges than the ledger"
        except CheckpointError as error:
            return str(error)
    return ""


def lost(folder: Path, said: str) -> bool:
    """Whether a run was refused because the crashes took what the whole budget had paid for: there is no checkpoint."""
    spent = (folder / LEDGER).exists() and read_ledger(folder / LEDGER)["charged"] == STEPS
    return "nothing is left to train" in said and spent and newest_whole(folder) is None


def goes_on(folder: Path, log: Path) -> str:
    """Resumes a run to its end; what is wrong with that, "" if nothing is."""
    status = ended(start(partial(train, folder), log))
    said = log.read_text(errors="replace")
    if status == REFUSED and "no complete header" in said:
        return "" if applied() == 0 else f"refused after {applied()} updates: {said}"
    if status == REFUSED and lost(folder, said):
        return ""
    if status != FINISHED:
        return f"a resumed run ended with {status}: {said[-1500:]}"
    if wrong := complaint(folder):
        return f"after the end of a resumed run: {wrong}"
    charged = read_ledger(folder / LEDGER)["charged"]
    if charged != STEPS or epsilon_after(charged) > EPSILON:
        return f"{charged} of {STEPS} steps charged at the end, epsilon {epsilon_after(charged)}"
    return "" if not (folder / ".incomplete").exists() else "leftovers of a save are never cleared"


@contextmanager
def new_run(base: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir=base))
    count(0)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def report(name: str, tried: int, complaints: list[str], **more: Any) -> Row:
    for text in complaints[:5]:
        print(f"{name}: {text}", file=sys.stderr, flush=True)
    return {"check": name, "tried": tried, "failed": len(complaints), **more}


# -- the checks -------------------------------------------------------------------------------------------------------


def kill_at_named_points(base: Path, rounds: int) -> Row:
    """kill -9 at every fail point of `POINTS`; each must be reached, and the run must go on."""
    complaints = []
    for point in POINTS * rounds:
        with new_run(base) as folder:
            if point.after:
                before = NAMED[point.after]
                first = killing(before, min(3, before.most))
                wrong = "" if ended(start(partial(train, folder, first), base / "log")) == -9 else "never reached"
            else:
                wrong = ""
            watch = killing(point, random.randint(1, point.most))
            status = ended(start(partial(train, folder, watch, point.earlier), base / "log"))
            if status != -signal.SIGKILL:
                wrong = wrong or f"not reached: {status} {(base / 'log').read_text()[-500:]}"
            wrong = wrong or complaint(folder) or goes_on(folder, base / "log")
        if wrong:
            complaints.append(f"{point.name}: {wrong}")
    return report("kill -9 at a named point", len(POINTS) * rounds, complaints, points=len(POINTS))


def kill_at_random(base: Path, kills: int, seconds: float) -> Row:
    """kill -9 at uniformly random moments, up to four times in one run before it may go on to its end."""
    complaints, done = [], 0
    while done < kills:
        with new_run(base) as folder:
            wrong = ""
            for _ in range(random.randint(1, 4)):
                child = start(partial(train, folder), base / "log")
                time.sleep(random.uniform(0, seconds))
                os.kill(child, signal.SIGKILL)  # a zombie until it is waited for, so this is the child and no other
                status = ended(child)
                done += status == -signal.SIGKILL
                said = (base / "log").read_text()
                refused = status == REFUSED and ("no complete header" in said or lost(folder, said))
                if status not in (-signal.SIGKILL, FINISHED) and not refused:
                    wrong = f"a resumed run ended with {status}: {said[-1500:]}"
                wrong = wrong or complaint(folder)
                if wrong or status != -signal.SIGKILL or done >= kills:
                    break
            wrong = wrong or goes_on(folder, base / "log")
        if wrong:
            complaints.append(wrong)
    return report("kill -9 at a random moment", done, complaints)
