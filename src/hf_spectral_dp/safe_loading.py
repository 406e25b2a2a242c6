"""Loading that cannot run anything: weights come from safetensors, file names stay in their folder."""

import json
import os
from pathlib import Path
from typing import Any

from .private_marks import marks

REPORT_NAME = "privacy.json"


class HubModel:
    """For models: how they come from the Hub and go there. To be named before the class of transformers."""

    @classmethod
    def from_pretrained(cls, *args: Any, use_safetensors: bool | None = True, **kwargs: Any) -> Any:
        """As in transformers, but weights are read from .safetensors only: there is no way back to a pickle.

        Raises:
            ValueError: `use_safetensors=False`, or an index of weights that names a file outside of the folder.
            OSError: there are no .safetensors weights.
        """
        if use_safetensors is False:
            raise ValueError(
                "use_safetensors=False would read a pickle, which can run code; convert the weights to safetensors."
            )
        source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        if isinstance(source, str | os.PathLike) and Path(source).is_dir():
            check_shards(source)
        return super().from_pretrained(*args, use_safetensors=True, **kwargs)  # type: ignore[misc]

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        save_peft_format: bool = True,
        **kwargs: Any,
    ) -> None:
        """As in transformers; with `push_to_hub`, what `push_to_hub` refuses is refused before anything is saved.

        All arguments are named, since diffusers looks which ones a model knows.

        Raises:
            ValueError: as `push_to_hub`.
        """
        if push_to_hub:
            self._check_public()
        super().save_pretrained(  # type: ignore[misc]
            save_directory, is_main_process, state_dict, push_to_hub, max_shard_size, variant,
            save_peft_format=save_peft_format, **kwargs,
        )  # fmt: skip

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, for models that saw no private data: the README is a stock one, and there is no card.

        Raises:
            ValueError: the model was loaded from a folder with a privacy card, which would stay behind, or its config
                names a private run.
        """
        self._check_public()
        return super().push_to_hub(*args, **kwargs)  # type: ignore[misc]

    def _check_public(self) -> None:
        if found := marks(self):
            raise ValueError(
                f"the model came out of the private run {found[0][:12]!r}, and no card would say what that cost; save"
                " it with its PrivacyCard, and upload both by publication.publish(folder, repo_id)."
            )
        folder = Path(self.name_or_path)  # type: ignore[attr-defined]
        for place in (folder, folder.parent):
            if folder.is_dir() and (place / REPORT_NAME).is_file():
                raise ValueError(
                    f"{str(place)!r} holds a privacy card, which would stay behind; upload both by"
                    " publication.publish(folder, repo_id), or by push_to_hub of the pipeline."
                )


def check_index(path: str | Path, class_name: str) -> None:
    """Raises unless a file is the `model_index.json` of a pipeline class.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or names another class, such as one in a source file beside it.
    """
    try:
        fields = json.loads(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} does not exist, so this is no pipeline; name a folder or Hub id that save_pretrained or"
            " push_to_hub wrote, or load a model alone by AutoModelForCausalLM.from_pretrained."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no readable JSON ({error}); save or download the pipeline again.") from error
    found = fields.get("_class_name") if isinstance(fields, dict) else fields
    if found != class_name:
        raise ValueError(
            f"{path} names the class {str(found)[:100]!r}, not {class_name}; load it with the class that saved it. Code"
            " beside a model is never run."
        )


def check_shards(folder: str | os.PathLike) -> None:
    """Raises ValueError if the index of a sharded checkpoint below a folder is unreadable, or names a file elsewhere
    or a hidden one."""
    for index in sorted(Path(folder).rglob("*.safetensors.index*.json")):  # of a variant: .index.fp16.json
        try:
            names = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{index} is no index of weights ({error}); download or save them again.") from error
        for name in names:
            if not isinstance(name, str) or not name or Path(name).name != name or "\\" in name or name[0] == ".":
                raise ValueError(
                    f"{index} names the file {name!r}, which may lie outside of its folder, or is hidden and on no"
                    " card; do not load this."
                )


__all__ = ["REPORT_NAME", "HubModel", "check_index", "check_shards"]
