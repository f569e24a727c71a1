"""How the folder of a tuned model is written: every file as its base published it, wherever nothing changed.

    stored = StoredWeights(weight_files(base))
    layout = Layout(empty_model(path), stored)
    layout.written({"model.layers.0.mlp.experts.gate_up_proj": tensor})   # the published tensors that hold it
    WeightWriter(stored, coming, gone).write(folder, weights)             # tensor by tensor
    write_adapter_texts(base, renderer, folder)                           # tokenizer and generation config

transformers gives many weights other names than their files do, and joins some. `Layout` follows its own table of
conversions both ways. `WeightWriter` holds one tensor at a time; safetensors' writer wants a whole file in memory
(format: https://github.com/huggingface/safetensors#format). transformers 4, and converters of its time, do not know
what transformers 5 writes into configs, so those are copied byte for byte or changed key by key.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from lmtune.config.schema import ModelConfig
from lmtune.data.rendering import Renderer
from lmtune.errors import LmtuneError
from lmtune.io.atomic import name_disk_errors
from lmtune.models.base import stored_files
from lmtune.models.head import classifier_head
from lmtune.models.validate import CONFIG, INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_COPIED_BYTES = 16 * 2**20  # at a time
Tensors = dict[str, torch.Tensor]

GENERATION, TOKENIZER_CONFIG, SPECIAL = "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"
TOKENIZER_FILES = (
    "tokenizer.json", TOKENIZER_CONFIG, SPECIAL, "added_tokens.json", "chat_template.jinja", "tokenizer.model",
    "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt", "tekken.json",
)  # fmt: skip
Tree = dict[str, Any]
# Of config.json: where its author had it, code that is not copied, and how weights were stored
_DROPPED = ("_name_or_path", "auto_map", "quantization_config", "compression_config")
# Of tokenizer_config.json: what transformers 5 notes about how a tokenizer was loaded
_ONLY_IN_5 = ("backend", "is_local", "local_files_only")
_ROTATIONS_OF_4 = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


# --- weights


@dataclass(frozen=True)
class Entry:
    """Where a tensor is: file, type, shape, and the bytes `begin` to `end` of the file."""

    file: Path
    code: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def dtype(self) -> torch.dtype | None:
        """Its type; None for 8-bit floats."""
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

    def __init__(self, empty: PreTrainedModel, stored: StoredWeights) -> None:
        """
        Args:
            empty: the base on the meta device, as `structure.empty_model` makes it.
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
        from transformers.core_model_loading import revert_weight_conversion

        name = next(iter(weights))
        if len(weights) == 1 and (source := self.source(name)):
            return {source: weights[name]}
        stored = {source for name in weights for source in self._sources.get(name, [])}
        with contextlib.suppress(Exception):  # a conversion without a way back, of whatever kind
            pieces: Tensors = revert_weight_conversion(self._empty, dict(weights))
            renamed = {_like(piece, stored): tensor for piece, tensor in pieces.items()}
            if stored and renamed.keys() == stored:
                return renamed
        return dict(weights)

    def unused(self) -> set[str]:
        """The stored tensors that no weight of the model is loaded from."""
        return {name for name, target in self.targets.items() if target not in self._names}

    def replaced(self, weights: Iterable[str]) -> set[str]:
        """The stored tensors whose content is in `weights`, those that hold scales of quantized ones included."""
        names = {source for name in weights for source in self._sources.get(name, [])}
        scales = {
            other for name in names for other in self._stored.entries
            if other.startswith(f"{name}.") or other in (f"{name[:-6]}SCB", f"{name[:-6]}weight_format")
        }  # fmt: skip
        return names | scales


class WeightWriter:
    """New safetensors files in the layout of the stored ones: the same names, order and types wherever they fit."""

    def __init__(self, stored: StoredWeights, coming: Mapping[str, torch.Tensor], gone: set[str]) -> None:
        """
        Args:
            stored: what is copied but for the following.
            coming: what is written anew, by published name: tensors on the meta device, of the right shape and dtype.
            gone: stored names that are not written.
        """
        files: dict[Path, dict[str, Entry | torch.Tensor]] = {path: {} for path in stored.files}
        for name, entry in stored.entries.items():
            if name in coming:
                files[entry.file][name] = coming[name]
            elif name not in gone:
                files[entry.file][name] = entry
        files[stored.files[-1]] |= {name: tensor for name, tensor in coming.items() if name not in stored.entries}
        self._files = {path: tensors for path, tensors in files.items() if tensors}
        self._metadata = stored.metadata

    def write(self, folder: Path, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Write the files; `weights` gives each tensor of `coming` once, in any order."""
        places: dict[str, tuple[IO[bytes], int]] = {}
        with contextlib.ExitStack() as stack:
            for path, tensors in self._files.items():
                file: IO[bytes] = stack.enter_context((folder / path.name).open("wb"))
                places |= {name: (file, at) for name, at in _write_header(file, tensors, self._metadata[path]).items()}
            for name, tensor in weights:
                target, offset = places.pop(name)
                target.seek(offset)
                _write_tensor(target, tensor)
        assert not places, f"not written: {min(places)}"
        if len(self._files) > 1:
            shards = {name: path.name for path, tensors in self._files.items() for name in tensors}
            total = sum(_num_bytes(item) for tensors in self._files.values() for item in tensors.values())
            write_tree(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(shards.items()))})


def _write_header(
    file: IO[bytes], tensors: Mapping[str, Entry | torch.Tensor], metadata: dict[str, str]
) -> dict[str, int]:  # fmt: skip
    """Write a header, and what is copied; returns where each other tensor begins."""
    header: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    end = 0
    # the widest types first, as safetensors itself does, so that each tensor begins at a multiple of its width
    for name in sorted(tensors, key=lambda name: -_width(tensors[name])):
        item, begin = tensors[name], end
        end += _num_bytes(item)
        code = item.code if isinstance(item, Entry) else _CODES[item.dtype]
        header[name] = {"dtype": code, "shape": list(item.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    start = file.tell()
    file.truncate(start + end)
    places = {name: start + header[name]["data_offsets"][0] for name in tensors}
    for name, item in tensors.items():
        if isinstance(item, Entry):
            file.seek(places.pop(name))
            _copy(item, file)
    return places


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


def _width(item: Entry | torch.Tensor) -> int:
    return 1 if item.dtype is None else item.dtype.itemsize


def _num_bytes(item: Entry | torch.Tensor) -> int:
    return item.end - item.begin if isinstance(item, Entry) else item.numel() * item.dtype.itemsize


def _copy(entry: Entry, file: IO[bytes]) -> None:
    with entry.file.open("rb") as source:
        source.seek(entry.begin)
        left = entry.end - entry.begin
        while left:
            part = source.read(min(left, _COPIED_BYTES))
            if not part:
                raise LmtuneError(f"{entry.file}: became shorter during the merge; start the same command again")
            file.write(part)
            left -= len(part)


def _write_tensor(file: IO[bytes], tensor: torch.Tensor) -> None:
    flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    for begin in range(0, len(flat), _COPIED_BYTES):
        file.write(flat[begin : begin + _COPIED_BYTES].numpy().data)


# --- configs and tokenizer


def merged_config(
    base: Mapping[str, Any], dtype: str, stop_token_ids: Sequence[int], untied: bool, widened: bool = False
) -> Tree:
    """The config.json of a merged model, of its `base`'s.

    Args:
        base: the content of the base's.
        dtype: of the merged weights.
        stop_token_ids: the end of an answer first.
        untied: the head has become a weight of its own.
        widened: `dtype` is more than the base says of itself.
    """
    quantized = "quantization_config" in base or "compression_config" in base
    tree = {key: value for key, value in base.items() if key not in _DROPPED}
    said = tree.get("dtype") or tree.get("torch_dtype")
    tree["dtype"] = tree["torch_dtype"] = dtype if quantized or widened or not said else said
    for part in (tree, *(value for value in tree.values() if isinstance(value, dict))):
        part.update(_rope_keys(part))
        if widened:
            part.update({key: dtype for key in ("dtype", "torch_dtype") if part.get(key)})
        if "eos_token_id" in part or part is tree:
            part["eos_token_id"] = _first(part.get("eos_token_id"), stop_token_ids[0])
        if untied and ("tie_word_embeddings" in part or part is tree):
            part["tie_word_embeddings"] = False
    return tree


def classifier_keys(model: PreTrainedModel) -> Tree:
    """What the config.json of a classifier says that its base's does not; nothing for a language model."""
    if classifier_head(model) is None:
        return {}
    config = model.config
    return {
        "architectures": [type(model).__name__], "id2label": config.id2label, "label2id": config.label2id,
        "problem_type": config.problem_type, "pad_token_id": config.pad_token_id,
    }  # fmt: skip


def generation_config(base: Mapping[str, Any], stop_token_ids: Sequence[int], pad_token_id: int | None) -> Tree:
    """The generation_config.json of a tuned model: its base's, with the stop tokens of training.

    It is made of the file's text, not by transformers: that reads some settings that it refuses to write.
    """
    pad = base.get("pad_token_id") if pad_token_id is None else pad_token_id
    return {
        **{key: value for key, value in base.items() if key != "_from_model_config"},
        "eos_token_id": list(stop_token_ids),
        "pad_token_id": stop_token_ids[0] if pad is None else pad,
    }


def write_adapter_texts(model: ModelConfig, renderer: Renderer, folder: Path, writes: bool = True) -> None:
    """Write the tokenizer beside an adapter or a whole model, and the generation config of one that `writes`.

    An OSError names what cannot be written.
    """
    stops, template = renderer.stop_token_ids, renderer.chat_template
    write_tokenizer(renderer.tokenizer, stored_files(model, TOKENIZER_FILES), folder, template, stops[0])
    if not writes:
        return
    base = {name: read_tree(file) for name, file in stored_files(model, (GENERATION, CONFIG)).items()}
    begin = base.get(CONFIG, {}).get("bos_token_id")
    stated = base.get(GENERATION, {"bos_token_id": begin} if isinstance(begin, int) else {})
    with name_disk_errors(folder):
        write_tree(folder / GENERATION, generation_config(stated, stops, renderer.tokenizer.pad_token_id))


def write_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    sources: Mapping[str, Path],
    folder: Path,
    template: str | None,
    stop_token_id: int,
) -> None:
    """Write the files of a tokenizer: the base's own where it is still that tokenizer, else made anew.

    Args:
        tokenizer: the one that training used.
        sources: the base's files by name.
        folder: where to.
        template: the chat template that training used; None for plain text.
        stop_token_id: the end of an answer.
    """
    with name_disk_errors(folder):
        if template is None or template == tokenizer.chat_template:
            for name, source in sources.items():
                (folder / name).write_bytes(source.read_bytes())
        if not _reads_as(tokenizer, folder):
            for name in TOKENIZER_FILES:
                (folder / name).unlink(missing_ok=True)
            _save_anew(tokenizer, template, folder)
        make_readable(folder)
        _state_end(tokenizer, folder, stop_token_id)


def read_tree(path: Path) -> Tree:
    """The object in a JSON file, or `{}` where there is none."""
    tree = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return tree if isinstance(tree, dict) else {}


def write_tree(path: Path, tree: Mapping[str, Any]) -> None:
    """Write an object as such files are written."""
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _rope_keys(part: Mapping[str, Any]) -> Tree:
    """What `rope_parameters` says, in the keys of transformers 4; none for a rotation that it does not know."""
    rope = part.get("rope_parameters")
    if not isinstance(rope, dict) or not rope:
        return {}
    added: Tree = {}
    kinds = {name: value for name, value in rope.items() if isinstance(value, dict)}
    whole = kinds.get("full_attention", rope if not kinds else next(iter(kinds.values())))
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in whole:
            added[key] = whole[key]
    if "rope_theta" in (sliding := kinds.get("sliding_attention", {})):
        added["rope_local_base_freq"] = sliding["rope_theta"]
    kind = whole.get("rope_type", "default")
    if kind not in _ROTATIONS_OF_4:
        return {}
    if kind != "default":
        lifted = {key: value for key, value in whole.items() if key not in ("rope_theta", "partial_rotary_factor")}
        added["rope_scaling"] = {**lifted, "type": kind}
    return {key: value for key, value in added.items() if key not in part}


def _first(stated: Any, trained: int) -> Any:
    """The end tokens of a config, the trained one first, or alone where it names one."""
    return [trained, *(token for token in stated if token != trained)] if isinstance(stated, list) else trained


def _reads_as(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Whether the files in `folder` alone give this tokenizer."""
    from transformers import AutoTokenizer

    if not (folder / TOKENIZER_CONFIG).is_file():
        return False
    try:
        again = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return _identity(again) == _identity(tokenizer)
    except Exception:  # of any kind, where files belong to a class that cannot be told without a config.json
        return False


def _identity(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, ...]:
    """What makes two tokenizers the same one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pieces = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    pieces = {key: value for key, value in pieces.items() if key not in ("truncation", "padding")}  # of the last call
    special = sorted(map(str, tokenizer.all_special_tokens)), str(tokenizer.bos_token), str(tokenizer.eos_token)
    return pieces, special, str(tokenizer.pad_token), tokenizer.chat_template


def _save_anew(tokenizer: PreTrainedTokenizerBase, template: str | None, folder: Path) -> None:
    own = tokenizer.chat_template
    try:
        if template is not None:
            tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = own


def make_readable(folder: Path) -> None:
    """Say what transformers 5 has written in words that transformers 4 knows too."""
    path = folder / TOKENIZER_CONFIG
    tree = read_tree(path)
    changed = {key: value for key, value in tree.items() if key not in _ONLY_IN_5}
    if changed.get("tokenizer_class") == "TokenizersBackend":
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(changed.get("extra_special_tokens"), list):
        extra = changed.pop("extra_special_tokens")
        changed["additional_special_tokens"] = [*changed.get("additional_special_tokens", ()), *extra]
    if changed != tree:
        write_tree(path, changed)


def _state_end(tokenizer: PreTrainedTokenizerBase, folder: Path, stop_token_id: int) -> None:
    """Name the trained end of an answer as the tokenizer's end token, where the chat template does not write that."""
    end = tokenizer.convert_ids_to_tokens(stop_token_id)
    if tokenizer.eos_token_id == stop_token_id or "eos_token" in (tokenizer.chat_template or ""):
        return
    for name in (TOKENIZER_CONFIG, SPECIAL):
        tree = read_tree(folder / name)
        if name == TOKENIZER_CONFIG or "eos_token" in tree:
            stated = tree.get("eos_token")
            tree["eos_token"] = {**stated, "content": end} if isinstance(stated, dict) else end
            if stated is not None:  # it stays a control token
                tree["additional_special_tokens"] = [*tree.get("additional_special_tokens", ()), stated]
            write_tree(folder / name, tree)
