"""Data files as rows of tokens, ready to be trained on and kept on disk, so that a second start is quick.

    data = load_data(config.data, renderer, seed=0)
    data.train.num_tokens, data.train[7].sequences, data.validation, data.report

The rows are rendered once and stored under the hash of everything they depend on: the files' content, the tokenizer,
the template and the options. They are read back through a memory map, so memory does not grow with the data.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lmtune.config.schema import DataConfig, DataSource, sources_of
from lmtune.data.lengths import Fitted, fit
from lmtune.data.mixing import mix
from lmtune.data.readers import content_hash, num_bytes
from lmtune.data.reading import ReadReport, read_examples
from lmtune.data.rendering import ControlText, Renderer, render_all
from lmtune.data.report import (
    DataReport,
    DuplicateIndex,
    HeldOut,
    PartReport,
    RowCounter,
    SelectedRows,
    SourceReport,
    describe_part,
    typed,
)
from lmtune.data.selection import Selection
from lmtune.data.sequences import SequenceTable
from lmtune.data.sources import DataFile, Given, find_files, portable_names, shown_name, unread_entries
from lmtune.data.types import Example, Label, RowKind, TokenizedExample, TokenSequence, piece_hash
from lmtune.errors import CheckpointError, DataError
from lmtune.io.atomic import cache_folder, get_or_build, hold, key_of, write_json
from lmtune.io.console import row_progress
from lmtune.io.text import pluralize

_VERSION = 2  # of what the key is made of: runs of earlier versions know their rows by it
_STORED = 9  # of what the columns hold; new columns or another number leave old entries unused
_KEPT = 10  # entries: training and validation rows are two

Int32 = npt.NDArray[np.int32]
Rows = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float64]


class TokenizedData:
    """Rows of tokens, or some of them: an `ExampleStore`.

    Attributes:
        key: SHA-256, in hex, of what the rows depend on; not of the files' names.
        report: what became of every row read.
        num_tokens, num_targets: int32 `[N]`, of each row.
        content, prompt: uint64 `[N]`, equal for rows of equal content, or with the same prompt; a copy that `lmtune
            augment` made has the prompt of its row.
        copies: bool `[N]`, which rows are such copies.
        weight: float64 `[N]`, how much each row counts in the loss.
    """

    def __init__(
        self, table: TokenTable, key: str, signature: str, report: PartReport, files: Sequence[DataFile],
        selected: Rows | None = None, weight: Weights | None = None,
    ) -> None:  # fmt: skip
        self._table, self._files = table, files
        self._rows = np.arange(len(table)) if selected is None else selected
        self.key, self.signature = key, signature
        self.report = report
        self.num_tokens: Int32 = table.num_tokens[self._rows]
        self.num_targets: Int32 = table.num_targets[self._rows]
        self.sequences = table.sequences if selected is None else table.sequences.select(self._rows)
        self.weight: Weights = table.weight[self._rows] if weight is None else weight
        if weight is not None:
            self.sequences = replace(self.sequences, weights=None if (weight == 1).all() else weight)
        self.content: npt.NDArray[np.uint64] = table.content[self._rows]
        self.prompt: npt.NDArray[np.uint64] = table.prompt[self._rows]
        self.copies: npt.NDArray[np.bool_] = table.copies[self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> TokenizedExample:
        row = int(self._rows[index])
        return TokenizedExample(
            self.location(index), self._table.sequences_of(row), label=self._table.label_of(row),
            weight=float(self.weight[index]),
        )  # fmt: skip

    @property
    def labels(self) -> list[Label | None]:
        """Of every row; read without its tokens."""
        return [self._table.label_of(row) for row in self._rows.tolist()]

    def location(self, index: int) -> str:
        """`file:line` of a row."""
        row = int(self._rows[index])
        return str(self._files[self._table.file[row]].place(self._table.line[row]))

    @property
    def files(self) -> Sequence[DataFile]:
        """Where the rows were read."""
        return self._files

    @property
    def lines(self) -> tuple[Int32, Int32]:
        """int32 `[N]` each: the file of each row, as a place in `files`, and its number there."""
        return self._table.file[self._rows], self._table.line[self._rows]

    @property
    def entry(self) -> Rows:
        """Which of the paths that were given each row is of."""
        entries: Rows = np.array([file.entry for file in self._files])
        files: Rows = self._table.file[self._rows]
        return entries[files]

    def mixed(self, sources: Sequence[DataSource]) -> TokenizedData:
        """The same rows, of which each epoch takes what the shares of `sources` say; itself where there are none."""
        mixture = mix(sources, self.entry)
        if mixture is None:
            return self
        mixed = copy.copy(self)
        mixed.sequences = replace(self.sequences, mixture=mixture)
        mixed.key, mixed.signature = (key_of(one, mixture.sizes, mixture.taken) for one in (self.key, self.signature))
        return mixed

    def select(self, indices: Rows, weights: Weights | None = None) -> TokenizedData:
        """The rows at `indices`, in their order, each with its weight times one of `weights`; shares the file."""
        chosen = hashlib.sha256(np.asarray(indices, dtype=np.int64).tobytes())
        weight = self.weight[indices]
        if weights is not None:
            chosen.update(weights.tobytes())
            weight = weight * weights
        key, signature = (key_of(one, chosen.hexdigest()) for one in (self.key, self.signature))
        return TokenizedData(self._table, key, signature, self.report, self._files, self._rows[indices], weight)


@dataclass(frozen=True)
class LoadedData:
    """The rows of a run: those to train on, and those to be scored on; `key` and `signature` are hashes of both."""

    train: TokenizedData
    validation: TokenizedData | None
    report: DataReport
    key: str
    signature: str

    def selected(self, selection: Selection, config: DataConfig) -> LoadedData:
        """What `selection` says of these rows; `key` and `signature` stay those of all of them.

        Raises:
            CheckpointError: there are not so many rows.
        """
        known = self.train
        if selection.highest >= len(known):
            raise CheckpointError(
                f"the selected rows: row {selection.highest} is named, counted from 0; there are {len(known)}: the "
                "selection was made of other data; put that back, or choose a new run.name"
            )
        weights = None if selection.weights is None else np.array(selection.weights)
        sources = sources_of(config.train)
        train = known.select(np.array(selection.train), weights).mixed(sources)
        counts = SelectedRows(len(selection.train), len(set(selection.train)))
        report = replace(self.report, selected=counts, sources=_source_reports(sources, train))
        validation = self.validation
        if (chosen := selection.validation) is not None:
            validation = known.select(np.array(chosen)) if chosen else None
            report = replace(report, validation=HeldOut(len(chosen)) if chosen else None)
        return replace(self, train=train, validation=validation, report=report)


def load_data(config: DataConfig, renderer: Renderer, seed: int, rows: RowKind = "answer") -> LoadedData:
    """The rows of `config`, which must be of the kind `rows`; without validation files, a part of train is held out.

    That part is the same for the same seed.

    Raises:
        DataError: with every fault found, or no row is left.
    """
    data = tokenize(sources_of(config.train), renderer, config, part="data.train", rows=rows)
    train, validation = data, None
    held_out: PartReport | HeldOut | None = None
    if config.validation is not None:
        validation = tokenize(sources_of(config.validation), renderer, config, part="data.validation", rows=rows)
        shared = np.flatnonzero(np.isin(validation.content, data.content))
        also = RowCounter(len(shared), [validation.location(int(index)) for index in shared[:5]])
        held_out = replace(validation.report, also_in_train=also)
    elif config.validation_fraction > 0:
        kept, chosen = split(data, config.validation_fraction, seed)
        if len(chosen):
            train, validation = data.select(kept), data.select(chosen)
        held_out = HeldOut(len(chosen), len(data) - len(kept) - len(chosen))
    sources = sources_of(config.train)
    train = train.mixed(sources)
    report = DataReport(
        renderer.description, data.report, held_out, renderer.rendered_at, _source_reports(sources, train)
    )
    key = key_of(train.key, validation.key if validation is not None else None)
    signature = key_of(train.signature, validation.signature if validation is not None else None)
    return LoadedData(train, validation, report, key, signature)


def _source_reports(sources: Sequence[DataSource], train: TokenizedData) -> list[SourceReport] | None:
    """What is trained on of each source; None where there is one."""
    if len(sources) == 1:
        return None
    sizes, mixture = np.bincount(train.entry, minlength=len(sources)).tolist(), train.sequences.mixture
    taken = sizes if mixture is None else mixture.taken
    names = portable_names([shown_name(source.path) for source in sources])
    return [
        SourceReport(name, size, count, source.split, source.share)
        for name, size, count, source in zip(names, sizes, taken, sources, strict=True)
    ]


def split(data: TokenizedData, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Row numbers to train on and to hold out, both ascending; the same for the same content and seed.

    Rows with the same prompt stay together, so what is held out is not trained under another line number or with
    another answer; where all have the same prompt, rows of equal content do. Copies that `lmtune augment` made of rows
    that are held out are on neither side; a copy names the prompt of its row, so where all have the same prompt no copy
    is on any side. At least one row is held out if that is possible at all, and at least one is
    left to train on.
    """
    prompts, prompt_of = np.unique(data.prompt, return_inverse=True)
    if len(prompts) == 1 and data.copies.any():
        own = np.flatnonzero(~data.copies)
        train, held_out = split(data.select(own), fraction, seed)
        return (own[train], own[held_out]) if len(held_out) else (np.arange(len(data)), held_out)
    group = data.content
    if len(prompts) > 1:  # each named by the least of its contents, so that the order is that of contents
        least = np.full(len(prompts), np.iinfo(np.uint64).max, dtype=np.uint64)
        np.minimum.at(least, prompt_of, data.content)
        group = least[prompt_of]
    _, group_of, sizes = np.unique(group, return_inverse=True, return_counts=True)
    wanted = max(1, round(fraction * len(data))) if fraction > 0 else 0
    if not wanted or len(sizes) < 2:
        return np.arange(len(data)), np.arange(0)
    order = np.random.default_rng([seed, 0x5EED]).permutation(len(sizes))
    fitting = order[sizes[order] <= wanted]
    if not len(fitting):
        fitting = order[[np.argmin(sizes[order])]]
    num_groups = int(np.searchsorted(np.cumsum(sizes[fitting]), wanted)) + 1
    chosen = np.zeros(len(sizes), dtype=bool)
    chosen[fitting[: min(num_groups, len(sizes) - 1)]] = True
    is_held_out = chosen[group_of]
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out & ~data.copies)


def tokenize(
    paths: Sequence[Given],
    renderer: Renderer,
    config: DataConfig,
    cache_dir: Path | None = None,
    part: str = "the data",
    rows: RowKind = "answer",
) -> TokenizedData:
    """The rows of `paths` (files or folders) as tokens, from the cache or made now; `part` names them in messages.

    `rows` is the kind that they must be of.

    Raises:
        DataError: with every fault of every row, or no row is left.
    """
    files = find_files(paths, "validation" if part == "data.validation" else "train")
    contents = [content_hash(file) for file in files]
    further: list[object] = [*["skip"] * (config.faulty_rows == "skip"), *[rows] * (rows != "answer")]
    further += [config.columns] * bool(config.columns)
    further += [[file.part for file in files]] * any(file.kind == "xlsx" for file in files)
    key = key_of("tokens", _VERSION, contents, renderer.fingerprint, config.max_length, config.too_long, *further)
    names = [file.portable_name for file in files]
    folder = (cache_dir or cache_folder()) / "tokens"
    entry = get_or_build(
        folder, key_of(key, names, _STORED, str(_SCHEMA)),
        lambda folder: _build(folder, files, contents, renderer, config, part, rows), keep=_KEPT,
    )  # fmt: skip
    table = TokenTable(entry / "rows.arrow")
    hold(entry, table)
    report = typed(PartReport, json.loads((entry / "report.json").read_text(encoding="utf-8")))
    report.warnings.extend(unread_entries(paths))  # which the key does not know
    signature = json.loads((entry / "tokens.json").read_text(encoding="utf-8"))["sha256"]
    return TokenizedData(table, key, signature, report, files)


def _build(
    folder: Path, files: Sequence[DataFile], contents: Sequence[str], renderer: Renderer, config: DataConfig, part: str,
    rows: RowKind,
) -> None:  # fmt: skip
    """Render every row into `folder`."""
    report, index, control_text = ReadReport(), DuplicateIndex(), ControlText(renderer.tokenizer)
    found = PartReport(files=[file.portable_name for file in files], sha256=list(contents))
    number = {name: place for place, name in enumerate(found.files)}
    told: dict[str, RowCounter] = {}  # by a fault that all rows of a kind have
    size = sum(map(num_bytes, files))
    with TableWriter(folder / "rows.arrow") as table, row_progress("tokenizing") as progress:
        examples = found.without_zero_weights(
            read_examples(files, report, rows, config.columns, part != "data.validation")
        )
        for example, outcome in render_all(examples, renderer, size):
            if isinstance(outcome, DataError):
                report.faulty.add(_reason(outcome), example.location)
                if getattr(outcome, "once", False):
                    told.setdefault(_reason(outcome), RowCounter()).add(example.location)
                else:
                    report.add_fault(example.location, _reason(outcome))
                continue
            hashes = index.add(example)
            control_text.add(example)
            try:
                fitted = fit(example, outcome, config)
            except DataError as fault:  # `faulty_rows: skip` does not skip what `too_long: error` refuses
                report.add_fault(example.location, _reason(fault), fatal=True)
                continue
            _count(found, example, outcome, fitted)
            if config.faulty_rows == "skip" or not report.num_faults:
                for piece, sequences in enumerate(fitted.rows):  # the pieces of a text may be on both sides of a split
                    own = hashes if not piece else (piece_hash(hashes[0], piece),) * 2
                    own = own if example.origin is None else (own[0], example.origin)
                    table.append(sequences, number[example.source], example, own)
            progress(len(index))
    for reason, of_rows in told.items():
        report.add_fault(of_rows.first[0], f"{reason} ({pluralize(of_rows.count)})")
    for file, before in zip(files, contents, strict=True):
        if content_hash(file) != before:  # the rows would be kept under the hash of others
            raise DataError(f"{file.name}: changed while it was read; start again when it is complete")
    report.raise_for_faults(config.faulty_rows, len(index))
    found.rows = len(index) + found.zero_weight.count + report.faulty.count
    found.formats, found.read_as, found.faulty = report.formats, report.read_as, report.faulty
    found.duplicates, found.same_prompt = index.duplicates(), index.same_prompt()
    found.warnings = [*report.warnings, *control_text.warnings()]
    if not found.kept:
        lines = "\n".join(describe_part(found))
        advice = f"raise data.max_length ({config.max_length})" if found.dropped else "give rows a weight above 0"
        raise DataError(f"{part}: no row is left; {advice}\n{lines}")
    write_json(folder / "report.json", found.to_dict())
    write_json(folder / "tokens.json", {"sha256": table.sha256})


def _reason(fault: DataError) -> str:
    """What a fault says behind the row's place."""
    return str(fault).partition(": ")[2]


def _count(found: PartReport, example: Example, rendered: Sequence[TokenSequence], fitted: Fitted) -> None:
    """Add one row to the counts."""
    found.longest_row_tokens = max(found.longest_row_tokens, *map(len, rendered))
    if fitted.dropped is not None:
        found.dropped.setdefault(fitted.dropped, RowCounter()).add(example.location)
        return
    if fitted.truncated:
        found.truncated.add(example.location)
    if len(fitted.rows) > 1:
        found.split.add(example.location)
        found.pieces += len(fitted.rows)
    found.kept += 1
    found.add(example)
    kept = [sequence for row in fitted.rows for sequence in row]
    found.tokens += sum(map(len, kept))
    found.trained_tokens += sum(sequence.num_targets for sequence in kept)


_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())), ("loss_mask", pa.list_(pa.bool_())),
        ("sequence_tokens", pa.list_(pa.int32())), ("sequence_targets", pa.list_(pa.int32())),
        ("num_targets", pa.int32()), ("file", pa.int32()), ("line", pa.int32()), ("content", pa.uint64()),
        ("prompt", pa.uint64()), ("label", pa.string()), ("weight", pa.float64()), ("copy", pa.bool_()),
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
        """Of all rows so far, in hex: tokens, which of them are targets, where sequences end; labels and weights."""
        return self._digest.hexdigest()

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None:
            self._flush()
        self._writer.close()
        self._sink.close()

    def append(
        self, sequences: Sequence[TokenSequence], file: int, example: Example, hashes: tuple[int, int]
    ) -> None:  # fmt: skip
        """Add one row, whose `hashes` are those of its content and its prompt."""
        input_ids = np.concatenate([sequence.input_ids for sequence in sequences])
        loss_mask = np.concatenate([sequence.loss_mask for sequence in sequences])
        lengths, targets = [len(sequence) for sequence in sequences], [sequence.num_targets for sequence in sequences]
        for numbers in (lengths, input_ids, loss_mask):
            self._digest.update(np.int32(len(numbers)).tobytes() + np.asarray(numbers, dtype=np.int32).tobytes())
        label = None if example.label is None else json.dumps(example.label)
        for value, plain in ((label, None), (example.weight, 1.0)):
            if value != plain:  # so that other rows have the hash that they had without
                self._digest.update(repr(value).encode())
        self._rows.append(
            (
                input_ids, loss_mask, lengths, targets, sum(targets), file, example.line, *hashes, label,
                example.weight, example.origin is not None,
            )
        )  # fmt: skip
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
        num_tokens, num_targets: int32 `[N]`.
        sequences: lengths of the sequences of all rows.
        file, line: int32 `[N]`; content, prompt: uint64 `[N]`; weight: float64 `[N]`; copies: bool `[N]`.
    """

    def __init__(self, path: Path) -> None:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_stream(source).read_all()
        self._batches = table.to_batches()
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self.file, self.line, self.content, self.prompt, self.num_targets, self.weight = (
            table.column(name).to_numpy() for name in ("file", "line", "content", "prompt", "num_targets", "weight")
        )
        self._labels = table.column("label")
        self.copies = table.column("copy").to_numpy()
        self.num_tokens = self._list_lengths("input_ids").astype(np.int32)
        tokens, targets = (
            pc.list_flatten(table.column(name)).to_numpy() for name in ("sequence_tokens", "sequence_targets")
        )
        first = np.concatenate([[0], np.cumsum(self._list_lengths("sequence_tokens"))])
        self.sequences = SequenceTable(tokens, targets, first, None if (self.weight == 1).all() else self.weight)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def sequences_of(self, row: int) -> tuple[TokenSequence, ...]:
        """The sequences of a row."""
        batch_index = int(np.searchsorted(self._starts, row, side="right")) - 1
        batch, row = self._batches[batch_index], row - int(self._starts[batch_index])
        input_ids = batch.column(0)[row].values.to_numpy()
        trained = batch.column(1)[row].values.to_numpy(zero_copy_only=False)
        ends = np.cumsum(batch.column(2)[row].values.to_numpy())[:-1]
        return tuple(map(TokenSequence, np.split(input_ids, ends), np.split(trained, ends)))

    def label_of(self, row: int) -> Label | None:
        """The label of a row."""
        text = self._labels[row].as_py()
        if text is None:
            return None
        label = json.loads(text)
        return tuple(label) if isinstance(label, list) else label

    def _list_lengths(self, name: str) -> Rows:
        """int64 `[N]`; from the offsets alone, so that the tokens are not read."""
        offsets = [np.diff(batch.column(name).offsets.to_numpy()) for batch in self._batches]
        return np.concatenate(offsets).astype(np.int64)
