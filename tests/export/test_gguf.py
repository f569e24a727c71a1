"""GGUF files say what the model is: read back by transformers, they give the same logits, tokens, template and ends."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmtune.demo import tiny_path
from lmtune.errors import ConfigError, ModelError
from lmtune.export.base import Request
from lmtune.export.engines import EXPORTERS
from lmtune.export.gguf import write_adapter, write_model
from lmtune.export.gguf_models import architecture
from lmtune.export.gguf_tokenizer import tokenizer_keys
from lmtune.export.k_quants import quantize_q4_k, quantize_q6_k
from lmtune.export.ollama import turn_texts
from lmtune.export.uploads import prepare_push
from lmtune.inference.load import load_for_inference
from lmtune.models.gguf import gguf_folder
from tests.export_models import FAMILIES, family_config, family_model
from tests.processes import completed
from tests.recorded_server import recorded_run
from tests.tiny import SAVED_VOCABULARY, adapted
from tests.tokenizers import CHATML, make_tokenizer, turns
from tests.workplace import finetune, inside, make_workplace

gguf = pytest.importorskip("gguf")
IDS = torch.arange(5, 45)[None]


def saved(folder: Path, model: Any, template: str | None = CHATML) -> Path:
    """A model folder with a tokenizer that llama.cpp can cut text like."""
    tokenizer = make_tokenizer(template)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ends = [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


def read_back(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(gguf_folder(str(path), with_weights=True), dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


# Of the others transformers' reader leaves out what the model needs; `tests/real` asks llama.cpp itself about all.
@pytest.mark.parametrize("family", ["llama", "llama3", "mistral", "qwen2", "qwen3", "phi3"])
def test_a_file_read_back_is_the_same_model(family: str, tmp_path: Path) -> None:
    model = family_model(family, SAVED_VOCABULARY)
    written = write_model(saved(tmp_path / "model", model), tmp_path / "m.gguf", "f32", "test")
    assert written.has_template
    assert written.kept == 0
    torch.testing.assert_close(logits(read_back(tmp_path / "m.gguf")), logits(model), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_a_family_has_its_place(family: str, tmp_path: Path) -> None:
    model = family_model(family, SAVED_VOCABULARY)
    write_model(saved(tmp_path / "model", model), tmp_path / "m.gguf", "f32", "test")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture(model.config).name)
    known = {gguf.TENSOR_NAMES[part].format(bid=layer) for part in gguf.MODEL_TENSORS[kind] for layer in range(6)}
    names = [tensor.name for tensor in reader.tensors]
    assert {name.rpartition(".")[0] for name in names} - {"rope_freqs"} <= known
    count = sum(int(tensor.n_elements) for tensor in reader.tensors if tensor.name != "rope_freqs.weight")
    assert count == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("kind", "error"), [("f16", 1e-3), ("bf16", 1e-2), ("q8_0", 1e-2), ("q4_0", 0.13), ("q4_k_m", 0.1)]
)
def test_weights_in_fewer_bits_are_near(kind: Any, error: float, tmp_path: Path) -> None:
    model = family_model("qwen3", SAVED_VOCABULARY, hidden_size=256, intermediate_size=512, head_dim=64)
    write_model(saved(tmp_path / "model", model), tmp_path / "m.gguf", kind, "test")
    for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors:
        if tensor.name == "blk.1.attn_output.weight":
            found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            wanted = model.model.layers[1].self_attn.o_proj.weight.detach().numpy()
            assert 0 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < error
            return
    raise AssertionError("no such tensor")


@pytest.mark.parametrize(("quantize", "name", "share"), [(quantize_q4_k, "Q4_K", 0.9), (quantize_q6_k, "Q6_K", 0.25)])
def test_k_quants_beat_q4_0(quantize: Any, name: str, share: float) -> None:
    rows = np.random.default_rng(0).standard_t(4, (16, 1024)).astype(np.float32)
    rows[3] = 0
    kinds = gguf.GGMLQuantizationType
    plain = gguf.quants.dequantize(gguf.quants.quantize(rows, kinds.Q4_0), kinds.Q4_0)
    found = gguf.quants.dequantize(quantize(rows), kinds[name])
    assert np.linalg.norm(found - rows) < share * np.linalg.norm(plain - rows)
    assert (found[3] == 0).all()


def test_what_does_not_fit_a_block_keeps_16_bits(tmp_path: Path) -> None:
    model = family_model("qwen3", SAVED_VOCABULARY, hidden_size=48, intermediate_size=80)
    assert write_model(saved(tmp_path / "model", model), tmp_path / "m.gguf", "q8_0", "test").kept > 0


def test_tokens_template_and_ends_are_those_of_the_folder(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", family_model("qwen3", SAVED_VOCABULARY))
    write_model(folder, tmp_path / "m.gguf", "f32", "test")
    read, own = (AutoTokenizer.from_pretrained(path) for path in (gguf_folder(str(tmp_path / "m.gguf")), folder))
    text = "Hello 123 wörld<|im_end|>\n  x"
    assert read(text).input_ids == own(text).input_ids
    assert read.chat_template == own.chat_template
    ends = json.loads((gguf_folder(str(tmp_path / "m.gguf")) / "generation_config.json").read_text())["eos_token_id"]
    assert ends == json.loads((folder / "generation_config.json").read_text())["eos_token_id"]


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("gemma2", {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar"),
        ("gemma3", {"layer_types": ["full_attention"] * 6}, "take turns"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    ],
)
def test_what_gguf_cannot_say_is_refused(family: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        architecture(family_config(family, 64, **changes))


def test_a_family_that_is_not_known_is_refused() -> None:
    from transformers import GPT2Config

    with pytest.raises(ModelError, match="model_type gpt2: lmtune writes GGUF of llama"):
        architecture(GPT2Config())


def test_a_tokenizer_that_cuts_text_otherwise_is_refused() -> None:
    from tokenizers import Regex, pre_tokenizers

    tokenizer = make_tokenizer(CHATML)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[aeiou]"), "isolated")
    with pytest.raises(ModelError, match="cuts text by Split"):
        tokenizer_keys(tokenizer, len(tokenizer), [2], None)


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 4}}])
def test_an_adapter_has_the_scale_that_it_was_trained_with(changes: dict[str, Any], tmp_path: Path) -> None:
    base = family_model("qwen3", SAVED_VOCABULARY)
    settings = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "init_lora_weights": False, **changes}
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], **settings))
    model.save_pretrained(tmp_path / "adapter")
    write_adapter(tmp_path / "adapter", base.config, tmp_path / "lora.gguf", "test")
    reader = gguf.GGUFReader(tmp_path / "lora.gguf")
    parts = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    alpha = reader.fields["adapter.lora.alpha"].contents()
    for name, theirs in (("q_proj", "attn_q"), ("v_proj", "attn_v")):
        layer = getattr(model.base_model.model.model.layers[1].self_attn, name)
        wanted = layer.get_delta_weight("default").detach().numpy()
        b, a = (parts[f"blk.1.{theirs}.weight.lora_{half}"] for half in "ba")
        np.testing.assert_allclose(alpha / len(a) * b @ a, wanted, atol=1e-6)


def test_a_template_that_puts_texts_around_turns_becomes_ollamas() -> None:
    tokenizer = make_tokenizer(CHATML)
    texts = turn_texts(tokenizer)
    talk = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Why?")]
    for some in (talk, talk[1:], talk[3:]):
        messages = [{"role": role, "content": text} for role, text in some]
        wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert texts.render(some) == wanted
    written = texts.go_template()
    assert written.count("{{") == written.count("}}")
    assert '{{ "<|im_start|>user\\n" }}{{ .Content }}' in written


def test_a_template_that_looks_at_contents_is_refused_for_ollama() -> None:
    with pytest.raises(ModelError, match="does more than put texts around turns"):
        turn_texts(make_tokenizer(turns("message['content'] | upper")))


def test_a_run_is_exported_for_each_engine(tmp_path: Path) -> None:
    folder = make_workplace(tmp_path)
    with inside(folder):
        run, _ = finetune(folder)
        said = EXPORTERS["gguf"](Request(run, "f32"))
        assert said[-1] == f"llama-server -m {run.path / 'trial-f32.gguf'} --jinja"
        merged = AutoModelForCausalLM.from_pretrained(run.merged, dtype=torch.float32)
        found = read_back(run.path / "trial-f32.gguf")
        torch.testing.assert_close(logits(found), logits(merged), atol=1e-4, rtol=1e-4)
        with pytest.raises(ConfigError, match="is there already"):
            EXPORTERS["gguf"](Request(run, "f32"))
        assert EXPORTERS["ollama"](Request(run, "q8_0"))[-1].startswith("ollama create trial -f ")
        modelfile = (run.path / "ollama/Modelfile").read_text()
        assert modelfile.startswith("FROM ./trial.gguf\n")
        assert 'PARAMETER stop "<|im_end|>"' in modelfile
        assert (run.path / "ollama/trial.gguf").is_file()
        said = EXPORTERS["vllm"](Request(run, adapter=True))
        assert f"--enable-lora --lora-modules trial={run.path / 'vllm'} --max-lora-rank 8" in said[-1]
        assert run_by("vllm", said[-1], folder) == run_by("vllm", f"sh {run.path / 'vllm/serve.sh'}", folder)
        said = EXPORTERS["vllm"](Request(run, adapter=True, output=folder / "elsewhere/vllm"))
        found = run_by("vllm", said[-1], folder)
        assert found == run_by("vllm", "sh elsewhere/vllm/serve.sh", folder)
        assert found["serve"] == str(folder / "base")
        assert found["--chat-template"] == str(folder / "elsewhere/vllm/chat_template.jinja")
        stops = json.loads((Path(found["--generation-config"]) / "generation_config.json").read_text())
        assert stops["eos_token_id"] == list(load_for_inference(str(run.path)).renderer.stop_token_ids)
        with pytest.raises(ConfigError, match="Ollama takes the merged model"):
            EXPORTERS["ollama"](Request(run, adapter=True))
        with pytest.raises(ConfigError, match="--output: vLLM serves the merged folder itself"):
            EXPORTERS["vllm"](Request(run, output=folder / "elsewhere"))
        output = folder / "a b.gguf"
        assert EXPORTERS["gguf"](Request(run, output=output))[-1] == f"llama-server -m '{output}' --jinja"
        said = EXPORTERS["gguf"](Request(run, adapter=True, output=folder / "lora.gguf"))
        assert not any("nf4" in line for line in said)
        weights = run.merged / "model.safetensors"
        whole = weights.read_bytes()
        for damaged in (None, whole[:100]):
            weights.unlink(missing_ok=True)
            if damaged is not None:
                weights.write_bytes(damaged)
            for engine in EXPORTERS:
                with pytest.raises(ModelError, match=r"make it again: lmtune merge .*trial"):
                    EXPORTERS[engine](Request(run, output=folder / engine if engine != "vllm" else None))
            with pytest.raises(ModelError, match="make it again"):
                prepare_push(run, "me/mine", merged=True)


@pytest.mark.parametrize("options", [("--adapter",), ("--to", "vllm")])
def test_a_type_that_has_no_meaning_is_refused(options: tuple[str, ...], tmp_path: Path) -> None:
    run = recorded_run(tmp_path)
    done = completed(tmp_path, "export", str(run.path), "--type", "f16", *options)
    assert done.returncode == 2
    assert "--type: f16; only a merged model in GGUF has one" in done.stderr


def test_an_adapter_over_nf4_says_that_the_engines_base_is_another(tmp_path: Path) -> None:
    run = recorded_run(tmp_path)
    run.config.write_text(run.config.read_text().replace("quantization: none", "quantization: nf4"))
    said = EXPORTERS["vllm"](Request(run, adapter=True))
    assert any("trained over the base in nf4" in line for line in said)


def run_by(program: str, command: str, folder: Path) -> dict[str, str]:
    """What `command`, run in `folder`, tells `program`: option and value, paths absolute."""
    stub = folder / "bin" / program
    stub.parent.mkdir(exist_ok=True)
    stub.write_text('#!/bin/sh\npwd\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    path = f"{stub.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, shell=True, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True)
    where, *words = done.stdout.decode().splitlines()
    words = [os.path.normpath(os.path.join(where, word)) if os.path.exists(os.path.join(where, word)) else word
             for word in words if word != "--enable-lora"]  # fmt: skip
    words = [f"{name}={os.path.normpath(os.path.join(where, value))}" if value else name
             for name, _, value in (word.partition("=") for word in words)]  # fmt: skip
    return dict(zip(words[::2], words[1::2], strict=True))


def test_an_adapter_over_the_embedded_model_names_its_folder(tmp_path: Path) -> None:
    run = recorded_run(tmp_path)
    found = run_by("vllm", EXPORTERS["vllm"](Request(run, adapter=True))[-1], tmp_path)
    assert found["serve"] == str(tiny_path())
    assert found == run_by("vllm", f"sh {run.path / 'vllm/serve.sh'}", tmp_path)


def test_vllm_gets_the_names_of_a_wrapped_text_model(tmp_path: Path) -> None:
    from safetensors import safe_open

    from lmtune.export.vllm import write_adapter as write_for_vllm

    adapted(family_model("qwen3", SAVED_VOCABULARY)).save_pretrained(tmp_path / "adapter")
    (tmp_path / "served").mkdir()
    renamed = write_for_vllm(tmp_path / "adapter", tmp_path / "served", "Gemma3ForConditionalGeneration")
    with safe_open(tmp_path / "served/adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    assert renamed == len(names)
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in names)
