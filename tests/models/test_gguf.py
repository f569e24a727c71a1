"""A base in a GGUF file: model, tokenizer, template and stop tokens are those that were written; commands take it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lmtune.config.schema import ModelConfig
from lmtune.errors import ModelError
from lmtune.export.merged import merge_run
from lmtune.inference.load import build_renderer, load_for_inference
from lmtune.models.base import base_fingerprint, load_model, load_tokenizer, stored_dtype, stored_parameters
from lmtune.runs.store import RunDirectory
from tests.tiny import SAVED_VOCABULARY, tiny_model
from tests.tokenizers import CHATML, make_tokenizer
from tests.workplace import finetune, inside, make_workplace, written_files

gguf = pytest.importorskip("gguf")
IDS = torch.arange(5, 29)[None]
QWEN3 = {
    "block_count": 2, "context_length": 256, "embedding_length": 64, "feed_forward_length": 128,
    "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 16, "attention.value_length": 16,
}  # fmt: skip


def write_gguf(path: Path, quantize: str = "F32", architecture: str = "qwen3", **extra: Any) -> Any:
    """The file of a tiny Qwen3 as llama.cpp's converter writes it; returns the model."""
    tokenizer = make_tokenizer(CHATML)
    model = tiny_model("qwen3", vocab_size=SAVED_VOCABULARY, tie_word_embeddings=True)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in QWEN3.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_float32(f"{architecture}.rope.freq_base", 10000.0)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    tokens += [f"[PAD{index}]" for index in range(len(tokens), SAVED_VOCABULARY)]
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t in special else 4 if t in ("<think>", "</think>") else 1 for t in tokens])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    for name, token in (("eos", "</s>"), ("padding", "<pad>"), ("eot", "<|im_end|>")):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    writer.add_chat_template(CHATML)
    for key, value in extra.items():
        if isinstance(value, torch.Tensor):
            writer.add_tensor(f"{key}.weight", value.numpy())
        else:
            (writer.add_uint32 if isinstance(value, int) else writer.add_string)(key.replace("__", "."), value)
    names, kind = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 2), gguf.GGMLQuantizationType[quantize]
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":
            stored = weight.numpy() if weight.dim() == 1 else gguf.quantize(weight.numpy(), kind)
            written = names.get_name(name, try_suffixes=(".weight",))
            writer.add_tensor(written, stored, raw_dtype=None if weight.dim() == 1 else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`base.gguf` in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_gguf(Path("base.gguf"))
    return Path("base.gguf")


@pytest.mark.parametrize(
    ("kind", "dtype", "bound"),
    [("F32", torch.float32, 1e-6), ("F16", torch.float16, 2e-3), ("Q8_0", torch.bfloat16, 5e-2)],
)
@torch.no_grad()
def test_it_is_the_model_that_was_written(tmp_path: Path, kind: str, dtype: torch.dtype, bound: float) -> None:
    written = write_gguf(tmp_path / "base.GGUF", kind)
    config = ModelConfig(name=str(tmp_path / "base.GGUF"), quantization="none", dtype="float32")
    model = load_model(config, "cpu")
    expected, found = written(input_ids=IDS).logits, model(input_ids=IDS).logits
    assert (found - expected).abs().max() <= bound * expected.abs().max()
    assert stored_dtype(config) == dtype
    assert stored_parameters(config) == sum(parameter.numel() for parameter in written.parameters())


def test_tokens_template_and_stop_tokens_are_those_of_the_file(file: Path) -> None:
    config, wanted = ModelConfig(name="base.gguf"), make_tokenizer(CHATML)
    tokenizer = load_tokenizer(config, alone=True)
    assert not list(Path().glob("cache/gguf/*"))  # no weight was read for it
    text = "<|im_start|>user\nThe quick brown fox, again and again.\n\n<think>"
    assert tokenizer(text).input_ids == wanted(text, add_special_tokens=False).input_ids
    assert tokenizer.chat_template == CHATML
    assert set(build_renderer(tokenizer, config).stop_token_ids) == {1, 4}


@pytest.mark.slow
def test_a_run_over_it_is_merged_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_workplace(tmp_path / "work")
    (tmp_path / "work/models").mkdir()
    (tmp_path / "blob").touch()
    write_gguf(tmp_path / "blob", "Q8_0")
    (tmp_path / "work/models/base.gguf").symlink_to(tmp_path / "blob")  # as in the Hub's cache
    run, summary = finetune(place, model__name="models/base.gguf", model__quantization="nf4", train__max_steps=4)
    assert summary["tuned"]["loss"] < summary["base"]["loss"]
    with inside(place):
        report = merge_run(RunDirectory("runs/trial"), Path("merged"), "trained")
        merged = load_for_inference("merged", quantization="none")
        tuned = load_for_inference("runs/trial")
        assert report["top1_agreement"] > 0.9
        assert set(merged.renderer.stop_token_ids) == set(tuned.renderer.stop_token_ids) == {1, 4}
        assert merged.tokenizer.chat_template == CHATML
    assert json.loads((run.adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        "./models/base.gguf"
    )
    for name, content in written_files(run.path).items():
        assert str(tmp_path).encode() not in content, name
    shutil.move(place, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert load_for_inference("moved/runs/trial").has_adapter
    (tmp_path / "moved/models/base.gguf").rename("other.gguf")
    with pytest.raises(ModelError, match=r"in the file \S+base.gguf, and there is no file .*; .*--base FILE_OR_ID"):
        load_for_inference("moved/runs/trial")
    assert load_for_inference("moved/runs/trial/adapter", base="other.gguf").has_adapter


def test_another_file_is_another_base(file: Path) -> None:
    before = base_fingerprint(ModelConfig(name="base.gguf"))
    write_gguf(Path("other.gguf"), "Q8_0")
    assert base_fingerprint(ModelConfig(name="other.gguf")) != before
    shutil.copy("base.gguf", "copy.gguf")
    assert base_fingerprint(ModelConfig(name="copy.gguf")) == before


def llama3_factors(theta: float = 10000.0, scale: float = 8.0) -> torch.Tensor:
    """What llama.cpp's converter stores for Llama 3."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3", "rope_theta": theta, "factor": scale, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return 1 / (theta ** (torch.arange(8) / 8)) / scaled


def test_the_rotary_embedding_of_llama_3_is_completed(tmp_path: Path) -> None:
    write_gguf(tmp_path / "base.gguf", rope_freqs=llama3_factors())
    model = load_model(ModelConfig(name=str(tmp_path / "base.gguf"), quantization="none"), "cpu")
    rope = model.config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("llama3", 8.0, 8192)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"rope_freqs": torch.ones(8) * 3}, "leaves out its rope_freqs.weight"),
        ({"qwen3__rope__scaling__type": "yarn"}, "leaves out its rope.scaling.type yarn"),
        ({"split__count": 3}, "one of 3 parts; join them"),
        ({"general__type": "adapter"}, "its general.type is adapter; expected the file of a whole model"),
        ({"architecture": "dbrx"}, "transformers cannot read it: ValueError: GGUF model with architecture dbrx"),
    ],
)
def test_a_file_that_cannot_be_a_base(file: Path, extra: dict[str, Any], said: str) -> None:
    write_gguf(file, **extra)
    with pytest.raises(ModelError) as caught:
        load_tokenizer(ModelConfig(name="base.gguf"))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "base.gguf: cut off after"),
        (lambda path: path.write_bytes(path.read_bytes()[:900]), "base.gguf: not a GGUF file, or cut off"),
        (lambda path: path.write_bytes(b"version https://git-lfs"), "base.gguf: a Git LFS pointer; expected GGUF"),
        (lambda path: path.unlink(), "base.gguf: no such file; expected a GGUF file"),
    ],
)
def test_a_damaged_file(file: Path, harm: Callable[[Path], None], said: str) -> None:
    harm(file)
    with pytest.raises(ModelError) as caught:
        load_model(ModelConfig(name="base.gguf"), "cpu")
    assert said in str(caught.value)


def test_without_its_reader_one_message_says_what_to_install(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"base\.gguf: a GGUF file is read by the package gguf; `pip install gguf`"):
        load_tokenizer(ModelConfig(name="base.gguf"), alone=True)


def test_a_folder_with_such_a_file_names_it(file: Path) -> None:
    with pytest.raises(ModelError, match=r"no config.json; name the GGUF file itself: \./base\.gguf"):
        load_model(ModelConfig(name="./"), "cpu")
