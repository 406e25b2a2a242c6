"""Files that are whole or as they were: written beside their place, flushed to disk, then renamed."""

import os
from collections.abc import Mapping
from pathlib import Path


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


__all__ = ["replace_files"]
