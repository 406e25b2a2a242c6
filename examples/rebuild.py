"""The command that makes a public network again, for the card of the scripts that train one."""

import shlex
from typing import Any


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
