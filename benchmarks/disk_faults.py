"""Saves on a full, read-only or broken disk: the previous checkpoint still loads, and the error says what to do.

Full and read-only disks are real ones, where this process may mount (a tmpfs of its own, a read-only bind mount);
elsewhere a limit on the size of files takes the place of the full disk, and a row says so. An I/O error is put in the
place of every single call of a save that touches a file, one save per call. All on the shipped `DPTrainer`, in children
of the fork server in `crashes`.
"""

import ctypes
import errno
import json
import os
import random
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from benchmarks.crashes import (
    FINISHED,
    NAMED,
    REFUSED,
    STEPS,
    Row,
    complaint,
    count,
    ended,
    goes_on,
    new_run,
    report,
    start,
    striking,
    train,
    trainer_in,
)  # fmt: skip
from hf_spectral_dp import DPTrainer
from hf_spectral_dp.checkpoint_files import CheckpointError, newest_whole, verify
from hf_spectral_dp.privacy.ledger import LedgerError, PrivacyLedger, read_ledger
from hf_spectral_dp.trainer import LEDGER

_PAGE = 4096
_FILE_CALLS = {
    "open", "write", "close", "fsync", "rename", "mkdir", "rmdir", "unlink", "scandir", "listdir", "stat", "lstat",
    "fstat", "serialize_file", "write_record", "write_end_of_file", "BufferedReader.readinto", "BufferedWriter.write",
    "BufferedWriter.flush", "BufferedWriter.__exit__", "TextIOWrapper.write", "TextIOWrapper.__exit__",
}  # fmt: skip


class _Stop(TrainerCallback):
    """Ends a run after the third step, and keeps it from saving that one."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            control.should_training_stop, control.should_save = True, False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = False


def before_a_save(folder: Path) -> DPTrainer:
    """A run after three steps and two checkpoints, about to save the third."""
    trainer = trainer_in(folder)
    trainer.add_callback(_Stop())
    trainer.train()
    return trainer


def save_fails(trainer: DPTrainer, folder: Path) -> tuple[bool, str]:
    """Tries the save of step 3. Returns whether it was refused, and what is wrong with that or with what it left."""
    failed, wrong = False, ""
    try:
        trainer._save_checkpoint(trainer.model, None)
    except CheckpointError as error:
        failed = True
        if "resume_from_checkpoint=True" not in str(error) or "checkpoint-3 could not be saved" not in str(error):
            wrong = f"an error without a remedy: {error}"
    except Exception as error:
        return True, f"an error that is no CheckpointError: {error!r}"
    sys.setprofile(None)
    try:
        whole = newest_whole(folder)
        verify(folder / "checkpoint-2")
        for checkpoint in folder.glob("checkpoint-*"):
            verify(checkpoint)
        if whole is None or not failed and whole[0].name != "checkpoint-3":
            wrong = wrong or f"saved, but the newest checkpoint is {whole}"
    except CheckpointError as error:
        wrong = wrong or f"after a failed save: {error}"
    return failed, wrong


def in_child(action: Callable[[Path, Path], dict[str, Any]], folder: Path, base: Path) -> dict[str, Any]:
    """What `action(folder, base)` returns, run in a child."""
    answer = base / "answer"
    status = ended(start(lambda: answer.write_text(json.dumps(action(folder, base))) and None, base / "log"))
    if status != FINISHED:
        return {"tried": 1, "complaints": [f"the child ended with {status}: {(base / 'log').read_text()[-1500:]}"]}
    return json.loads(answer.read_text())


# -- an I/O error in place of every call -------------------------------------------------------------------------------


def failing(number: int, hit: list[str]) -> Callable:
    """A profile function that raises an I/O error instead of the `number`-th call that touches a file."""
    left = number

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal left
        if event != "c_call":
            return
        name = argument.__qualname__.split("abi_1.")[-1]  # pybind11 puts its own name before that of a method
        if name in _FILE_CALLS:
            left -= 1
            if left == 0:
                hit.append(f"{name} in {frame.f_code.co_qualname}")
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    return watch


def _every_call(folder: Path, base: Path) -> dict[str, Any]:
    trainer = before_a_save(folder)
    pristine, complaints, calls, refused = base / "pristine", [], set(), 0
    shutil.rmtree(pristine, ignore_errors=True)
    shutil.copytree(folder, pristine, ignore=shutil.ignore_patterns(LEDGER))
    number = 0
    while True:
        number += 1
        hit: list[str] = []
        sys.setprofile(failing(number, hit))
        failed, wrong = save_fails(trainer, folder)
        sys.setprofile(None)
        if not hit:
            return {"tried": number - 1, "complaints": complaints, "calls": len(calls), "refused": refused}
        refused += failed
        calls.add(hit[0])
        if wrong:
            complaints.append(f"{hit[0]}: {wrong}")
        # The state that the fault left goes on to the parent now and then; the next one starts from the pristine.
        if number % 25 == 1:
            shutil.copytree(folder, base / f"after-{number}")
        for path in folder.iterdir():
            if path.name != LEDGER:
                shutil.rmtree(path)
        shutil.copytree(pristine, folder, dirs_exist_ok=True)


def io_error_at_every_call(base: Path) -> Row:
    """The save of one checkpoint, broken once at each of its calls that touches a file."""
    with new_run(base) as folder:
        answer = in_child(_every_call, folder, base)
        for left in base.glob("after-*"):
            count(3)
            if wrong := goes_on(left, base / "log"):
                answer["complaints"].append(f"{left.name}: {wrong}")
            shutil.rmtree(left)
    more = {"calls": answer.get("calls", 0), "refused": answer.get("refused", 0)}
    return report("I/O error at each call of a save", answer["tried"], answer["complaints"], **more)


def io_error_in_the_ledger(base: Path, rounds: int) -> Row:
    """Training whose charge cannot be written or flushed ends before the noise, and goes on later."""

    def strike(frame: FrameType) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    complaints = []
    points = [NAMED[name] for name in ("charge torn", "charge written, not flushed", "header written, not flushed")]
    for point in points * rounds:
        with new_run(base) as folder:
            watch = striking(point, random.randint(1, point.most), strike)
            status = ended(start(partial(train, folder, watch), base / "log"))
            said = (base / "log").read_text()
            wrong = "" if status == REFUSED and "No space left" in said else f"ended with {status}: {said[-500:]}"
            if wrong := wrong or complaint(folder) or goes_on(folder, base / "log"):
                complaints.append(f"{point.name}: {wrong}")
    return report("I/O error in the ledger", len(points) * rounds, complaints)


# -- full and read-only disks ------------------------------------------------------------------------------------------


def _mount(source: str, target: Path, kind: str | None, flags: int, options: str = "") -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    type_ = kind.encode() if kind else None
    return libc.mount(source.encode(), str(target).encode(), type_, ctypes.c_ulong(flags), options.encode()) == 0


_BIND, _REMOUNT, _READ_ONLY, _REC_PRIVATE = 1 << 12, 1 << 5, 1, 1 << 14 | 1 << 18


def own_mounts() -> bool:
    """Gives this process mounts that nobody else sees; False where the system does not allow it."""
    new_mounts, new_user = 0x20000, 0x10000000
    user, group = os.geteuid(), os.getegid()
    if ctypes.CDLL(None).unshare(new_mounts | (new_user if user else 0)) != 0:
        return False
    if user:
        try:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        except OSError:
            return False
    return _mount("none", Path("/"), None, _REC_PRIVATE)


def may_mount(base: Path) -> bool:
    """Can a child of this process have a file system of its own? Tried in a child, for a half success is worse."""

    def attempt() -> None:
        folder = base / "mounted"
        folder.mkdir(exist_ok=True)
        assert own_mounts() and _mount("tmpfs", folder, "tmpfs", 0, "size=64k")
        (folder / "file").write_bytes(b"")

    return ended(start(attempt, base / "log")) == FINISHED


@contextmanager
def _only(free: int, folder: Path) -> Iterator[None]:
    """Leaves `free` bytes on the file system of `folder`."""
    filler = folder / "filler"
    with open(filler, "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * _PAGE)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        file.truncate(max(0, file.tell() - free))
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def _file_size_limit(limit: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _full(real: bool, folder: Path, base: Path) -> dict[str, Any]:
    if real:
        assert own_mounts() and _mount("tmpfs", folder, "tmpfs", 0, "size=1m")
    trainer, complaints, tried = before_a_save(folder), [], 0
    failed = True
    while failed:  # with a page more each time, until it fits
        room = tried * (_PAGE if real else 512)
        with _only(room, folder) if real else _file_size_limit(room):
            failed, wrong = save_fails(trainer, folder)
        if wrong:
            complaints.append(f"{room} bytes free: {wrong}")
        tried += 1
        if failed:
            shutil.rmtree(folder / "checkpoint-3", ignore_errors=True)
    shutil.rmtree(folder / "checkpoint-3")
    if tried < 10:
        complaints.append(f"the disk was full only {tried} times")
    if real:
        complaints += _full_ledger(folder)
    trainer_in(folder).train(resume_from_checkpoint=True)
    if (charged := read_ledger(folder / LEDGER)["charged"]) != STEPS:
        complaints.append(f"{charged} charges at the end")
    return {"tried": tried, "complaints": complaints, "how": "tmpfs of 1 MiB" if real else "limit on file sizes"}


def _full_ledger(folder: Path) -> list[str]:
    path, returned = folder / "other", 0
    ledger = PrivacyLedger.create(path, {}, 1000)
    with _only(0, folder):
        try:
            while True:
                returned = ledger.charge()
        except LedgerError as error:
            wrong = [] if "No space left" in str(error) else [str(error)]
    ledger.close()
    with PrivacyLedger.open(path, {}, 1000) as again:
        if not returned <= again.charged <= returned + 1:
            wrong.append(f"{returned} charges returned, {again.charged} on disk")
        again.charge()
    path.unlink()
    return wrong


def full_disk(base: Path) -> Row:
    """Saves with 0, 1, 2 ... free pages until one fits, and a ledger that meets the end of the disk."""
    with new_run(base) as folder:
        answer = in_child(partial(_full, may_mount(base)), folder, base)
    return report("full disk", answer["tried"], answer["complaints"], how=answer.get("how", ""))


def _read_only(folder: Path, base: Path) -> dict[str, Any]:
    trainer, complaints = before_a_save(folder), []
    # Over the folder, not in its place: the ledger is open on the mount below.
    assert own_mounts() and _mount(str(folder), folder, None, _BIND)
    _mount("none", folder, None, _BIND | _REMOUNT | _READ_ONLY)
    failed, wrong = save_fails(trainer, folder)
    if wrong or not failed:
        complaints.append(wrong or "a save on a read-only disk did not fail")
    for resume in (True, None):
        try:
            trainer_in(folder).train(resume_from_checkpoint=resume)
            complaints.append("training on a read-only disk did not fail")
        except LedgerError as error:
            if "Read-only" not in str(error) and "exists" not in str(error):
                complaints.append(str(error))
    return {"tried": 3, "complaints": complaints, "how": "read-only bind mount"}


def read_only_disk(base: Path) -> Row:
    """A folder that becomes read-only during a run: the save and every start are refused, and later it goes on."""
    if not may_mount(base):
        return report("read-only disk", 0, [], how="not allowed to mount")
    with new_run(base) as folder:
        answer = in_child(_read_only, folder, base)
        if wrong := goes_on(folder, base / "log"):
            answer["complaints"].append(wrong)
    return report("read-only disk", answer["tried"], answer["complaints"], how=answer.get("how", ""))
