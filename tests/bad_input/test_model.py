"""Models and adapters as they are found: the commands take them, or end with 2, say what is wrong, and write nothing.

That code in a base model's folder is never run is in tests/models/test_loading.py, further templates without bound in
tests/data/test_template_limits.py, and what only `pull` meets in tests/test_hub.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmtune.config.schema import ModelConfig
from lmtune.io import sandbox
from lmtune.models import pattern_limits
from lmtune.models.base import base_fingerprint, load_model
from lmtune.models.tuning.lora import save_adapter
from tests.bad_input.conftest import Command, Outcome, everything
from tests.faults.choosing import few
from tests.sample_run import write_base, write_run
from tests.tiny import adapted, save_tiny
from tests.tokenizers import CHATML
from tests.workplace import make_workplace

pytestmark = pytest.mark.slow  # seconds together; left out of `make test-fast`

PICKLE = b"cos\nsystem\n(S'touch it-ran'\ntR."
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9912\n"
HTML = b"<!DOCTYPE html>\n<html><title>Not found</title></html>\n"
Change = Callable[[Path], Any]


def written(name: str, content: bytes | str) -> Change:
    """Replaces a file."""
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def without(*names: str) -> Change:
    """Takes files away."""
    return lambda folder: [(folder / name).unlink() for name in names]


def settings(name: str, **values: Any) -> Change:
    """Changes keys of a JSON file."""
    return lambda folder: (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **values}))


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    """Changes the adapter's tensors."""

    def apply(folder: Path) -> None:
        state = load_file(folder / "adapter_model.safetensors")
        change(state)
        save_file(state, folder / "adapter_model.safetensors")

    return apply


def pipe(name: str) -> Change:
    """Puts a named pipe in a file's place: who opens it waits for ever."""

    def apply(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return apply


def all_of(*changes: Change) -> Change:
    """One after the other."""
    return lambda folder: [change(folder) for change in changes]


# --- base models, as `lmtune finetune` meets them

INDEX = "model.safetensors.index.json"


def sharded(change: Callable[[Path, list[Path]], Any]) -> Change:
    """The weights in three files, and then a change to them."""

    def apply(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
        place = {tensor: names[number % 3] for number, tensor in enumerate(sorted(state))}
        for name in names:
            save_file({t: state[t] for t in state if place[t] == name}, folder / name, metadata={"format": "pt"})
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": place}))
        change(folder, [folder / name for name in names])

    return apply


def stored_as(kind: torch.dtype, *parts: str) -> Change:
    """The weights whose names hold one of `parts`, or all matrices, in another type."""

    def apply(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        chosen = [n for n in state if (any(part in n for part in parts) if parts else state[n].dim() == 2)]
        state.update({name: (state[name] * 100).to(kind) for name in chosen})
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


BITS = {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}
MASKS = (torch.bool, torch.uint8)
PANICS = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
GROWS = "{% for i in range(99999) %}{% for m in messages %}{{ m.content }}{% endfor %}{% endfor %}"
BASES: dict[str, tuple[Change, str]] = {
    "pickled weights": (
        all_of(without("model.safetensors"), written("pytorch_model.bin", PICKLE)),
        "model.name: ./base holds pickled weights (pytorch_model.bin), which can run code when read",
    ),
    "a pickle called safetensors": (
        written("model.safetensors", b"\x80\x04" + PICKLE), "model.safetensors is pickled weights, which can run code",
    ),
    "HTML in place of the weights": (
        written("model.safetensors", HTML),
        "model.name: ./base: model.safetensors is a web page, not weights; download the file itself, for example with",
    ),
    "a pointer in place of the weights": (
        written("model.safetensors", POINTER),
        "model.name: ./base: model.safetensors is a Git LFS pointer, not weights; download the file itself: `git lfs",
    ),
    "no byte of weights": (written("model.safetensors", b""), "model.name: ./base: model.safetensors is empty"),
    "weights cut off": (
        lambda base: (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-9]),
        "model.name: ./base: model.safetensors: damaged or cut off",
    ),
    "no weights": (
        without("model.safetensors"),
        "model.name: ./base holds no model.safetensors; lmtune reads safetensors only: download the weights too",
    ),
    "a link to weights that are not there": (
        lambda base: ((base / "model.safetensors").unlink(), (base / "model.safetensors").symlink_to("../blobs/4d7a")),
        "model.name: ./base: model.safetensors is a link to a file that is not there; copy the file itself",
    ),
    "shards without their list": (
        sharded(lambda base, shards: (base / INDEX).unlink()),
        "model.name: ./base holds model-00001-of-00003.safetensors, but neither model.safetensors nor model.safe",
    ),
    "weights for llama.cpp": (
        all_of(without("model.safetensors"), written("model-q4.gguf", b"GGUF")),
        "model.name: ./base holds weights for llama.cpp (model-q4.gguf); lmtune reads safetensors only",
    ),
    "weights of TensorFlow": (
        all_of(without("model.safetensors"), written("tf_model.h5", b"HDF")),
        "model.name: ./base holds weights for TensorFlow or Flax (tf_model.h5); lmtune reads safetensors only",
    ),
    "a shard missing": (
        sharded(lambda base, shards: shards[1].unlink()),
        "model.name: ./base: model-00002-of-00003.safetensors, which model.safetensors.index.json names, is missing; ",
    ),
    "a pointer in place of a shard": (
        sharded(lambda base, shards: shards[2].write_bytes(POINTER)),
        "model.name: ./base: model-00003-of-00003.safetensors is a Git LFS pointer, not weights; ",
    ),
    "HTML in place of the list of shards": (
        sharded(lambda base, shards: (base / INDEX).write_bytes(HTML)),
        f"model.name: ./base: {INDEX} is a web page, not JSON; ",
    ),
    "no list of shards in its file": (
        sharded(lambda base, shards: (base / INDEX).write_text('{"weight_map": {"a": 1}}')),
        f"model.name: ./base: {INDEX} holds no weight_map of file names; copy or download it again",
    ),
    "a shard from elsewhere": (
        sharded(lambda base, shards: (base / INDEX).write_text('{"weight_map": {"a": "../../a.safetensors"}}')),
        f"model.name: ./base: {INDEX} names ../../a.safetensors, which is no file name; copy or download it again",
    ),
    "HTML in place of the config": (
        written("config.json", HTML), "model.name: ./base: config.json is a web page, not JSON; download the file itse",
    ),
    "half a config": (written("config.json", '{"model": '), "model.name: ./base: config.json: not valid JSON"),
    "a pointer in place of the tokenizer": (
        written("tokenizer.json", POINTER), "model.name: ./base: tokenizer.json is a Git LFS pointer, not a vocabulary",
    ),
    "half a tokenizer": (
        written("tokenizer.json", '{"version": '), "model.name: ./base: tokenizer.json: not valid JSON (",
    ),
    "a tokenizer without what makes one": (
        written("tokenizer.json", "{}"), "\n  check tokenizer.json, tokenizer_config.json and config.json, or download",
    ),
    "a tokenizer at which its library panics": (  # which is no Exception
        settings("tokenizer.json", normalizer=PANICS), "cannot load the tokenizer of ./base: PanicException: ",
    ),
    "a tokenizer without tokens": (
        settings("tokenizer.json", model={"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0]]}, added_tokens=[]),
        "model.name: ./base: its tokenizer knows nothing of 'Hello, 12 ",
    ),
    "a tokenizer with no token at all": (
        settings("tokenizer.json", model={"type": "Unigram", "unk_id": None, "vocab": []}, added_tokens=[]),
        "model.name: ./base: its tokenizer cannot encode plain text (Encountered an unknown token",
    ),
    "a pointer in place of the template": (
        written("chat_template.jinja", POINTER), "model.name: ./base: chat_template.jinja is a Git LFS pointer, not a ",
    ),
    "a template that is no UTF-8": (
        written("chat_template.jinja", b'{{ "\xe9" }}'), "model.name: ./base: chat_template.jinja: not UTF-8 (byte 4)",
    ),
    "an end token by name": (
        settings("generation_config.json", eos_token_id="</s>"),
        "model.name: ./base: generation_config.json: eos_token_id is '</s>'; should be a token's number or several",
    ),
    "end tokens by name": (
        settings("generation_config.json", eos_token_id=[1, "</s>"]), "generation_config.json: eos_token_id is [1, '</",
    ),
    "an end token below zero": (
        settings("generation_config.json", eos_token_id=-5), "generation_config.json: eos_token_id is -5; should be a ",
    ),
    "a truth for an end token": (
        settings("generation_config.json", eos_token_id=True), "generation_config.json: eos_token_id is True; should ",
    ),
    "an end token beyond the vocabulary": (
        settings("generation_config.json", eos_token_id=10**12),
        "generation_config.json: eos_token_id is 1000000000000; should be a token's number or several",
    ),
    "a length that is no number": (
        settings("tokenizer_config.json", model_max_length="x"),
        "model.name: ./base: tokenizer_config.json: model_max_length is 'x'; should be a number above 0",
    ),
    "a smaller vocabulary in the config": (
        settings("config.json", vocab_size=10),
        "model.name: ./base: the weights have other shapes than its config.json says; copy or download both again\n",
    ),
    "a million layers in the config": (
        settings("config.json", num_hidden_layers=10**6),
        "model.name: ./base: config.json: num_hidden_layers is 1,000,000, but the weights have 2; copy or downl",
    ),
    "a million layers over shards": (
        sharded(lambda base, shards: settings("config.json", num_hidden_layers=10**6)(base)),
        "config.json: num_hidden_layers is 1,000,000, but the weights have 2",
    ),
    "a vocabulary without end in the config": (
        settings("config.json", vocab_size=10**12),
        "config.json: vocab_size is 1,000,000,000,000, but the largest of the weights has 448; copy or downl",
    ),
    "plain weights said to be 4-bit ones": (
        settings("config.json", quantization_config={**BITS, "load_in_4bit": True}),
        "model.name: ./base: config.json says that the weights are stored in 4 bit",
    ),
    "plain weights said to be 8-bit ones": (
        settings("config.json", quantization_config={**BITS, "load_in_8bit": True}),
        "model.name: ./base: config.json says that the weights are stored in 8 bit",
    ),
    "weights in whole numbers": (
        stored_as(torch.int8),
        "model.name: ./base: model.safetensors: lm_head.weight and 15 more are of type I8, but config.json has no",
    ),
    "one weight in whole numbers": (
        stored_as(torch.uint8, "0.self_attn.q_proj"),
        "model.safetensors: model.layers.0.self_attn.q_proj.weight is of type U8, but config.json has no quant",
    ),
    "weights in 8-bit floats without scales": (
        stored_as(torch.float8_e4m3fn), "model.safetensors: lm_head.weight and 15 more are of type F8_E4M3, but config",
    ),
    "other 8-bit floats, over shards": (
        all_of(stored_as(torch.float8_e5m2, "norm"), sharded(lambda base, shards: None)),
        ": model.layers.0.post_attention_layernorm.weight and 1 more are of type F8_E5M2, but config.json has no",
    ),
    "an adapter in the base's folder": (
        written("adapter_config.json", '{"peft_type": "LORA", "base_model_name_or_path": "a/b"}'),
        "model.name: ./base holds an adapter (adapter_config.json) beside the model, and transformers would load the ",
    ),
    "no layers in the config": (
        settings("config.json", num_hidden_layers=0),
        "model.name: ./base: config.json: num_hidden_layers is 0; should be a whole number above 0; correct it",
    ),
    "layers below zero": (settings("config.json", num_hidden_layers=-1), "num_hidden_layers is -1; should be a whole"),
    "half a layer": (settings("config.json", num_hidden_layers=1.5), "num_hidden_layers is 1.5; should be a whole"),
    "no width": (settings("config.json", hidden_size=0), "config.json: hidden_size is 0; should be a whole number"),
    "no heads": (settings("config.json", num_attention_heads=0), "num_attention_heads is 0; should be a whole number"),
    "heads by name": (settings("config.json", num_key_value_heads="x"), "num_key_value_heads is 'x'; should be a whol"),
    "no vocabulary": (settings("config.json", vocab_size=-5), "config.json: vocab_size is -5; should be a whole"),
    "no layers of the text's part": (
        settings("config.json", text_config={"num_hidden_layers": 0}), "text_config.num_hidden_layers is 0; should be",
    ),
    "an epsilon that is no number": (
        settings("config.json", rms_norm_eps=float("nan")),
        "config.json: rms_norm_eps is nan; should be a number of 0 or above; correct it, or copy or download it again",
    ),
    "an epsilon below zero": (settings("config.json", layer_norm_eps=-1e-5), "layer_norm_eps is -1e-05; should be a n"),
    "a base of positions without bound": (
        settings("config.json", rope_theta=float("inf")), "config.json: rope_theta is inf; should be a number above 0",
    ),
    "a base of positions of zero": (
        settings("config.json", rope_parameters={"rope_type": "default", "rope_theta": 0}),
        "config.json: rope_parameters.rope_theta is 0; should be a number above 0; correct it",
    ),
    "a base of positions below zero": (
        settings("config.json", rope_scaling={"rope_type": "default", "rope_theta": -1e4}),
        "config.json: rope_scaling.rope_theta is -10000.0; should be a number above 0",
    ),
    "positions stretched by nothing": (
        settings("config.json", rope_scaling={"rope_type": "linear", "factor": 0}), "rope_scaling.factor is 0; should",
    ),
    "one kind of layer without positions": (
        settings("config.json", rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 10**400}}),
        "config.json: rope_parameters.full_attention.rope_theta is 1000",
    ),
    "a pipe for the weights": (
        pipe("model.safetensors"),
        "model.name: ./base: model.safetensors is a pipe or a device, not a file; put the file itself there",
    ),
    "a device for the weights": (
        lambda base: ((base / "model.safetensors").unlink(), (base / "model.safetensors").symlink_to("/dev/zero")),
        "model.name: ./base: model.safetensors is a pipe or a device, not a file; put the file itself there",
    ),
    "a folder for the list of shards": (
        sharded(lambda base, shards: ((base / INDEX).unlink(), (base / INDEX).mkdir())),
        f"model.name: ./base: {INDEX} is a folder, not a file; put the file itself there",
    ),
    "a pipe for a shard": (
        sharded(lambda base, shards: pipe(shards[1].name)(base)), "model-00002-of-00003.safetensors is a pipe or a dev",
    ),
    "a watermark of unknown settings": (
        settings("generation_config.json", watermarking_config={"a": 1}),
        "model.name: ./base: generation_config.json: cannot be used (TypeError: ",
    ),
    "a list for generation's settings": (
        written("generation_config.json", "[]"), "./base: generation_config.json: holds list, not an object",
    ),
    "no tokenizer": (
        without("tokenizer.json", "tokenizer_config.json"), "model.name: cannot load the tokenizer",
    ),
    "a template that renders no answer": (
        written("chat_template.jinja", "{{ messages[0].content }}"),
        "the chat template drops or rewrites answers; use data.template: plain",
    ),
    "a template that renders nothing": (written("chat_template.jinja", "Hello!"), "use data.template: plain"),
    "a template that loops": (written("chat_template.jinja", LOOPS), "did not finish a small conversation in 1 s"),
    "a template that grows": (written("chat_template.jinja", GROWS), "writes over 1,000,000 characters for a small"),
    "a template that reaches for Python": (
        written("chat_template.jinja", "{{ ''.__class__.__mro__[1].__subclasses__() }}"), "use data.template: plain",
    ),
}  # fmt: skip

TEXTS = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "vocab.json",
)  # fmt: skip
SIZES = ("no layers in the config", "layers below zero", "no heads", "a base of positions of zero")


@pytest.mark.parametrize("name", BASES)
def test_a_base_that_cannot_be_used(
    place: Path, refused: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # one that grows is to meet the limit of memory first, also on a busy machine
    monkeypatch.setattr(sandbox, "PROBE_CPU_SECONDS", 10 if "grows" in name else 1)
    sandbox.probe.cache_clear()
    make_workplace(place)
    change, said = BASES[name]
    change(place / "base")
    (place / "trial.yaml").write_text("model: {name: ./base, quantization: none}\ndata: {train: train.jsonl}\n")
    begin = time.monotonic()
    assert said in refused("finetune", "trial.yaml").err
    assert time.monotonic() - begin < 30
    assert not (place / "it-ran").exists()


@pytest.mark.parametrize("name", TEXTS)
def test_a_pipe_in_place_of_a_text_is_not_waited_for(place: Path, refused: Callable[..., Outcome], name: str) -> None:
    make_workplace(place)
    pipe(name)(place / "base")
    (place / "trial.yaml").write_text("model: {name: ./base, quantization: none}\ndata: {train: train.jsonl}\n")
    said = f"./base: {name} is a pipe or a device, not a file; put the file itself there"
    for arguments in (("finetune", "trial.yaml"), ("plan", "trial.yaml"), ("chat", "./base")):
        assert said in refused(*arguments).err


@pytest.mark.parametrize("name", SIZES)
def test_plan_and_chat_refuse_sizes_too(place: Path, refused: Callable[..., Outcome], name: str) -> None:
    """Also where a folder holds no weights, which `plan` does without."""
    make_workplace(place)
    change, said = BASES[name]
    change(place / "base")
    (place / "trial.yaml").write_text("model: {name: ./base, quantization: none}\ndata: {train: train.jsonl}\n")
    assert said in refused("chat", "./base").err
    (place / "base" / "model.safetensors").unlink()
    assert said in refused("plan", "trial.yaml").err


def test_whole_numbers_that_are_no_weights(place: Path, command: Command) -> None:
    """What old files of GPT-2 hold beside the weights: masks, and the numbers of positions."""
    make_workplace(place)
    shutil.rmtree(place / "base")
    save_tiny(place / "base", "gpt2", chat_template=CHATML)
    state = load_file(place / "base" / "model.safetensors")
    masks = {f"transformer.h.{n}.attn.bias": torch.ones(1, 1, 256, 256, dtype=kind) for n, kind in enumerate(MASKS)}
    others = {"h.1.attn.bias": torch.ones(1, 1, 9, 9, dtype=torch.int8), "position_ids": torch.arange(256)}
    save_file({**state, **masks, **others}, place / "base" / "model.safetensors", metadata={"format": "pt"})
    (place / "trial.yaml").write_text("model: {name: ./base, quantization: none}\ndata: {train: train.jsonl}\n")
    outcome = command("plan", "trial.yaml")
    assert outcome.code == 0, outcome.said
    assert load_model(ModelConfig(name="./base", quantization="none"), "cpu").lm_head is not None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./base/model.safetensors", "is a file; give the folder that it is in, a Hub id like Qwen/Qwen3-0.6B, or ti"),
        ("model.gguf", "is a file; give the folder that it is in"),
        ("https://huggingface.co/Qwen/Qwen3-0.6B", "is no folder; give its Hub id: Qwen/Qwen3-0.6B"),
        ("https://example.org/some/model", "is no folder; give a model folder, a Hub id like Qwen/Qwen3-0.6B, or tiny"),
    ],
)
def test_a_name_of_a_base_that_is_something_else(
    place: Path, refused: Callable[..., Outcome], name: str, said: str
) -> None:
    (place / "base").mkdir()
    for file in ("base/model.safetensors", "model.gguf"):
        (place / file).write_bytes(b"GGUF")
    (place / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (place / "trial.yaml").write_text(f"model: {{name: '{name}'}}\ndata: {{train: train.jsonl}}\n")
    assert f"error: model.name: {name} {said}" in refused("finetune", "trial.yaml").err


@pytest.mark.parametrize("name", ["b" * 5000, "/".join(["bb"] * 2000)], ids=["a long name", "a long path"])
def test_a_name_too_long_for_any_file(place: Path, refused: Callable[..., Outcome], name: str) -> None:
    (place / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (place / "trial.yaml").write_text(f"model: {{name: '{name}'}}\ndata: {{train: train.jsonl}}\n")
    for arguments, key in (
        (("finetune", "trial.yaml"), "model.name: "),
        (("chat", name), ""),
        (("evaluate", name, "train.jsonl"), ""),
    ):
        assert f"error: {key}{name[:56]}…: File name too long; give " in refused(*arguments).err


@pytest.mark.parametrize("arguments", [("chat", ""), ("evaluate", " ", "train.jsonl"), ("app", "")], ids=" ".join)
def test_no_name_at_all(place: Path, refused: Callable[..., Outcome], arguments: tuple[str, ...]) -> None:
    (place / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert "no model is named; give a run, an adapter or model folder, a Hub id, or tiny" in refused(*arguments).err


@pytest.mark.parametrize("verb", ["finetune", "plan"])
@pytest.mark.parametrize(
    "targets", ["x{99999999999}", "(" * 5000 + ")" * 5000, "(q"], ids=["a repetition", "nested", "no expression"]
)
def test_targets_that_are_no_regular_expression(
    place: Path, refused: Callable[..., Outcome], verb: str, targets: str
) -> None:
    make_workplace(place)
    (place / "trial.yaml").write_text("model: {name: ./base, quantization: none}\ndata: {train: train.jsonl}\n")
    said = refused(verb, "trial.yaml", f"adapter.target_modules={targets}").err
    assert f"error: adapter.target_modules: '{targets[:40]}" in said
    assert "is no regular expression: " in said
    assert len(said) < 400


@pytest.mark.parametrize("verb", ["finetune", "plan"])
def test_targets_that_name_nothing(place: Path, refused: Callable[..., Outcome], verb: str) -> None:
    make_workplace(place)
    (place / "trial.yaml").write_text("model: {name: ./base, quantization: none}\ndata: {train: train.jsonl}\n")
    said = refused(verb, "trial.yaml", "adapter.target_modules=[q_porj]").err
    assert "error: adapter.target_modules: nothing in this model is named q_porj; its linear layers are " in said


# --- adapters, as `lmtune chat` meets them

A, B = "lora_A.weight", "lora_B.weight"
UP = "base_model.model.model.layers.0.mlp.up_proj."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CODE = "from pathlib import Path\nPath('it-ran').touch()\nclass T: pass\n"
HUGE = "x{99999999999}"
PIPES = (
    WEIGHTS, CONFIG, "lmtune.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
    "special_tokens_map.json",
)  # fmt: skip
ADAPTERS: dict[str, tuple[Change, str]] = {
    "pickled weights": (
        all_of(without(WEIGHTS), written("adapter_model.bin", PICKLE)),
        "no adapter_model.safetensors; it holds a pickled adapter, which can run code when read",
    ),
    "a pickle called safetensors": (written(WEIGHTS, b"\x80\x04" + PICKLE), f"{WEIGHTS} is pickled weights"),
    "a zip as torch saves it": (written(WEIGHTS, b"PK\x03\x04" + PICKLE), f"{WEIGHTS} is pickled weights"),
    "HTML in place of the weights": (written(WEIGHTS, HTML), f"{WEIGHTS} is a web page, not weights"),
    "a pointer in place of the weights": (written(WEIGHTS, POINTER), f"{WEIGHTS} is a Git LFS pointer, not weights"),
    "no byte of weights": (written(WEIGHTS, b""), f"{WEIGHTS} is empty"),
    "weights cut off": (lambda a: (a / WEIGHTS).write_bytes((a / WEIGHTS).read_bytes()[:-9]), f"{WEIGHTS}: damaged"),
    "no tensor": (tensors(lambda state: state.clear()), f"{WEIGHTS}: holds no LoRA tensor"),
    "keys of another kind": (
        tensors(lambda state: [state.update({f"x.{key}": state.pop(key)}) for key in list(state)]),
        "missing: base_model",
    ),
    "half a pair": (tensors(lambda state: state.pop(UP + B)), f"{UP}{A}: no lora_B that fits its shape [4, 64]"),
    "a pair missing": (tensors(lambda state: [state.pop(UP + A), state.pop(UP + B)]), f"missing: {UP}{A}"),
    "one layer too many": (
        tensors(lambda state: [state.update({(UP + e).replace(".0.", ".7."): state[UP + e].clone()}) for e in (A, B)]),
        f"unexpected: {UP}{A}".replace(".0.", ".7."),
    ),
    "too narrow": (
        tensors(lambda state: state.update({UP + A: torch.zeros(4, 32)})),
        f"{UP}{A}: shape [4, 32], the base needs [4, 64]",
    ),
    "NaN": (tensors(lambda state: state[UP + A].fill_(float("nan"))), f"{UP}{A}: holds NaN or infinity"),
    "infinity": (tensors(lambda state: state[UP + B].fill_(float("inf"))), f"{UP}{B}: holds NaN or infinity"),
    "of another base": (settings("lmtune.json", base_fingerprint="0" * 32), "trained over another base model"),
    "a base of a name too long": (settings("lmtune.json", base_model="b" * 5000), "bbbb…: File name too long; give "),
    "a base without a name": (settings("lmtune.json", base_model=" "), "names no base model (base_model_name_or_path)"),
    "a base that is not there": (settings("lmtune.json", base_model="./gone"), "base model in the folder ./gone"),
    "rank that its tensors have not": (settings(CONFIG, r=4096), "rank 4, but adapter_config.json says 4096"),
    "rank 1e9": (settings(CONFIG, r=10**9), f"{CONFIG}: r is 1000000000; should be 1 to 4096"),
    "an alpha that overflows": (settings(CONFIG, lora_alpha=1e308), f"{CONFIG}: lora_alpha is 1e+308; should be a num"),
    "100,000 targets": (
        settings(CONFIG, target_modules=[f"layer_{n}" for n in range(100_000)]),
        "should be a name or a list of up to 2,000 names",
    ),
    "an empty fingerprint": (settings("lmtune.json", base_fingerprint=""), "base_fingerprint is ''; should be 32 hex"),
    "of another method": (settings(CONFIG, peft_type="PREFIX_TUNING"), f"{CONFIG}: peft_type is 'PREFIX_TUNING'"),
    "a class to import": (settings(CONFIG, auto_mapping={"parent_library": "os"}), f"{CONFIG}: auto_mapping is set"),
    "layers to multiply": (settings(CONFIG, layer_replication=[[0, 99]]), f"{CONFIG}: layer_replication is set"),
    "biases of the base": (settings(CONFIG, bias="all"), f"{CONFIG}: bias is 'all'; should be none"),
    "no regular expression": (settings(CONFIG, target_modules="(q"), f"{CONFIG}: target_modules: '(q' is no"),
    "a repetition without bound": (settings(CONFIG, target_modules=HUGE), f"{CONFIG}: target_modules: '{HUGE}"),
    "modules left out, without bound": (settings(CONFIG, exclude_modules=HUGE), f"{CONFIG}: exclude_modules: '{HUGE}"),
    "ranks without bound": (settings(CONFIG, rank_pattern={HUGE: 4}), f"{CONFIG}: rank_pattern: '{HUGE}"),
    "alphas by no expression": (settings(CONFIG, alpha_pattern={"(q": 4}), f"{CONFIG}: alpha_pattern: '(q' is no reg"),
    "layers without bound": (
        settings(CONFIG, layers_pattern=HUGE, layers_to_transform=[0]), f"{CONFIG}: layers_pattern: '{HUGE}",
    ),
    "nested without end": (settings(CONFIG, target_modules="(" * 249 + ")" * 249), "this adapter on the base"),
    "a regular expression without end": (settings(CONFIG, target_modules=r"([\w.]+)+!"), "takes too long to match"),
    "another, for ranks": (settings(CONFIG, rank_pattern={r"([\w.]+)+!": 4}), "takes too long to match"),
    "a text for a truth": (settings(CONFIG, use_rslora="no"), f"{CONFIG}: use_rslora is 'no'; should be true or false"),
    "HTML in place of the config": (written(CONFIG, HTML), f"{CONFIG} is a web page, not JSON"),
    "a tokenizer with code": (
        all_of(
            settings("tokenizer_config.json", auto_map={"AutoTokenizer": [None, "code.T"]}), written("code.py", CODE),
        ),
        "tokenizer_config.json: auto_map names code of the repository, which lmtune never runs",
    ),
    "a tokenizer of no known class": (
        all_of(settings("tokenizer_config.json", tokenizer_class="T"), written("tokenizer.json", "{"),),
        "cannot read its tokenizer",
    ),
    "a tokenizer at which its library panics": (
        settings("tokenizer.json", normalizer=PANICS), "adapter: cannot read its tokenizer: ",
    ),
    "a tokenizer with no token at all": (
        settings("tokenizer.json", model={"type": "Unigram", "unk_id": None, "vocab": []}, added_tokens=[]),
        "adapter: its tokenizer cannot encode plain text (",
    ),
    "a template that loops": (written("chat_template.jinja", LOOPS), "did not finish a small conversation in 1 s"),
    "a folder for the template": (
        lambda a: ((a / "chat_template.jinja").unlink(), (a / "chat_template.jinja").mkdir()),
        "chat_template.jinja is a folder, not a file; put the file itself there",
    ),
    **{f"a pipe for {name}": (pipe(name), f"adapter: {name} is a pipe or a device, not a file") for name in PIPES},
    "a watermark of unknown settings": (
        written("generation_config.json", '{"watermarking_config": {"a": 1}}'),
        "generation_config.json: cannot be used (TypeError: ",
    ),
    "a list for generation's settings": (
        written("generation_config.json", "[]"), "generation_config.json: holds list, not an object",
    ),
}  # fmt: skip


BESIDE = (
    "a pipe for tokenizer.json", "a pipe for adapter_config.json", "a pipe for generation_config.json",
    "a folder for the template", "a watermark of unknown settings", "a list for generation's settings",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an adapter over it."""
    folder = tmp_path_factory.mktemp("made")
    save_tiny(folder / "base", chat_template=CHATML)
    (folder / "adapter").mkdir()
    base = ModelConfig(name=str(folder / "base"), quantization="none")
    notes = {"base_model": "./base", "quantization": "none", "base_fingerprint": base_fingerprint(base)}
    save_adapter(adapted(load_model(base, "cpu")), folder / "adapter", notes)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder / "base" / name, folder / "adapter" / name)
    return folder


@pytest.fixture
def adapter(made: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of its own in the current folder, with a question waiting at the command's input."""
    shutil.copytree(made, place, dirs_exist_ok=True)
    (place / "question").write_text("Hello?\n")
    monkeypatch.setattr("sys.stdin", open(place / "question"))  # noqa: SIM115 - ends with the test
    return place / "adapter"


@pytest.mark.parametrize("name", few(ADAPTERS, *(set(ADAPTERS) - {"another, for ranks"})))
def test_an_adapter_that_cannot_be_used(
    place: Path, adapter: Path, refused: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(sandbox, "PROBE_CPU_SECONDS", 1)
    monkeypatch.setattr(pattern_limits, "CPU_SECONDS", 1)
    sandbox.probe.cache_clear()
    change, said = ADAPTERS[name]
    change(adapter)
    assert said in refused("chat", "adapter").err
    assert not (place / "it-ran").exists()


def test_the_adapter_as_it_was_answers(place: Path, adapter: Path, command: Command) -> None:
    outcome = command("chat", "adapter", "--max-new-tokens", "3")
    assert outcome.code == 0, outcome.said


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "up_proj")])
def test_an_adapter_of_another_depth(
    place: Path, adapter: Path, refused: Callable[..., Outcome], num_layers: int, targets: Any
) -> None:
    """Only the fingerprint tells an adapter for fewer layers whose targets are full names."""
    other = ModelConfig(name=str(save_tiny(place / "other", num_hidden_layers=num_layers)), quantization="none")
    shutil.rmtree(place / "adapter")
    (place / "adapter").mkdir()
    notes = {"base_model": "./base", "quantization": "none", "base_fingerprint": base_fingerprint(other)}
    save_adapter(adapted(load_model(other, "cpu"), target_modules=targets), place / "adapter", notes)
    assert "trained over another base model" in refused("chat", "adapter").err
    if num_layers == 3 or targets != "all-linear":
        (place / "adapter" / "lmtune.json").write_text('{"base_model": "./base"}')
        said = refused("chat", "adapter").err
        assert "does not fit the base model" in said or "PEFT cannot put this adapter on the base model" in said


@pytest.mark.parametrize(
    ("key", "arguments"),
    [
        ("data.max_length", ("finetune", "trial.yaml")),
        ("--max-length", ("evaluate", "base", "train.jsonl", "--max-length", "5000")),
    ],
)
def test_rows_longer_than_a_base_has_positions(
    place: Path, refused: Callable[..., Outcome], key: str, arguments: tuple[str, ...]
) -> None:
    save_tiny(place / "base", "gpt2", chat_template=CHATML)
    rows = [{"prompt": "Count!", "completion": "one two three " * n} for n in (1, 2, 200, 3)]
    (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "trial.yaml").write_text(
        "model: {name: ./base, quantization: none}\ndata: {train: train.jsonl, max_length: 5000}\n"
    )
    said = refused(*arguments).err
    assert re.search(rf"error: {key}: train\.jsonl:3 has [\d,]+ tokens, but this model has positions for 256;", said)


@pytest.mark.parametrize("name", few(("weights cut off", "no byte of weights", "half a config"), "weights cut off"))
def test_a_damaged_base_is_not_merged_into(place: Path, refused: Callable[..., Outcome], name: str) -> None:
    run = write_run(place / "runs" / "trial", "./base")
    run.verification.write_text('{"sequences": [[1, 2, 3]]}')
    write_base(place / "base")
    change, said = BASES[name]
    change(place / "base")
    assert said in refused("merge", "trial").err


@pytest.mark.parametrize("name", BESIDE)
def test_what_is_wrong_beside_an_adapter_is_said_by_merge_as_by_chat(
    place: Path, adapter: Path, refused: Callable[..., Outcome], name: str
) -> None:
    run = write_run(place / "runs" / "trial", "./base")
    run.verification.write_text('{"sequences": [[1, 2, 3]]}')
    shutil.rmtree(run.adapter)
    shutil.copytree(adapter, run.adapter)
    change, said = ADAPTERS[name]
    change(run.adapter)
    assert said in refused("merge", "trial").err


@pytest.mark.parametrize("value", few((float("nan"), float("inf")), float("nan")), ids=str)
@pytest.mark.parametrize("quantization", few(("none", "nf4", "int8"), "none"))
def test_a_base_whose_weights_are_no_numbers(
    place: Path, refused: Callable[..., Outcome], quantization: str, value: float
) -> None:
    """Not its rows are at fault."""
    make_workplace(place)
    state = load_file(place / "base" / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][100, 33] = value
    save_file(state, place / "base" / "model.safetensors", metadata={"format": "pt"})
    (place / "trial.yaml").write_text(
        f"model: {{name: ./base, quantization: {quantization}}}\ndata: {{train: train.jsonl}}\n"
    )
    said = refused("finetune", "trial.yaml").err
    assert "model.name: ./base: weights hold NaN or infinity; copy or download it again\n" in said
    assert "  model.layers.1.mlp.up_proj.weight" in said


def test_an_adapter_too_large_to_be_added_to_its_base_leaves_nothing(
    place: Path, adapter: Path, command: Command
) -> None:
    run = write_run(place / "runs" / "trial", "./base")
    run.verification.write_text('{"sequences": [[1, 2, 3]]}')
    shutil.rmtree(run.adapter)
    shutil.copytree(adapter, run.adapter)
    shutil.copy(place / "base" / "generation_config.json", run.adapter)
    tensors(lambda state: [tensor.fill_(1e20) for tensor in state.values()])(run.adapter)
    before = everything(place)
    outcome = command("merge", "trial")
    assert outcome.code == 1, outcome.said
    assert "error: the merged weights are not finite: the adapter's values are too large; nothing was" in outcome.err
    assert everything(place) == before
