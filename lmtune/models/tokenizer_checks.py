"""A tokenizer as transformers has loaded it: whether it can be used at all, asked before rows are read with it.

A damaged vocabulary loads without a word, and fails, or turns every text into unknown tokens, at the first row.
"""

from __future__ import annotations

from typing import Any

from lmtune.errors import is_failure

_TEXT = "Hello, 12 plain words of text"


def unusable(tokenizer: Any) -> str | None:
    """Why `tokenizer` cannot be used and what to do about it, or None."""
    length = tokenizer.model_max_length
    if not isinstance(length, (int, float)) or isinstance(length, bool) or not length >= 0:
        return f"tokenizer_config.json: model_max_length is {length!r}; should be a number above 0"
    try:
        ids = tokenizer.encode(_TEXT, add_special_tokens=False)
    except BaseException as error:
        if not is_failure(error):
            raise
        return f"its tokenizer cannot encode plain text ({error}); copy or download it again"
    if len(set(ids)) < 2:  # the one for what is unknown
        return f"its tokenizer knows nothing of {_TEXT!r}; copy or download it again"
    return None
