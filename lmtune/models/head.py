"""The head of a sequence classifier: what its outputs mean, and how a base gets one.

    head = Head("single_label", ("negative", "positive"), pad_token_id=1)
    model = load_model(config, head=head)        # the base's body, and a new head that depends on the seed alone

A head is `score` of transformers' AutoModelForSequenceClassification: it reads the hidden state of a sequence's last
token. transformers takes that for the last one which is not a padding token, so the padding token of a classifier is
one that no row ends in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from lmtune.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# one class of several; classes of which each may hold; a number; how good an answer is
HeadKind = Literal["single_label", "multi_label", "value", "reward"]
_PROBLEMS: dict[str, str] = {
    "single_label": "single_label_classification", "multi_label": "multi_label_classification",
    "value": "regression", "reward": "regression",
}  # fmt: skip
_SUFFIX = "ForSequenceClassification"
_STD = 0.02  # of a new head, where the model's config names none


@dataclass(frozen=True)
class Head:
    """K outputs.

    Attributes:
        kind: what they are.
        labels: `[K]`, the name of each.
        pad_token_id: a token that no row ends in; None where the tokenizer has no such token.
        chat: rows were prompts, so a single text is read as a message of the user; else as plain text.
        seed: of the weights of a new head.
    """

    kind: HeadKind
    labels: tuple[str, ...]
    pad_token_id: int | None = None
    chat: bool = False
    seed: int = 0

    @property
    def is_classes(self) -> bool:
        """Whether outputs stand for classes, not for a number."""
        return self.kind in ("single_label", "multi_label")

    @property
    def constant(self) -> str:
        """What the best constant output is called."""
        return "the most frequent class" if self.is_classes else "the mean"

    def keys(self) -> dict[str, Any]:
        """What a config.json says of it, for transformers."""
        return {
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
            "problem_type": _PROBLEMS[self.kind], "pad_token_id": self.pad_token_id,
        }  # fmt: skip

    def describe(self, config: PretrainedConfig) -> None:
        """Write it into a config."""
        for part in {id(one): one for one in (config, config.get_text_config())}.values():
            for key, value in self.keys().items():
                setattr(part, key, value)

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Head | None:
        """What a config.json says of its model's head; None for a language model."""
        if not any(str(name).endswith(_SUFFIX) for name in config.get("architectures") or ()):
            return None
        stated = config.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}  # transformers leaves its defaults out
        labels = tuple(str(stated[index]) for index in sorted(stated, key=int))
        problem = config.get("problem_type") or (_PROBLEMS["single_label"] if len(labels) > 1 else "regression")
        kind: HeadKind = "single_label" if problem == _PROBLEMS["single_label"] else "multi_label"
        if problem == "regression":
            kind = "reward" if labels == ("reward",) else "value"
        return cls(kind, labels, config.get("pad_token_id"))


def is_classifier(config: PretrainedConfig) -> bool:
    """Whether a config describes a sequence classifier."""
    return any(name.endswith(_SUFFIX) for name in config.architectures or ())


def classifier_head(base: PreTrainedModel) -> torch.nn.Module | None:
    """`score` of a transformers sequence classifier; None for a language model."""
    return getattr(base, "score", None) if base.get_output_embeddings() is None else None


def head_weights(base: PreTrainedModel) -> frozenset[str]:
    """The names of the weights of a classifier's head; none of a language model."""
    head = classifier_head(base)
    places = [name for name, module in base.named_modules() if module is head] if head is not None else []
    return frozenset(f"{place}.{name}" for place in places for name, _ in base.get_submodule(place).named_parameters())


def prepare_head(model: PreTrainedModel, head: Head, stored: torch.Tensor | None) -> None:
    """Hold the head in fp32, with its `stored` weights; without, it is new and gets its first ones.

    Raises:
        ModelError: the head is not a linear layer.
    """
    layer = classifier_head(model)
    if not isinstance(layer, torch.nn.Linear):
        raise ModelError(
            f"model.name: {type(model).__name__} has no linear layer `score` on its last token; take a decoder such as "
            "Llama, Qwen or Mistral"
        )
    layer.float()
    with torch.no_grad():
        if stored is not None:  # in more digits than the model's dtype may have
            layer.weight.copy_(stored)
            return
        std = float(getattr(model.config.get_text_config(), "initializer_range", None) or _STD)
        generator = torch.Generator().manual_seed(head.seed)
        layer.weight.copy_(torch.empty(layer.weight.shape, device="cpu").normal_(0, std, generator=generator))
        if layer.bias is not None:
            layer.bias.zero_()


def padding_token(tokenizer: PreTrainedTokenizerBase, last_tokens: Iterable[int]) -> int | None:
    """A control token in which none of some rows ends, the tokenizer's own padding token first; None without one."""
    ends = set(last_tokens)
    special = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id]
    added = sorted(index for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special)
    return next((index for index in (*special, *added) if index is not None and index not in ends), None)
