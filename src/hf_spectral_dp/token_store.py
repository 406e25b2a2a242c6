"""Streamed images to memory-mapped token rows; one row is one image with its label or its captions.

It is one privacy unit, unless a column names the person it belongs to: then all rows of a person are.

Images pass through once, in batches: decode, preprocess, encode, append to an Arrow file. Memory is bounded by one
batch whatever the number of images. The rows are then read by index through the page cache, because Poisson sampling
needs random access. A store appears under its name only when it is complete.

Tokens are as sensitive as the images they come from: the codec decodes them. Keep the folder as private as the data.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from tqdm.auto import tqdm

from .captions import Captions, CaptionWriter, captions_of
from .codec import codec_fingerprint
from .image_rows import Example, batches_of, examples_of, kept_of, total_of
from .privacy.noise import system_generator
from .privacy.units import FirstRows
from .row_file import RowFile
from .text_encoder import check_text_encoder
from .views import Views
from .whole_files import new_folder

logger = logging.getLogger(__name__)

_TOKENS = "tokens.arrow"
_FACTS = "store.json"
_FORMAT = 1


class TokenStore:
    """Token rows of a data set, memory-mapped. Made by `build_token_store`, opened by `TokenStore.load`.

    Attributes:
        folder: where the store lies.
        dataset: the rows as a `datasets.Dataset` with the column "input_ids", "unit" where persons are known, and
            "captions", the numbers of a row's captions in `captions`.
        row_length: ids per row, 1 + T: the class or null token, then the image's T tokens.
        views: token rows kept of every image, of which one is shown at a time; see `views.Views`.
        units: number of the person of every row, (rows,) int64, in order of first appearance; None if each row is a
            unit of its own. As secret as the rows; names are not kept.
        unit: what the privacy unit is, in words.
        captions: the text states of all captions, or None without text.
        fingerprint: SHA-256 (hex) of all rows in order, so of tokens, labels and text states, and of the units. Secret
            as the data are: it confirms a guess of the whole set.
        codec_fingerprint: SHA-256 (hex) of the codec that made the rows; see `check_codec`.
        report: {"images": rows, "undecodable": images left out, "unlabelled": rows with the null token for want of a
            label}; with units also {"units": persons, "beyond_limit": images left out}, with captions {"captions":
            distinct ones, "uncaptioned": rows without any}.
    """

    def __init__(self, folder: str | Path):
        """Opens a complete store.

        Raises:
            FileNotFoundError: there is no store in the folder.
            ValueError: the files do not belong together, or were written in a format this version does not know.
        """
        self.folder = Path(folder)
        try:
            facts = json.loads((self.folder / _FACTS).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{self.folder} holds no token store ({_FACTS}); make one with build_token_store."
            ) from error
        if facts.get("format") != _FORMAT:
            raise ValueError(
                f"{self.folder} has format {facts.get('format')}, this version reads {_FORMAT}; build it again."
            )
        self.row_length: int = facts["row_length"]
        self.fingerprint: str = facts["fingerprint"]
        self.codec_fingerprint: str = facts["codec_fingerprint"]
        self.report: dict[str, int] = facts["report"]
        self.dataset = Dataset.from_file(str(self.folder / _TOKENS))
        self.views: int = (facts.get("views") or {"count": 1})["count"]
        self._coins = system_generator()
        limit = facts.get("max_rows_per_unit")
        text = facts.get("text")
        self.captions = Captions(self.folder, text, self.dataset.data.column("captions")) if text else None
        belongings = "its label" if text is None else "all its captions"
        self.unit: str = f"one row of the training data (one image with {belongings})"
        self.units: np.ndarray | None = None
        if limit is not None:
            column = facts["unit_column"]
            self.unit = f"all rows with one value of {column!r} (a person; at most {limit} images of each are used)"
            self.units = self.dataset.data.column("unit").to_numpy()
        chunks = self.dataset.data.column("input_ids").chunks
        self._chunks = [_rows(chunk, self.views, self.row_length) for chunk in chunks]
        if len(self) != self.report["images"]:
            raise ValueError(f"{self.folder} holds {len(self)} rows, not {self.report['images']}; build it again.")

    @classmethod
    def load(cls, folder: str | Path) -> "TokenStore":
        """Opens the store in `folder`; see the constructor."""
        return cls(folder)

    def __len__(self) -> int:
        return sum(len(chunk) for chunk in self._chunks)

    def __getitem__(self, indices: Any) -> dict[str, torch.Tensor]:
        """Rows by index. Of an image with several views, one.

        Formal guarantee: which view a row shows is drawn uniformly, independently of all else and anew at every call,
        by the generator that also draws batches. Given these draws every row is a function of one image; so the image
        with all its views is the unit, by the argument of `privacy.units.OneRowPerUnit`.

        Args:
            indices: integer array or sequence (b,), possibly empty or with repetitions; or one integer.

        Returns:
            {"input_ids": LongTensor (b, 1 + T)}, or (1 + T,) for one integer. With captions also {"text_states":
            float16 (b, K, text_width)} of one caption of each row, see `Captions.draw`.

        Raises:
            IndexError: an index outside [0, len).
            TypeError: indices that are not integers (a boolean mask, for instance).
        """
        wanted = np.asarray(indices)
        if wanted.size and not np.issubdtype(wanted.dtype, np.integer):
            raise TypeError(f"indices of dtype {wanted.dtype} must be integers; turn a mask into them with nonzero().")
        if wanted.size and not (0 <= wanted.min() and wanted.max() < len(self)):
            raise IndexError(f"indices in [{wanted.min()}, {wanted.max()}] but the store has {len(self)} rows.")
        flat = wanted.reshape(-1).astype(np.int64)
        rows = np.empty((len(flat), self.row_length), dtype=np.int64)
        chunks, size = self._chunks, len(self._chunks[0])  # all chunks but the last have the same size
        shown = self._coins.integers(self.views, size=len(flat))
        for position, (index, view) in enumerate(zip(flat.tolist(), shown.tolist(), strict=True)):
            rows[position] = chunks[index // size][index % size, view]
        found = {"input_ids": torch.from_numpy(rows.reshape(*wanted.shape, self.row_length))}
        if self.captions is not None:
            states = self.captions.draw(flat)
            found["text_states"] = states.reshape(*wanted.shape, *states.shape[1:])
        return found

    def check_codec(self, model: Any) -> None:
        """Raises ValueError unless `model` holds the very codec that made these rows."""
        if codec_fingerprint(model.codec) != self.codec_fingerprint:
            raise ValueError(
                f"the tokens in {self.folder} were made by codec {self.codec_fingerprint[:12]}, the model holds"
                f" {codec_fingerprint(model.codec)[:12]}; build the store again with this model."
            )

    def verify(self) -> bool:
        """Reads every row and recomputes the fingerprint; True if the rows are what was written."""
        digest = hashlib.sha256()
        for chunk in self._chunks:
            digest.update(chunk.astype("<i4").tobytes())
        if self.units is not None:
            digest.update(self.units.astype("<i8").tobytes())
        if self.captions is not None:
            self.captions.update(digest)
        return digest.hexdigest() == self.fingerprint

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder,)

    def __repr__(self) -> str:
        return f"TokenStore({str(self.folder)!r}, rows={len(self)}, row_length={self.row_length})"


def build_token_store(
    dataset: Any,
    model: Any,
    image_processor: Any,
    folder: str | Path,
    *,
    image_column: str = "image",
    label_column: str | None = None,
    class_names: Sequence[str] | None = None,
    caption_column: str | None = None,
    text_encoder: Any = None,
    tokenizer: Any = None,
    unit_column: str | None = None,
    max_rows_per_unit: int | None = None,
    views: Views | None = None,
    batch_size: int = 256,
    progress: bool = True,
    overwrite: bool = False,
) -> TokenStore:
    """Tokenises a data set in one pass, without ever holding more than a batch of images.

    Args:
        dataset: a `datasets.Dataset` or `IterableDataset` (see `load_images`), or any iterable of mappings.
        model: a `SpectralTokenizerForCausalLM`; its `codec` encodes on the device where it lies.
        image_processor: a `SpectralImageProcessor` with the model's `image_size` and `num_channels`.
        folder: where to put the store; made anew.
        image_column: column of the images, in any form that `decode_image` takes.
        label_column: column of integer class labels, or None for an unconditional set. A label None or -1 means
            unlabelled and gives the null token.
        class_names: the names of the classes in the order of their numbers, a PUBLIC list, for labels that are text or
            the sub-folders of a folder of images. A name that is not on it means unlabelled. Numbers that follow the
            names that occur would not do: one image of a class of its own would renumber all others.
        caption_column: column of captions, one or several an image, in any form that `captions.captions_of` takes; for
            a model with `text_width`. An image without captions gets the null condition.
        text_encoder, tokenizer: the frozen, PUBLIC encoder of the captions, see `text_encoder.load_text_encoder`. It
            runs where it lies, once for every distinct caption.
        unit_column: column that names the person an image belongs to (text or a number), or None: every image is a unit
            of its own. The store remembers who owns which row, and training then protects the person. Memory grows
            with the number of persons.
        max_rows_per_unit: at most so many images of a person are kept: the first ones, in the order of the data, that
            can be decoded. Which are kept depends on that person's images alone.
        views: which changed views of every image to keep beside it (data augmentation), or None. A store with k views
            is k times as large and takes k times as long to make; training takes as long as without.
        batch_size: images per batch.
        progress: show a progress bar.
        overwrite: replace a store that is already there.

    Returns:
        The store. Images that cannot be decoded are left out and counted in `report["undecodable"]`; they never stop
        the run. That count is kept in the store and nowhere else: it is as private as the images.

    Formal guarantee: every row, with its views, is a function of one image with its label or captions, and so is
    whether there is a row (up to the time limit of `decode_image`). Adding or removing one image therefore adds or
    removes at most one row, and one that cannot be decoded moves nothing at all: it contributes zero to every sum ever
    computed from the store.

    Raises:
        FileExistsError: the folder exists and `overwrite` is False, or it is no token store.
        ValueError: fields that do not fit together (before any image is read), a label outside the model's classes,
            an image without a person, or not one decodable image.
    """
    folder = Path(folder)
    units = None
    if unit_column is not None or max_rows_per_unit is not None:
        units = FirstRows(unit_column, max_rows_per_unit)
    columns = (image_column, label_column, caption_column, unit_column)
    _check(dataset, model, image_processor, columns, batch_size, class_names)
    if caption_column is not None:
        check_text_encoder(text_encoder, tokenizer, model.config)
    if folder.exists() and not (overwrite and (folder / _FACTS).exists()):
        remedy = "pass overwrite=True or load it" if (folder / _FACTS).exists() else "choose a new folder"
        raise FileExistsError(f"folder={str(folder)!r} already exists; {remedy}.")

    def write(scratch: Path) -> None:
        captions = None
        if caption_column is not None:
            captions = CaptionWriter(scratch, text_encoder, tokenizer, model.config.max_text_tokens)
        examples = examples_of(dataset, columns)
        if class_names is not None:
            feature = (getattr(dataset, "features", None) or {}).get(label_column)
            examples = _numbered(examples, feature.names if isinstance(feature, ClassLabel) else None, class_names)
        total = total_of(dataset)
        counts = _write(examples, model, image_processor, scratch, batch_size, total, progress, units, captions, views)
        if label_column is not None and counts["unlabelled"] == counts["images"]:
            raise ValueError(
                f"not one image has a class: label_column={label_column!r} holds none of class_names={class_names!r};"
                " write the names as the data have them, or leave out label_column for a model without classes."
            )

    new_folder(folder, write)  # a killed process leaves rows of private images beside it until the next call
    return TokenStore(folder)


def _numbered(
    examples: Iterator[Example], known: Sequence[str] | None, class_names: Sequence[str]
) -> Iterator[Example]:
    """The examples, each label by its place among `class_names`, None if it has none; `known`: names of numbers."""
    numbers = {name: number for number, name in enumerate(class_names)}
    for image, label, *others in examples:
        if known is not None and isinstance(label, int) and 0 <= label < len(known):
            label = known[label]
        elif isinstance(label, int) and label != -1:
            raise ValueError(f"label {label} is a number without a name; leave out class_names={class_names!r}.")
        yield image, numbers.get(label), *others


def _check(
    dataset: Any, model: Any, image_processor: Any, columns: tuple[str | None, ...], batch_size: int,
    class_names: Sequence[str] | None,
) -> None:  # fmt: skip
    """Refuses, before anything is read, what could not work."""
    config, (_, label_column, caption_column, _) = model.config, columns
    if class_names is not None:
        listed = [] if isinstance(class_names, str) else list(class_names)
        fits = 0 < len(listed) <= config.num_classes and all(isinstance(name, str) for name in listed)
        if label_column is None or not fits or len(set(listed)) < len(listed):
            raise ValueError(
                f"class_names={class_names!r} with label_column={label_column!r}: give a list of different names, at"
                f" most the model's num_classes={config.num_classes}, and the column that holds them."
            )
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    for name in ("image_size", "num_channels"):
        ours, theirs = getattr(config, name), getattr(image_processor, name)
        if ours != theirs:
            raise ValueError(
                f"{name}={theirs} of the image processor differs from the model's {ours}; make them equal."
            )
    if label_column is not None and config.num_classes == 0:
        raise ValueError(
            f"label_column={label_column!r} but the model has num_classes=0;"
            " leave it out or use a class-conditional model."
        )
    if (caption_column is None) == (config.conditioning == "text"):
        raise ValueError(
            f"caption_column={caption_column!r} and text_width={config.text_width} in the model: captions need a model"
            " with text, and such a model needs captions; load it with text_width=<width of the text encoder's states>."
        )
    features = getattr(dataset, "features", None)
    if features is None:
        return
    names = ("image_column", "label_column", "caption_column", "unit_column")
    for name, column in zip(names, columns, strict=True):
        if column is not None and column not in features:
            raise ValueError(f"{name}={column!r} is not a column of the data; choose one of {sorted(features)}.")
    if label_column is not None:
        feature, named = features[label_column], class_names is not None
        if named and not isinstance(feature, ClassLabel) and getattr(feature, "dtype", None) in ("int32", "int64"):
            raise ValueError(
                f"label_column={label_column!r} holds numbers without names; leave out class_names={class_names!r}."
            )
        source = getattr(getattr(dataset, "info", None), "builder_name", None)
        if isinstance(feature, ClassLabel) and source == "imagefolder" and not named:
            raise ValueError(
                f"label_column={label_column!r} is numbered by the sub-folders that there are, so that one image may"
                " renumber the classes of all others; give class_names, the public list of classes in order, such as"
                f" {feature.names}."
            )
        if isinstance(feature, ClassLabel) and feature.num_classes > config.num_classes and not named:
            raise ValueError(
                f"label_column={label_column!r} has {feature.num_classes} classes, more than the model's"
                f" num_classes={config.num_classes}; use a model with enough classes."
            )
        if getattr(feature, "dtype", None) in ("string", "large_string") and not named:
            raise ValueError(
                f"label_column={label_column!r} holds text; give class_names, the public list of classes in order. Do"
                " not read it off the data: an image of a class of its own would renumber the others."
            )


def _write(
    examples: Iterator[Example],
    model: Any,
    image_processor: Any,
    folder: Path,
    batch_size: int,
    total: int | None,
    progress: bool,
    units: FirstRows | None,
    captions: CaptionWriter | None,
    views: Views | None,
) -> dict[str, int]:
    """Streams the rows into `folder` and puts the facts beside them; returns `TokenStore.report`."""
    config = model.config
    row_length = 1 + config.layout.length
    width, highest = row_length * (views.count if views else 1), max([config.null_token_id, *config.class_token_ids])
    digest = hashlib.sha256()
    report = {"images": 0, "undecodable": 0, "unlabelled": 0}
    first_reason = None
    try:
        with (
            RowFile(folder / _TOKENS, width, highest, units, captions is not None) as file,
            tqdm(total=total, unit="image", desc="tokenising", disable=not progress) as bar,
        ):
            for number, batch in enumerate(batches_of(examples, batch_size)):
                pixels, kept, reasons = kept_of(batch, image_processor, units)
                first_reason = first_reason or next(iter(reasons), None)
                report["undecodable"] += len(reasons)
                if kept:
                    labels = [label for _, label, *_ in kept]
                    starts = _start_tokens(labels, config, number * batch_size)
                    shown = views.of(pixels) if views and pixels is not None else [pixels]
                    parts = [part for view in shown for part in (starts[:, None], _encode(view, model))]
                    rows = np.concatenate(parts, axis=1)
                    digest.update(rows.astype("<i4").tobytes())
                    report["images"] += len(rows)
                    report["unlabelled"] += sum(label is None or label == -1 for label in labels)
                    texts = [captions_of(captioned) for _, _, captioned, _ in kept] if captions is not None else []
                    if captions is not None:
                        report["uncaptioned"] = report.get("uncaptioned", 0) + sum(not each for each in texts)
                    file.append(rows, captions.numbers(texts) if captions is not None else [])
                bar.update(len(batch))
            file.finish()
    finally:
        examples.close()  # type: ignore[attr-defined]  # a generator: lets go of the source now, not at exit
    if report["images"] == 0:
        failed = f"; the first failed with {first_reason!r}" if first_reason else ""
        raise ValueError(
            f"not one image could be decoded, {report['undecodable']} were tried{failed}. Check image_column and the"
            " source."
        )
    if units is not None:
        digest.update(np.asarray(units.units, dtype="<i8").tobytes())
        report |= {"units": max(units.units) + 1, "beyond_limit": units.beyond_limit}
    text = None
    if captions is not None:
        text = captions.close()
        kept_captions = Captions(folder, text, Dataset.from_file(str(folder / _TOKENS)).data.column("captions"))
        kept_captions.update(digest)
        report["captions"] = len(kept_captions)
    # Whether there were any depends on the private images; a log is not as private as the store is.
    logger.info("images that cannot be decoded are left out; report['undecodable'] counts them.")
    facts = {
        "format": _FORMAT,
        "row_length": row_length,
        "fingerprint": digest.hexdigest(),
        "codec_fingerprint": codec_fingerprint(model.codec),
        "report": report,
        "text": text,
        "unit_column": units and units.column,
        "max_rows_per_unit": units and units.limit,
        "views": views and asdict(views),
    }
    (folder / _FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return report


def _start_tokens(labels: Sequence[Any], config: Any, first_row: int) -> np.ndarray:
    """Class tokens (b,) of the labels; the null token where there is none."""
    tokens, class_tokens = np.full(len(labels), config.null_token_id, dtype=np.int64), config.class_token_ids
    for position, label in enumerate(labels):
        if label is None or label == -1:
            continue
        if isinstance(label, float) and label.is_integer():  # as a column of CSV with an empty cell gives them
            label = int(label)
        if not isinstance(label, int | np.integer) or not 0 <= label < config.num_classes:
            raise ValueError(
                f"label {label!r} near row {first_row + position} is not in 0..{config.num_classes - 1};"
                " use a model with enough classes, or map the labels."
            )
        tokens[position] = class_tokens[label]
    return tokens


@torch.no_grad()
def _encode(pixels: Any, model: Any) -> np.ndarray:
    """Image tokens (b, T) of pixel values, encoded where the codec lies."""
    device = next((tensor.device for tensor in model.codec.state_dict().values()), torch.device("cpu"))
    return model.codec.encode(pixels.to(device)).cpu().numpy()


def _rows(chunk: Any, views: int, row_length: int) -> np.ndarray:
    """View (rows, views, row_length) of a memory-mapped Arrow chunk; nothing is copied."""
    return chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, views, row_length)


__all__ = ["TokenStore", "build_token_store"]
