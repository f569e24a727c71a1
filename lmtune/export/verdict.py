"""What is said of an endpoint: the verdict, the evidence in numbers, and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lmtune.export.nearness import Nearness, Weights
from lmtune.export.prompt_variants import OTHER, Variant
from lmtune.io.text import pluralize

Verdict = Literal["tuned", "base", "template", "end token", "neither", "unknown"]

BASE_ADVICE = (
    "apply the adapter. vLLM: --enable-lora --lora-modules NAME=FOLDER, and requests name NAME (`lmtune export RUN "
    "--to vllm --adapter` writes the command); llama.cpp: --lora FILE; else serve the merged model"
)
IDLE_ADVICE = (
    "the endpoint lists an adapter of this name over {parent}, which changes nothing there: vLLM leaves out weights "
    "whose names it does not know; `lmtune export RUN --to vllm --adapter` writes them as it reads them, or serve the "
    "merged model"
)
END_ADVICE = (
    "serve the run's generation_config.json with the weights (vLLM), or export the run again (GGUF, Ollama); until "
    "then give `stop` with each request: {stops}"
)
NEITHER_ADVICE = (
    "compare the name and the file of the served model with the run; another checkpoint, another strength of the "
    "adapter, and weights of less than four bits count as another model"
)
SAME_ADVICE = (
    "nothing can be told: on the run's verification rows the tuned model says what the base says; train longer"
)
UNCLEAR_ADVICE = "what is served is about as near to the one as to the other; serve it in more bits, and ask again"
_WEIGHTS = {
    "tuned": "the weights are those of the tuned model", "base": "the weights are those of the base",
    "neither": "behind it, the weights cannot be told; completions, or log-probabilities, would tell",
    "unknown": "behind it, the weights cannot be told",
}  # fmt: skip


@dataclass(frozen=True)
class Verification:
    """What is known of an endpoint.

    Attributes:
        verdict: what it serves.
        weights: whose weights.
        model: its name there.
        way: by what the weights were told.
        nearness: of the weights.
        chat: of the chat under the prompts of training; None where it was not asked, or is the way itself.
        variant: how the endpoint's prompts are, where not as in training.
        bos: the beginning token.
        run_on: answers that go on where they should end, and answers that could.
        counted: the tokens of a prompt that the endpoint counts, and those of training; None where they agree.
        notes: what could not be asked, and why.
        advice: what to do; empty where all is right.
    """

    verdict: Verdict
    weights: Weights
    model: str
    way: str
    nearness: Nearness
    chat: Nearness | None = None
    variant: Variant | None = None
    bos: str = ""
    run_on: tuple[int, int] = (0, 0)
    counted: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()
    advice: str = ""

    @property
    def is_right(self) -> bool:
        """Whether the tuned model is served as it was trained."""
        return self.verdict == "tuned"

    @property
    def lines(self) -> list[str]:
        """For people: the verdict, the evidence, what to do."""
        rendered = f"it renders chats {(self.variant or OTHER).what.format(bos=self.bos)}"
        verdict = {
            "tuned": "the endpoint serves the tuned model",
            "base": "the endpoint serves the base, without what was trained",
            "template": rendered,
            "end token": "answers go on where the tuned model stops",
            "neither": "the endpoint serves neither the tuned model nor the base",
            "unknown": "the endpoint may serve the tuned model or the base",
        }[self.verdict]
        name = {"template": "another template", "end token": "another end token", "unknown": "not told"}
        lines = [f"{name.get(self.verdict, self.verdict)}: {verdict}"]
        if self.verdict == "template":
            lines.append(f"  {_WEIGHTS[self.weights]}")
        elif self.variant is not None:
            lines.append(f"  {rendered}")
        explains = self.verdict in ("tuned", "end token")
        lines.append(f"  {self.way}: {evidence(self.nearness, explains)}")
        if self.chat is not None:
            lines.append(f"  chat, with the prompts of training: {evidence(self.chat, explains)}")
        if self.counted is not None:
            lines.append(
                f"  tokens: the endpoint counts {self.counted[0]} in a prompt that has {self.counted[1]} in training"
            )
        if self.run_on[1]:
            lines.append(
                f"  ends: of {pluralize(self.run_on[1], 'answer')} equal to the tuned model's up to its end, "
                f"{self.run_on[0]} go on"
            )
        lines += [f"  not asked: {note}" for note in self.notes]
        return [*lines, *([f"  do: {self.advice}"] if self.advice else [])]

    def as_dict(self) -> dict[str, object]:
        """For `--json`."""
        return {
            "verdict": self.verdict, "weights": self.weights, "model": self.model, "way": self.way,
            **_numbers(self.nearness), "chat": None if self.chat is None else _numbers(self.chat),
            "template": None if self.variant is None else self.variant.key,
            "answers_that_go_on": self.run_on[0], "answers_compared": self.run_on[1],
            "prompt_tokens_counted": None if self.counted is None else list(self.counted),
            "not_asked": list(self.notes), "advice": self.advice,
        }  # fmt: skip


def evidence(near: Nearness, explains: bool) -> str:
    """How far it is from both, in one line; `explains`: by which type of weights."""
    if near.by == "answers":
        of_all = f"of {pluralize(near.count, 'answer')} on which base and tuned model differ"
        tuned, base = (round((1 - share) * near.count) for share in (near.to_tuned, near.to_base))
        return f"{of_all}, {tuned} begin as the tuned model's and {base} as the base's"
    expected = ", ".join(f"{name} {_nats(value)}" for name, value in near.expected.items())
    fits = ""
    if explains and near.nearest_type:
        fits = f", as expected of {' or '.join(near.fitting_types)} ({expected})"
    elif expected:
        fits = f" (expected of {expected})"
    share = "" if near.share is None else f"; {round(100 * near.share)} % of the way from base to tuned"
    return (
        f"KL {_nats(near.to_tuned)} a token to the tuned model{fits}, {_nats(near.to_base)} to the base{share}; "
        f"{pluralize(near.rows)}, {pluralize(near.count, 'token')}"
    )


def _nats(value: float) -> str:
    return "below 1e-8" if value < 1e-8 else f"{value:.2g}"


def _numbers(near: Nearness) -> dict[str, object]:
    return {
        "by": near.by, "to_tuned": near.to_tuned, "to_base": near.to_base, "between": near.between, "share": near.share,
        "rows": near.rows,
        "count": near.count, "expected": dict(near.expected), "nearest_type": near.nearest_type,
    }  # fmt: skip
