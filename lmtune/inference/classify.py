"""What a classifier says of texts, conversations and answers: classes with their probabilities, values, rewards.

    classifier = Classifier(load_for_inference("runs/reviews"))
    verdict = classifier.verdict([tokens])[0]
    verdict.label, verdict.probabilities          # "positive", {"negative": 0.03, "positive": 0.97}

Rows run in packs, as in training; their scores do not depend on what shares a pack with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from lmtune.batching.packing import pack, pack_bins
from lmtune.data.types import Example, Message, TokenSequence
from lmtune.errors import LmtuneError
from lmtune.inference.load import LoadedModel
from lmtune.models.head import Head
from lmtune.models.structure import max_positions

_PACK_TOKENS = {"cuda": 16384, "cpu": 2048}
_SHOWN = 10  # classes


@dataclass(frozen=True)
class Verdict:
    """What a classifier says of a row.

    Attributes:
        label: its class, its classes where it may have several, or a number.
        probabilities: of every class, in the order of the head; none of a number.
    """

    label: str | tuple[str, ...] | float
    probabilities: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        """For a line of JSON."""
        label = list(self.label) if isinstance(self.label, tuple) else self.label
        found: dict[str, object] = {"prediction": label}
        if isinstance(self.label, str):
            found["probability"] = self.probabilities[self.label]
        return {**found, **({"probabilities": dict(self.probabilities)} if self.probabilities else {})}

    def __str__(self) -> str:
        if isinstance(self.label, float):
            return f"{self.label:.4g}"
        often = sorted(self.probabilities.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name} {share:.1%}" for name, share in often[:_SHOWN])
        if isinstance(self.label, tuple):
            return f"{' and '.join(self.label) or 'no class'} ({shown})"
        return shown


class Classifier:
    """A loaded classifier, ready to read rows."""

    def __init__(self, loaded: LoadedModel) -> None:
        assert loaded.head is not None
        self.loaded, self.head = loaded, loaded.head
        self._forward = loaded.packed_forward()

    def read(self, user_text: str, system: str | None = None) -> list[int]:
        """The tokens of a text by itself, as rows of training had them.

        Raises:
            ModelError: it cannot be rendered.
        """
        renderer = self.loaded.renderer
        if self.head.chat:
            system_turn = [Message("system", system)] if system else []
            return list(renderer.prompt_ids([*system_turn, Message("user", user_text)]))
        (sequence,) = renderer.render(Example("the text", 1, text=user_text, kind="labelled"))
        return [int(index) for index in sequence.input_ids]

    def verdicts(self, rows: Sequence[Sequence[int]]) -> list[Verdict]:
        """What the model says of rows of tokens, in their order.

        Raises:
            LmtuneError: a row is longer than the model can read.
        """
        limit = max_positions(self.loaded.model)
        if limit is not None and (longest := max(map(len, rows), default=0)) > limit:
            raise LmtuneError(f"{longest:,} tokens, and {self.loaded.name} reads at most {limit:,}; shorten the text")
        found = torch.zeros(len(rows), len(self.head.labels))
        bins = pack_bins([len(row) for row in rows], _PACK_TOKENS[self._forward.device.type]) if rows else []
        with self.loaded.lock, torch.no_grad(), self._forward.context():
            for group in bins:
                ids = [np.asarray(rows[index], dtype=np.int32) for index in group]
                sequences = [TokenSequence(one, np.zeros(len(one), dtype=bool)) for one in ids]
                batch = pack(
                    sequences, range(len(group)), len(group), self._forward.shares_prefixes, reads=self._forward.reads
                )  # fmt: skip
                scores = self._forward(batch.to(self._forward.device)).scores
                assert scores is not None
                found[group] = scores.cpu()
        return [verdict_of(self.head, scores) for scores in found]


def verdict_of(head: Head, scores: torch.Tensor) -> Verdict:
    """What the outputs `[K]` of one row say."""
    if not head.is_classes:
        return Verdict(float(scores[0]))
    shares = scores.double().softmax(-1) if head.kind == "single_label" else scores.double().sigmoid()
    probabilities = dict(zip(head.labels, shares.tolist(), strict=True))
    if head.kind == "single_label":
        return Verdict(head.labels[int(shares.argmax())], probabilities)
    return Verdict(tuple(label for label, share in probabilities.items() if share > 0.5), probabilities)
