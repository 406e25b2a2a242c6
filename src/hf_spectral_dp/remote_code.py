"""A model that loads without this package: its source files beside its weights, for `trust_remote_code=True`.

For models alone (`AutoModelForCausalLM`, `AutoImageProcessor`). A pipeline is not exported so: diffusers fetches one
source file per component from the Hub and none of those that it imports, and loses even that when it is saved again.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from .image_processing_spectral import SpectralImageProcessor
from .modeling_spectral import SpectralTokenizerForCausalLM
from .released_files import check_own_folder


def save_with_code(
    model: SpectralTokenizerForCausalLM, image_processor: SpectralImageProcessor, folder: str | Path
) -> None:
    """Saves a model and its image processor with the source files that they need.

    Readers need torch, transformers, PyWavelets and Pillow, and `trust_remote_code=True`, which runs the files of that
    folder. Where this package is imported, its own classes are used instead.

    Args:
        folder: a folder that holds nothing but a model, or does not exist. Complete afterwards, or as it was.

    Raises:
        ValueError: other files lie in the folder.
    """
    folder = Path(folder)
    check_own_folder(folder, pipeline=False)
    configuration = type(model.config)
    references: dict[str, dict[str, type]] = {
        "config.json": {"AutoConfig": configuration, "AutoModelForCausalLM": type(model)},
        "preprocessor_config.json": {"AutoImageProcessor": type(image_processor)},
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        staging = Path(scratch)
        model.save_pretrained(staging)
        image_processor.save_pretrained(staging)
        for name, classes in references.items():
            # Written here, not by `register_for_auto_class`: that takes every class whose name holds "Tokenizer" for a
            # pair of tokenizers, and nobody could load what it writes.
            fields: dict[str, Any] = json.loads((staging / name).read_text(encoding="utf-8"))
            fields["auto_map"] = {auto: f"{_file(kind).stem}.{kind.__name__}" for auto, kind in classes.items()}
            (staging / name).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            for kind in classes.values():
                for source in [_file(kind), *map(Path, get_relative_import_files(_file(kind)))]:
                    shutil.copyfile(source, staging / source.name)
        folder.mkdir(exist_ok=True)
        for path in staging.iterdir():
            path.replace(folder / path.name)


def _file(kind: type) -> Path:
    return Path(str(sys.modules[kind.__module__].__file__))


__all__ = ["save_with_code"]
