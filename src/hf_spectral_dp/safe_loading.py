"""Loading that cannot run anything: weights come from safetensors, file names stay in their folder."""

import json
from pathlib import Path
from typing import Any


class SafetensorsOnly:
    """For models: `from_pretrained` reads .safetensors and never falls back to a pickle."""

    @classmethod
    def from_pretrained(cls, *args: Any, use_safetensors: bool | None = True, **kwargs: Any) -> Any:
        """As in transformers.

        Raises:
            ValueError: `use_safetensors=False`.
            OSError: there are no .safetensors weights.
        """
        if use_safetensors is False:
            raise ValueError(
                "use_safetensors=False would read a pickle, which can run code; convert the weights to safetensors."
            )
        return super().from_pretrained(*args, use_safetensors=True, **kwargs)  # type: ignore[misc]


def check_shards(folder: str | Path) -> None:
    """Raises ValueError if the index of a sharded checkpoint below a folder is unreadable or names a file elsewhere."""
    for index in sorted(Path(folder).rglob("*.safetensors.index.json")):
        try:
            names = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{index} is no index of weights ({error}); download or save them again.") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or "\\" in name:
                raise ValueError(
                    f"{index} names the file {name!r}, which may lie outside of its folder; do not load this checkpoint."
                )


__all__ = ["SafetensorsOnly", "check_shards"]
