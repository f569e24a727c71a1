"""Models and adapters as they are found: the commands take them, or end with 2, say what is wrong, and write nothing.

That code in a base model's folder is never run is in tests/models/test_loading.py, further templates without bound in
tests/data/test_template_limits.py, and what only `pull` meets in tests/test_hub.py.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmtune.config.schema import ModelConfig
from lmtune.io import sandbox
from lmtune.models.base import base_fingerprint, load_model
from lmtune.models.tuning.adapter_files import Metadata
from lmtune.models.tuning.lora import save_adapter
from tests.bad_input.conftest import Command, Outcome, everything
from tests.faults.choosing import few
from tests.sample_run import write_run
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


def all_of(*changes: Change) -> Change:
    """One after the other."""
    return lambda folder: [change(folder) for change in changes]


def stored_as_int8(folder: Path) -> None:
    """The weights as codes, without what they stand for."""
    state = load_file(folder / "model.safetensors")
    save_file({name: weight.to(torch.int8) for name, weight in state.items()}, folder / "model.safetensors")


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


PANICS = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
UNKNOWN = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0]]}
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
GROWS = "{% for i in range(99999) %}{% for m in messages %}{{ m.content }}{% endfor %}{% endfor %}"
BASES: dict[str, tuple[Change, str]] = {
    "pickled weights": (
        all_of(without("model.safetensors"), written("pytorch_model.bin", PICKLE)),
        "pytorch_model.bin: pickled weights can run code; expected safetensors; ",
    ),
    "a pickle called safetensors": (
        written("model.safetensors", b"\x80\x04" + PICKLE), "model.safetensors: pickled weights can run code",
    ),
    "HTML in place of the weights": (
        written("model.safetensors", HTML), "model.safetensors: a web page; expected weights; download the file itself",
    ),
    "a pointer in place of the weights": (
        written("model.safetensors", POINTER), "model.safetensors: a Git LFS pointer; expected weights; download ",
    ),
    "an empty file of weights": (written("model.safetensors", b""), "model.safetensors: empty"),
    "weights cut off": (
        lambda base: (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-9]),
        "model.safetensors: damaged or cut off",
    ),
    "no weights": (without("model.safetensors"), "no model.safetensors: lmtune reads safetensors only; download the "),
    "shards without their index": (
        sharded(lambda base, shards: (base / INDEX).unlink()), f"model-00001-of-00003.safetensors: without {INDEX}",
    ),
    "weights for llama.cpp": (
        all_of(without("model.safetensors"), written("model-q4.gguf", b"GGUF")),
        "model-q4.gguf: weights for llama.cpp, in one file with their config; name this file itself",
    ),
    "a shard missing": (
        sharded(lambda base, shards: shards[1].unlink()), "model-00002-of-00003.safetensors: missing, but model.safete",
    ),
    "half a config": (written("config.json", '{"model": '), "config.json: not valid JSON"),
    "a pointer in place of the tokenizer": (
        written("tokenizer.json", POINTER), "tokenizer.json: a Git LFS pointer; expected a vocabulary",
    ),
    "a tokenizer at which its library panics": (  # with a BaseException
        settings("tokenizer.json", normalizer=PANICS), "cannot load the tokenizer of ./base: PanicException: ",
    ),
    "a tokenizer without tokens": (
        settings("tokenizer.json", model=UNKNOWN, added_tokens=[]), "the tokenizer has no tokens for 'Hello, 12 ",
    ),
    "no tokenizer": (
        without("tokenizer.json", "tokenizer_config.json"), "cannot load the tokenizer of ./base: ",
    ),
    "a smaller vocabulary in the config": (
        settings("config.json", vocab_size=10), "shapes of the weights differ from config.json; download both again\n",
    ),
    "plain weights with a config for 4 bit": (
        settings("config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "config.json: quantization_config says bitsandbytes, but no weight is quantized; remove that key",
    ),
    "weights in integers": (
        stored_as_int8, "model.safetensors: lm_head.weight: I8 weights, and config.json has no quantization_config",
    ),
    "an adapter in the base's folder": (
        written("adapter_config.json", '{"peft_type": "LORA", "base_model_name_or_path": "a/b"}'),
        "adapter_config.json beside the model; transformers would load the base that this adapter names",
    ),
    "a template that renders no answer": (
        written("chat_template.jinja", "{{ messages[0].content }}"),
        "the chat template drops or rewrites answers; use data.template: plain",
    ),
    "a template that loops": (written("chat_template.jinja", LOOPS), "did not finish a small conversation in 1 s"),
    "a template that grows": (written("chat_template.jinja", GROWS), "writes over 1,000,000 characters for a small"),
    "a template that reaches for Python": (
        written("chat_template.jinja", "{{ ''.__class__.__mro__[1].__subclasses__() }}"), "use data.template: plain",
    ),
}  # fmt: skip
TRIAL = "model: {name: ./base, quantization: none}\ndata: {train: train.jsonl}\n"


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
    (place / "trial.yaml").write_text(TRIAL)
    found = refused("finetune", "trial.yaml").err
    assert said in found
    assert "./base:" in found or "template" in name
    assert not (place / "it-ran").exists()


def test_every_problem_of_a_folder_is_listed_at_once(place: Path, refused: Callable[..., Outcome]) -> None:
    make_workplace(place)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        written(name, POINTER)(place / "base")
    (place / "trial.yaml").write_text(TRIAL)
    lines = refused("finetune", "trial.yaml").err.splitlines()
    assert [line.split(":")[0].strip() for line in lines[-3:]] == ["config.json", "tokenizer.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./base/model.safetensors", "a file; expected a model folder, a GGUF file, a Hub id like Qwen/Qwe"),
        ("https://huggingface.co/Qwen/Qwen3-0.6B", "no such folder; expected a model folder, a GGUF file"),
    ],
)
def test_a_base_name_that_is_something_else(place: Path, refused: Callable[..., Outcome], name: str, said: str) -> None:
    (place / "base").mkdir()
    (place / "base/model.safetensors").write_bytes(b"GGUF")
    (place / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (place / "trial.yaml").write_text(f"model: {{name: '{name}'}}\ndata: {{train: train.jsonl}}\n")
    assert f"error: model.name: {name}: {said}" in refused("finetune", "trial.yaml").err


@pytest.mark.parametrize("arguments", [("chat", ""), ("evaluate", " ", "train.jsonl"), ("app", "")], ids=" ".join)
def test_no_name_at_all(place: Path, refused: Callable[..., Outcome], arguments: tuple[str, ...]) -> None:
    (place / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert (
        "no model is named; give a run, an adapter or model folder, a GGUF file, a Hub id, or tiny"
        in refused(*arguments).err
    )


# --- adapters, as `lmtune chat` meets them

A, B = "lora_A.weight", "lora_B.weight"
UP = "base_model.model.model.layers.0.mlp.up_proj."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CODE = "from pathlib import Path\nPath('it-ran').touch()\nclass T: pass\n"
ADAPTERS: dict[str, tuple[Change, str]] = {
    "pickled weights": (
        all_of(without(WEIGHTS), written("adapter_model.bin", PICKLE)),
        "no adapter_model.safetensors; a pickled adapter can run code",
    ),
    "a zip as torch saves it": (written(WEIGHTS, b"PK\x03\x04" + PICKLE), f"{WEIGHTS}: pickled weights"),
    "weights cut off": (lambda a: (a / WEIGHTS).write_bytes((a / WEIGHTS).read_bytes()[:-9]), f"{WEIGHTS}: damaged"),
    "no tensor": (tensors(lambda state: state.clear()), f"{WEIGHTS}: no LoRA tensor"),
    "integers": (tensors(lambda state: state.update({UP + A: state[UP + A].int()})), f"{UP}{A}: type I32; expected a "),
    "half a pair": (tensors(lambda state: state.pop(UP + B)), f"missing: {UP}{B}"),
    "rank that its tensors do not have": (settings(CONFIG, r=16), "shape [4, 64], the base needs [16, 64]"),
    "NaN": (tensors(lambda state: state[UP + A].fill_(float("nan"))), f"{UP}{A}: holds NaN or infinity"),
    "of another base": (settings("lmtune.json", base_fingerprint="0" * 32), "trained over another base model"),
    "a base without a name": (settings("lmtune.json", base_model=" "), "no base model (base_model_name_or_path)"),
    "a base that is missing": (settings("lmtune.json", base_model="./gone"), "base model in the folder ./gone"),
    "unknown metadata": (settings("lmtune.json", template="odd"), "template: got 'odd'; should be 'auto', "),
    "of another method": (settings(CONFIG, peft_type="PREFIX_TUNING"), f"{CONFIG}: peft_type: 'PREFIX_TUNING'; expe"),
    "a class to import": (settings(CONFIG, auto_mapping={"parent_library": "os"}), f"{CONFIG}: auto_mapping: not a s"),
    "nested without end": (settings(CONFIG, target_modules="(" * 249 + ")" * 249), "this adapter on the base"),
    "a slow regular expression": (settings(CONFIG, target_modules=r"([\w.]+)+!"), "catastrophic backtracking"),
    "a rank that takes all memory": (settings(CONFIG, r=10**8), f"{CONFIG}: r: 100000000; expected less than"),
    "another, for ranks": (settings(CONFIG, rank_pattern={r"([\w.]+)+!": 4}), "catastrophic backtracking"),
    "HTML in place of the config": (written(CONFIG, HTML), f"{CONFIG}: a web page; expected JSON"),
    "a tokenizer with code": (
        all_of(
            settings("tokenizer_config.json", auto_map={"AutoTokenizer": [None, "code.T"]}), written("code.py", CODE),
        ),
        "tokenizer_config.json: auto_map names code of the repository, which lmtune never runs",
    ),
    "half a tokenizer": (written("tokenizer.json", "{"), "adapter: cannot read its tokenizer: "),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an adapter over it."""
    folder = tmp_path_factory.mktemp("made")
    save_tiny(folder / "base", chat_template=CHATML)
    save_over(folder / "base", folder / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder / "base" / name, folder / "adapter" / name)
    return folder


def save_over(base: Path, folder: Path, **adapter: Any) -> None:
    """An adapter over `base` that names ./base."""
    folder.mkdir()
    config = ModelConfig(name=str(base), quantization="none")
    metadata = Metadata(base_model="./base", base_fingerprint=base_fingerprint(config))
    save_adapter(adapted(load_model(config, "cpu"), **adapter), folder, metadata)


@pytest.fixture
def adapter(made: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of its own in the current folder, with a question waiting at the command's input."""
    shutil.copytree(made, place, dirs_exist_ok=True)
    (place / "question").write_text("Hello?\n")
    monkeypatch.setattr("sys.stdin", open(place / "question"))  # noqa: SIM115 - ends with the test
    return place / "adapter"


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_cannot_be_used(
    place: Path, adapter: Path, refused: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(sandbox, "PROBE_CPU_SECONDS", 1)
    monkeypatch.setattr(sandbox, "PATTERN_CPU_SECONDS", 1)
    sandbox.probe.cache_clear()
    change, said = ADAPTERS[name]
    change(adapter)
    assert said in refused("chat", "adapter").err
    assert not (place / "it-ran").exists()


def test_the_adapter_as_it_was_answers(place: Path, adapter: Path, command: Command) -> None:
    outcome = command("chat", "adapter", "--max-new-tokens", "3")
    assert outcome.code == 0, outcome.said


def test_an_adapter_of_another_depth(place: Path, adapter: Path, refused: Callable[..., Outcome]) -> None:
    """Its fingerprint tells; without one, its tensors."""
    other = save_tiny(place / "other", num_hidden_layers=3)
    shutil.rmtree(place / "adapter")
    save_over(other, place / "adapter", target_modules=("q_proj", "up_proj"))
    assert "trained over another base model" in refused("chat", "adapter").err
    (place / "adapter" / "lmtune.json").write_text('{"base_model": "./base"}')
    assert "does not fit the base model" in refused("chat", "adapter").err


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


def run_over(place: Path, adapter: Path) -> None:
    """A run that `merge` can take, with this adapter."""
    run = write_run(place / "runs" / "trial", "./base")
    run.verification.write_text('{"sequences": [[1, 2, 3]]}')
    shutil.rmtree(run.adapter)
    shutil.copytree(adapter, run.adapter)
    shutil.copy(place / "base" / "generation_config.json", run.adapter)


def test_merge_refuses_a_damaged_base_and_a_damaged_adapter(
    place: Path, adapter: Path, refused: Callable[..., Outcome]
) -> None:
    run_over(place, adapter)
    change, said = ADAPTERS["HTML in place of the config"]
    change(place / "runs/trial/adapter")
    assert said in refused("merge", "trial").err
    change, said = BASES["weights cut off"]
    change(place / "base")
    assert said in refused("merge", "trial").err


@pytest.mark.parametrize("quantization", few(("none", "nf4", "int8"), "none"))
def test_a_base_whose_weights_are_not_finite(place: Path, refused: Callable[..., Outcome], quantization: str) -> None:
    """The message names the base, not the rows."""
    make_workplace(place)
    state = load_file(place / "base" / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][100, 33] = float("nan")
    save_file(state, place / "base" / "model.safetensors", metadata={"format": "pt"})
    (place / "trial.yaml").write_text(
        f"model: {{name: ./base, quantization: {quantization}}}\ndata: {{train: train.jsonl}}\n"
    )
    said = refused("finetune", "trial.yaml").err
    assert "model.name: ./base: weights hold NaN or infinity; download it again\n" in said
    assert "  model.layers.1.mlp.up_proj.weight" in said


def test_an_adapter_too_large_to_be_added_to_its_base_leaves_nothing(
    place: Path, adapter: Path, command: Command
) -> None:
    tensors(lambda state: [tensor.fill_(1e20) for tensor in state.values()])(adapter)
    run_over(place, adapter)
    before = everything(place)
    outcome = command("merge", "trial")
    assert outcome.code == 1, outcome.said
    assert "error: the merged weights are not finite: the adapter's values are too large; nothing was" in outcome.err
    assert everything(place) == before
