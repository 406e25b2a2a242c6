"""Files and folders that are whole or as they were: written beside their place, flushed to disk, then renamed."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def replace_files(contents: Mapping[Path, bytes], mark: str | None = None) -> None:
    """Writes files; none takes its place before all are on the disk.

    Args:
        contents: by path; the folders exist.
        mark: the files are called ".{mark}-{name}" until then, so a later call with the same mark overwrites what a
            killed process left; default the number of the process.

    Raises:
        OSError: a file could not be written; all files are what they were, and nothing is left beside them.
    """
    temporary = {path: path.with_name(f".{os.getpid() if mark is None else mark}-{path.name}") for path in contents}
    try:
        for path, content in contents.items():
            with temporary[path].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path in contents:
            os.replace(temporary[path], path)
    finally:
        for path in contents:
            temporary[path].unlink(missing_ok=True)


def new_folder(folder: Path, write: Callable[[Path], Any]) -> None:
    """Makes a folder that is there only when all its files are, and then outlives a power failure.

    Args:
        folder: what is there already is replaced; what a killed process left beside it goes.
        write: fills the empty folder that it is given, such as `model.save_pretrained`. If it fails, nothing is left of
            that folder, and `folder` is what it was.
    """
    scratch = folder.with_name(f".{folder.name}-incomplete")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        write(scratch)
        for path in (*scratch.rglob("*"), scratch):
            sync(path)
        put_in_place(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def put_in_place(staged: Path, target: Path) -> None:
    """Renames a folder, whose files are on the disk, to `target` on the same file system; what was there goes.

    Once this returns, it outlives a power failure.

    Raises:
        OSError: some call failed. `target` is then what it was before, or whole.
    """
    replaced = staged.with_name(f"{staged.name}-replaced")
    if target.exists():
        target.rename(replaced)
    try:
        staged.rename(target)
    except BaseException:
        if replaced.exists():
            replaced.rename(target)
        raise
    sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def sync(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = ["new_folder", "put_in_place", "replace_files", "sync"]
