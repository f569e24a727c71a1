"""The small files beside tuned weights: the base's own where nothing changed, and true about the end token."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from lmtune.config.schema import ModelConfig
from lmtune.data.rendering import Renderer
from lmtune.data.types import Example, Message
from lmtune.export.merged import merge_run
from lmtune.models.base import load_tokenizer
from lmtune.models.model_folder import (
    TOKENIZER_FILES,
    merged_config,
    write_adapter_texts,
)
from lmtune.runs.store import RunDirectory
from tests.tiny import save_tiny
from tests.tokenizers import CHATML, NO_END
from tests.workplace import finetune, inside, make_workplace

QUESTION = [Message("user", "What is the capital of France?")]
OF_5 = ("TokenizersBackend", "is_local", "local_files_only")


def as_transformers_4(folder: Path, **more: Any) -> Path:
    """Make a model folder what transformers 4 would have written."""
    path = folder / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text())
    kept = {key: tokenizer[key] for key in ("bos_token", "eos_token", "pad_token") if key in tokenizer}
    template = folder / "chat_template.jinja"
    kept |= {"chat_template": template.read_text()} if template.is_file() else {}
    template.unlink(missing_ok=True)
    special = ["<|im_start|>", "<|im_end|>"]
    tree = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": special, **kept, **more}
    path.write_text(json.dumps(tree))  # in a form that nobody else writes
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """The tokenizer's files there."""
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}


def written(base: Path, folder: Path, template: Any = "auto") -> Renderer:
    """What training would save over `base`."""
    model = ModelConfig(name=str(base), quantization="none")
    renderer = Renderer(load_tokenizer(model), template)
    folder.mkdir()
    write_adapter_texts(model, renderer, folder)
    return renderer


def test_an_unchanged_tokenizer_is_copied_byte_for_byte(tmp_path: Path) -> None:
    base = as_transformers_4(save_tiny(tmp_path / "base", chat_template=CHATML), eos_token="<|im_end|>")
    renderer = written(base, tmp_path / "adapter")
    assert renderer.stop_token_ids[0] == renderer.tokenizer.eos_token_id == 4
    assert files(tmp_path / "adapter") == files(base)
    assert "tokenizer_config.json" in files(base)


def test_of_a_tokenizer_with_another_end_token_that_alone_is_changed(tmp_path: Path) -> None:
    base = as_transformers_4(save_tiny(tmp_path / "base", chat_template=CHATML))
    special = {"eos_token": {"content": "</s>", "lstrip": False}, "bos_token": "<s>"}
    (base / "special_tokens_map.json").write_text(json.dumps(special))
    renderer = written(base, tmp_path / "adapter")
    before, after = files(base), files(tmp_path / "adapter")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"tokenizer_config.json", "special_tokens_map.json"}
    config = json.loads(before["tokenizer_config.json"])
    control = [*config["additional_special_tokens"], "</s>"]
    assert json.loads(after["tokenizer_config.json"]) == {
        **config, "eos_token": "<|im_end|>", "additional_special_tokens": control,
    }  # fmt: skip
    assert json.loads(after["special_tokens_map.json"])["eos_token"] == {"content": "<|im_end|>", "lstrip": False}
    saved = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert saved.eos_token_id == 4
    again = Renderer(saved)
    assert again.prompt_ids(QUESTION) == renderer.prompt_ids(QUESTION)


def test_an_end_token_that_the_template_writes_is_left_alone(tmp_path: Path) -> None:
    template = CHATML.replace("'<|im_end|>\n' }}{% endfor %}", "'<|im_end|>' + eos_token + '\n' }}{% endfor %}")
    assert "eos_token" in template
    base = as_transformers_4(save_tiny(tmp_path / "base", chat_template=template))
    written(base, tmp_path / "adapter")
    assert files(tmp_path / "adapter") == files(base)


@pytest.mark.parametrize("template", [CHATML, NO_END, None])
def test_what_transformers_5_wrote_is_put_in_words_of_4(tmp_path: Path, template: str | None) -> None:
    base = save_tiny(tmp_path / "base", chat_template=template)
    renderer = written(base, tmp_path / "adapter")
    text = (tmp_path / "adapter" / "tokenizer_config.json").read_text()
    assert not [word for word in OF_5 if word in text]
    assert json.loads(text)["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(json.loads(text).get("extra_special_tokens"), list)
    saved = PreTrainedTokenizerFast.from_pretrained(tmp_path / "adapter")
    rows = [Example("rows:1", (Message("user", "a"), Message("assistant", "b")))]
    assert [Renderer(saved).render(row) for row in rows] == [renderer.render(row) for row in rows]
    assert Renderer(saved).prompt_ids(QUESTION) == renderer.prompt_ids(QUESTION)
    assert sorted(saved.all_special_tokens) == sorted(renderer.tokenizer.all_special_tokens)


@pytest.mark.parametrize(
    "stated",
    [{"min_p": 0.1}, {"num_beam_groups": 2, "top_p": 0.5}],
)
def test_a_generation_config_that_is_read_but_not_written_again_does_no_harm(
    tmp_path: Path, stated: dict[str, Any]
) -> None:
    base = save_tiny(tmp_path / "base", chat_template=CHATML)
    tree = {"eos_token_id": 1, "do_sample": False, **stated}
    (base / "generation_config.json").write_text(json.dumps(tree))
    written(base, tmp_path / "adapter")
    got = json.loads((tmp_path / "adapter" / "generation_config.json").read_text())
    assert got == {**tree, "eos_token_id": [4, 1], "pad_token_id": 2}
    assert GenerationConfig.from_pretrained(tmp_path / "adapter").eos_token_id == [4, 1]


# --- config.json


@pytest.mark.parametrize(
    ("base", "wanted"),
    [
        ({"rope_theta": 5e5, "torch_dtype": "float16"}, {"rope_theta": 5e5, "dtype": "float16"}),
        (
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "dtype": "bfloat16"},
            {"rope_theta": 5e5, "torch_dtype": "bfloat16"},
        ),
        (
            {
                "rope_parameters": {
                    "rope_theta": 1e4, "rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5,
                },
            },
            {
                "rope_theta": 1e4, "partial_rotary_factor": 0.5, "dtype": "float32", "torch_dtype": "float32",
                "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2.0},
            },
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
        ),
        ({"eos_token_id": [2, 4]}, {"eos_token_id": [4, 2]}),
        ({}, {"eos_token_id": 4}),
    ],
)  # fmt: skip
def test_a_merged_config_says_it_in_the_words_of_the_base_and_of_others(
    base: dict[str, Any], wanted: dict[str, Any]
) -> None:
    got = merged_config(base, "float32", (4, 2), False)
    assert {key: got.get(key) for key in wanted} == wanted
    assert {key: got[key] for key in base if key != "eos_token_id"} == {
        key: value for key, value in base.items() if key != "eos_token_id"
    }


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_the_older_keys_are_written_for_the_kinds_that_transformers_4_knows(kind: str) -> None:
    linear = {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}
    nested = {"full_attention": linear, "sliding_attention": {"rope_type": "default", "rope_theta": 1e3}}
    base = {"model_type": kind, "rope_parameters": nested if "gemma" in kind else linear}
    got = merged_config(base, "float32", (4, 2), False)
    assert (got["rope_theta"], got["rope_scaling"]["factor"]) == (1e4, 2.0)


def test_no_older_key_is_written_where_transformers_would_read_something_else_with_it() -> None:
    """Gemma 4 turns in a way that transformers 4 does not know."""
    kinds = {
        "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    base = {"model_type": "gemma4_text", "head_dim": 16, "rope_parameters": kinds}
    got = merged_config(base, "float32", (4, 2), False)
    assert "rope_scaling" not in got
    read = CONFIG_MAPPING["gemma4_text"].from_dict(dict(got)).rope_parameters
    assert read == CONFIG_MAPPING["gemma4_text"].from_dict(base).rope_parameters


def test_what_is_not_true_of_a_merged_model_is_left_out_of_its_config() -> None:
    base = {
        "quantization_config": {}, "auto_map": {}, "_name_or_path": "author/base", "dtype": "float16",
        "text_config": {"tie_word_embeddings": True, "eos_token_id": 1, "rope_parameters": {"rope_theta": 2.0}},
    }  # fmt: skip
    assert merged_config(base, "bfloat16", (4,), True) == {
        "dtype": "bfloat16", "torch_dtype": "bfloat16", "eos_token_id": 4, "tie_word_embeddings": False,
        "text_config": {
            "tie_word_embeddings": False, "eos_token_id": 4, "rope_parameters": {"rope_theta": 2.0}, "rope_theta": 2.0,
        },
    }  # fmt: skip


# --- transformers 4.57

_OLD = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
assert transformers.__version__.startswith(sys.argv[1]), transformers.__version__
folder = sys.argv[2]
tokenizer = AutoTokenizer.from_pretrained(folder)
question = [{"role": "user", "content": "What is number 3?"}]
text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
ids = tokenizer(text, add_special_tokens=False)["input_ids"]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
with torch.no_grad():
    logits = model(input_ids=torch.tensor([ids])).logits[0]
print(json.dumps({
    "text": text, "ids": ids, "more": tokenizer("two  words\\n\\n<|im_end|>")["input_ids"], "eos": tokenizer.eos_token,
    "stops": GenerationConfig.from_pretrained(folder).eos_token_id, "logits": logits.tolist(),
}))
"""


@pytest.fixture(scope="module")
def python_457(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with transformers 4.57, and with this environment's torch."""
    folder = tmp_path_factory.mktemp("transformers-4.57")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    wanted = ["transformers==4.57.*", "tokenizers<=0.23", "huggingface_hub<1", "numpy", "safetensors", "jinja2"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
    here = next(Path(part) for part in map(str, map(Path, torch.__path__)))
    site = next((folder / "lib").glob("python3*/site-packages"))
    (site / "torch-of-the-tests.pth").write_text(f"{here.parent}\n")  # after its own packages
    return python


@pytest.mark.long
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_transformers_4_57_reads_a_merged_folder_as_5_does(tmp_path: Path, python_457: Path, theta: float) -> None:
    place = make_workplace(tmp_path)
    save_tiny(
        place / "base",
        chat_template=CHATML,
        rope_parameters={"rope_theta": theta, "rope_type": "linear", "factor": 2.0},
    )
    finetune(place, train__max_steps=4)
    with inside(place):
        merge_run(RunDirectory("runs/trial"), Path("merged"), "trained")
    said = {}
    for name, python, version in (("new", sys.executable, "5."), ("old", python_457, "4.57")):
        done = subprocess.run(
            [python, "-c", _OLD, version, place / "merged"], capture_output=True, text=True, check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said[name] = json.loads(done.stdout.splitlines()[-1])
    new, old = said["new"].pop("logits"), said["old"].pop("logits")
    assert said["old"] == said["new"]
    assert (said["old"]["eos"], said["old"]["stops"]) == ("<|im_end|>", [4, 1])
    torch.testing.assert_close(torch.tensor(old), torch.tensor(new), atol=1e-5, rtol=1e-5)
