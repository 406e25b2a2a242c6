"""`hf-spectral-dp verify FOLDER` and `hf-spectral-dp card FOLDER`: the privacy card on the command line."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .card import PrivacyCard


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments without the program's name (default: those of the process).

    Returns:
        Exit code: 0; or 1 if the card is missing, not valid, or contradicted.
    """
    parser = argparse.ArgumentParser(
        prog="hf-spectral-dp", description="Check and render the privacy card of a differentially private generator."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, description in (
        ("verify", _verify, "Recompute epsilon from privacy.json and compare the files with their recorded hashes."),
        ("card", _card, "Render README.md again from privacy.json. Hashes stay as they are recorded."),
    ):
        command = commands.add_parser(name, help=description, description=description)
        command.add_argument("folder", type=Path, metavar="FOLDER", help="folder of a saved pipeline with privacy.json")
        command.set_defaults(run=run)
    command.add_argument("--license", help="license identifier for the Hub; left out, README.md keeps its own")
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except (OSError, ValueError) as error:
        print(f"hf-spectral-dp: {error}", file=sys.stderr)
        return 1


def _verify(arguments: argparse.Namespace) -> int:
    """Prints the guarantee and every check. 1 on any contradiction."""
    card = PrivacyCard.load(arguments.folder)
    checks = card.checks(arguments.folder)
    print(card.guarantee)
    for name, contradictions in checks.items():
        print(f"[{'FAILED' if contradictions else 'ok'}] {name}")
        for contradiction in contradictions:
            print(f"    {contradiction}")
    return int(any(checks.values()))


def _card(arguments: argparse.Namespace) -> int:
    """Writes README.md and nothing else."""
    PrivacyCard.load(arguments.folder).save_readme(arguments.folder, arguments.license)
    return 0


__all__ = ["main"]
