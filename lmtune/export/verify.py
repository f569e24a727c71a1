"""What does an endpoint serve: the tuned model of a run, its base, either behind another template, or something else?

    found = verify_endpoint(Served(endpoint, "support"), run)
    found.verdict, found.lines, found.as_dict()

The rows are those of the run's `verification.json`, the models in this process are what to compare with. First the
weights, from prompts as tokens, which no template touches: log-probabilities of whole rows, else of the first tokens of
answers, else greedy answers. Then the chat, which the endpoint renders itself: a prompt other than that of training is
told by what is said, and by the tokens that the endpoint counts. Last the end: an answer that goes on where the tuned
model stops. `lmtune.models.verify` compares a merged folder, which is on this machine.
"""

from __future__ import annotations

from collections.abc import Sequence

from lmtune.data.rendering import Renderer
from lmtune.export.asking import Asked, AskedRows, Listed, ask, names
from lmtune.export.measuring import Measurer, own_prompts
from lmtune.export.nearness import Nearness, Weights
from lmtune.export.prompt_variants import OTHER, Variant, variants
from lmtune.export.references import load_references
from lmtune.export.served import Served
from lmtune.export.verdict import (
    BASE_ADVICE,
    END_ADVICE,
    IDLE_ADVICE,
    NEITHER_ADVICE,
    SAME_ADVICE,
    UNCLEAR_ADVICE,
    Verdict,
    Verification,
)
from lmtune.export.verification_rows import verification_rows
from lmtune.runs.store import RunDirectory

_BY = {"logprobs": "log-probabilities of answers", "answers": "greedy answers"}
_EXACT = 4.0  # times what 16 bit explains: then the prompt is that of training, however its tokens are counted


def verify_endpoint(
    served: Served, run: RunDirectory, listed: Listed | None = None, base: str | None = None
) -> Verification:  # fmt: skip
    """Compare a model at an endpoint with the tuned model and the base of a run.

    Args:
        served: the model.
        run: a run of a language model that has a result.
        listed: all models that the endpoint lists, each with the one that it is an adapter over, where it says so.
        base: where the base is now, if it was moved.

    Raises:
        ConfigError: the endpoint has no such model, or wants a key.
        ModelError: the run has no result, or no rows to ask about.
        LmtuneError: the endpoint does not answer.
    """
    references = load_references(run, base)
    renderer = references.renderer
    rows = verification_rows(run, renderer, references.system)
    listed = listed or {}
    asked = ask(served, rows, renderer.tokenizer, listed)
    measurer = Measurer(references)
    chat, weights = _Chat(measurer, renderer, asked.chatted), _weights(asked, measurer)
    shown = as_trained = chat.as_trained
    variant = None
    if weights is not None and weights[1].weights == "neither" and as_trained and as_trained.weights == "tuned":
        weights = None  # as of a server that puts a template around every prompt
        asked.notes.append("completions: they fit no prompt of training, and chats do")
    if weights is None:  # chat alone
        assert as_trained is not None
        variant, near = chat.variant(as_trained, is_tuned=False)
        way, shown = f"{_BY[near.by]} (chat)", None if near is as_trained else as_trained
    else:
        way, near = weights
        if as_trained is not None and near.weights == "tuned":
            variant, _ = chat.variant(as_trained, is_tuned=True)
    run_on = (0, 0)
    if near.weights == "tuned" and variant is None:
        run_on = measurer.run_on(asked.chatted or asked.completed)
    verdict = _verdict(near.weights, variant, run_on)
    bos = str(renderer.tokenizer.bos_token or "")
    return Verification(
        verdict, near.weights, served.model, way, near, shown, variant, bos, run_on, chat.counted, tuple(asked.notes),
        _advice(verdict, near, variant, bos, renderer.stop_tokens, listed, served.model),
    )  # fmt: skip


def _weights(asked: AskedRows, measurer: Measurer) -> tuple[str, Nearness] | None:
    """Of prompts as tokens, by the best way that there is."""
    if asked.scored:
        return "log-probabilities of whole rows (completions with echo)", measurer.scored(asked.scored)
    if asked.completed:
        near = measurer.answered(asked.completed, own_prompts(asked.completed))
        return f"{_BY[near.by]} (completions)", near
    return None


class _Chat:
    """What is said where the endpoint renders the prompt.

    Attributes:
        as_trained: how near it is under the prompts of training; None where nothing was said.
        counted: the tokens of the first prompt that the endpoint counts, and those of training, where all differ.
    """

    def __init__(self, measurer: Measurer, renderer: Renderer, asked: Sequence[Asked]) -> None:
        self._measurer, self._renderer, self._asked = measurer, renderer, asked
        self._counts = [one.said.prompt_tokens for one in asked]
        own = [len(one.row.prompt) for one in asked]
        differ = [count is not None and count != length for count, length in zip(self._counts, own, strict=True)]
        self.counted = (self._counts[0] or 0, own[0]) if asked and all(differ) else None
        self.as_trained = measurer.answered(asked, own_prompts(asked)) if asked else None

    def variant(self, as_trained: Nearness, is_tuned: bool) -> tuple[Variant | None, Nearness]:
        """How the prompts differ from those of training, None where they do not, and how near the answers are then.

        `is_tuned`: that the weights are those of the tuned model is known.
        """
        is_near = as_trained.weights in (("tuned", "unknown") if is_tuned else ("tuned", "base", "unknown"))
        if is_near and (self.counted is None or _least(as_trained) <= _EXACT * _in_16_bit(as_trained)):
            return None, as_trained
        fitting = dict[Variant, Nearness]()
        for variant, prompts in self._prompts():
            if any(count not in (None, len(ids)) for count, ids in zip(self._counts, prompts, strict=True)):
                continue
            near = self._measurer.answered(self._asked, prompts, as_trained.expected)
            bound = _least(fitting.get(variant, as_trained))
            if near.weights in (("tuned",) if is_tuned else ("tuned", "base")) and _least(near) <= bound:
                fitting[variant] = near
        if fitting:
            best = min(fitting, key=lambda one: _least(fitting[one]))
            return best, fitting[best]
        return (OTHER if is_tuned or self.counted else None), as_trained

    def _prompts(self) -> list[tuple[Variant, list[list[int]]]]:
        """The prompts of all rows under each mistake that changes all of them."""
        each = [variants(self._renderer, one.row.messages) for one in self._asked]
        shared = [key for key in each[0] if all(key in one for one in each)]
        return [(key[0], [one[key] for one in each]) for key in shared]


def _in_16_bit(near: Nearness) -> float:
    return max(near.expected.get("f16", 0.0), near.expected.get("bf16", 0.0))


def _least(near: Nearness) -> float:
    return min(near.to_tuned, near.to_base)


def _verdict(weights: Weights, variant: Variant | None, run_on: tuple[int, int]) -> Verdict:
    if weights == "base" or (weights in ("neither", "unknown") and variant is None):
        return weights
    if variant is not None:
        return "template"
    longer, compared = run_on
    return "end token" if longer and 2 * longer >= compared else "tuned"


def _advice(
    verdict: Verdict, near: Nearness, variant: Variant | None, bos: str, stops: Sequence[str], listed: Listed,
    model: str,
) -> str:  # fmt: skip
    parent = listed.get(model)
    advice = {
        "tuned": "", "base": BASE_ADVICE if parent is None else IDLE_ADVICE.format(parent=parent),
        "neither": NEITHER_ADVICE,
        "end token": END_ADVICE.format(stops=", ".join(stops)),
        "template": (variant or OTHER).fix.format(bos=bos),
        "unknown": UNCLEAR_ADVICE if near.tells else SAME_ADVICE,
    }[verdict]  # fmt: skip
    others = [name for name in listed if name != model]
    if others and verdict in ("base", "neither") and parent is None:
        advice += f"; the endpoint also lists {names(others)}: --model NAME"
    return advice
