"""The Arrow file that token rows stream into: chunks of one size, so that a row is found by its number alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from .privacy.units import FirstRows

ROWS_PER_CHUNK = 8192


class RowFile:
    """Token rows on their way to an Arrow file, in chunks of one size (the last may be smaller), with what names them.

    Args:
        path: the file, made anew.
        width: ids in a row, all views together; highest: the largest id.
        units: has the unit of every row appended so far; None if there are no units.
        captioned: whether rows come with the numbers of their captions.
    """

    def __init__(self, path: Path, width: int, highest: int, units: FirstRows | None, captioned: bool):
        self._type = pa.int16() if highest <= np.iinfo(np.int16).max else pa.int32()
        self._column = pa.list_(self._type, width)
        fields = [("input_ids", self._column)]
        fields += [("unit", pa.int64())] if units is not None else []
        fields += [("captions", pa.list_(pa.int32()))] if captioned else []
        self._schema, self._units, self._captioned = pa.schema(fields), units, captioned
        self._rows = [np.empty((0, width), self._type.to_pandas_dtype())]  # not written yet, as their captions' numbers
        self._numbers: list[list[int]] = []
        self._written = 0
        self._file = open(path, "wb")
        self._sink = pa.ipc.new_stream(self._file, self._schema)

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(self, *_: Any) -> None:
        with self._file, self._sink:
            pass

    def append(self, rows: np.ndarray, numbers: list[list[int]]) -> None:
        """Takes rows (b, width), and the numbers of the captions of each where rows have captions."""
        self._rows.append(rows.astype(self._type.to_pandas_dtype()))
        self._numbers += numbers
        if (count := sum(map(len, self._rows))) >= ROWS_PER_CHUNK:
            self._flush(count - count % ROWS_PER_CHUNK)

    def finish(self) -> None:
        """Writes the rows that do not fill a chunk."""
        self._flush(sum(map(len, self._rows)))

    def _flush(self, count: int) -> None:
        """Writes the first `count` of the rows that are held."""
        rows = np.concatenate(self._rows)
        for start in range(0, count, ROWS_PER_CHUNK):
            chunk = rows[start : min(start + ROWS_PER_CHUNK, count)]
            ids = pa.array(chunk.reshape(-1), type=self._type)
            arrays = [pa.FixedSizeListArray.from_arrays(ids, type=self._column)]
            if self._units is not None:
                units = self._units.units[self._written : self._written + len(chunk)]
                arrays.append(pa.array(units, type=pa.int64()))
            if self._captioned:
                arrays.append(pa.array(self._numbers[start : start + len(chunk)], type=pa.list_(pa.int32())))
            self._sink.write_batch(pa.record_batch(arrays, schema=self._schema))
            self._written += len(chunk)
        self._rows, self._numbers = [rows[count:]], self._numbers[count:]


__all__ = ["ROWS_PER_CHUNK", "RowFile"]
