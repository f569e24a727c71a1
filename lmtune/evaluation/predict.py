"""What a model says of rows: classes with probabilities, values or rewards of a classifier, answers of others.

for row in predict(loaded, ["reviews.jsonl"]): …     # the row, and `prediction` beside its own keys
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lmtune.data.inputs import read_inputs
from lmtune.data.reading import ReadReport
from lmtune.data.rendering import Renderer
from lmtune.data.replies import split_reply
from lmtune.data.sources import Given, find_files
from lmtune.data.types import Example
from lmtune.errors import ConfigError, DataError
from lmtune.inference.classify import Classifier
from lmtune.inference.load import LoadedModel
from lmtune.inference.request import Request, Sampling
from lmtune.io.console import progress, warn
from lmtune.io.text import pluralize
from lmtune.models.structure import max_positions
from lmtune.runs.columns import columns_for

Row = dict[str, Any]


def predict(
    loaded: LoadedModel, paths: Sequence[Given], max_length: int = 2048, max_new_tokens: int = 128,
    columns: Mapping[str, str] | None = None,
) -> Iterator[Row]:  # fmt: skip
    """The rows of files or folders in their order, each with what the model says of it.

    A class gives `prediction`, `probability` and `probabilities`; several classes and a value `prediction`; a pair
    `reward_chosen` and `reward_rejected`. A language model gives its greedy answer as `prediction`.

    Args:
        loaded: the model.
        paths: of the rows, with labels or without.
        max_length: of longer rows a classifier reads the last tokens.
        max_new_tokens: where an answer that does not stop is cut.
        columns: keys for columns of other names; None takes those that the run of the model was trained with.

    Raises:
        DataError: with every faulty row, by `file:line`.
    """
    report, read = ReadReport(), list[tuple[Example, Row]]()
    read += read_inputs(find_files(paths), report, columns_for(loaded.run, paths, columns))
    report.raise_for_faults(None)
    if not read:
        raise DataError("the data hold no row")
    if loaded.head is None:
        yield from _answers(loaded, read, max_new_tokens)
    else:
        yield from _verdicts(loaded, read, min(max_length, max_positions(loaded.model) or max_length))


def _verdicts(loaded: LoadedModel, read: Sequence[tuple[Example, Row]], max_length: int) -> Iterator[Row]:
    classifier, rendered = Classifier(loaded), [loaded.renderer.render(example) for example, _ in read]
    longer = sum(any(len(sequence) > max_length for sequence in sequences) for sequences in rendered)
    if longer:
        warn(f"of {pluralize(longer)} only the last {max_length:,} tokens are read (--max-length)")
    ids = [sequence.input_ids[-max_length:].tolist() for sequences in rendered for sequence in sequences]
    with progress("reading", len(read), "rows"):
        verdicts = iter(classifier.verdicts(ids))
    for (_, row), sequences in zip(read, rendered, strict=True):
        said = [next(verdicts) for _ in sequences]
        if len(said) == 1:
            yield {**row, **said[0].as_dict()}
        else:  # a pair
            yield {**row, "reward_chosen": said[0].label, "reward_rejected": said[1].label}


def _answers(loaded: LoadedModel, read: Sequence[tuple[Example, Row]], max_new_tokens: int) -> Iterator[Row]:
    replies = _replies(loaded, [example for example, _ in read], max_new_tokens)
    for (_, row), (reasoning, answer) in zip(read, replies, strict=True):
        yield {**row, **({} if reasoning is None else {"reasoning": reasoning}), "prediction": answer}


def answer_prompts(loaded: LoadedModel, examples: Sequence[Example], max_new_tokens: int) -> list[str]:
    """The greedy answer to each row, without reasoning.

    Raises:
        ConfigError: the model is a classifier.
    """
    if loaded.head is not None:
        raise ConfigError(f"{loaded.name}: a classifier gives no answers; expected a language model")
    return [answer for _, answer in _replies(loaded, examples, max_new_tokens)]


def _replies(
    loaded: LoadedModel, examples: Sequence[Example], max_new_tokens: int
) -> Iterator[tuple[str | None, str]]:  # fmt: skip
    """Reasoning and answer of each."""
    sampling = Sampling(max_new_tokens=max_new_tokens, stop_token_ids=tuple(loaded.renderer.stop_token_ids))
    requests = [Request(prompt_of(loaded.renderer, example), sampling, loaded.members) for example in examples]
    with progress(f"letting {loaded.name} answer", len(requests), "rows") as shown:
        generated = loaded.engine.generate(requests, shown.advance)
    return (split_reply(loaded.renderer.decode(ids)) for ids in generated)


def prompt_of(renderer: Renderer, example: Example) -> list[int]:
    """The tokens before an answer: a row's own answer, if it has one, is left out."""
    if example.text is not None:
        raise DataError(f"{example.location}: a language model answers prompts; write prompt, or messages")
    turns = example.messages[:-1] if example.messages[-1].role == "assistant" else example.messages
    return list(renderer.prompt_ids(turns, example.tools))
