"""A pool of processes renders the same documents in the same order as one process."""

from __future__ import annotations

import os

import pytest

from lmtune.data import rendering
from lmtune.data.rendering import Renderer, render_all
from lmtune.data.types import Example, Message, TokenSequence
from lmtune.errors import DataError, LmtuneError
from tests.tokenizers import NO_SYSTEM, make_tokenizer


def examples(count: int) -> list[Example]:
    def one(number: int) -> Example:
        head = (Message("system", "s"),) if number % 10 == 9 else ()  # which the template refuses
        return Example("f", number, (*head, Message("user", f"q {number}"), Message("assistant", f"a {number}")))

    return [one(number) for number in range(1, count + 1)]


def plain(outcomes: list[tuple[Example, tuple[TokenSequence, ...] | DataError]]) -> list[tuple[Example, object]]:
    return [(example, str(found) if isinstance(found, DataError) else found) for example, found in outcomes]


@pytest.mark.slow
def test_a_pool_gives_what_one_process_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "_CHUNK_ROWS", 7)
    renderer = Renderer(make_tokenizer(NO_SYSTEM))
    rows = examples(100)
    alone = plain(list(render_all(rows, renderer, 0)))
    assert plain(list(render_all(iter(rows), renderer, 0, num_processes=2))) == alone
    assert sum(isinstance(found, str) for _, found in alone) == 10


class Deadly(Renderer):
    """Kills its process at the tenth row."""

    def render(self, example: Example) -> tuple[TokenSequence, ...]:
        if example.line == 10:
            os._exit(1)
        return super().render(example)


def test_a_process_that_dies_is_an_error() -> None:
    renderer = Deadly(make_tokenizer())
    with pytest.raises(LmtuneError, match="a process that renders rows died"):
        list(render_all(examples(20), renderer, 0, num_processes=2))


def test_small_data_needs_no_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "ProcessPoolExecutor", lambda *_, **__: pytest.fail("started a pool"))
    renderer = Renderer(make_tokenizer())
    assert len(list(render_all(examples(3), renderer, rendering.WORTH_BYTES - 1))) == 3
    with pytest.raises(pytest.fail.Exception):
        list(render_all(examples(3), renderer, rendering.WORTH_BYTES, num_processes=2))
