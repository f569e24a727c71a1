"""What a model says by itself: greedy answers to held-out prompts, beside the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lmtune.data.rendering import Renderer
from lmtune.data.replies import split_reply
from lmtune.data.report import label_name
from lmtune.data.types import ExampleStore, Message, TokenizedExample
from lmtune.evaluation.answer_metrics import exact
from lmtune.io.console import progress
from lmtune.models.head import Head
from lmtune.models.members import AS_IS, Members

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Answer:
    """A generated answer (`prediction`) beside the right one, for row `row` of the data; reasoning is left out."""

    row: int
    question: str
    reference: str
    prediction: str

    @property
    def matches(self) -> bool:
        """Whether they are the same text, but for white space at the ends."""
        return exact(self.reference, self.prediction)


def answers(
    model: Any, renderer: Renderer, data: ExampleStore, rows: Sequence[int], max_new_tokens: int,
    who: str = "the model", members: Members = AS_IS,
) -> list[Answer]:  # fmt: skip
    """Let the model, or `members` of it, answer the last turn of each of `rows` of `data`, greedily.

    `who` stands in the progress shown.
    """
    from lmtune.inference.engine import TransformersEngine
    from lmtune.inference.request import Request, Sampling

    prompts, references = zip(*(split_prompt(data[row]) for row in rows), strict=True) if rows else ((), ())
    training = model.training
    model.eval()
    with progress(f"letting {who} answer", len(rows), "rows") as shown:
        sampling = Sampling(max_new_tokens=max_new_tokens, stop_token_ids=tuple(renderer.stop_token_ids))
        requests = [Request(prompt, sampling, members) for prompt in prompts]
        generated = TransformersEngine(model).generate(requests, shown.advance)
    model.train(training)
    question_of = questions(renderer)
    return [
        Answer(row, question_of(prompt), *(split_reply(renderer.decode(ids))[1] for ids in (reference, said)))
        for row, prompt, reference, said in zip(rows, prompts, references, generated, strict=True)
    ]


def verdicts(renderer: Renderer, head: Head, data: ExampleStore, outputs: Float64) -> list[Answer]:
    """What a classifier says of the first rows, by its `outputs[N, K]`, beside what is right."""
    question_of = questions(renderer)
    said = [verdict_text(head, one) for one in outputs]
    rows = [data[row] for row in range(len(said))]
    return [
        Answer(row, text_read(question_of, one), "" if one.label is None else label_name(one.label), text)
        for row, (one, text) in enumerate(zip(rows, said, strict=True))
    ]


def text_read(question_of: Callable[[Sequence[int]], str], row: TokenizedExample) -> str:
    """What a classifier reads of a row, as text."""
    sequence = row.sequences[0]
    return question_of(sequence.input_ids[~sequence.loss_mask].tolist())


def verdict_text(head: Head, outputs: Float64) -> str:
    """What a classifier says by its `outputs[K]`, in words."""
    import torch

    from lmtune.inference.classify import verdict_of

    label = verdict_of(head, torch.from_numpy(outputs)).label
    return f"{label:.6g}" if isinstance(label, float) else label_name(label)


def split_prompt(row: TokenizedExample) -> tuple[list[int], list[int]]:
    """The last turn of a row as (tokens before the answer, the answer's tokens with its end token).

    A plain text row is trained from its second token on and has no question: its prompt is empty.
    """
    sequence = row.sequences[-1]
    context = np.flatnonzero(~sequence.loss_mask)
    start = int(context[-1]) + 1 if len(context) else 0
    ids = sequence.input_ids.tolist()
    return (ids[:start], ids[start:]) if start > 1 else ([], ids)


def questions(renderer: Renderer) -> Callable[[Sequence[int]], str]:
    """What makes text of a prompt: without control tokens and, of a single question, the template's words around it."""
    probe = "a question of its own"
    around = str(renderer.tokenizer.decode(renderer.prompt_ids([Message("user", probe)]), skip_special_tokens=True))
    before, found, after = around.partition(probe)

    def question_of(prompt: Sequence[int]) -> str:
        text = str(renderer.tokenizer.decode(prompt, skip_special_tokens=True))
        return text.removeprefix(before).removesuffix(after).strip() if found else text.strip()

    return question_of
