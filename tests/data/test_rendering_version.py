"""The version of rendering is a part of the cache's key, so it must change whenever a row becomes other tokens."""

from __future__ import annotations

import hashlib
import json

from lmtune.data import rendering
from lmtune.data.rendering import Renderer, Template
from lmtune.data.types import Example
from tests.data.test_rendering import example
from tests.tokenizers import (
    CHANNELS,
    CHAT_TEMPLATES,
    EMPTY_THOUGHT,
    EMPTY_THOUGHT_FIELD,
    PREFILLED,
    QWEN3,
    QWEN35,
    R1,
    TRIMS,
    WORD,
    make_tokenizer,
)

# By RENDERING_VERSION, the hash of what the rows below become. Where it differs, tokens have changed: raise the version
# and put the new hash here; an old version's hash never changes.
GOLDEN = {
    1: "6f6d2fa1d3f8ecfce5220226ac6a55bc02601d63d252fbbc5d1ef7cc050796ee",
    2: "6f6d2fa1d3f8ecfce5220226ac6a55bc02601d63d252fbbc5d1ef7cc050796ee",  # answers that a template rewrites changed
}

THOUGHT = "<think>\nIt is clear.\n</think>\n\nParis."
ROWS = [
    example("What is the capital of France?", "Paris is the capital of France."),
    example("Hello", "Hi, <|im_end|> there", "And  you?", "\n\n  Fine.\n ", "Be brief", "Yes."),
    example("The quick", " brown fox 歷 😀", system="Answer.\n\nBriefly."),
]
TEMPLATES: list[tuple[str | None, Template, list[Example]]] = [
    (None, "auto", [ROWS[0], ROWS[2], Example("f", 1, text="The lazy dog <|im_end|> sleeps.")]),
    *((template, "auto", ROWS[:2]) for template in CHAT_TEMPLATES.values()),
    *((template, "auto", ROWS) for template in (CHANNELS, EMPTY_THOUGHT, EMPTY_THOUGHT_FIELD, PREFILLED, TRIMS, WORD)),
    *((template, "thinking", [example("Where?", THOUGHT)]) for template in (CHANNELS, QWEN3, QWEN35, R1)),
]  # fmt: skip


def test_tokens_change_only_with_the_version() -> None:
    rendered = [
        [
            [document.input_ids.tolist(), document.loss_mask.tolist()]
            for document in Renderer(make_tokenizer(template), option).render(row)
        ]
        for template, option, rows in TEMPLATES
        for row in rows
    ]
    digest = hashlib.sha256(json.dumps(rendered).encode()).hexdigest()
    assert GOLDEN.get(rendering.RENDERING_VERSION) == digest
