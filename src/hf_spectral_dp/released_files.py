"""What may leave the machine: the known files of a saved pipeline or model, by name, and their hashes.

An allow-list, because the folder of a run also holds what must stay: token rows, the ledger, optimizer states, random
states, the files of checkpoints. A pipeline lies in a folder of its own, with one folder per component; a model alone
lies in one folder without any. No file on the list can hold a pickle, and none of a pipeline can hold code; a model
alone may have this package's own source files beside it, see `remote_code.py`.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from .safe_loading import REPORT_NAME

README_NAME = "README.md"
SAMPLES_NAME = "samples.png"

_WEIGHTS = (
    r"(model|diffusion_pytorch_model)(\.fp16)?(-\d{5}-of-\d{5})?\.safetensors"
    r"|(model|diffusion_pytorch_model)\.safetensors\.index(\.fp16)?\.json"
)
_MODEL = rf"config\.json|generation_config\.json|{_WEIGHTS}"
_TOKENIZER = (
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|spiece\.model|sentencepiece\.bpe\.model"
)
_BESIDE = rf"{re.escape(SAMPLES_NAME)}|LICENSE(\.txt|\.md)?"
_CARD = rf"{re.escape(REPORT_NAME)}|{re.escape(README_NAME)}"
_PIPELINE = re.compile(
    rf"model_index\.json|{_CARD}|{_BESIDE}"
    rf"|(model|text_encoder|super_resolution|critic)/({_MODEL})"
    r"|image_processor/preprocessor_config\.json"
    rf"|tokenizer/({_TOKENIZER})"
    # A super-resolution model may be a whole pipeline of diffusers.
    rf"|super_resolution/(model_index\.json|(unet|vae|vqvae|text_encoder)/({_MODEL})|tokenizer/({_TOKENIZER})"
    r"|(low_res_)?scheduler/scheduler_config\.json)"
)
_SOURCES = "|".join(sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__"))
_MODEL_ALONE = re.compile(rf"{_CARD}|{_BESIDE}|{_MODEL}|preprocessor_config\.json|({_SOURCES})\.py")


def is_public(name: str, pipeline: bool = True) -> bool:
    """Whether a file of that path in the folder of a pipeline (or of a model alone) may be uploaded."""
    return (_PIPELINE if pipeline else _MODEL_ALONE).fullmatch(name) is not None


def public_files(folder: str | Path) -> list[str]:
    """Paths of the files in a folder that may be uploaded, sorted."""
    folder = Path(folder)
    return sorted(name for name in files(folder) if is_public(name, _is_pipeline(folder)))


def check_own_folder(folder: str | os.PathLike, pipeline: bool | None = None) -> None:
    """Raises ValueError if anything but public files lies in a folder (hidden files aside).

    A pipeline has a folder of its own, so that whoever copies or uploads that folder by other means takes no private
    file along.

    Args:
        folder: may be missing.
        pipeline: whose files may lie there, a pipeline's or a model's; None looks for `model_index.json`.
    """
    folder = Path(folder)
    pipeline = _is_pipeline(folder) if pipeline is None else pipeline
    private = sorted(name for name in files(folder) if not is_public(name, pipeline))
    if private:
        named = ", ".join(private[:3]) + (f" and {len(private) - 3} more" if len(private) > 3 else "")
        kind = "pipeline" if pipeline else "model"
        raise ValueError(
            f"{str(folder)!r} holds files that no {kind} has ({named}); save the {kind} to a folder of its own."
        )


def hash_released(folder: str | Path) -> list[dict[str, str | int]]:
    """{"path", "sha256", "bytes"} of every file that is not the card or hidden, sorted by path."""
    folder = Path(folder)
    found: list[dict[str, str | int]] = []
    for name in sorted(files(folder)):
        if name in (REPORT_NAME, README_NAME):
            continue
        path = folder / name
        if name.endswith("/"):
            found.append({"path": name, "sha256": "a link to a folder", "bytes": 0})
            continue
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found.append({"path": name, "sha256": digest, "bytes": path.stat().st_size})
    return found


def files(folder: Path) -> Iterator[str]:
    """Paths of all files below a folder, with /; hidden ones are those of git and of the Hub.

    A link to a folder is among them, by its own name with / behind it: what is in there is loaded, too, and nobody
    hashes it or looks for marks.
    """
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        linked = path.is_symlink() and path.is_dir()
        if (linked or not path.is_dir()) and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix() + "/" * linked


def _is_pipeline(folder: Path) -> bool:
    return (folder / "model_index.json").exists()


__all__ = ["README_NAME", "REPORT_NAME", "SAMPLES_NAME", "check_own_folder", "files", "hash_released", "is_public",
           "public_files"]  # fmt: skip
