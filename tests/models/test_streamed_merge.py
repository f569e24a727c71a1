"""A merge holds the base as it is stored, one block in fp32, and a row's logits; the files keep the base's layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from benchmarks.merge_memory import make_run, measured
from lmtune.config.schema import ModelConfig
from lmtune.errors import LmtuneError
from lmtune.export.merged import merge_run
from lmtune.inference.load import load_for_inference
from lmtune.models import merge
from lmtune.models.base import load_model, weight_files
from lmtune.models.block_weights import BlockWeights
from lmtune.models.model_folder import Layout, StoredWeights
from lmtune.models.structure import empty_model
from lmtune.models.verify import Comparison, LogitsReader, Routing
from lmtune.runs.store import RunDirectory
from tests.tiny import SAVED_VOCABULARY, adapted, save_tiny, tiny_model
from tests.tokenizers import CHATML, make_tokenizer
from tests.workplace import finetune, inside, make_workplace

IDS = list(range(5, 29))


def save_mixture(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> None:
    """A random mixture of experts, in the files of which each expert's matrices have names of their own."""
    common: dict[str, Any] = {
        "vocab_size": SAVED_VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
        "bos_token_id": 0, "eos_token_id": 1, "num_experts_per_tok": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    model: Any
    if kind == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**common, num_local_experts=4))
    elif kind == "llama4_text":  # which looks at its embedding's weight before the embedding runs
        shape = Llama4TextConfig(**common, num_local_experts=4, intermediate_size_mlp=128, pad_token_id=None)
        model = Llama4ForCausalLM(shape)
    else:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, moe_intermediate_size=64, num_experts=4))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.08) if parameter.dim() > 1 else None
    model.to(dtype).save_pretrained(folder)
    make_tokenizer(CHATML).save_pretrained(folder)


def merged(place: Path, name: str = "trial", **options: Any) -> dict[str, Any]:
    """Merge a run of that place into `merged`."""
    with inside(place):
        return merge_run(RunDirectory(f"runs/{name}"), Path("merged"), "trained", **options)


def raw(folder: Path) -> dict[str, bytes]:
    """The bytes of each stored tensor."""
    stored = StoredWeights(sorted(folder.glob("*.safetensors")))
    return {name: bytes(entry.read().reshape(-1).view(torch.uint8).numpy()) for name, entry in stored.entries.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "quantization"), [("mixtral", "none"), ("qwen3_moe", "nf4"), ("llama4_text", "none")])
def test_a_mixture_of_experts_keeps_the_published_layout(tmp_path: Path, kind: str, quantization: str) -> None:
    place = make_workplace(tmp_path)
    save_mixture(place / "base", kind)
    finetune(place, model__quantization=quantization, train__max_steps=3)
    report = merged(place)
    assert report["logits_difference"] <= 1e-5
    before, after = raw(place / "base"), raw(place / "merged")
    assert list(after) == list(before)
    assert [name for name in before if "experts" in name and after[name] != before[name]], "experts are merged too"
    assert after["model.embed_tokens.weight"] == before["model.embed_tokens.weight"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_keep_their_names_and_what_did_not_change_is_copied_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    place = make_workplace(tmp_path, dtype=dtype)
    base = place / "base"
    model = load_model(ModelConfig(name=str(base), quantization="none"), "cpu").to(dtype)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="100KB")
    finetune(place, train__max_steps=2, tuning__target_modules=["q_proj"])
    merged(place)
    folder = place / "merged"
    assert sorted(p.name for p in folder.glob("*.safetensors*")) == sorted(p.name for p in base.glob("*.safetensors*"))
    index = "model.safetensors.index.json"
    assert (
        json.loads((folder / index).read_text())["weight_map"] == json.loads((base / index).read_text())["weight_map"]
    )
    before, after = raw(base), raw(folder)
    assert {name for name in before if before[name] != after[name]} == {
        f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)
    }


@pytest.mark.slow
def test_a_base_of_several_types_is_merged_in_each_ones_own(tmp_path: Path) -> None:
    """Norms in 32 bit among matrices in 16, as some publish them."""
    from safetensors.torch import save_file

    place = make_workplace(tmp_path, dtype=torch.bfloat16)
    file = place / "base" / "model.safetensors"
    state = load_file(file)
    norms = {name for name in state if "norm" in name}
    mixed = {n: t.float() + 1e-4 * torch.rand(t.shape) if n in norms else t for n, t in state.items()}
    save_file(mixed, file, {"format": "pt"})
    finetune(place, train__max_steps=2, model__quantization="nf4", model__dtype="bfloat16")
    merged(place)
    written = load_file(place / "merged" / "model.safetensors")
    assert {name for name, tensor in written.items() if tensor.dtype == torch.float32} == norms
    assert all(torch.equal(written[name], mixed[name]) for name in norms)


@pytest.mark.long
def test_the_most_memory_is_the_base_one_block_and_a_rows_logits(tmp_path: Path) -> None:
    """With the logits of all rows and of three models at once it was 1.9 GiB here."""
    from types import SimpleNamespace

    options = SimpleNamespace(
        rows=8, tokens=512, vocabulary=40_000, width=64, layers=2, dtype="bfloat16", quantization="none"
    )
    make_run(tmp_path, options)
    result = measured(tmp_path, options)
    allowed = result["base_gib"] + 4 * 40_000 * 64 / 2**30 + result["logits_of_one_row_gib"]
    assert result["peak_gib"] < allowed + 0.45, "beside what Python and the libraries take as they work"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "changes"), [("qwen3", {"model__quantization": "nf4"}), ("gpt2", {})])
def test_a_head_that_was_tied_becomes_a_weight_of_its_own(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    place = make_workplace(tmp_path)
    save_tiny(place / "base", kind, chat_template=CHATML, tie_word_embeddings=True)
    before = raw(place / "base")
    assert "lm_head.weight" not in before
    finetune(place, train__max_steps=4, tuning__target_modules=["lm_head", "c_attn" if kind == "gpt2" else "q_proj"],
             **changes)  # fmt: skip
    report = merged(place)
    assert report["difference_to_trained"] <= 1e-5
    after = raw(place / "merged")
    embedding = "transformer.wte.weight" if kind == "gpt2" else "model.embed_tokens.weight"
    assert after[embedding] == before[embedding] != after["lm_head.weight"]
    assert json.loads((place / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    with inside(place):
        plain, trained = load_for_inference("merged"), load_for_inference("trial")
    with torch.no_grad():
        ids = torch.tensor([IDS])
        torch.testing.assert_close(plain.model(input_ids=ids).logits, trained.model(input_ids=ids).logits,
                                   atol=1e-4, rtol=1e-4)  # fmt: skip


# --- blocks


def test_only_the_block_at_work_is_in_another_dtype() -> None:
    model = adapted(tiny_model().bfloat16())
    held = BlockWeights(model)
    seen = []

    def look(module: Any, *_: Any) -> None:
        found = {name for name, p in held.base.named_parameters() if p.dtype == torch.float32 and "lora" not in name}
        seen.append(sum(dict(held.base.named_parameters())[name].numel() for name in found))

    for module in held.base.modules():
        if isinstance(module, torch.nn.Embedding | torch.nn.Linear) and not list(module.children()):
            module.register_forward_hook(look)
    with torch.no_grad(), held.in_dtype(torch.float32):
        got = held.base(input_ids=torch.tensor([IDS])).logits
    largest = max(sum(p.numel() for p in block.parameters()) for block, _ in held.blocks)
    assert 0 < max(seen) <= largest < sum(p.numel() for p in held.base.parameters()) / 2
    assert {p.dtype for name, p in held.base.named_parameters() if "lora" not in name} == {torch.bfloat16}
    with torch.no_grad():
        wanted = held.base.float()(input_ids=torch.tensor([IDS])).logits
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)


def test_a_merged_block_is_handed_out_in_fp32_and_put_back() -> None:
    model = adapted(tiny_model().bfloat16(), use_dora=True)
    held = BlockWeights(model)
    before = {name: p.clone() for name, p in held.base.named_parameters()}
    parts = list(held.merged())
    assert [len(part) for part in parts] == [7, 7]
    assert {tensor.dtype for part in parts for tensor in part.values()} == {torch.float32}
    assert all(torch.equal(p, before[name]) for name, p in held.base.named_parameters())
    whole = adapted(tiny_model().bfloat16(), use_dora=True).float().merge_and_unload().state_dict()
    for part in parts:
        for name, tensor in part.items():
            torch.testing.assert_close(tensor, whole[name], atol=1e-6, rtol=1e-6)


def test_weights_that_are_not_finite_are_refused() -> None:
    model = adapted(tiny_model())
    model.base_model.model.model.layers[1].mlp.up_proj.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(LmtuneError, match="the merged weights are not finite"):
        list(BlockWeights(model).merged())
    with pytest.raises(LmtuneError, match=r"head: the merged weight is not finite in float16"):
        merge._require_finite("head", torch.tensor([1.0, 70000.0]).half())


# --- names in the files


def test_stored_names_without_the_models_prefix_are_found(tmp_path: Path) -> None:
    """As GPT-2 is published."""
    from safetensors.torch import save_file

    save_tiny(tmp_path / "base", "gpt2")
    file = tmp_path / "base" / "model.safetensors"
    save_file({n.removeprefix("transformer."): t for n, t in load_file(file).items()}, file, {"format": "pt"})
    base = ModelConfig(name=str(tmp_path / "base"), quantization="none")
    layout = Layout(empty_model(tmp_path / "base"), StoredWeights(weight_files(base)))
    name = "transformer.h.1.attn.c_attn.weight"
    assert layout.source(name) == "h.1.attn.c_attn.weight"
    assert list(layout.written({name: torch.zeros(1)})) == ["h.1.attn.c_attn.weight"]


# --- the comparison


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_logits_of_some_positions_are_those_of_the_whole_row(kind: str) -> None:
    model = tiny_model(kind)
    reader = LogitsReader(model, torch.no_grad)
    reader.read(0, IDS)
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(reader.logits(IDS, 3, 11), wanted[3:11], atol=1e-5, rtol=1e-5)
    assert "forward" not in model.base_model.__dict__


def test_a_difference_that_is_not_finite_is_not_lost() -> None:
    result = Comparison()
    result.begin_row(None)
    broken = torch.ones(4, 8)
    broken[2, 3] = float("nan")
    result.add(0, torch.ones(4, 8), broken)
    result.add(4, torch.ones(4, 8), torch.ones(4, 8))
    assert result.difference != result.difference


def routing(*scores: list[float]) -> Routing:
    """One router's scores of each token."""
    found = Routing(torch.nn.Identity())
    table = torch.tensor(scores)
    found.chosen = [(table, table.topk(1).indices)]
    return found


def test_only_a_choice_that_rounding_explains_is_rerouted() -> None:
    plain = routing([1.0, 0.0], [0.5, 0.50001], [1.0, 0.0])
    assert plain.first_difference(plain, 1e-4) is None
    assert plain.first_difference(routing([1.0, 0.0], [0.50001, 0.5], [1.0, 0.0]), 1e-4) == 1
    assert plain.first_difference(routing([1.0, 0.0], [0.9, 0.5], [1.0, 0.0]), 1e-4) is None
    steep = routing([1000.0, 999.0])
    assert steep.first_difference(routing([1000.05, 999.0]), 1e-4) == 0
    result = Comparison()
    result.begin_row(1)
    result.add(0, torch.ones(3, 4), torch.ones(3, 4) + torch.tensor([0.0, 0.5, 0.25])[:, None])
    assert (result.difference, result.rerouted, result.rerouted_difference) == (0.0, 2, 0.5)
    result = Comparison()
    result.begin_row(0)
    result.add(0, torch.ones(3, 4), torch.ones(3, 4) + 0.5)
    assert result.difference == 0.5, "where no token is left, nothing is proven"


@pytest.mark.slow
def test_a_router_that_rounding_decides_is_said_and_a_larger_difference_is_kept_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = make_workplace(tmp_path)
    save_mixture(place / "base", "mixtral")
    finetune(place, train__max_steps=2)
    real = merge._write_weights

    def corrupted(source: Any, folder: Path) -> bool:
        from safetensors.torch import save_file

        untied = real(source, folder)
        state = load_file(folder / "model.safetensors")
        state["model.norm.weight"] = state["model.norm.weight"] * 1.01
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return untied

    monkeypatch.setattr(merge, "_write_weights", corrupted)
    with pytest.raises(LmtuneError, match="--accept-difference keeps such a model"):
        merged(place)
    assert not (place / "merged").exists()
    report = merged(place, accept_difference=True)
    assert report["accepted"]
    assert report["logits_difference"] > report["bound"]
    assert "kept, because of --accept-difference" in " ".join(capsys.readouterr().err.split())
    assert json.loads((place / "merged" / "merge.json").read_text()) == report
    assert "more than allowed" in (place / "merged" / "README.md").read_text()
