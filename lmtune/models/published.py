"""The small files of a tuned model's folder, as its base published them wherever nothing changed.

What transformers 5 would write in their place is not what others read: the class `TokenizersBackend`, a list of extra
tokens and `rope_parameters` alone are unknown to transformers 4, and to programs and converters of its time. So files
are copied byte for byte where they are still true, and changed key by key where they are not: an answer ends in the
token that was learned, and `generation_config.json` (first), `config.json` and `tokenizer_config.json` say so.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmtune.config.schema import ModelConfig
from lmtune.data.rendering import Renderer
from lmtune.io.atomic import name_disk_errors
from lmtune.models.base import stored_files

CONFIG, GENERATION, TOKENIZER_CONFIG, SPECIAL = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
)  # fmt: skip
TOKENIZER_FILES = (
    "tokenizer.json", TOKENIZER_CONFIG, SPECIAL, "added_tokens.json", "chat_template.jinja", "tokenizer.model",
    "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt", "tekken.json",
)  # fmt: skip
Tree = dict[str, Any]
# Of config.json: where its author had it, code that is not copied, and how weights were stored
_NOT_KEPT = ("_name_or_path", "auto_map", "quantization_config", "compression_config")
# Of tokenizer_config.json: what transformers 5 notes about how a tokenizer was loaded
_NOTES_OF_5 = ("backend", "is_local", "local_files_only")


def merged_config(base: Mapping[str, Any], dtype: str, stop_token_ids: Sequence[int], untied: bool) -> Tree:
    """The config.json of a merged model, of its base's.

    Args:
        base: the content of the base's.
        dtype: of the written weights, such as `bfloat16`.
        stop_token_ids: the end of an answer first.
        untied: whether the head has become a weight of its own.
    """
    quantised = "quantization_config" in base or "compression_config" in base
    tree = {key: value for key, value in base.items() if key not in _NOT_KEPT}
    said = tree.get("dtype") or tree.get("torch_dtype")
    tree["dtype"] = tree["torch_dtype"] = dtype if quantised or not said else said
    for part in (tree, *(value for value in tree.values() if isinstance(value, dict))):
        part.update(_rope_keys(part))
        if "eos_token_id" in part or part is tree:
            part["eos_token_id"] = _first(part.get("eos_token_id"), stop_token_ids[0])
        if untied and ("tie_word_embeddings" in part or part is tree):
            part["tie_word_embeddings"] = False
    return tree


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


def write_adapter_texts(model: ModelConfig, renderer: Renderer, folder: Path) -> None:
    """Write the tokenizer and the generation config beside an adapter.

    Args:
        model: the base.
        renderer: how training turned messages into tokens.
        folder: where to.

    Raises:
        OSError: the disk is full or must not be written; names what.
    """
    stops, template = renderer.stop_token_ids, renderer.chat_template
    write_tokenizer(renderer.tokenizer, stored_files(model, TOKENIZER_FILES), folder, template, stops[0])
    base = {name: read_tree(file) for name, file in stored_files(model, (GENERATION, CONFIG)).items()}
    begin = base.get(CONFIG, {}).get("bos_token_id")
    stated = base.get(GENERATION, {"bos_token_id": begin} if isinstance(begin, int) else {})
    with name_disk_errors(folder):
        write_tree(folder / GENERATION, generation_config(stated, stops, renderer.tokenizer.pad_token_id))


def write_tokenizer(
    tokenizer: Any, sources: Mapping[str, Path], folder: Path, template: str | None, stop_token_id: int
) -> None:
    """Write the files of a tokenizer: the base's own where it is still that tokenizer, else made anew.

    Args:
        tokenizer: the one that training used.
        sources: the base's files by name; empty if they are not known.
        folder: where to.
        template: the chat template that training used; None for plain text.
        stop_token_id: the end of an answer.

    Raises:
        OSError: the disk is full or must not be written; names what.
    """
    with name_disk_errors(folder):
        if template is None or template == tokenizer.chat_template:
            for name, source in sources.items():
                (folder / name).write_bytes(source.read_bytes())
        if not _reads_as(tokenizer, folder):
            _remove(folder)
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
    """The keys that say to transformers 4 and its like what `rope_parameters` says to transformers 5.

    None where transformers 5 would read something else with them, as for kinds of rotation that are newer than 4.
    """
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
    if kind != "default":
        lifted = {key: value for key, value in whole.items() if key not in ("rope_theta", "partial_rotary_factor")}
        added["rope_scaling"] = {**lifted, "type": kind}
    added = {key: value for key, value in added.items() if key not in part}
    read = _rope_read_by_5(part)
    return added if read is not None and read == _rope_read_by_5({**part, **added}) else {}


def _rope_read_by_5(part: Mapping[str, Any]) -> Any:
    """The rotation that transformers makes of a config; None if it cannot read it."""
    from transformers import CONFIG_MAPPING

    kind = part.get("model_type")
    if kind not in CONFIG_MAPPING:
        return part.get("rope_parameters")
    try:
        with warnings.catch_warnings(action="ignore"):  # it says that the older keys are older
            read = getattr(CONFIG_MAPPING[kind].from_dict(dict(part)), "rope_parameters", None)
    except Exception:  # of any kind: an entry that is missing, or that it does not take
        return None
    return {key: value for key, value in read.items() if key != "type"} if read else None  # `rope_type`'s older name


def _first(stated: Any, learned: int) -> Any:
    """The end tokens of a config, the learned one first, or alone where it names one."""
    return [learned, *(token for token in stated if token != learned)] if isinstance(stated, list) else learned


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _reads_as(tokenizer: Any, folder: Path) -> bool:
    """Whether the files in `folder` alone give this tokenizer."""
    if not (folder / TOKENIZER_CONFIG).is_file():
        return False
    try:
        return _identity(_load(folder)) == _identity(tokenizer)
    except Exception:  # of any kind, where files belong to a class that cannot be told without a config.json
        return False


def _identity(tokenizer: Any) -> tuple[Any, ...]:
    """What makes two tokenizers the same one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pieces = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    pieces = {key: value for key, value in pieces.items() if key not in ("truncation", "padding")}  # of the last call
    special = sorted(map(str, tokenizer.all_special_tokens)), str(tokenizer.bos_token), str(tokenizer.eos_token)
    return pieces, special, str(tokenizer.pad_token), tokenizer.chat_template


def _save_anew(tokenizer: Any, template: str | None, folder: Path) -> None:
    own = tokenizer.chat_template
    try:
        if template is not None:
            tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = own


def _remove(folder: Path) -> None:
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)


def make_readable(folder: Path) -> None:
    """Say what transformers 5 has written in words that transformers 4 knows too; leave what was never its own."""
    path = folder / TOKENIZER_CONFIG
    tree = read_tree(path)
    changed = {key: value for key, value in tree.items() if key not in _NOTES_OF_5}
    if changed.get("tokenizer_class") == "TokenizersBackend":
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(changed.get("extra_special_tokens"), list):
        extra = changed.pop("extra_special_tokens")
        changed["additional_special_tokens"] = [*changed.get("additional_special_tokens", ()), *extra]
    if changed != tree:
        write_tree(path, changed)


def _state_end(tokenizer: Any, folder: Path, stop_token_id: int) -> None:
    """Name the learned end of an answer as the tokenizer's end token, where the chat template does not write that."""
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
