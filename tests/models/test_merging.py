"""Merging: the written folder is a plain model that says what the adapter model says, or there is none."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lmtune.config.schema import ModelConfig
from lmtune.errors import ConfigError, LmtuneError
from lmtune.export.merged import merge_run
from lmtune.inference.load import load_for_inference
from lmtune.models import base, merge
from lmtune.models.verify import MergeReport, require_bounds
from lmtune.runs.store import RunDirectory
from tests.tiny import save_tiny
from tests.tokenizers import CHATML
from tests.workplace import finetune, inside, make_workplace, written_files

pytestmark = pytest.mark.slow  # seconds together; left out of `make test-fast`

IDS = torch.arange(5, 29)[None]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """`[24, V]` in fp32."""
    return model(input_ids=IDS).logits[0].float()


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest, relative to the largest logit."""
    return float((one - other).abs().max() / other.abs().max())


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A workplace for each dtype that the base is stored in, with a run for each quantization."""
    found = {}
    for name, dtype in DTYPES.items():
        found[name] = make_workplace(tmp_path_factory.mktemp(name), dtype=dtype)
        for quantization in ("none", "nf4", "int8") if name == "float32" else ("nf4",):
            finetune(found[name], run__name=quantization, model__quantization=quantization)
    return found


def merged(place: Path, name: str, into: Any = "trained", output: str = "merged") -> tuple[Path, dict[str, Any]]:
    """Merge a run of that place."""
    with inside(place):
        report = merge_run(RunDirectory(f"runs/{name}"), Path(output), into)
    return place / output, report


@pytest.mark.parametrize(
    ("quantization", "into", "bound"),
    [
        ("none", "trained", 1e-5), ("nf4", "trained", 1e-5), ("int8", "trained", 1e-5), ("nf4", "original", 0.5),
    ],
)  # fmt: skip
def test_plain_transformers_loads_it_with_the_logits_of_training(
    places: dict[str, Path], quantization: str, into: str, bound: float
) -> None:
    place = places["float32"]
    folder, report = merged(place, quantization, into, f"merged-{quantization}-{into}")
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with inside(place):
        trained = load_for_inference(f"runs/{quantization}")
        whole = load_for_inference(f"runs/{quantization}", quantization="none")
    assert difference(logits(plain), logits(trained.model)) <= bound
    if into == "original":
        assert difference(logits(plain), logits(whole.model)) <= 1e-5
        assert difference(logits(plain), logits(trained.model)) > 1e-4
    assert difference(logits(plain), logits(AutoModelForCausalLM.from_pretrained(place / "base"))) > 0.01
    assert report["logits_difference"] <= report["bound"]
    assert (report["into"], report["dtype"], report["rows"]) == (into, "float32", 6)
    assert report["tokens"] > 6
    conversation = [{"role": "user", "content": "What is number 3?"}]
    assert tokenizer.apply_chat_template(conversation, tokenize=False) == trained.tokenizer.apply_chat_template(
        conversation, tokenize=False
    )


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_base_that_is_stored_quantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: Any
) -> None:
    monkeypatch.setattr(base, "_CACHED_FROM_BYTES", 0)
    place = make_workplace(tmp_path)
    with inside(place):
        quantized = base.load_model(ModelConfig(name="base", quantization=kind), "cpu")
        (place / "base" / "model.safetensors").unlink()
        quantized.save_pretrained(place / "base")
    finetune(place, train__max_steps=2, model__quantization=kind)
    _, report = merged(place, "trial")
    assert report["logits_difference"] <= report["bound"]
    assert "not kept for the next start" not in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("stored", DTYPES)
def test_what_rounding_leaves_of_the_update_is_measured(places: dict[str, Path], stored: str) -> None:
    """Its share by the written files and plain PEFT's merge, and the divergence by the logits of both models."""
    from peft import PeftModel

    place = places[stored]
    folder, report = merged(place, "nf4", output="measured")
    with inside(place):
        base_model = base.load_model(ModelConfig(name="base", quantization="nf4"), "cpu").dequantize()
        before = {name: weight.detach().clone() for name, weight in base_model.named_parameters()}
        exact = PeftModel.from_pretrained(base_model, "runs/nf4/adapter").merge_and_unload()
    written, update, kept = load_file(folder / "model.safetensors"), 0.0, 0.0
    for name, weight in exact.named_parameters():
        if name in written and (delta := (weight - before[name]).detach().double()).any():
            update += float((delta * delta).sum())
            kept += float(((written[name].double() - before[name].double()) * delta).sum())
    assert report["update_kept"] == pytest.approx(kept / update, abs=1e-3)
    assert report["update_kept"] > 0.97
    assert 0 < report["kl"] < {"float32": 1e-6, "float16": 1e-4, "bfloat16": 1e-2}[stored]
    assert report["update_kept"] == 1 or stored != "float32"


@pytest.mark.parametrize("stored", DTYPES)
def test_the_dtype_is_kept(places: dict[str, Path], stored: str) -> None:
    folder, report = merged(places[stored], "nf4", output="kept")
    state = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {DTYPES[stored]}
    assert state.keys() == load_file(places[stored] / "base" / "model.safetensors").keys()
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == stored == report["dtype"]
    assert "quantization_config" not in config
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with inside(places[stored]):
        trained = load_for_inference("runs/nf4")
    assert difference(logits(plain), logits(trained.model)) <= merge.BOUNDS[DTYPES[stored]]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"model__dtype": "float16", "model__quantization": "nf4"}),
        ("gpt2", {"model__quantization": "int8"}),
        ("llama", {"model__quantization": "int8", "tuning__target_modules": ["q_proj"]}),
        ("qwen3", {"model__quantization": "nf4", "tuning__use_dora": True}),
        ("llama", {"tuning__init_lora_weights": "pissa"}),
    ],
)
def test_whatever_was_trained_can_be_merged(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    """Computed in 16 bit over a base stored in 32; GPT-2, whose files hold its layers transposed; variants of LoRA."""
    place = make_workplace(tmp_path)
    save_tiny(place / "base", kind, chat_template=CHATML)
    finetune(place, **changes)
    folder, report = merged(place, "trial")
    with inside(place):
        trained = load_for_inference("trial")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    bound = 0.08 if {"model__dtype", "tuning__target_modules"} & changes.keys() else 1e-4
    assert difference(logits(plain), logits(trained.model)) <= bound
    assert report["logits_difference"] <= report["bound"] == merge.BOUNDS[torch.float32]


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_in_fp32_nothing_of_the_update_is_rounded(places: dict[str, Path], stored: str) -> None:
    place = places[stored]
    with inside(place):
        report = merge_run(RunDirectory("runs/nf4"), Path("exact"), exact=True)
        trained = load_for_inference("runs/nf4")
    assert (report["dtype"], report["update_kept"]) == ("float32", 1.0)
    assert report["logits_difference"] <= report["bound"] == merge.BOUNDS[torch.float32]
    config = json.loads((place / "exact/config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float32"
    plain = AutoModelForCausalLM.from_pretrained(place / "exact")
    assert {weight.dtype for weight in plain.parameters()} == {torch.float32}
    assert difference(logits(plain), logits(trained.model.float())) <= 1e-4


def test_a_refused_merge_in_16_bit_names_fp32() -> None:
    bad = MergeReport("trained", "bfloat16", 1, 1, 0.1, 8e-2, 0.0, 8e-2, 1.0, 0.0)
    with pytest.raises(LmtuneError, match="--dtype float32 writes it without rounding"):
        require_bounds(bad)


def test_everything_that_chat_needs_is_there(places: dict[str, Path]) -> None:
    place = places["float32"]
    folder, report = merged(place, "none", output="whole")
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [4, 1]  # <|im_end|>, </s>
    assert (folder / "chat_template.jinja").is_file()
    assert json.loads((folder / "merge.json").read_text()) == report
    assert "merge" not in json.loads((place / "runs/none/summary.json").read_text())  # it tells of RUN/merged only
    assert (folder / "README.md").read_text().startswith("---\n")
    with inside(place):
        loaded, trained = load_for_inference("whole"), load_for_inference("runs/none")
    assert not loaded.has_adapter
    assert loaded.renderer.stop_token_ids == trained.renderer.stop_token_ids
    for name, content in written_files(folder).items():
        assert not name.endswith((".bin", ".pt", ".pkl"))
        assert str(place).encode() not in content, name


def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the merge go wrong: one of the written weights is another one."""
    real = merge._write_weights

    def corrupted(source: Any, folder: Path) -> bool:
        untied = real(source, folder)
        state = load_file(folder / "model.safetensors")
        state["model.norm.weight"] *= 1.1
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return untied

    monkeypatch.setattr(merge, "_write_weights", corrupted)


def test_a_merge_that_is_not_the_trained_model_is_refused_and_the_earlier_one_stays(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, output = places["float32"], "refused"
    merged(place, "none", output=output)
    kept = written_files(place / output)
    spoil(monkeypatch)
    with pytest.raises(LmtuneError, match="the merged model's logits differ from those of the adapter over the same"):
        merged(place, "none", output=output)
    assert written_files(place / output) == kept
    assert not list(place.glob(".staging*"))


def test_a_merge_whose_logits_are_not_finite_is_refused() -> None:
    fine = MergeReport("trained", "float32", 1, 1, 0.0, 1e-4, 0.0, 1e-4, 1.0, 0.0)
    require_bounds(fine)
    for bad in ({"logits_difference": float("nan")}, {"difference_to_trained": 1e-3}):
        with pytest.raises(LmtuneError, match="nothing was kept"):
            require_bounds(dataclasses.replace(fine, **bad))  # type: ignore[arg-type]
    require_bounds(dataclasses.replace(fine, difference_to_trained=9.0, bound_to_trained=None))


@pytest.mark.parametrize("output", ["runs/none/adapter", "train.jsonl"])
def test_a_folder_that_merge_did_not_make_is_never_replaced(places: dict[str, Path], output: str) -> None:
    place = places["float32"]
    kept = written_files(place)
    with pytest.raises(ConfigError, match=r"--output: .* exists and was not made by lmtune merge"):
        merged(place, "none", output=output)
    assert written_files(place) == kept
