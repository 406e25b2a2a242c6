"""To the Hub and back: a saved pipeline or model with its card in one commit, and nothing that lies beside them."""

import filecmp
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import PreTrainedModel

from .card import PrivacyCard
from .released_files import README_NAME, REPORT_NAME, SAMPLES_NAME, is_public, public_files

# What may be fetched: data that the installed classes read. No code, and no pickle, which could carry some; no name
# that leads out of the folder. `*` also matches slashes.
_WANTED = ["*.json", "*.safetensors", README_NAME, SAMPLES_NAME, "LICENSE*", "*/vocab.txt", "*/merges.txt", "*.model"]
_UNWANTED = ["*..*", "/*", ".*", "*/.*", "*:*"]


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
    """Uploads a saved pipeline, or a model alone, with its card to the Hub: the files of the card.

    What an earlier upload left there and this one does not hold goes in the same commit, so that the repository never
    holds weights of which the card does not speak.

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
    PrivacyCard.load(folder).raise_contradictions(folder)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    names = public_files(folder)
    stale = [
        name
        for name in api.list_repo_files(repo_id, revision=revision)
        if name not in names and (is_public(name) or is_public(name, pipeline=False))
    ]
    commit = api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=Path(folder) / name) for name in names),
            *(CommitOperationDelete(path_in_repo=name) for name in stale),
        ],
        revision=revision,
        commit_message=commit_message or "Upload model with its privacy card",
        create_pr=create_pr,
    )
    return str(commit)


def check_saved(components: Mapping[str, Any], folder: Path) -> None:
    """Whether a saved pipeline holds exactly the weights that saving its models now would write.

    Args:
        components: of the pipeline, by name; those that are no models are not looked at.

    Raises:
        ValueError: weights in memory that are not in the folder.
    """
    for name, model in components.items():
        if not isinstance(model, PreTrainedModel):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            model.save_pretrained(scratch)
            now, saved = ({path.name for path in each.glob("*.safetensors")} for each in (Path(scratch), folder / name))
            same = (filecmp.cmp(Path(scratch) / file, folder / name / file, shallow=False) for file in now)
            if now != saved or not all(same):
                raise ValueError(
                    f"the weights of {name} in memory are not those in {str(folder)!r}; save the pipeline and its card"
                    " again."
                )


def fetch(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    with_code: bool = False,
) -> str:
    """Downloads a published pipeline or model into the cache: data files only, and nothing is run.

    Args:
        repo_id: Hub id, "owner/name".
        revision, token, cache_dir, force_download, local_files_only: as in `huggingface_hub`.
        with_code: also source files, to compare them with the card.

    Returns:
        The local folder.

    Raises:
        FileNotFoundError: no Hub id; or not here, and the Hub cannot be reached.
        OSError: the Hub refuses, or knows no such repository.
    """
    if repo_id.count("/") != 1 or not all(repo_id.split("/")):
        raise FileNotFoundError(f"{repo_id!r} is neither a folder that exists nor a Hub id (owner/name); name either.")
    try:
        return snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            allow_patterns=[*_WANTED, "*.py"] if with_code else _WANTED,
            ignore_patterns=_UNWANTED,
        )
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo_id!r} is no folder here, was not downloaded before, and was not fetched from the Hub now; check the"
            f" name and the connection. {error}"
        ) from error


def strangers(repo_id: str, folder: str | Path, *, revision: str | None = None, token: str | None = None) -> list[str]:
    """Names of the files in a repository that its card does not list, hidden ones aside; `fetch` leaves most there."""
    listed = {entry["path"] for entry in PrivacyCard.load(folder).report["released"]} | {README_NAME, REPORT_NAME}
    names = HfApi(token=token).list_repo_files(repo_id, revision=revision)
    hidden = [name for name in names if any(part.startswith(".") for part in name.split("/"))]
    return sorted(set(names) - listed - set(hidden))


__all__ = ["check_saved", "fetch", "publish", "strangers"]
