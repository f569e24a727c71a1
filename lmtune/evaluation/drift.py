"""How far training has moved a model from its base on prompts outside the data: what it may have forgotten.

    found = drift_of(load_for_inference("runs/support"))
    found.kl, found.changed, found.rows[0]

The base answers each prompt greedily. Along its answer, up to and with the place where it stops, both models give a
distribution over the next token: their divergence KL(base ‖ tuned) in nats a token says how much of the base's
behaviour is another one. The tuned model answers, too: the share of prompts whose answer is another text is what a
user notices. The divergence needs no answers that are right, and so works for any prompt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmtune.config.load import load_config
from lmtune.config.schema import FinetuneConfig
from lmtune.data.replies import split_reply
from lmtune.demo import drift_prompts
from lmtune.errors import ConfigError, DataError
from lmtune.evaluation.answer_files import prompt_of_row, read_prompts
from lmtune.evaluation.answer_metrics import exact
from lmtune.evaluation.predict import prompt_of
from lmtune.evaluation.results import ScoreOfRows, scores_of_parts
from lmtune.inference.engine import unpacked_attention
from lmtune.inference.load import LoadedModel, load_for_inference
from lmtune.inference.request import Request, Sampling
from lmtune.io.console import progress
from lmtune.models.members import AS_IS, Members
from lmtune.models.structure import max_positions

MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class DriftRow:
    """One prompt.

    Attributes:
        kl: nats a token along the base's answer.
        tokens: of this answer.
    """

    location: str
    prompt: str
    base: str
    tuned: str
    kl: float
    tokens: int

    @property
    def is_changed(self) -> bool:
        """Whether the answers are different texts, but for white space at the ends."""
        return not exact(self.base, self.tuned)


@dataclass(frozen=True)
class Drift:
    """What has changed, and how sure that is of other prompts of this kind.

    Attributes:
        kl: nats a token, KL(base ‖ tuned).
        changed: the share of greedy answers that are other texts.
        rows: those with the greatest divergence first.
    """

    kl: ScoreOfRows
    changed: ScoreOfRows
    rows: list[DriftRow]

    def as_dict(self) -> dict[str, object]:
        """For `--json`."""
        return {
            "kl": asdict(self.kl), "changed": asdict(self.changed),
            "rows": [{**asdict(row), "changed": row.is_changed} for row in self.rows],
        }  # fmt: skip


def drift_of(loaded: LoadedModel, prompts: Path | None = None, max_new_tokens: int = MAX_NEW_TOKENS) -> Drift:
    """The model beside its base on prompts of a file of rows; without one on those that ship.

    Raises:
        ConfigError: the model is a classifier, or no base of it is known.
        DataError: a row is faulty, or none is left.
    """
    if loaded.head is not None:
        raise ConfigError("--drift: a classifier gives no answers; expected a language model")
    examples = read_prompts(drift_prompts() if prompts is None else prompts)
    room = (max_positions(loaded.model) or 1 << 30) - max_new_tokens
    ids = [prompt_of(loaded.renderer, example) for example in examples]
    kept = [place for place, one in enumerate(ids) if len(one) < room]
    if not kept:
        raise DataError("--drift: no prompt is short enough for this model")
    examples, ids = [examples[place] for place in kept], [ids[place] for place in kept]
    base = loaded if loaded.has_adapter else _own_base(loaded)
    as_base = base.use_base if loaded.has_adapter else contextlib.nullcontext
    sampling = Sampling(max_new_tokens=max_new_tokens, stop_token_ids=tuple(loaded.renderer.stop_token_ids))
    with progress("letting the base answer", len(ids), "prompts") as shown:
        who = base.answering(use_base=True)
        before = base.engine.generate([Request(prompt, sampling, who) for prompt in ids], shown.advance)
    with progress("letting the tuned model answer", len(ids), "prompts") as shown:
        after = loaded.engine.generate([Request(prompt, sampling, loaded.members) for prompt in ids], shown.advance)
    rows = []
    with progress("comparing with the base", len(ids), "prompts") as shown:
        for example, prompt, said, other in zip(examples, ids, before, after, strict=True):
            along = said if len(said) == max_new_tokens else [*said, loaded.renderer.stop_token_ids[0]]
            with as_base():
                wanted = _logprobs(base.model, AS_IS, prompt, along)
            found = _logprobs(loaded.model, loaded.members, prompt, along)
            kl = (wanted.exp() * (wanted - found)).sum(-1).clamp(min=0).double().mean()
            one, two = (split_reply(loaded.renderer.decode(ids))[1] for ids in (said, other))
            rows.append(DriftRow(example.location, prompt_of_row(example), one, two, float(kl), len(along)))
            shown.advance()
    parts = np.array([[row.kl * row.tokens, row.tokens] for row in rows])
    changed = np.array([[row.is_changed, 1.0] for row in rows])
    rows.sort(key=lambda row: -row.kl)
    return Drift(scores_of_parts(parts), scores_of_parts(changed), rows)


def _own_base(loaded: LoadedModel) -> LoadedModel:
    """The model that a run began from whose own weights were trained."""
    if loaded.run is None:
        raise ConfigError(f"--drift: {loaded.name} has no adapter to leave out; compare the run or adapter")
    return load_for_inference(load_config(FinetuneConfig, loaded.run.config).model.name)


def _logprobs(model: Any, members: Members, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """The log-probabilities `[T, V]` of the tokens at the places of `answer[T]`, of all members together, fp32."""
    ids = torch.tensor([[*prompt, *answer]] * max(1, len(members.adapters)), device=model.device)
    switch = {"adapter_names": list(members.adapters)} if members.adapters else {}
    with torch.no_grad(), unpacked_attention(model):
        logits = model(input_ids=ids, use_cache=False, **switch).logits[:, len(prompt) - 1 : -1].float()
    if not members.adapters:
        return torch.log_softmax(logits[0], -1)
    return members.combine(logits.softmax(-1)).log().float()
