"""The one way out: a saved pipeline or model with its card, in one commit, and nothing that lies beside them."""

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from .card import PrivacyCard
from .released_files import public_files


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


__all__ = ["publish"]
