"""The cards of the checkpoints that the package ships: `python model_cards/build.py` writes them, `--check` compares.

A checkpoint that was trained on private data must carry a privacy card that nothing contradicts, and is shown here with
it. One that was trained on public data only has no privacy to claim: its card says so, what it was made from, and
which files it is.
"""

import argparse
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import reports
from huggingface_hub import ModelCard

from hf_spectral_dp import PrivacyCard
from hf_spectral_dp.bundled import CHECKPOINTS
from hf_spectral_dp.released_files import README_NAME, REPORT_NAME, hash_released

HERE = Path(__file__).parent
PUBLIC_NAME = "public.json"
_PUBLIC = re.compile(r"\bpublic (images|data|digits)\b|\bno private image was used\b", re.IGNORECASE)


def public_facts(folder: Path) -> dict[str, Any]:
    """What is recorded of a checkpoint that saw no private data.

    Raises:
        ValueError: its README does not say that the data were public, or under which license it is.
    """
    readme = ModelCard((folder / README_NAME).read_text(encoding="utf-8"))
    if not _PUBLIC.search(readme.content) or not readme.data.license:
        raise ValueError(
            f"{folder / README_NAME} must say that it was trained on public data, and its license; or {REPORT_NAME}"
            " must say what was guaranteed."
        )
    return {
        "checkpoint": folder.name,
        "private_data": False,
        "statement": "No private data was used, so there is no privacy claim to make and none to verify.",
        "license": readme.data.license,
        "files": hash_released(folder),
    }


def public_card(folder: Path, facts: dict[str, Any]) -> str:
    """The checkpoint's own README, what was measured of a generator, then what was recorded."""
    rows = [f"| {entry['path']} | {entry['bytes']} | {entry['sha256']} |" for entry in facts["files"]]
    return "\n".join(
        [
            (folder / README_NAME).read_text(encoding="utf-8").rstrip(),
            "",
            *reports.summary(folder.name),
            "## Privacy",
            "",
            facts["statement"],
            "",
            "## Files",
            "",
            "| File | Bytes | SHA-256 |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def build(out: Path) -> None:
    """Writes one folder per checkpoint into a folder.

    Raises:
        ValueError: a privacy card is contradicted, or a checkpoint says nothing of its data.
    """
    for folder in sorted(path for path in CHECKPOINTS.iterdir() if path.is_dir()):
        place = out / folder.name
        place.mkdir(parents=True)
        if (folder / REPORT_NAME).exists():
            PrivacyCard.load(folder).raise_contradictions(folder)
            for name in (REPORT_NAME, README_NAME):
                shutil.copyfile(folder / name, place / name)
            continue
        facts = public_facts(folder)
        (place / PUBLIC_NAME).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        (place / README_NAME).write_text(public_card(folder, facts), encoding="utf-8")


def contents(folder: Path) -> dict[str, bytes]:
    """The cards in a folder, by path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.glob("*/*")
        if path.is_file() and path.suffix in (".md", ".json")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a card is not up to date")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        build(Path(scratch))
        if arguments.check:
            stale = sorted(dict(contents(HERE).items() ^ contents(Path(scratch)).items()))
            if stale:
                raise SystemExit(f"not up to date: {', '.join(stale)}; run `python model_cards/build.py`.")
            return
        for place in [path for path in HERE.iterdir() if path.is_dir() and path.name != "__pycache__"]:
            if not (Path(scratch) / place.name).exists():
                shutil.rmtree(place)  # of a checkpoint that is no longer shipped
                continue
            for path in [path for path in place.iterdir() if path.name != reports.FOLDER]:
                path.unlink()
        shutil.copytree(scratch, HERE, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
