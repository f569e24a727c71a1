"""How near an endpoint's answers are to both models of a run, under a given prompt; and whether answers end rightly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from lmtune.data.replies import split_reply
from lmtune.export.asking import Asked
from lmtune.export.nearness import Float64, Nearness, of_answers, of_places
from lmtune.export.references import Reference, References, ScoredTokens
from lmtune.export.rounding import PRECISIONS
from lmtune.export.served import has_logprobs
from lmtune.export.tokens_of_texts import TokenNumbers
from lmtune.io.console import progress

Prompts = Sequence[Sequence[int]]

_PLACES = 32  # of an answer
_BEGINNING = 12  # tokens of an answer that must be equal
_ROUNDED_ROWS = 4


class Measurer:
    """Compares with the models of one run."""

    def __init__(self, references: References) -> None:
        self._references = references
        self._numbers = TokenNumbers(references.renderer.tokenizer, references.vocabulary)

    def scored(self, asked: Sequence[Asked]) -> Nearness:
        """Of whole rows whose tokens were scored."""
        return self._by_places([one for each in asked if (one := self._of_row(each)).places])

    def answered(
        self, asked: Sequence[Asked], prompts: Prompts, expected: Mapping[str, float] | None = None
    ) -> Nearness:  # fmt: skip
        """Of answers to `prompts`, one each, by log-probabilities where there are any that can be used.

        `expected`: what rounding explains, if that is known from the same answers.
        """
        if any(has_logprobs(one.said) for one in asked):
            found = [self._of_answer(one, prompt) for one, prompt in zip(asked, prompts, strict=True)]
            if usable := [one for one in found if one.places]:
                return self._by_places(usable, expected)
        said = [split_reply(one.said.text)[1] for one in asked]
        both = [self._beginnings(model, prompts) for model in (self._references.tuned, self._references.base)]
        return of_answers(said, *both)

    def run_on(self, asked: Sequence[Asked]) -> tuple[int, int]:
        """How many answers go on where the tuned model stops, and how many begin as the tuned model's and could."""
        most = [one.most for one in asked]
        with progress("letting the tuned model answer", len(asked), "rows"):
            own = self._references.tuned.answers(own_prompts(asked), most)
        longer = comparable = 0
        for one, ids in zip(asked, own, strict=True):
            text, said = self._text(ids), split_reply(one.said.text)[1].strip()
            if len(ids) >= one.most or not said.startswith(text):
                continue
            comparable += 1
            longer += len(said) > len(text) or one.said.finish_reason == "length"
        return longer, comparable

    def _by_places(self, rows: Sequence[ScoredTokens], expected: Mapping[str, float] | None = None) -> Nearness:
        served = [np.array(list(tops.values())) for row in rows for tops in row.places.values()]
        with progress("asking the tuned model and the base", 2 * len(rows), "rows") as shown:
            tuned, base = (list(_read(model, rows, shown.advance)) for model in self._models)
        found = of_places(
            served, [one for row in tuned for one in row], [one for row in base for one in row], len(rows)
        )
        expected = expected or self._expected(rows[:_ROUNDED_ROWS], tuned[:_ROUNDED_ROWS])
        return replace(found, expected=expected)

    @property
    def _models(self) -> tuple[Reference, Reference]:
        return self._references.tuned, self._references.base

    def _expected(self, rows: Sequence[ScoredTokens], tuned: Sequence[list[Float64]]) -> dict[str, float]:
        """How far rounding moves the tuned model."""
        found = dict[str, float]()
        for kind in PRECISIONS:
            moved = [one for row in rows for one in self._references.tuned.logprobs(row, kind)]
            flat = [one for row in tuned for one in row]
            found[kind] = of_places(moved, flat, flat, len(rows)).to_tuned
        return found

    def _of_row(self, asked: Asked) -> ScoredTokens:
        ids, said = asked.row.ids, asked.said
        places = {}
        for place, (name, tops) in enumerate(zip(said.prompt_names, said.prompt_tops, strict=True)):
            if place and name in tops:
                others = self._numbers.tops({token: value for token, value in tops.items() if token != name})
                places[place] = {**others, ids[place]: tops[name]}
        return ScoredTokens(ids, places)

    def _of_answer(self, asked: Asked, prompt: Sequence[int]) -> ScoredTokens:
        """Along the answer, as far as its tokens are known."""
        ids, places = list(prompt), {}
        for token, tops in list(zip(asked.said.tokens, asked.said.tops, strict=False))[:_PLACES]:
            if not (known := self._numbers.tops(tops)):
                break
            places[len(ids)] = known
            if (number := self._numbers.of(token)) is None:
                break
            ids.append(number)
        return ScoredTokens(tuple(ids), places)

    def _beginnings(self, model: Reference, prompts: Prompts) -> list[str]:
        return [self._text(ids) for ids in model.answers(prompts, [_BEGINNING] * len(prompts))]

    def _text(self, ids: Sequence[int]) -> str:
        return split_reply(self._references.renderer.decode(ids))[1].strip().rstrip("�")


def _read(
    model: Reference, rows: Sequence[ScoredTokens], advance: Callable[[], None]
) -> Iterator[list[Float64]]:  # fmt: skip
    for row in rows:
        yield model.logprobs(row)
        advance()


def own_prompts(asked: Sequence[Asked]) -> Prompts:
    """Those of training."""
    return [one.row.prompt for one in asked]
