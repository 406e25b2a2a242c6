"""Checkpoint folders that are whole or not there at all, whatever ends the process that writes them.

A checkpoint is written to a hidden folder beside its place, every file is hashed and flushed to disk, and one rename
puts it in place. Its `privacy_state.json` seals it: the hash of every file, how much the ledger had charged, the
ledger's head, and a hash of all that. Nothing is loaded from a folder that does not match its seal.

The hashes guard against accidents (a bad disk, a half-copied folder), not against somebody who rewrites the seal.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .whole_files import put_in_place, sync

logger = logging.getLogger(__name__)

STATE = "privacy_state.json"
_PREFIX = "checkpoint-"
_INCOMPLETE = ".incomplete"  # hidden, and no `checkpoint-*`: nobody takes what lies in it for a checkpoint
_FORMAT = 1
_REMEDY = (
    "resume with resume_from_checkpoint=True, which takes the newest whole checkpoint (the steps after it stay paid),"
    " or put this one back from a backup"
)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is not what was written."""


def staging(output_dir: Path) -> Path:
    """A new, empty folder inside `output_dir` for `publish`; what an earlier save left there is gone."""
    folder = output_dir / _INCOMPLETE
    clear_staging(output_dir)
    folder.mkdir(parents=True)
    return folder


def clear_staging(output_dir: Path) -> None:
    """Removes what unfinished saves left. Only the process that holds the ledger of `output_dir` may do so."""
    folder = output_dir / _INCOMPLETE
    if folder.exists():
        shutil.rmtree(folder)


def publish(staged: Path, target: Path, *, ledger_head: str, charged: int) -> None:
    """Seals the checkpoint in `staged`, flushes it to disk, and renames it to `target`, both on one file system.

    Before the rename there is no `target` (or the one it replaces), after it there is a whole one; once this returns,
    that outlives a power failure.

    Raises:
        OSError: some call failed. `target` is then absent, or what it was before, or whole.
    """
    files = {}
    for path in _files(staged):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        files[path.relative_to(staged).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    state = {"format": _FORMAT, "ledger_head": ledger_head, "charged": charged, "files": files}
    with open(staged / STATE, "xb") as file:
        file.write(_seal(state))
        file.flush()
        os.fsync(file.fileno())
    for folder in (*(path for path in staged.rglob("*") if path.is_dir()), staged):
        sync(folder)
    # A run resumed from an earlier checkpoint may come by the same step again. Were it killed between the two renames
    # that replace a folder, that earlier checkpoint, whole and with a smaller number, would still be in place.
    put_in_place(staged, target)


def verify(checkpoint: Path) -> dict[str, Any]:
    """Compares every byte of a checkpoint with its seal.

    Returns:
        The seal: {"ledger_head": str, "charged": int, "files": {name: {"bytes", "sha256"}}, ...}.

    Raises:
        CheckpointError: a file is missing, added, cut or changed, or the seal itself is; says which.
    """
    try:
        return _verified(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_REMEDY}.") from error.__cause__


def newest_whole(output_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """The whole checkpoint with most charges and its seal, or None if there is no checkpoint at all.

    Not simply the one with the largest step: a run resumed from an earlier checkpoint counts its steps from there.
    Damaged ones are passed over with a warning; that is safe, because the ledger has counted what they held.

    Raises:
        CheckpointError: there are checkpoints, but none is whole.
    """
    reasons = []
    readable = []
    try:
        checkpoints = _checkpoints(output_dir)
    except OSError as error:
        raise CheckpointError(f"{output_dir} cannot be searched for checkpoints ({error.strerror})") from error
    for checkpoint in checkpoints:
        try:
            readable.append((_read_state(checkpoint)["charged"], checkpoint))
        except CheckpointError as error:
            reasons.append(str(error))
    for _, checkpoint in sorted(readable, reverse=True):
        try:
            state = _verified(checkpoint)
        except CheckpointError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            logger.warning("resuming from %s, because %s", checkpoint, reason)
        return checkpoint, state
    if reasons:
        raise CheckpointError(
            f"{output_dir} holds no whole checkpoint: {'; '.join(reasons)}. Put one back from a backup; or, to start"
            " again from the public weights with all that was spent still counted, move these folders elsewhere and"
            " resume with resume_from_checkpoint=True."
        )
    return None


def rotate(output_dir: Path, limit: int | None) -> None:
    """Keeps the `limit` checkpoints with most charges, and those that are not readable, which may be somebody else's.

    Each is moved out of sight before it is deleted, so that none is ever seen half deleted. A failure is a warning:
    the newest checkpoint is in place.
    """
    if not limit or limit < 0:
        return
    ours = []
    try:
        for checkpoint in _checkpoints(output_dir):
            try:
                ours.append((_read_state(checkpoint)["charged"], checkpoint))
            except CheckpointError as error:
                logger.warning("not counted in save_total_limit=%d: %s", limit, error)
        for _, checkpoint in sorted(ours)[:-limit]:
            checkpoint.rename(staging(output_dir) / "deleted")
            clear_staging(output_dir)
    except OSError as error:
        logger.warning("save_total_limit=%d: an older checkpoint could not be deleted (%s)", limit, error)


def _checkpoints(output_dir: Path) -> list[Path]:
    numbered = (path for path in output_dir.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal())
    return sorted(path for path in numbered if path.is_dir())


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder, but for hidden ones, which nothing loads."""
    for path in sorted(folder.rglob("*")):
        if not path.is_dir() and not path.name.startswith("."):
            yield path


def _seal(state: dict[str, Any]) -> bytes:
    """Canonical JSON with the hash of everything else in it."""
    text = json.dumps(state, sort_keys=True, indent=1, allow_nan=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({**state, "hash": digest}, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"


def _verified(checkpoint: Path) -> dict[str, Any]:
    """The seal of a whole checkpoint; a CheckpointError without a remedy for another."""
    state = _read_state(checkpoint)
    try:
        found = {path.relative_to(checkpoint).as_posix() for path in _files(checkpoint)} - {STATE}
        if missing := sorted(set(state["files"]) - found):
            raise CheckpointError(f"{checkpoint} is damaged: {', '.join(missing)} is missing")
        if added := sorted(found - set(state["files"])):
            raise CheckpointError(f"{checkpoint} holds {', '.join(added)}, which was not saved with it; move it away")
        for name, recorded in state["files"].items():
            with open(checkpoint / name, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != recorded["bytes"]:
                    raise CheckpointError(f"{checkpoint} is damaged: {name} has {size} bytes of {recorded['bytes']}")
                if hashlib.file_digest(file, "sha256").hexdigest() != recorded["sha256"]:
                    raise CheckpointError(f"{checkpoint} is damaged: {name} has changed on disk")
    except OSError as error:
        raise CheckpointError(f"{checkpoint} cannot be read ({error.strerror})") from error
    return state


def _read_state(checkpoint: Path) -> dict[str, Any]:
    """The seal alone, which must be genuine."""
    try:
        content = (checkpoint / STATE).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{checkpoint} is incomplete: no readable {STATE} ({error.strerror})") from error
    try:
        state = json.loads(content)
        genuine = _seal({key: value for key, value in state.items() if key != "hash"}) == content
    except (ValueError, AttributeError, RecursionError):
        genuine = False
    if not genuine:
        raise CheckpointError(f"{checkpoint} is damaged: {STATE} has changed on disk")
    if state["format"] != _FORMAT:
        raise CheckpointError(f"{checkpoint} has format {state['format']}, not {_FORMAT}: another version wrote it")
    return state


__all__ = ["STATE", "CheckpointError", "clear_staging", "newest_whole", "publish", "rotate", "staging", "verify"]
