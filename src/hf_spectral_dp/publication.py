"""What may leave the machine: the public files of a saved pipeline with its card, and nothing that lies beside them.

An allow-list, because the folder of a run also holds what must stay: token rows, the ledger, optimizer states, random
states, the files of checkpoints. All uploads of this package go through `publish`.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from .card import README_NAME, REPORT_NAME, SAMPLES_NAME, PrivacyCard

_COMPONENTS = ("model", "image_processor", "super_resolution")
_PUBLIC = re.compile(
    rf"model_index\.json|{re.escape(REPORT_NAME)}|{re.escape(README_NAME)}|{re.escape(SAMPLES_NAME)}|LICENSE(\.txt|\.md)?"
    rf"|({'|'.join(_COMPONENTS)})/(config\.json|generation_config\.json|preprocessor_config\.json"
    r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json)"
)


def is_public(name: str) -> bool:
    """Whether a file of that path in a pipeline's folder, such as "model/config.json", may be uploaded."""
    return _PUBLIC.fullmatch(name) is not None


def public_files(folder: str | Path) -> list[str]:
    """Paths of the files in a folder that may be uploaded, sorted."""
    return sorted(name for name in _files(Path(folder)) if is_public(name))


def check_own_folder(folder: str | os.PathLike) -> None:
    """Raises ValueError if anything but the public files of a pipeline lies in a folder (hidden files aside).

    A pipeline has a folder of its own, so that whoever copies or uploads that folder by other means takes no private
    file along.
    """
    folder = Path(folder)
    private = sorted(name for name in _files(folder) if not is_public(name))
    if private:
        named = ", ".join(private[:3]) + (f" and {len(private) - 3} more" if len(private) > 3 else "")
        raise ValueError(
            f"{str(folder)!r} holds files that no pipeline has ({named}); save the pipeline to a folder of its own."
        )


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Uploads a saved pipeline with its card to the Hub: the files of `public_files`, whatever else is there.

    Args:
        folder: where the pipeline and its card were saved.
        repo_id: Hub id, "owner/name"; made if it does not exist.
        private, token, revision, commit_message, create_pr: as in `huggingface_hub`.

    Returns:
        Address of the commit; it holds all files, so the weights never stand there without their card.

    Raises:
        FileNotFoundError: the folder holds no card.
        ValueError: the card is not valid, or `PrivacyCard.verify` contradicts it. Nothing was uploaded.
    """
    contradictions = PrivacyCard.load(folder).verify(folder)
    if contradictions:
        raise ValueError(
            f"{str(folder)!r} is not what its card says, so it is not uploaded: {' '.join(contradictions)}"
        )
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    commit = api.create_commit(
        repo_id,
        [CommitOperationAdd(path_in_repo=name, path_or_fileobj=Path(folder) / name) for name in public_files(folder)],
        revision=revision,
        commit_message=commit_message or "Upload DPSpectralPipeline with its privacy card",
        create_pr=create_pr,
    )
    return str(commit)


def _files(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if not path.is_dir() and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix()


__all__ = ["check_own_folder", "is_public", "public_files", "publish"]
