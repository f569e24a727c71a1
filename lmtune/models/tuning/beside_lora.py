"""What a LoRA adapter trains beside its low-rank matrices: whole modules, and the rows of new tokens, through PEFT.

    settings = beside_lora(model, tuning, tokenizer, found)   # `modules_to_save`, `trainable_token_indices`, …
    LoraConfig(**settings, …)

A head that is tied to the embeddings stays tied. The row of a new token begins as the mean of the rows of the pieces
that the token was before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from lmtune.config.schema import LoraConfig
from lmtune.errors import ConfigError
from lmtune.models.structure import embeddings, heads
from lmtune.models.tuning.targets import Targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TIED_BY_PEFT = ("embed_tokens", "lm_head")  # last parts of names by which PEFT knows what may be tied


class BesideLora(TypedDict, total=False):
    """Settings of PEFT's `LoraConfig`."""

    modules_to_save: list[str]
    trainable_token_indices: dict[str, list[int]]
    ensure_weight_tying: bool


def beside_lora(
    model: PreTrainedModel, tuning: LoraConfig, found: Targets, tokenizer: PreTrainedTokenizerBase | None = None
) -> BesideLora:
    """PEFT's settings for what `tuning` names; adds rows for new tokens to the model.

    Args:
        model: the base without an adapter.
        tuning: modules to save, new tokens.
        found: what LoRA is on.
        tokenizer: of the base, without the new tokens; needed if there are any.

    Raises:
        ConfigError: a module is not there or cannot be trained whole, or the tokens have no rows to be trained.
    """
    settings: BesideLora = {}
    if tuning.modules_to_save:
        settings["modules_to_save"] = whole_modules(model, tuning.modules_to_save, found)
        if is_tied(model) and _tables(model) & {model.get_submodule(name) for name in settings["modules_to_save"]}:
            settings["ensure_weight_tying"] = True
    if tuning.new_tokens:
        assert tokenizer is not None
        tables = [model.get_input_embeddings(), *([] if is_tied(model) else [model.get_output_embeddings()])]
        names = {module: name for name, module in model.named_modules()}
        saved = settings.get("modules_to_save", [])
        shared = _tables(model) if is_tied(model) else tables
        if taken := [names[table] for table in shared if names.get(table) in saved]:
            raise ConfigError(
                f"tuning.new_tokens: their rows are in {taken[0]}, which tuning.modules_to_save trains whole; choose "
                "one of the two: leave out new_tokens, or head and embeddings of modules_to_save"
            )
        ids = add_rows(model, tokenizer, tuning.new_tokens)
        # the tables were made anew if rows were added
        tables = [model.get_input_embeddings(), *([] if is_tied(model) else [model.get_output_embeddings()])]
        names = {module: name for name, module in model.named_modules()}
        settings["trainable_token_indices"] = {names[table]: ids for table in tables}
    return settings


def whole_modules(model: PreTrainedModel, names: Sequence[str], found: Targets) -> list[str]:
    """Full names of the modules that `names` select: last parts of names, or `head` and `embeddings` by what they are.

    Raises:
        ConfigError: a name selects nothing, or what an adapter is on, or weights in few bits.
    """
    modules = dict(model.named_modules())
    full = {module: name for name, module in modules.items()}
    selected: list[str] = []
    for wanted in names:
        named = [name for name in modules if name == wanted or name.endswith(f".{wanted}")]
        by_kind = {"head": heads, "embeddings": embeddings}.get(wanted)
        named = named or ([full[module] for module in by_kind(model)] if by_kind else [])
        if not named:
            known = [full[module] for module in (*heads(model), *embeddings(model))]
            raise ConfigError(
                f"tuning.modules_to_save: nothing in this model is named {wanted}; expected head, embeddings, or last "
                f"parts of names of modules; head and embeddings are {', '.join(dict.fromkeys(known))}"
            )
        selected += named
    for name in selected:
        inside = [target for target in found.modules if target == name or target.startswith(f"{name}.")]
        quantized = [part for part in modules[name].parameters() if not part.is_floating_point()]
        if inside or quantized:
            why = f"{inside[0]} has an adapter (tuning.target_modules)" if inside else "its weights are in few bits"
            raise ConfigError(f"tuning.modules_to_save: {name} cannot be trained whole: {why}")
        if is_tied(model) and modules[name] in _tables(model) and name.rpartition(".")[2] not in _TIED_BY_PEFT:
            raise ConfigError(
                f"tuning.modules_to_save: {name}: head and embeddings of this model are one weight, and PEFT cannot "
                "keep them tied; set tuning.kind: partial"
            )
    return list(dict.fromkeys(selected))


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the head is the table of tokens."""
    return getattr(model.get_output_embeddings(), "weight", None) is model.get_input_embeddings().weight


def _tables(model: PreTrainedModel) -> set[Any]:
    return {model.get_input_embeddings(), model.get_output_embeddings()}


def add_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Give `model` a row for each of `tokens`, and `tokenizer` the tokens; returns their ids."""
    pieces = [tokenizer.encode(token, add_special_tokens=False) for token in tokens]
    ids = add_tokens(tokenizer, tokens)
    hold_rows(model, max(ids) + 1)
    tables = {id(module.weight): module.weight for module in _tables(model) if module is not None}
    with torch.no_grad():
        for weight in tables.values():
            for row, parts in zip(ids, pieces, strict=True):
                weight[row] = weight[parts].float().mean(0).to(weight.dtype)
    return ids


def hold_rows(model: PreTrainedModel, rows: int) -> None:
    """Let the tables of tokens have at least so many rows."""
    if model.get_input_embeddings().weight.shape[0] < rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
        model.requires_grad_(False)


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Add tokens that are written in texts as they are; returns their ids.

    Raises:
        ConfigError: one is a token already.
    """
    if known := [token for token in tokens if token in tokenizer.get_vocab()]:
        raise ConfigError(f"tuning.new_tokens: {known[0]} is a token of this model already; leave it out")
    tokenizer.add_tokens(list(tokens))
    ids: list[int] = tokenizer.convert_tokens_to_ids(list(tokens))
    return ids
