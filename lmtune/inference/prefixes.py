"""What a model has read, kept for prompts that begin alike: the next turn of a conversation, a shared system prompt."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import Cache

from lmtune.inference.kv_cache import can_crop, copy_of, crop, num_bytes
from lmtune.models.members import Members

MAX_PREFIXES = 256  # each is compared with a prompt that comes


@dataclass(frozen=True)
class Prefix:
    """Tokens that were read, with their keys and values.

    Attributes:
        token_ids: of the cache's columns.
        cache: a row for each member.
        logits: `[V]` after the first `num_prompt` tokens.
        num_prompt: how many of them were the prompt.
    """

    token_ids: tuple[int, ...]
    cache: Cache
    logits: torch.Tensor | None = None
    num_prompt: int = 0

    @property
    def num_bytes(self) -> int:
        """Of the memory that it holds."""
        return num_bytes(self.cache) + (0 if self.logits is None else self.logits.numel() * 4)


class PrefixStore:
    """The prefixes used last, up to a number of bytes and `MAX_PREFIXES`.

    Members do not share what they read: an adapter changes keys and values.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._kept: OrderedDict[tuple[Members, tuple[int, ...]], Prefix] = OrderedDict()

    def add(self, members: Members, prefix: Prefix) -> None:
        """Keep one in place of those that it begins with."""
        ids = prefix.token_ids
        for key in [key for key in self._kept if key[0] == members and ids[: len(key[1])] == key[1]]:
            self._bytes -= self._kept.pop(key).num_bytes
        self._kept[members, ids] = prefix
        self._bytes += prefix.num_bytes
        while self._bytes > self._max_bytes or len(self._kept) > MAX_PREFIXES:
            self._bytes -= self._kept.popitem(last=False)[1].num_bytes

    def find(self, members: Members, prompt: Sequence[int]) -> Prefix | None:
        """The longest part of `prompt` that was read before, in a cache of its own; at least the last token is left to
        read, unless the logits after the whole prompt are known."""
        best, longest, prompt = None, 0, tuple(prompt)
        for key, prefix in self._kept.items():
            if key[0] != members:
                continue
            length = _num_common(prefix.token_ids, prompt)
            is_known = length == len(prompt) == prefix.num_prompt and prefix.logits is not None
            length = length if is_known else min(length, len(prompt) - 1)
            if length > longest and (length == len(key[1]) or can_crop(prefix.cache, len(key[1]))):
                best, longest = key, length
        if best is None:
            return None
        self._kept.move_to_end(best)
        found, cache = self._kept[best], copy_of(self._kept[best].cache)
        crop(cache, len(found.token_ids), longest)
        logits = found.logits if longest == len(prompt) else None
        return Prefix(prompt[:longest], cache, logits, found.num_prompt if logits is not None else 0)


def _num_common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginnings."""
    if one[: len(other)] == other or other[: len(one)] == one:
        return min(len(one), len(other))
    return next(n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
