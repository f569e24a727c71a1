"""A base's weights as its files hold them, and new files of the same layout, written tensor by tensor.

    stored = StoredWeights(weight_files(base))
    layout = Layout(empty_model(path), stored)
    layout.written({"model.layers.0.mlp.experts.gate_up_proj": tensor})   # the published tensors that hold it

transformers gives many weights other names than their files do, and joins some: the experts of a mixture are one 3-D
parameter in the module and a matrix each in the file. `Layout` follows transformers' own table of conversions
(`transformers.conversion_mapping`) both ways. `write_weights` copies what did not change byte for byte and asks for the
rest one after another, so no more than one weight is held. safetensors' own writer wants a whole file in memory; the
format is https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from lmtune.errors import LmtuneError

INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_COPIED_BYTES = 16 * 2**20  # at a time
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Entry:
    """Where a tensor is: its file, type and shape, and the first byte and the one after its last in the file."""

    file: Path
    code: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def dtype(self) -> torch.dtype | None:
        """Its type; None for one that no weight has (8-bit floats)."""
        return _DTYPES.get(self.code)

    @property
    def is_float(self) -> bool:
        """Whether it holds plain floating point numbers, not codes for them."""
        return self.dtype is not None and self.dtype.is_floating_point

    def read(self) -> torch.Tensor:
        """The tensor, in memory of its own."""
        with self.file.open("rb") as file:
            file.seek(self.begin)
            content = bytearray(self.end - self.begin)
            file.readinto(content)
        assert self.dtype is not None
        return torch.frombuffer(content, dtype=self.dtype).view(self.shape)


class StoredWeights:
    """The tensors of a base's safetensors files by name, in the order of the files; no weight is read.

    Attributes:
        files: in order.
        entries: where each tensor is.
        metadata: what each file's header says beside its tensors.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[Path, dict[str, str]] = {}
        for path in self.files:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            self.metadata[path] = header.pop("__metadata__", {})
            for name, item in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"]):
                begin, end = (8 + length + offset for offset in item["data_offsets"])
                self.entries[name] = Entry(path, item["dtype"], tuple(item["shape"]), begin, end)


class Layout:
    """Which stored tensors hold which weights of a model, and the other way round.

    Attributes:
        targets: the weight that each stored tensor is loaded into, alone or with others, by stored name.
    """

    def __init__(self, empty: Any, stored: StoredWeights) -> None:
        """
        Args:
            empty: the base of its config on the meta device, as `weight_types.empty_model` makes it.
            stored: its files.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        self._empty, self._stored = empty, stored
        self._names = {name: True for name, _ in empty.named_parameters(remove_duplicate=False)}
        self._names |= {name: True for name, _ in empty.named_buffers()}
        changes = get_model_conversion_mapping(empty)
        renamings = [change for change in changes if isinstance(change, WeightRenaming)]
        converters = [change for change in changes if isinstance(change, WeightConverter)]
        self.targets: dict[str, str] = {}
        self._joined: set[str] = set()  # weights that are made of several stored tensors, or of a part of one
        for name in stored.entries:
            target, pattern = rename_source_key(name, renamings, converters, empty.base_model_prefix, self._names)
            if target not in self._names and name in self._names:
                target, pattern = rename_source_key(name, [], [], empty.base_model_prefix, self._names)
            self.targets[name] = target
            if pattern is not None:
                self._joined.add(target)
        self._groups: dict[str, list[str]] = {}
        backwards = [change.reverse_transform() for change in reversed(converters) if _is_reversible(change)]
        self._keys = {name: key for name in self._names if (key := _group_key(name, backwards)) is not None}
        for name, key in self._keys.items():
            self._groups.setdefault(key, []).append(name)
        self._sources: dict[str, list[str]] = {}
        for name, target in self.targets.items():
            self._sources.setdefault(target, []).append(name)

    def group(self, name: str) -> tuple[str, ...]:
        """The weights that must be known together to write `name`: those that one stored tensor holds parts of."""
        key = self._keys.get(name)
        return (name,) if key is None else tuple(self._groups[key])

    def source(self, name: str) -> str | None:
        """The stored tensor that is `name` as it stands, or None where it is joined from several or not stored."""
        sources = self._sources.get(name, [])
        return sources[0] if len(sources) == 1 and name not in self._joined else None

    def written(self, weights: Tensors) -> Tensors:
        """The tensors to write for a whole `group` of weights, by published name.

        A weight without a stored tensor, such as a head that was tied, or one whose conversion cannot be undone, gets
        the module's name, which transformers reads as well.
        """
        if len(weights) == 1:
            ((name, weight),) = weights.items()
            if source := self.source(name):
                return {source: weight}
        pieces = self._undone(weights)
        stored = {source for name in weights for source in self._sources.get(name, [])}
        if pieces is not None and stored:
            renamed = {_like(piece, stored): tensor for piece, tensor in pieces.items()}
            if renamed.keys() == stored:
                return renamed
        return dict(weights)

    def replaced(self, weights: Iterable[str]) -> set[str]:
        """The stored tensors whose content is in `weights`, those that hold scales of quantised ones included."""
        names = {source for name in weights for source in self._sources.get(name, [])}
        scales = {
            other for name in names for other in self._stored.entries
            if other.startswith(f"{name}.") or other in (f"{name[:-6]}SCB", f"{name[:-6]}weight_format")
        }  # fmt: skip
        return names | scales

    def _undone(self, weights: Tensors) -> Tensors | None:
        from transformers.core_model_loading import revert_weight_conversion

        try:
            pieces: Tensors = revert_weight_conversion(self._empty, dict(weights))
        except Exception:  # a conversion without a way back, of whatever kind
            return None
        return pieces


@dataclass
class NewFile:
    """A file to write: what it copies from the stored ones, and what is to come, by name."""

    name: str
    metadata: dict[str, str]
    copied: dict[str, Entry] = field(default_factory=dict)
    coming: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)


class WeightWriter:
    """New safetensors files in the layout of the stored ones: the same names, order and types wherever they fit."""

    def __init__(self, stored: StoredWeights, coming: Mapping[str, torch.Tensor], gone: set[str]) -> None:
        """
        Args:
            stored: what is copied but for the following.
            coming: what is written anew, by published name: tensors on the meta device, of the right shape and dtype.
            gone: stored names that are not written.
        """
        self._files = [NewFile(path.name, stored.metadata[path]) for path in stored.files]
        self._places: dict[str, tuple[NewFile, int]] = {}
        of = dict(zip(stored.files, self._files, strict=True))
        new = [name for name in coming if name not in stored.entries]
        for name in (*stored.entries, *new):
            entry = stored.entries.get(name)
            file = self._files[-1] if entry is None else of[entry.file]
            if name in coming:
                file.coming[name] = (_CODES[coming[name].dtype], tuple(coming[name].shape))
            elif entry is not None and name not in gone:
                file.copied[name] = entry
            file.order.append(name)
        self._files = [file for file in self._files if file.copied or file.coming]

    def write(self, folder: Path, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Write the files; `weights` gives each tensor that was announced once, in any order."""
        opened = {}
        try:
            for new in self._files:
                opened[new.name] = (folder / new.name).open("wb")
                self._begin(new, opened[new.name])
            missing = {name for new in self._files for name in new.coming}
            for name, tensor in weights:
                new, offset = self._places[name]
                file = opened[new.name]
                file.seek(offset)
                _write_tensor(file, tensor)
                missing.remove(name)
            if missing:
                raise LmtuneError(f"{len(missing)} weights were not merged, such as {min(missing)}; please report it")
        finally:
            for file in opened.values():
                file.close()
        if len(self._files) > 1:
            self._write_index(folder)

    def _begin(self, new: NewFile, file: IO[bytes]) -> None:
        """Write the header, and copy what is copied."""
        header: dict[str, Any] = {"__metadata__": new.metadata or {"format": "pt"}}
        position, places = 0, {}
        announced = {name: (entry.code, entry.shape) for name, entry in new.copied.items()} | new.coming
        # the widest types first, as safetensors itself does, so that each tensor begins at a multiple of its width
        names = [name for name in new.order if name in announced]
        for name in sorted(names, key=lambda name: -_width(announced[name][0])):
            code, shape = announced[name]
            size = _num_bytes(code, shape, new.copied.get(name))
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [position, position + size]}
            places[name] = position
            position += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + position)
        for name, entry in new.copied.items():
            file.seek(start + places[name])
            _copy(entry, file)
        self._places |= {name: (new, start + places[name]) for name in new.coming}

    def _write_index(self, folder: Path) -> None:
        places, total = {}, 0
        for new in self._files:
            for name, entry in new.copied.items():
                places[name] = new.name
                total += entry.end - entry.begin
            for name, (code, shape) in new.coming.items():
                places[name] = new.name
                total += _num_bytes(code, shape, None)
        tree = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def _group_key(name: str, backwards: list[Any]) -> str | None:
    """What the weights that one conversion makes together have in common; None for a weight that is stored as it is."""
    from transformers.core_model_loading import apply_converters

    renamed, pattern = apply_converters(name, backwards)
    return renamed if pattern is not None else None


def _is_reversible(change: Any) -> bool:
    try:
        change.reverse_transform()
    except (NotImplementedError, ValueError):
        return False
    return True


def _like(name: str, stored: Iterable[str]) -> str:
    """The stored name that differs from `name` by its first parts only, which a file may leave out or add."""
    fitting = [other for other in stored if f".{other}".endswith(f".{name}") or f".{name}".endswith(f".{other}")]
    return fitting[0] if len(fitting) == 1 else name


def _width(code: str) -> int:
    dtype = _DTYPES.get(code)
    return 1 if dtype is None else dtype.itemsize


def _num_bytes(code: str, shape: tuple[int, ...], entry: Entry | None) -> int:
    return entry.end - entry.begin if entry is not None else _width(code) * torch.Size(shape).numel()


def _copy(entry: Entry, file: IO[bytes]) -> None:
    with entry.file.open("rb") as source:
        source.seek(entry.begin)
        left = entry.end - entry.begin
        while left:
            part = source.read(min(left, _COPIED_BYTES))
            if not part:
                raise LmtuneError(f"{entry.file}: became shorter while it was read; start the same command again")
            file.write(part)
            left -= len(part)


def _write_tensor(file: IO[bytes], tensor: torch.Tensor) -> None:
    flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    for begin in range(0, len(flat), _COPIED_BYTES):
        file.write(flat[begin : begin + _COPIED_BYTES].numpy().data)
