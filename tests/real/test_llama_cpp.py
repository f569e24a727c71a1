"""llama.cpp itself reads our GGUF files: the same tokens of a text, and the same greedy answers, in every family."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmtune.export.gguf import write_adapter, write_model
from tests.export_models import FAMILIES, family_model
from tests.real.folders import REAL, smollm2, tokenizer_of
from tests.tiny import adapted

pytestmark = pytest.mark.real
TEXT = "Hello world, the price is 12345 €. 你好\n\n It's   fine!"
TOKENIZERS = {"llama3": "llama3_1", "qwen2": "qwen3", "qwen3": "qwen3", "gemma2": "gemma3", "gemma3": "gemma3",
              "gpt_oss": "gptoss"}  # fmt: skip
SURE = 1.02  # how much likelier than the next a token must be, for rounding not to change it


def ask(file: Path, tokens: list[int], count: int = 16, adapter: Path | None = None) -> dict[str, Any]:
    """What llama.cpp answers to `tokens`, and how it reads `TEXT`."""
    command = ["node", str(Path(__file__).with_name("llama.mjs")), str(file), json.dumps(tokens), TEXT, str(count)]
    done = subprocess.run(
        [*command, *([str(adapter)] if adapter else [])], cwd=REAL / "llama_cpp", capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def agree(model: Any, prompt: list[int], answer: list[list[float]]) -> None:
    """Each token of an answer is the model's own, where it is sure of it."""
    ids = [*prompt, *(int(token) for token, _, _ in answer)]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
    own, sure = logits.argmax(-1).tolist(), 0
    for (token, first, second), chosen in zip(answer, own, strict=True):
        if first > SURE * second:
            sure += 1
            assert int(token) == chosen
    assert sure >= len(answer) // 2


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_the_models(family: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(TOKENIZERS.get(family, "llama2"))
    model = family_model(family, len(tokenizer))
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id}))
    write_model(folder, tmp_path / "m.gguf", "f32", "test")
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    prompt = [tokenizer.bos_token_id or 5, *ids]
    found = ask(tmp_path / "m.gguf", prompt)
    assert found["tokens"][1:] == ids[1:]  # the binding takes off the space that SentencePiece puts before a text
    agree(model, prompt, found["answer"])


def test_an_adapter_over_its_base_is_the_adapted_model(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("qwen3")
    for family in ("llama", "qwen3"):  # with rows in pairs, and without
        base = family_model(family, len(tokenizer))
        folder = tmp_path / family
        base.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id}))
        write_model(folder, tmp_path / f"{family}.gguf", "f32", "test")
        model = adapted(base)
        model.save_pretrained(folder / "adapter")
        write_adapter(folder / "adapter", base.config, tmp_path / f"{family}-lora.gguf", "test")
        prompt = tokenizer(TEXT).input_ids
        found = ask(tmp_path / f"{family}.gguf", prompt, adapter=tmp_path / f"{family}-lora.gguf")
        agree(model, prompt, found["answer"])


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_k_m"])
def test_a_real_model_answers_in_fewer_bits(kind: Any, tmp_path: Path) -> None:
    folder = smollm2()
    write_model(folder, tmp_path / "m.gguf", kind, "test")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = AutoTokenizer.from_pretrained(folder)("The capital of France is").input_ids
    answer = [int(token) for token, _, _ in ask(tmp_path / "m.gguf", prompt, 4)["answer"]]
    own = model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)[0, len(prompt) :].tolist()
    assert answer[:2] == own[:2]
