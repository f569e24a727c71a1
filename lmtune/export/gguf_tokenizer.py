"""A tokenizer as the keys of a GGUF file: tokens, merges or scores, kinds of tokens, ends, template.

    for key, value in tokenizer_keys(tokenizer, vocab_size, stop_token_ids, template): …

llama.cpp has two ways that matter here. Byte-level BPE cuts text by a regular expression that it knows by name
(`tokenizer.ggml.pre`), then merges by rank. The other, SentencePiece's, joins the pair with the highest score; a
token's score is the negative rank of the first merge that makes it, which is the same order. A tokenizer that cuts text
in a way that llama.cpp has no name for is refused: it would read other tokens than were trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lmtune.errors import ModelError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # kinds of tokens
_ENDS = ("eos", "eot", "eom")  # keys for tokens that end an answer; llama.cpp stops at each of them

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START, _SHORT = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# How text is cut before merging: the pattern of `Split`, and what llama.cpp calls it.
_PATTERNS = {
    (_WORDS + r"\p{N}{1,3}" + _REST,): "llama-bpe",
    (_WORDS + r"\p{N}" + _REST,): "qwen2",
    (
        f"{_START}{_UPPER}*{_LOWER}+{_SHORT}|{_START}{_UPPER}+{_LOWER}*{_SHORT}"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ): "gpt-4o",
    (): "gpt-2",  # the pattern of GPT-2, which ByteLevel has
    ("digits",): "smollm",  # each digit alone, then the pattern of GPT-2
}


def tokenizer_keys(
    tokenizer: Any, vocab_size: int, stop_token_ids: Sequence[int], template: str | None
) -> dict[str, Any]:
    """The keys `tokenizer.…` of the file.

    Args:
        tokenizer: a fast tokenizer of transformers.
        vocab_size: rows of the model's embedding, at least as many as there are tokens.
        stop_token_ids: what ends an answer, the first before others.
        template: the chat template; None for none.

    Raises:
        ModelError: llama.cpp would cut text into other tokens.
    """
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    if tree["model"]["type"] != "BPE":
        raise ModelError(f"the tokenizer is of type {tree['model']['type']}; only BPE can be written")
    tokens, kinds = _tokens(tokenizer, tree, vocab_size)
    keys: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in tree["model"]["merges"]]
    if tree["model"].get("byte_fallback"):
        keys["tokenizer.ggml.model"] = "llama"
        keys["tokenizer.ggml.scores"] = _scores(tokens, kinds, merges)
        keys["tokenizer.ggml.add_space_prefix"] = _prepends_space(tree)
    else:
        keys["tokenizer.ggml.model"] = "gpt2"
        keys["tokenizer.ggml.pre"] = _cut(tree)
        keys["tokenizer.ggml.merges"] = merges
    for name, token in zip(_ENDS, dict.fromkeys(stop_token_ids), strict=False):
        keys[f"tokenizer.ggml.{name}_token_id"] = token
    for name, key in (("bos", "bos"), ("unk", "unknown"), ("pad", "padding")):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            keys[f"tokenizer.ggml.{key}_token_id"] = token
    begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None
    keys |= {"tokenizer.ggml.add_bos_token": begins, "tokenizer.ggml.add_eos_token": False}
    return keys if template is None else {**keys, "tokenizer.chat_template": template}


def _tokens(tokenizer: Any, tree: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Every token by its id, and of which kind each is."""
    vocabulary: dict[str, int] = tree["model"]["vocab"]
    tokens, kinds = [f"[PAD{index}]" for index in range(vocab_size)], [_UNUSED] * vocab_size
    unknown, has_bytes = tree["model"].get("unk_token"), bool(tree["model"].get("byte_fallback"))
    for token, index in vocabulary.items():
        if index < vocab_size:
            is_byte = has_bytes and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            tokens[index] = token
            kinds[index] = _BYTE if is_byte else _UNKNOWN if token == unknown else _NORMAL
    for added in tree["added_tokens"]:
        if added["id"] < vocab_size and kinds[added["id"]] != _UNKNOWN:
            tokens[added["id"]] = added["content"]
            kinds[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    return tokens, kinds


def _scores(tokens: Sequence[str], kinds: Sequence[int], merges: Sequence[str]) -> list[float]:
    """Of each token the negative rank of the first merge that makes it; tokens that no merge makes come last."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", "", 1), rank)
    last = float(len(merges))
    return [
        -float(ranks.get(token, last)) if kind == _NORMAL else 0.0 for token, kind in zip(tokens, kinds, strict=True)
    ]


def _steps(part: Mapping[str, Any] | None, several: str) -> list[Mapping[str, Any]]:
    """A normalizer or pre-tokenizer as a list of what it does."""
    if part is None:
        return []
    return [step for one in part[several] for step in _steps(one, several)] if part["type"] == "Sequence" else [part]


def _prepends_space(tree: Mapping[str, Any]) -> bool:
    """Whether a text gets a space before it.

    Raises:
        ModelError: it is changed in another way.
    """
    normal, before = _steps(tree.get("normalizer"), "normalizers"), _steps(tree.get("pre_tokenizer"), "pretokenizers")
    known = [step for step in normal if step["type"] == "Replace" and step["pattern"] == {"String": " "}]
    prepends = [step for step in normal if step["type"] == "Prepend"]
    spaces = [step for step in before if step["type"] in ("Split", "Metaspace")]
    if len(known) + len(prepends) != len(normal) or len(spaces) != len(before):
        raise ModelError(f"the tokenizer changes text by {_named(normal, before)}, which llama.cpp has no name for")
    schemes = {step.get("prepend_scheme", "always") for step in spaces if step["type"] == "Metaspace"}
    return bool(prepends) or bool(schemes - {"never"})


def _cut(tree: Mapping[str, Any]) -> str:
    """What llama.cpp calls the way in which a byte-level tokenizer cuts text.

    Raises:
        ModelError: it has no name for it.
    """
    normal, before = _steps(tree.get("normalizer"), "normalizers"), _steps(tree.get("pre_tokenizer"), "pretokenizers")
    patterns: list[str] = []
    for step in before:
        if step["type"] == "Split" and "Regex" in step["pattern"] and step["behavior"] == "Isolated":
            patterns.append(step["pattern"]["Regex"])
        elif step["type"] == "Digits" and step["individual_digits"]:
            patterns.append("digits")
        elif step["type"] != "ByteLevel" or step["add_prefix_space"]:
            patterns.append(step["type"])
    found = _PATTERNS.get(tuple(patterns))
    is_gpt2 = any(step["type"] == "ByteLevel" and step["use_regex"] for step in before)
    if found is None or is_gpt2 != (found in ("gpt-2", "smollm")) or any(step["type"] != "NFC" for step in normal):
        raise ModelError(
            f"the tokenizer cuts text by {_named(normal, before)}, which llama.cpp has no name for that lmtune knows"
        )
    return found


def _named(normal: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(
        step["type"] + (f" {step['pattern'].get('Regex', '')[:60]}" if step["type"] == "Split" else "")
        for step in (*normal, *before)
    )
