"""The fate of every row, as it is written to a run's `data.json` and told to a person: nothing vanishes in silence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmtune.data.survey import counted, describe_faulty, shown_first

WHY_DROPPED = {
    "too_long": "longer than data.max_length",
    "answer_too_long": "the answer alone is longer than data.max_length",
}


def describe_fates(fates: Mapping[str, Any]) -> str:
    """What became of the rows, in a few lines; `fates` as `load_data` or `tokenize` returns them."""
    if "rows" in fates:
        return "\n".join(_describe_part(fates))
    lines = _describe_part(fates["train"])
    validation = fates.get("validation") or {}
    if "rows" in validation:
        lines += ["validation:", *_describe_part(validation)]
        if validation["also_in_train"]["count"]:
            shared = validation["also_in_train"]
            lines.append(f"  warning: {counted(shared['count'])} of them also in train: {shown_first(shared)}")
    elif validation and validation["held_out"]:
        lines.append(f"  {counted(validation['held_out'])} of these held out for validation")
    elif validation:
        lines.append("  warning: nothing could be held out for validation; that needs two different rows")
    return "\n".join(lines)


def _describe_part(part: Mapping[str, Any]) -> list[str]:
    lines = [f"{name}: {format}" for name, format in part["formats"].items()][:10]
    if len(part["formats"]) > 10:
        lines.append(f"… and {len(part['formats']) - 10} more files")
    lines.append(
        f"  {counted(part['rows'])}, {part['kept']:,} kept: {part['tokens']:,} tokens, {part['trained_tokens']:,} of "
        f"them learned; the longest row has {part['longest_row_tokens']:,}"
    )
    lines += describe_faulty(part["faulty"]) if "faulty" in part else []
    for reason, tally in part["dropped"].items():
        lines.append(f"  {tally['count']:,} dropped, {WHY_DROPPED.get(reason, reason)}: {shown_first(tally)}")
    if part["truncated"]["count"]:
        lines.append(f"  {part['truncated']['count']:,} cut at their beginning: {shown_first(part['truncated'])}")
    if part["duplicates"]["count"]:
        lines.append(f"  {part['duplicates']['count']:,} repeat an earlier row: {shown_first(part['duplicates'])}")
    lines += [f"  warning: {warning}" for warning in part["warnings"]]
    return lines


def changed_files(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Which data files differ in content between two runs' fates, as `section.key: what`; a new name is no difference.

    Args:
        before: of the run as it was begun, from its `data.json`; what cannot be understood of it is passed over.
        now: of the run as it would go on.
    """
    lines = []
    for part in ("train", "validation"):
        old, new = _contents(before.get(part)), _contents(now.get(part))
        if isinstance(old, dict) and isinstance(new, dict):
            lines += [f"data.{part}: {what}" for what in [_difference(old, new)] if what]
        elif old is not None and new is not None and old != new:
            lines.append(f"data.{part}: was {_named(old)}, now {_named(new)}")
    return lines


def _contents(part: Any) -> dict[str, str] | str | None:
    """Hash by file name, or what there is in place of files, or None for what cannot be understood."""
    if not part:
        return "none" if part is None else None
    if not isinstance(part, dict):
        return None
    if "held_out" in part:
        return "a part of data.train"
    files, sums = part.get("files"), part.get("sha256")
    if not isinstance(files, list) or not isinstance(sums, list) or len(files) != len(sums):
        return None
    return {str(name): str(digest) for name, digest in zip(files, sums, strict=True)}


def _difference(old: dict[str, str], new: dict[str, str]) -> str:
    """What became of the files, by content; empty if nothing."""
    changed = [name for name in new if name in old and new[name] != old[name]]
    added, gone = [name for name in new if name not in old], [name for name in old if name not in new]
    if sorted(old.values()) == sorted(new.values()):  # at most renamed
        return "" if list(old.values()) == list(new.values()) else "the same files in another order"
    parts = [(changed, "changed"), (added, "is new"), (gone, "is gone")]
    return ", ".join(f"{_some(names)} {what}" for names, what in parts if names)


def _named(contents: dict[str, str] | str) -> str:
    return contents if isinstance(contents, str) else _some(list(contents))


def _some(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
