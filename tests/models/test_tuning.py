"""The seam of tunings: what is trained is saved and loaded again as it was, whichever way of tuning it is."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lmtune.config.schema import LoraConfig, ModelConfig, PartialConfig
from lmtune.errors import ConfigError
from lmtune.models.base import load_model
from lmtune.models.parameters import count_parameters
from lmtune.models.tuning.adapter_files import Metadata
from lmtune.models.tuning.base import Tuning
from lmtune.models.tuning.full import Full
from lmtune.models.tuning.lora import Lora
from lmtune.models.tuning.partial import Partial, find_parameters
from tests.tiny import EXPERT_KINDS, save_tiny, tiny_model

PARTS = PartialConfig(parts=("head", "norms", "last_1_layers"))
TUNINGS: dict[str, Callable[[ModelConfig], Tuning]] = {
    "lora": lambda base: Lora(LoraConfig(rank=4, alpha=8)), "full": Full, "partial": lambda base: Partial(PARTS, base),
}  # fmt: skip
IDS = torch.arange(3, 20)[None]
METADATA = Metadata(stop_token_ids=(2,))


def stored(folder: Path, **changes: object) -> ModelConfig:
    """A base on the disk."""
    return ModelConfig(name=str(save_tiny(folder, **changes)), quantization="none", dtype="float32")


@pytest.mark.parametrize("name", TUNINGS)
def test_what_was_trained_is_saved_and_loaded_as_it_was(tmp_path: Path, name: str) -> None:
    base = stored(tmp_path / "base")
    tuning, folder = TUNINGS[name](base), tmp_path / "saved"
    folder.mkdir()
    assert tuning.kind == name
    model = tuning.apply(load_model(base, "cpu"), seed=0, base_name="tiny-random")
    groups = tuning.parameter_groups(model, weight_decay=0.5)
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.trainable().values()}
    for parameter in grouped:
        parameter.data += 0.01 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
        )
    before = model.module.eval()(input_ids=IDS).logits
    tuning.save(model, folder, METADATA)
    loaded = TUNINGS[name](base).load(load_model(base, "cpu"), folder)
    assert torch.equal(loaded.module(input_ids=IDS).logits, before)
    assert not loaded.trainable()
    assert not torch.equal(load_model(base, "cpu")(input_ids=IDS).logits, before)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("name", TUNINGS)
def test_other_weights_are_saved_in_place_of_the_models_own(tmp_path: Path, name: str, is_tied: bool) -> None:
    """Those of the best step, while the model holds the last one's; a tied head is that of the embedding."""
    base, folder = stored(tmp_path / "base", tie_word_embeddings=is_tied), tmp_path / "saved"
    folder.mkdir()
    tuning = TUNINGS[name](base)
    model = tuning.apply(load_model(base, "cpu"), seed=0, base_name="tiny-random")
    best = {key: parameter.detach() + 0.5 for key, parameter in model.trainable().items()}
    tuning.save(model, folder, METADATA, best)
    loaded = TUNINGS[name](base).load(load_model(base, "cpu"), folder)
    found = dict(loaded.module.named_parameters())
    assert all(torch.equal(found[key], tensor) for key, tensor in best.items())
    if name != "lora":
        assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not is_tied
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is is_tied


@pytest.mark.parametrize("kind", ["gpt2", *EXPERT_KINDS])
def test_plain_transformers_loads_a_model_in_which_every_weight_has_learned(tmp_path: Path, kind: str) -> None:
    """Also where its files name and cut the weights otherwise than the model does."""
    from transformers import AutoModelForCausalLM

    base, folder = stored(tmp_path / "base", kind=kind), tmp_path / "saved"
    folder.mkdir()
    tuning = Full(base)
    model = tuning.apply(load_model(base, "cpu"), 0, "x")
    for parameter in model.trainable().values():
        parameter.data += 0.01
    tuning.save(model, folder, METADATA)
    plain, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(plain.eval()(input_ids=IDS).logits, model.module.eval()(input_ids=IDS).logits)
    names = [load_file(path).keys() for path in (tmp_path / "base/model.safetensors", folder / "model.safetensors")]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("computed", "written"), [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float32)]
)
def test_a_weight_that_has_learned_is_stored_as_wide_as_it_was_computed_with(
    tmp_path: Path, computed: str, written: torch.dtype
) -> None:
    """Over a base in bfloat16; the others are copied bit for bit."""
    name, folder = str(save_tiny(tmp_path / "base", dtype=torch.bfloat16)), tmp_path / "saved"
    folder.mkdir()
    base = ModelConfig(name=name, quantization="none", dtype=computed)  # type: ignore[arg-type]
    tuning = Partial(PartialConfig(parts=("norms",)), base)
    model = tuning.apply(load_model(base, "cpu"), 0, "x")
    assert {parameter.dtype for parameter in model.trainable().values()} == {torch.float32}
    for parameter in model.trainable().values():
        parameter.data += 0.1
    tuning.save(model, folder, METADATA)
    before, after = (load_file(path / "model.safetensors") for path in (Path(name), folder))
    assert before.keys() == after.keys()
    for key, tensor in after.items():
        if "norm" in key:
            assert tensor.dtype == written
            assert torch.equal(tensor, model.base.get_parameter(key).to(written))
        else:
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, before[key])
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == str(written).removeprefix("torch.")


def test_matrices_decay_and_norms_do_not() -> None:
    groups = Full().parameter_groups(Full().apply(tiny_model(), 0, "x"), weight_decay=0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(parameter.dim() >= 2 for parameter in groups[0]["params"])
    assert all(parameter.dim() < 2 for parameter in groups[1]["params"])


# --- parts


def classifier() -> torch.nn.Module:
    """Qwen3 with a head of three classes."""
    from transformers import Qwen3ForSequenceClassification

    config = tiny_model("qwen3").config
    config.num_labels = 3
    return Qwen3ForSequenceClassification(config).requires_grad_(False)


LAST = {"model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"}
FOUND = {
    "head": (lambda: tiny_model("qwen3"), "head", {"lm_head.weight"}),
    "head of a classifier": (classifier, "head", {"score.weight"}),
    "tied head": (lambda: tiny_model(tie_word_embeddings=True), "head", {"model.embed_tokens.weight"}),
    "embeddings": (lambda: tiny_model("qwen3"), "embeddings", {"model.embed_tokens.weight"}),
    "embeddings of positions": (lambda: tiny_model("gpt2"), "embeddings", {"transformer.wte.weight",
                                                                           "transformer.wpe.weight"}),
    "norms": (tiny_model, "norms", {"model.norm.weight", *(
        f"model.layers.{n}.{norm}_layernorm.weight" for n in range(2) for norm in ("input", "post_attention"))}),
    "layer norms": (lambda: tiny_model("gpt2", n_layer=1), "norms", {
        f"transformer.{norm}.{leaf}" for norm in ("h.0.ln_1", "h.0.ln_2", "ln_f") for leaf in ("weight", "bias")}),
    "an expression": (tiny_model, r".*\.1\..*(q|down)_proj\.weight", LAST),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_a_part_is_found_by_what_it_is(name: str) -> None:
    make, part, wanted = FOUND[name]
    model = make()
    assert set(find_parameters(model, [part])) == wanted
    with torch.device("meta"):  # as `lmtune plan` has it
        assert set(find_parameters(type(model)(model.config), part)) == wanted


def test_the_last_layers_and_several_parts_together() -> None:
    model = tiny_model("qwen3")
    last = set(find_parameters(model, ["last_1_layers"]))
    assert last == {name for name, _ in model.named_parameters() if name.startswith("model.layers.1.")}
    assert set(find_parameters(model, ["head", "last_1_layer"])) == last | {"lm_head.weight"}
    assert len(find_parameters(model, ["last_2_layers"])) == 2 * len(last)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (["haed"], r"haed is unknown; its parts are head, embeddings, norms, last_N_layers \(N up to 2\); or"),
        (["head", "last_3_layers"], "last_3_layers: this model has 2 layers"),
        (r"model\.layer\..*", r"nothing in this model is named .*model\.embed_tokens\.weight"),
        ("model.(", "is not a regular expression"),
        ("((a+)+)+$b", "nothing in this model is named|too slow"),
    ],
)
def test_a_part_that_is_not_there_is_named_with_those_that_are(parts: str | list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        find_parameters(tiny_model(), parts)


def test_a_line_says_what_learns() -> None:
    model = tiny_model(tie_word_embeddings=True)
    part = count_parameters(model, PartialConfig(parts=("head",)), "none", torch.float32)
    assert part.describe() == "8,192 trained (head; head and embeddings are one weight); 74,048 frozen in float32"
    assert part.trained + part.frozen == sum(parameter.numel() for parameter in model.parameters())
