"""What the scripts that train a public network share: where it goes, and the command that makes it again."""

import argparse
import shlex
from pathlib import Path
from typing import Any


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments; refuses an `out` that cannot become a folder, before hours of training."""
    arguments = parser.parse_args()
    if Path(arguments.out).exists() and not Path(arguments.out).is_dir():
        parser.error(f"--out {arguments.out} is a file; name a folder for the network.")
    return arguments


def rebuild_command(script: str, options: dict[str, Any]) -> str:
    """`python examples/SCRIPT --name value ...`, from options as argparse has them; `out` comes last.

    Flags that are on stand alone. What is None, empty or off is left out.
    """
    words = ["python", f"examples/{script}"]
    for name, value in sorted(options.items(), key=lambda option: option[0] == "out"):
        if value is None or value is False or value == "":
            continue
        words.append(f"--{name}")
        if value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return shlex.join(words)
