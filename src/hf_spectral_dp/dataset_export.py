"""A synthetic dataset from a private generator: Parquet files that `datasets` reads, with a card that says what holds.

Images drawn from a model that was trained with differential privacy are post-processing: the guarantee of the model
holds for any number of them. So the dataset inherits it, word for word, and takes the model's `privacy.json` along.

The dataset is cut into shards. What a shard holds depends on the settings, the seed and its number only, and a shard is
written whole or not at all. So an export that was interrupted goes on where it stopped, on any number of processes, and
ends with the same files as one that was not.
"""

import hashlib
import html
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from accelerate import PartialState
from datasets import ClassLabel, Dataset, Features, Image, Value
from huggingface_hub import CommitOperationAdd, HfApi
from tqdm import tqdm

from .card import PrivacyCard
from .configuration_spectral import SpectralConfig
from .generation import check_device
from .pipeline_spectral import SAMPLING_VALUES, UPSCALING_MODES, DPSpectralPipeline
from .released_files import README_NAME, REPORT_NAME
from .whole_files import replace_files

SETTINGS_NAME = "export.json"


def export_dataset(
    source: str | Path,
    folder: str | Path,
    num_images: int,
    *,
    class_labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    seed: int = 0,
    shard_size: int = 1000,
    batch_size: int = 64,
    upscaling: str = "model",
    device: str | None = None,
    **sampling: float,
) -> Path:
    """Draws images into a folder that `datasets.load_dataset` reads; goes on with one that was begun.

    Call it in every process of `accelerate launch` or `torchrun`: each draws its share of the shards.

    Args:
        source: folder of a saved pipeline with its card, or a Hub id.
        folder: where the dataset goes: `data/train-*.parquet`, README.md, privacy.json.
        num_images: how many, in all.
        class_labels: the label of image i is `class_labels[i % len(class_labels)]`. Default: every class in turn, so
            that the numbers of images per class differ by one at most; no labels for a model without classes. Labels
            are published with the images and are NOT covered by the guarantee: take no frequencies from private data.
        prompts: for a model with text: image i shows `prompts[i % len(prompts)]`, which becomes the column "text".
            Prompts are published with the images and are NOT covered by the guarantee: take no private captions.
        seed: same seed, same images, on the same kind of device.
        shard_size: images per file. An interruption loses no more than one such file of each process.
        batch_size: images that are drawn at once.
        upscaling: one of `UPSCALING_MODES`.
        device: where to draw; default the accelerator of this process, or the CPU.
        sampling: `guidance_scale`, `temperature`, `top_k`, `top_p`, `attempts`;
            default the values saved with the pipeline.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: the pipeline has no card.
        ValueError: a setting out of range, a card that is contradicted, or a folder that another export was begun in.
            Nothing was drawn.
    """
    if device is not None:
        check_device(device)
    # Without being told, accelerate joins no processes on CPUs: each would take itself for the only one.
    on_cpu = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type == "cpu"
    state, folder = PartialState(cpu=on_cpu), Path(folder)
    if state.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise ValueError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} processes were started, but accelerate was set up before as"
            f" {state.num_processes}; do not make a PartialState or Accelerator before the export."
        )
    if not Path(source).is_dir():
        source = DPSpectralPipeline.download(str(source))
    conditions = _conditions(Path(source), class_labels, prompts)
    settings = _settings(Path(source), num_images, conditions, seed, shard_size, batch_size, upscaling, sampling)
    device = device or str(state.device)
    settings["made_with"] = {"torch": torch.__version__.partition("+")[0], "device": torch.device(device).type}
    if state.is_main_process:
        _begin(folder, settings)
    state.wait_for_everyone()
    pipeline = DPSpectralPipeline.from_pretrained(source).to(device)
    pipeline.set_progress_bar_config(disable=True)
    export_shards(pipeline, folder, state.process_index, state.num_processes)
    state.wait_for_everyone()
    if state.is_main_process:
        card = PrivacyCard.load(source)
        report, readme = (Path(source) / REPORT_NAME).read_bytes(), dataset_card(card, settings).encode()
        replace_files({folder / REPORT_NAME: report, folder / README_NAME: readme}, mark="0")
    state.wait_for_everyone()
    return folder


def export_shards(pipeline: DPSpectralPipeline, folder: Path, process_index: int = 0, num_processes: int = 1) -> None:
    """Draws every `num_processes`-th shard from `process_index` on that is not there, by the folder's settings.

    The pipeline must be that of the settings; `export_dataset` takes care of it.
    """
    settings = json.loads((folder / SETTINGS_NAME).read_text(encoding="utf-8"))
    files = list(shard_files(settings))
    for left in (folder / "data").glob(f".{process_index}-*"):
        left.unlink()  # half a shard of a process that died
    mine = range(process_index, len(files), num_processes)
    with tqdm(mine, desc="shards", disable=process_index > 0) as progress:
        for index in progress:
            if not (folder / files[index]).exists():
                shard = draw_shard(pipeline, settings, index)
                buffer = io.BytesIO()
                # The schema carries the features. Few rows per group, so that a viewer reads a page and not the file.
                pyarrow.parquet.write_table(shard.data.table, buffer, row_group_size=100)
                replace_files({folder / files[index]: buffer.getvalue()}, mark=str(process_index))


def draw_shard(pipeline: DPSpectralPipeline, settings: dict[str, Any], index: int) -> Dataset:
    """The images of one shard, with their labels where the model has some."""
    first = index * settings["shard_size"]
    numbers = range(first, min(first + settings["shard_size"], settings["num_images"]))
    # The generator of a shard depends on its number, so that no shard waits for another, and unrelated for all seeds.
    digest = hashlib.sha256(f"{settings['seed']} {index}".encode()).digest()
    generator = torch.Generator(pipeline.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    conditions: dict[str, Any] = {
        name: [values[number % len(values)] for number in numbers] for name, values in settings["conditions"].items()
    }
    images = pipeline(
        **conditions,
        num_images=1 if conditions else len(numbers),
        generator=generator,
        batch_size=settings["batch_size"],
        upscaling=settings["upscaling"],
        return_dict=False,
        **settings["sampling"],
    )[0]
    columns: dict[str, list] = {"image": [{"bytes": _png(image), "path": None} for image in images]}
    features = {"image": Image()}
    if "class_labels" in conditions:
        columns["label"] = conditions["class_labels"]
        names, count = pipeline.model.config.class_names or [], pipeline.model.config.num_classes
        features["label"] = ClassLabel(names=[*names, *map(str, range(len(names), count))])
    if "prompt" in conditions:
        columns["text"], features["text"] = conditions["prompt"], Value("string")
    return Dataset.from_dict(columns, features=Features(features))


def shard_files(settings: dict[str, Any]) -> Iterator[str]:
    """Paths in the folder, as `datasets` expects the shards of a split."""
    count = -(-settings["num_images"] // settings["shard_size"])
    return (f"data/train-{index:05d}-of-{count:05d}.parquet" for index in range(count))


def dataset_card(card: PrivacyCard, settings: dict[str, Any]) -> str:
    """README.md of the dataset: the guarantee of the model that drew it, and what that means for the images."""
    number, labels = settings["num_images"], settings["conditions"].get("class_labels", [])
    conditions, task = "", "unconditional-image-generation"
    if labels:
        conditions = f" Labels in turn: {', '.join(map(str, labels[:20]))}{' and so on' * (len(labels) > 20)}."
        conditions += " They are what was asked for; the guarantee does not speak of them."
        task = "image-classification"
    elif "prompt" in settings["conditions"]:
        conditions = " The column `text` holds what was asked for; the guarantee does not speak of it."
        task = "text-to-image"
    size = next(name for limit, name in _SIZES if number < limit)
    # The guarantee names the unit in the publisher's words: text, never markup.
    guarantee = html.escape(" ".join(card.guarantee.split()))
    return f"""---
pretty_name: Synthetic images with differential privacy
tags:
- synthetic
- differential-privacy
task_categories:
- {task}
size_categories:
- {size}
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
---

# Synthetic images with differential privacy

{number:,} images, all of them drawn from a generator; none is a photograph.{conditions}

> {guarantee}

That is the guarantee of the generator's training, as its card states it ([`{REPORT_NAME}`]({REPORT_NAME}), word
for word). Drawing images is post-processing: it looks at no private image, so the guarantee holds for all images here
together, for any others that are drawn, and for whatever is computed from them. It does not add up with their number.

What it does not say: that no image resembles a private one (the generator may draw what is common among them), that
these images are free of the biases of those it was trained on, or that they serve your purpose.

Drawn with seed {settings["seed"]}, `upscaling="{settings["upscaling"]}"`, sampling values
`{json.dumps(settings["sampling"])}` (the rest as saved with the generator), torch {settings["made_with"]["torch"]} on
{settings["made_with"]["device"]}. SHA-256 of the generator's `{REPORT_NAME}`: `{settings["source"]}`.
"""


def publish_dataset(folder: str | Path, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Uploads a finished dataset with its card to the Hub in one commit; returns the commit's address.

    Raises:
        FileNotFoundError: the export is not finished. Nothing was uploaded.
        ValueError: the card is not that of the generator, or the README not that of card and settings.
    """
    folder = Path(folder)
    settings = json.loads((folder / SETTINGS_NAME).read_text(encoding="utf-8"))
    names = [*shard_files(settings), README_NAME, REPORT_NAME]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{str(folder)!r} lacks {', '.join(missing[:3])}; finish the export, then publish it.")
    if (
        hashlib.sha256((folder / REPORT_NAME).read_bytes()).hexdigest() != settings["source"]
        or (folder / README_NAME).read_bytes() != dataset_card(PrivacyCard.load(folder), settings).encode()
    ):
        raise ValueError(
            f"{REPORT_NAME} or {README_NAME} in {str(folder)!r} is not what the export wrote, and both speak of a"
            " guarantee; export again to an empty folder."
        )
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names]
    message = "Upload synthetic images with their privacy card"
    return str(api.create_commit(repo_id, operations, repo_type="dataset", commit_message=message))


_SIZES = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
          (10**8, "10M<n<100M"), (10**9, "100M<n<1B"), (float("inf"), "n>1B")]  # fmt: skip


def _settings(
    source: Path, num_images: int, conditions: dict[str, list], seed: int, shard_size: int, batch_size: int,
    upscaling: str, sampling: dict[str, float],
) -> dict[str, Any]:  # fmt: skip
    """Everything that the images depend on, checked."""
    PrivacyCard.load(source).raise_contradictions(source)
    if num_images < 1 or batch_size < 1 or not 1 <= shard_size <= 100_000:
        raise ValueError(
            f"num_images={num_images} and batch_size={batch_size} must be at least 1, shard_size={shard_size} in"
            " [1, 100000]."
        )
    if upscaling not in UPSCALING_MODES:
        raise ValueError(f"upscaling={upscaling!r} is unknown; use one of {', '.join(UPSCALING_MODES)}.")
    if unknown := set(sampling) - set(SAMPLING_VALUES):
        raise ValueError(f"{sorted(unknown)} are unknown; use {', '.join(SAMPLING_VALUES)}.")
    return {
        "source": hashlib.sha256((source / REPORT_NAME).read_bytes()).hexdigest(),
        "num_images": num_images,
        "conditions": conditions,
        "seed": seed,
        "shard_size": shard_size,
        "batch_size": batch_size,
        "upscaling": upscaling,
        "sampling": sampling,
    }


def _conditions(source: Path, class_labels: Sequence[int] | None, prompts: Sequence[str] | None) -> dict[str, list]:
    """What the images show in turn, by the name of the pipeline's argument; empty for images without condition."""
    config = SpectralConfig.from_pretrained(source / "model")
    if prompts is not None:
        if class_labels is not None or config.conditioning != "text":
            raise ValueError(
                f"prompts are for a model with text alone, but this one has conditioning={config.conditioning!r}; use"
                " class_labels, or nothing."
            )
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"prompts={texts[:5]} must be texts, at least one.")
        return {"prompt": texts}
    classes = config.num_classes
    labels = list(range(classes)) if class_labels is None else [int(label) for label in class_labels]
    if class_labels is not None and (not labels or not all(0 <= label < classes for label in labels)):
        raise ValueError(f"class_labels={labels[:5]} must be labels in [0, {classes}), at least one.")
    return {"class_labels": labels} if labels else {}


def _begin(folder: Path, settings: dict[str, Any]) -> None:
    """Makes the folder with its settings, or checks that one that is there was begun with the same."""
    path = folder / SETTINGS_NAME
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        begun = any((folder / "data").glob("*.parquet"))  # settings alone are of an export that could not begin
        differ = [f"{name}={there.get(name)} there, {value} now" for name, value in settings.items()
                  if there.get(name) != value]  # fmt: skip
        if differ and begun:
            raise ValueError(
                f"{str(folder)!r} was begun with other settings ({'; '.join(differ)}); use another folder, or the same"
                " settings to go on."
            )
        for name in shard_files(settings):
            shard = folder / name
            if shard.exists():
                try:
                    pyarrow.parquet.read_metadata(shard)
                except (pyarrow.ArrowException, OSError) as error:
                    raise ValueError(f"{shard} is damaged ({error}); delete it and export again.") from error
        if not differ:
            return
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{str(folder)!r} holds other files; use a folder of its own.")
    (folder / "data").mkdir(parents=True, exist_ok=True)
    replace_files({path: (json.dumps(settings, indent=2) + "\n").encode()}, mark="0")


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


__all__ = ["dataset_card", "draw_shard", "export_dataset", "export_shards", "publish_dataset", "shard_files"]
