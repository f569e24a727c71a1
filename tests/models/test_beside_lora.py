"""What a LoRA adapter trains beside its matrices: whole modules and the rows of new tokens, as plain PEFT has them."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmtune.config.schema import LoraConfig, ModelConfig
from lmtune.errors import ConfigError
from lmtune.forward.packed import PackedForward
from lmtune.kernels.lora_linear import fuse
from lmtune.models.base import load_model
from lmtune.models.merge import merge
from lmtune.models.parameters import count_parameters
from lmtune.models.tuning.adapter_files import Metadata
from lmtune.models.tuning.base import TunedModel
from lmtune.models.tuning.lora import Lora, load_adapter
from tests.tiny import losses_of, pack_rows, random_rows, save_tiny, tiny_model

IDS = torch.arange(3, 20)[None]
NEW = ("<order>", "<refund>")
WAYS: dict[str, dict[str, Any]] = {
    "head": {"modules_to_save": ("head",)},
    "norms": {"modules_to_save": ("norm", "input_layernorm")},
    "embeddings": {"modules_to_save": ("embed_tokens",)},
    "tokens": {"new_tokens": NEW},
    "tokens and norms": {"new_tokens": NEW, "modules_to_save": ("norm",)},
}  # fmt: skip
each_way = pytest.mark.parametrize("way", WAYS)
each_tie = pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])


def stored(folder: Path, **changes: Any) -> ModelConfig:
    """A base on the disk, with a tokenizer."""
    return ModelConfig(name=str(save_tiny(folder, **changes)), quantization="none", dtype="float32")


def trained(base: ModelConfig, way: str) -> tuple[Lora, TunedModel]:
    """An adapter in which everything that is trained has moved."""
    tuning = Lora(LoraConfig(rank=4, alpha=8, **WAYS[way]), base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = tuning.apply(load_model(base, "cpu"), 0, base.name)
    assert all(parameter.dtype == torch.float32 for parameter in model.trainable().values())
    for index, parameter in enumerate(model.trainable().values()):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    model.module.eval()
    return tuning, model


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def ids_of(base: ModelConfig, way: str) -> torch.Tensor:
    """Some token ids, the new ones among them."""
    before = len(AutoTokenizer.from_pretrained(base.name))
    new = [before, before + 1] if WAYS[way].get("new_tokens") else []
    return torch.tensor([[*range(3, 12), *new, *range(12, 18)]])


@each_tie
@each_way
def test_it_is_saved_loaded_and_merged(tmp_path: Path, way: str, is_tied: bool) -> None:
    base = stored(tmp_path / "base", tie_word_embeddings=is_tied)
    tuning, model = trained(base, way)
    ids, folder = ids_of(base, way), tmp_path / "adapter"
    wanted = logits(model.module, ids)
    folder.mkdir()
    tuning.save(model, folder, Metadata(stop_token_ids=(2,)))
    loaded = load_adapter(load_model(base, "cpu"), folder)
    assert torch.equal(logits(loaded, ids), wanted)
    with loaded.disable_adapter():  # but for the rows that were added
        before = logits(load_model(base, "cpu"))
        torch.testing.assert_close(logits(loaded)[..., : before.shape[-1]], before)
    plain = AutoModelForCausalLM.from_pretrained(base.name)
    if WAYS[way].get("new_tokens"):
        plain.resize_token_embeddings(wanted.shape[-1], mean_resizing=False)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(plain, folder).eval(), ids), wanted)
    tokenizer = AutoTokenizer.from_pretrained(base.name)
    tokenizer.add_tokens(list(WAYS[way].get("new_tokens", ())))
    report = merge(base, folder, tmp_path / "merged", "trained", ids.tolist(), tokenizer, (2,))
    assert report.logits_difference < 1e-5
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(merged.eval(), ids), wanted)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is is_tied
    assert ("lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")) is not is_tied


@each_tie
@each_way
def test_the_count_is_what_is_trained(tmp_path: Path, way: str, is_tied: bool) -> None:
    base = stored(tmp_path / "base", tie_word_embeddings=is_tied)
    _, model = trained(base, way)
    counted = count_parameters(load_model(base, "cpu"), LoraConfig(rank=4, alpha=8, **WAYS[way]), "none", torch.float32)
    assert counted.trained == sum(parameter.numel() for parameter in model.trainable().values())
    said = counted.describe()
    assert ("head and embeddings are one weight" in said) is (is_tied and way in ("head", "embeddings"))
    assert ("2 new tokens" in said) is ("tokens" in way)


@each_tie
@each_way
def test_packed_losses_and_gradients_are_those_of_the_plain_model(tmp_path: Path, way: str, is_tied: bool) -> None:
    base = stored(tmp_path / "base", tie_word_embeddings=is_tied)
    _, model = trained(base, way)
    rows = random_rows(5).rows
    new = ids_of(base, way)[0].tolist()
    for row in rows:
        row.sequences[0].input_ids[: len(new)] = new[: len(row.sequences[0].input_ids)]

    def plain() -> torch.Tensor:
        parts = []
        for row in rows:
            for sequence in row.sequences:
                ids = torch.tensor(sequence.input_ids, dtype=torch.long)
                losses = torch.nn.functional.cross_entropy(
                    model.module(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none"
                )
                parts.append(losses[torch.tensor(sequence.loss_mask[1:])])
        return torch.cat(parts)

    parameters = list(model.trainable().values())
    expected = plain()
    gradients = torch.autograd.grad(expected.sum(), parameters)
    assert fuse(model.module) == []
    forward = PackedForward(model.module)
    assert forward.disabled_optimizations == []
    losses = losses_of(forward, pack_rows(rows, share_prefixes=True))
    assert losses.sum().item() == pytest.approx(expected.sum().item(), rel=1e-5)
    for found, gradient in zip(torch.autograd.grad(losses.sum(), parameters), gradients, strict=True):
        torch.testing.assert_close(found, gradient, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("is_tied", [False, True])
def test_only_the_rows_of_new_tokens_are_trained_and_they_begin_as_the_mean_of_their_pieces(
    tmp_path: Path, is_tied: bool
) -> None:
    base = stored(tmp_path / "base", tie_word_embeddings=is_tied)
    model = Lora(LoraConfig(new_tokens=NEW), base).apply(load_model(base, "cpu"), 0, "x")
    tokenizer = AutoTokenizer.from_pretrained(base.name)
    table = load_model(base, "cpu").get_input_embeddings().weight
    rows = {name: p for name, p in model.trainable().items() if "lora_" not in name}
    assert len(rows) == (1 if is_tied else 2)
    first = next(iter(rows.values()))
    for row, token in zip(first, NEW, strict=True):
        torch.testing.assert_close(row, table[tokenizer.encode(token, add_special_tokens=False)].mean(0))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"modules_to_save": ("haed",)}, "nothing in this model is named haed; .* are lm_head, model.embed_tokens"),
        ({"modules_to_save": ("q_proj",)}, "q_proj cannot be trained whole: .* has an adapter"),
        ({"modules_to_save": ("embed_tokens",), "new_tokens": NEW}, "choose one of the two"),
        ({"modules_to_save": ("head",), "new_tokens": NEW}, "choose one of the two"),
        ({"new_tokens": ("a",)}, "a is a token of this model already"),
    ],
)
@each_tie
def test_what_cannot_be_is_said(tmp_path: Path, is_tied: bool, settings: dict[str, Any], said: str) -> None:
    base = stored(tmp_path / "base", tie_word_embeddings=is_tied)
    with pytest.raises(ConfigError, match=said):
        Lora(LoraConfig(**settings), base).apply(load_model(base, "cpu"), 0, "x")


def test_weights_that_would_come_apart_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"one weight, and PEFT cannot keep them tied; set tuning\.kind: partial"):
        Lora(LoraConfig(modules_to_save=("wte",))).apply(tiny_model("gpt2"), 0, "x")


def test_b_learns_faster_with_lora_plus() -> None:
    tuning = Lora(LoraConfig(lora_plus_ratio=16, modules_to_save=("head",)))
    model = tuning.apply(tiny_model(), 0, "x")
    others, b = tuning.parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.trainable().items()}
    assert {"lora_B" in names[id(p)] for p in b["params"]} == {True}
    assert {"lora_B" in names[id(p)] for p in others["params"]} == {False}
    assert (b["lr_scale"], others.get("lr_scale")) == (16, None)
    assert len(b["params"]) + len(others["params"]) == len(names)
    assert len(Lora(LoraConfig()).parameter_groups(model, 0.1)) == 1
