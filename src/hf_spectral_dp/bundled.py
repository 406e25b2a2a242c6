"""The public models that come with the package; configs and scripts call one of them `bundled:NAME`."""

from pathlib import Path

CHECKPOINTS = Path(__file__).parent / "checkpoints"


def bundled_model(name: str) -> Path:
    """The folder of a public model that comes with the package, such as "photos", for any `from_pretrained`.

    Raises:
        ValueError: no such model; names those that there are.
    """
    known = sorted(path.name for path in CHECKPOINTS.iterdir() if path.is_dir())
    if name not in known:
        raise ValueError(f"name={name!r} is no model that comes with the package; use one of {', '.join(known)}.")
    return CHECKPOINTS / name


__all__ = ["CHECKPOINTS", "bundled_model"]
