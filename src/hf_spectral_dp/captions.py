"""Captions of private images, encoded once and kept as memory-mapped text states.

Every distinct caption is encoded when it is first met and kept once, in float16 and at its own length. Rows name their
captions by number. Only states are kept, no words; they are as private as the captions.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .privacy.noise import system_generator
from .text_encoder import encode_text, text_encoder_fingerprint

_STATES = "captions.f16"
_ENDS = "caption_ends.npy"
_AT_ONCE = 64  # captions per call of the encoder, always so many: shapes, and with them rounding, never vary
_KEYS = ("raw", "caption", "text")


def captions_of(value: Any) -> list[str]:
    """The captions in one cell of a data set, without empty ones.

    Args:
        value: a text, a list of texts (COCO has five an image), a list of mappings with the text under "raw", "caption"
            or "text" (as Karpathy's splits have them), or None.

    Raises:
        ValueError: anything else.
    """
    if value is None:
        return []
    if isinstance(value, str):
        return [value.strip()] if value.strip() else []
    if isinstance(value, dict):
        texts = [value[key] for key in _KEYS if isinstance(value.get(key), str)][:1]
    else:
        texts = list(value) if isinstance(value, list | tuple | np.ndarray) else []
    if not texts and not (isinstance(value, list | tuple | np.ndarray) and not len(value)):
        raise ValueError(f"{value!r:.80} is no caption; give a text, a list of texts, or None.")
    return [caption for text in texts for caption in captions_of(text)]


class CaptionWriter:
    """Encodes captions into a folder as they come, each distinct one once.

    Memory grows with the number of distinct captions, by about 100 bytes for each.

    Args:
        folder: where the two files go.
        encoder, tokenizer: see `text_encoder.load_text_encoder`.
        max_text_tokens: longest caption, in tokens; longer ones are cut.
    """

    def __init__(self, folder: Path, encoder: Any, tokenizer: Any, max_text_tokens: int):
        self._encoder, self._tokenizer, self._slots = encoder, tokenizer, max_text_tokens
        self._numbers: dict[bytes, int] = {}  # by hash, not by text: a fixed size
        self._ends: list[int] = []
        self._folder, self._file = folder, open(folder / _STATES, "wb")

    def numbers(self, rows: Sequence[Sequence[str]]) -> list[list[int]]:
        """The numbers of the captions of each row."""
        found: list[list[int]] = []
        new: list[str] = []
        for captions in rows:
            found.append([])
            for caption in captions:
                key = hashlib.blake2b(caption.encode(), digest_size=16).digest()
                if key not in self._numbers:
                    self._numbers[key] = len(self._numbers)
                    new.append(caption)
                found[-1].append(self._numbers[key])
        for start in range(0, len(new), _AT_ONCE):
            some = new[start : start + _AT_ONCE]
            padding = some[:1] * (_AT_ONCE - len(some))
            for states in encode_text(self._encoder, self._tokenizer, some + padding, self._slots)[: len(some)]:
                kept = states[(states != 0).any(-1)].numpy()
                self._file.write(kept.astype("<f2").tobytes())
                self._ends.append((self._ends[-1] if self._ends else 0) + len(kept))
        return found

    def close(self) -> dict[str, Any]:
        """Completes the files. Returns what `Captions` needs to know of them, and the encoder's fingerprint."""
        self._file.close()
        np.save(self._folder / _ENDS, np.asarray(self._ends, dtype=np.int64))
        return {
            "text_width": self._encoder.config.hidden_size,
            "max_text_tokens": self._slots,
            "text_encoder_fingerprint": text_encoder_fingerprint(self._encoder, self._tokenizer),
        }


class Captions:
    """The text states of the captions of every row, memory-mapped.

    Args:
        folder: written by `CaptionWriter`; facts: what its `close` returned.
        lists: Arrow column (rows,) of lists: the numbers of the captions of every row.

    Raises:
        ValueError: the files do not belong together.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], lists: Any):
        self.text_width: int = facts["text_width"]
        self.max_text_tokens: int = facts["max_text_tokens"]
        self.text_encoder_fingerprint: str = facts["text_encoder_fingerprint"]
        self._lists = [(chunk.offsets.to_numpy(), chunk.values.to_numpy()) for chunk in lists.chunks]
        self._ends = np.load(folder / _ENDS, mmap_mode="r")
        size = int(self._ends[-1]) if len(self._ends) else 0
        if (folder / _STATES).stat().st_size != size * self.text_width * 2:
            raise ValueError(
                f"{folder / _STATES} does not hold {size} states of width {self.text_width}; build the store again."
            )
        self._states = np.memmap(folder / _STATES, "<f2", "r", shape=(size, self.text_width)) if size else None
        self._generator = system_generator()

    def __len__(self) -> int:
        """Distinct captions."""
        return len(self._ends)

    def draw(self, rows: np.ndarray) -> Tensor:
        """States (b, max_text_tokens, text_width), float16, of one caption of each of the rows (b,).

        Formal guarantee: which of its captions a row shows is drawn uniformly, independently of all else and anew at
        every call, by the generator that also draws batches. Let it be drawn first: given these draws, a row is an
        image with one caption, and the step is that of the sampler on such rows. So the image with all its captions is
        the unit, by the argument of `privacy.units.OneRowPerUnit`. A row without captions shows zeros.
        """
        states = np.zeros((len(rows), self.max_text_tokens, self.text_width), dtype=np.float16)
        size = len(self._lists[0][0]) - 1  # all chunks but the last have the same size
        for position, row in enumerate(rows.tolist()):
            offsets, numbers = self._lists[row // size]
            first, end = offsets[row % size], offsets[row % size + 1]
            if first < end and self._states is not None:
                number = numbers[self._generator.integers(first, end)]
                found = self._states[self._ends[number - 1] if number else 0 : self._ends[number]]
                states[position, : len(found)] = found
        return torch.from_numpy(states)

    def check_encoder(self, encoder: Any, tokenizer: Any) -> None:
        """Raises ValueError unless this is the very text encoder that the captions went through."""
        found = text_encoder_fingerprint(encoder, tokenizer)
        if found != self.text_encoder_fingerprint:
            raise ValueError(
                f"the captions went through text encoder {self.text_encoder_fingerprint[:12]}, not {found[:12]}; build"
                " the token store again with this one."
            )

    def update(self, digest: Any) -> None:
        """Feeds the captions of every row, by number and by state, to a hash."""
        for offsets, numbers in self._lists:
            digest.update(np.diff(offsets).astype("<i4").tobytes())
            digest.update(numbers.astype("<i4").tobytes())
        if self._states is not None:
            for start in range(0, len(self._states), 8192):
                digest.update(self._states[start : start + 8192].tobytes())


__all__ = ["CaptionWriter", "Captions", "captions_of"]
