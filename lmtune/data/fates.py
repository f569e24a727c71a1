"""The fate of every row, as it is written to a run's `data.json` and told to a person: nothing vanishes in silence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmtune.data.survey import counted, shown_first

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
    for reason, tally in part["dropped"].items():
        lines.append(f"  {tally['count']:,} dropped, {WHY_DROPPED.get(reason, reason)}: {shown_first(tally)}")
    if part["truncated"]["count"]:
        lines.append(f"  {part['truncated']['count']:,} cut at their beginning: {shown_first(part['truncated'])}")
    if part["duplicates"]["count"]:
        lines.append(f"  {part['duplicates']['count']:,} repeat an earlier row: {shown_first(part['duplicates'])}")
    lines += [f"  warning: {warning}" for warning in part["warnings"]]
    return lines
