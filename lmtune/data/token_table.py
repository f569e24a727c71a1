"""Rows of tokens in an Arrow file: written row by row, read back through a memory map, a row at a time.

    input_ids: list<int32>   trained: list<bool>                         the documents of a row, end to end
    document_lengths: list<int32>   document_trained: list<int32>        tokens of each, and how many are trained
    num_trained: int32   file: int32   line: int32   content: uint64                 where from, and a hash of what

It is an Arrow IPC stream, the format of Hugging Face `datasets`, so `Dataset.from_file` opens it too. Only the columns
of counts are brought into memory, 32 bytes a row and 8 a document; tokens stay on the disk until asked for.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lmtune.data.rendering import Document
from lmtune.data.sequences import Sequences

_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())), ("trained", pa.list_(pa.bool_())),
        ("document_lengths", pa.list_(pa.int32())), ("document_trained", pa.list_(pa.int32())),
        ("num_trained", pa.int32()), ("file", pa.int32()), ("line", pa.int32()), ("content", pa.uint64()),
    ]
)  # fmt: skip
_BATCH_ROWS = 4096
_BATCH_TOKENS = 1 << 20


class TableWriter:
    """Appends rows to a new file; use as a context manager."""

    def __init__(self, path: Path) -> None:
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._sink, _SCHEMA)
        self._rows: list[tuple[Any, ...]] = []
        self._num_tokens = 0
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Of all rows so far, in hex: their tokens, which of them are labels, and where documents end."""
        return self._digest.hexdigest()

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None:
            self._flush()
        self._writer.close()
        self._sink.close()

    def append(self, documents: Sequence[Document], file: int, line: int, content: int) -> None:
        """Add one row."""
        input_ids = [index for document in documents for index in document.input_ids]
        trained = [flag for document in documents for flag in document.trained]
        lengths = [len(document.input_ids) for document in documents]
        labels = [sum(document.trained) for document in documents]
        for numbers in (lengths, input_ids, trained):
            self._digest.update(array("i", [len(numbers), *numbers]).tobytes())
        self._rows.append((input_ids, trained, lengths, labels, sum(labels), file, line, content))
        self._num_tokens += len(input_ids)
        if len(self._rows) >= _BATCH_ROWS or self._num_tokens >= _BATCH_TOKENS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            columns = zip(*self._rows, strict=True)
            arrays = [pa.array(column, type=field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
            self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=_SCHEMA))
            self._rows, self._num_tokens = [], 0


class TokenTable:
    """A file that `TableWriter` wrote.

    Attributes:
        num_tokens, num_trained: int32 `[N]`.
        sequences: the documents of all rows, in numbers.
        file, line: int32 `[N]`; content: uint64 `[N]`.
    """

    def __init__(self, path: Path) -> None:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_stream(source).read_all()
        self._batches = table.to_batches()
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self.file = self._column("file", np.int32)
        self.line = self._column("line", np.int32)
        self.content = self._column("content", np.uint64)
        offsets = [batch.column("input_ids").offsets.to_numpy() for batch in self._batches]
        self.num_tokens = self._joined([np.diff(of_batch) for of_batch in offsets], np.int32)
        self.num_trained = self._column("num_trained", np.int32)
        counts = [np.diff(batch.column("document_lengths").offsets.to_numpy()) for batch in self._batches]
        self.sequences = Sequences(
            self._values("document_lengths"), self._values("document_trained"),
            np.concatenate([[0], np.cumsum(self._joined(counts, np.int64))]),
        )  # fmt: skip

    def __len__(self) -> int:
        return int(self._starts[-1])

    def documents(self, row: int) -> list[tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]]:
        """The documents of a row: `input_ids[T]` and `trained[T]` of each."""
        batch_index = int(np.searchsorted(self._starts, row, side="right")) - 1
        batch, row = self._batches[batch_index], row - int(self._starts[batch_index])
        input_ids = batch.column(0)[row].values.to_numpy()
        trained = batch.column(1)[row].values.to_numpy(zero_copy_only=False)
        ends = np.cumsum(batch.column(2)[row].values.to_numpy())[:-1]
        return list(zip(np.split(input_ids, ends), np.split(trained, ends), strict=True))

    def _column(self, name: str, dtype: Any) -> Any:
        return self._joined([batch.column(name).to_numpy() for batch in self._batches], dtype)

    def _values(self, name: str) -> Any:
        """Of a column of lists, all of them end to end."""
        return self._joined([batch.column(name).flatten().to_numpy() for batch in self._batches], np.int32)

    @staticmethod
    def _joined(pieces: list[Any], dtype: Any) -> Any:
        return np.concatenate(pieces).astype(dtype) if pieces else np.empty(0, dtype)
