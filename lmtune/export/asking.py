"""Asking an endpoint for the rows of a run, in the ways that it has.

    asked = ask(served, rows, tokenizer)
    asked.scored        # whole rows with log-probabilities: completions with `echo`
    asked.completed     # what follows the prompts of training, as tokens
    asked.chatted       # what follows the same conversations, which the endpoint renders

A way that the endpoint refuses, or does not answer rightly, is left out with its reason. Only an endpoint that has no
way is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lmtune.errors import ConfigError, LmtuneError
from lmtune.export.served import Said, Served
from lmtune.export.verification_rows import VerificationRow
from lmtune.io.console import progress
from lmtune.io.endpoint import Endpoint, FailingError, RefusedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS = 8  # that are answered; all are scored
_MORE_TOKENS, _MOST_TOKENS = 24, 256  # of an answer beyond the one that was trained; in all
_FEW_TOKENS = 32  # that tell the weights
_CLOSED = (401, 403)
_NAMES = 8


Listed = Mapping[str, str | None]  # the models of an endpoint, each with the one that it is an adapter over


@dataclass(frozen=True)
class Asked:
    """A row, what was said, and the most tokens that were asked for."""

    row: VerificationRow
    said: Said
    most: int


@dataclass
class AskedRows:
    """What an endpoint has said, by way; `notes` tell why a way has none."""

    scored: list[Asked] = field(default_factory=list)
    completed: list[Asked] = field(default_factory=list)
    chatted: list[Asked] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def choose_model(endpoint: Endpoint, wanted: str | None, run: str) -> tuple[str, Listed]:
    """The model to ask, and all that the endpoint lists: `wanted`, or the one of the run's name, or the only one.

    Raises:
        ConfigError: none is given and there are several, or the endpoint wants a key.
        LmtuneError: nobody answers there.
    """
    listed: Listed = {}
    try:
        listed = endpoint.models()
    except RefusedError as refusal:
        if refusal.status in _CLOSED:
            raise
    except FailingError as failure:
        if failure.status is None or wanted is None:
            raise
    if wanted is not None:
        return wanted, listed
    if run in listed or len(listed) == 1:
        return (run if run in listed else next(iter(listed))), listed
    raise ConfigError(f"--model: missing; {endpoint.shown} has {names(listed) or 'no list of models'}")


def names(listed: Iterable[str]) -> str:
    """The first names of a list."""
    listed = list(listed)
    return ", ".join(listed[:_NAMES]) + (", …" if len(listed) > _NAMES else "")


def ask(
    served: Served, rows: Sequence[VerificationRow], tokenizer: PreTrainedTokenizerBase, listed: Iterable[str] = ()
) -> AskedRows:
    """Ask all that the endpoint has.

    Raises:
        ConfigError: it has no such model, or wants a key.
        LmtuneError: it does not answer, in any way.
    """
    found = AskedRows()
    talks = [row for row in rows if row.messages][:_ROWS]
    with progress("asking the endpoint", len(rows) + len(talks), "rows") as shown:

        def each(way: str, rows: Sequence[VerificationRow], one: Callable[[VerificationRow], Asked]) -> list[Asked]:
            asked = _each(served, listed, way, rows, one, found.notes, shown.advance)
            return list(asked)

        found.scored = each("completions with echo", rows, _scorer(served, tokenizer))
        found.chatted = each("chat", talks, lambda row: Asked(row, served.chat(row.messages, _most(row)), _most(row)))
        if not found.scored or not found.chatted:
            most = _FEW_TOKENS if found.chatted else _MOST_TOKENS  # chats show how answers end
            found.completed = each("completions", rows[:_ROWS], _completer(served, tokenizer, most))
    if not talks and not found.scored and not found.completed:
        found.notes.append("chat: no row of the run can be written as messages for its template")
    if not (found.scored or found.completed or found.chatted):
        raise LmtuneError(f"URL: {served.endpoint.shown}: cannot be verified: {'; '.join(found.notes)}")
    return found


def _each(
    served: Served, listed: Iterable[str], way: str, rows: Sequence[VerificationRow],
    one: Callable[[VerificationRow], Asked], notes: list[str], advance: Callable[[], None],
) -> Iterator[Asked]:  # fmt: skip
    """Every row that is answered; none after the first that is not, unless one was before."""
    count = 0
    for row in rows:
        try:
            asked = one(row)
        except _Unusable as fault:
            notes.append(f"{way}: {fault}")
            return
        except RefusedError as refusal:
            if refusal.status in _CLOSED:
                raise
            if refusal.status == 404 and "model" in refusal.reason.lower():
                raise ConfigError(
                    f"--model: {served.model}: {served.endpoint.shown} does not know it; it has "
                    f"{names(listed) or 'no list of models'}"
                ) from None
            if not count:
                said = "" if refusal.status == 404 else f": {refusal.reason[:120]}"
                notes.append(f"{way}: status {refusal.status}{said}")
                return
            continue  # this row alone: it may be too long
        except FailingError as failure:
            if failure.status is None:
                raise
            notes.append(f"{way}: {'no JSON' if failure.status == 200 else f'status {failure.status}'}")
            return
        count += 1
        yield asked
        advance()


class _Unusable(Exception):
    """An answer that says nothing of the row; the text tells why."""


class _Unscored(_Unusable):
    """The row was read as it is, and not scored."""


Prompt = list[int] | str


def _scorer(served: Served, tokenizer: PreTrainedTokenizerBase) -> Callable[[VerificationRow], Asked]:
    """Asks for log-probabilities of a row, as tokens or, where the endpoint takes none, as text."""

    def scored(prompt: Prompt, row: VerificationRow) -> Said:
        said = served.score(prompt, row.ids)
        if not said.prompt_tops:
            if said.prompt_tokens == len(row.ids):
                raise _Unscored("not scored")
            other = said.prompt_tokens is not None
            raise _Unusable(
                f"reads {said.prompt_tokens} tokens where training has {len(row.ids)}" if other else "not scored"
            )
        return said

    ask_one = _in_either_form(tokenizer, scored)
    return lambda row: Asked(row, ask_one(row.ids, row), 1)


def _completer(served: Served, tokenizer: PreTrainedTokenizerBase, most: int) -> Callable[[VerificationRow], Asked]:
    def completed(prompt: Prompt, row: VerificationRow) -> Said:
        said = served.complete(prompt, min(most, _most(row)))
        if said.prompt_tokens not in (None, row.num_prompt):
            raise _Unusable(f"reads {said.prompt_tokens} tokens where training has {row.num_prompt}")
        return said

    ask_one = _in_either_form(tokenizer, completed)
    return lambda row: Asked(row, ask_one(row.prompt, row), min(most, _most(row)))


def _in_either_form(
    tokenizer: PreTrainedTokenizerBase, one: Callable[[Prompt, VerificationRow], Said]
) -> Callable[[Sequence[int], VerificationRow], Said]:
    """Asks by tokens, and by text from the first time on that the endpoint does not take tokens."""
    by_text = False

    def asked(ids: Sequence[int], row: VerificationRow) -> Said:
        nonlocal by_text
        if not by_text:
            try:
                return one(list(ids), row)
            except _Unscored:  # as text neither
                raise
            except _Unusable:
                by_text = True
            except RefusedError as refusal:
                if refusal.status in (*_CLOSED, 404):
                    raise
                by_text = True
        return one(_text(tokenizer, ids), row)

    return asked


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text that the tokenizer makes these tokens of, the beginning token that it adds left out."""
    begin = tokenizer.bos_token_id
    adds = begin is not None and list(tokenizer.encode("a"))[:1] == [begin]
    kept = ids[1:] if adds and ids[0] == begin else ids
    return str(tokenizer.decode(list(kept), clean_up_tokenization_spaces=False))


def _most(row: VerificationRow) -> int:
    return min(_MOST_TOKENS, len(row.ids) - row.num_prompt + _MORE_TOKENS)
