"""A run over a mixture of experts from its first line to a chat, without a warning of PEFT's."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from lmtune.inference.load import load_for_inference
from lmtune.models.tuning.lora import read_adapter
from tests.tiny import save_tiny
from tests.tokenizers import CHATML
from tests.workplace import finetune, inside, make_workplace


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_run_over_a_mixture_of_experts(tmp_path: Path, quantization: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_workplace(tmp_path / "work")
    save_tiny(folder / "base", "qwen2_moe", chat_template=CHATML)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.filterwarnings("error", module="peft", category=UserWarning)
        run, summary = finetune(folder, model__quantization=quantization, evaluation__exact_match_rows=1)
        said = " ".join(capsys.readouterr().err.split())
        assert "(LoRA r=4 on 8 modules and 2 expert tensors); " in said
        assert said.count("stay in 32 bit") == (quantization != "none")
        assert f"parameters: {summary['trainable_parameters']:,} trained" in said
        assert summary["tuned"]["loss"] < summary["base"]["loss"]
        config, state = read_adapter(run.adapter)
        assert sum(tensor.numel() for tensor in state.values()) == summary["trainable_parameters"]
        assert "gate_up_proj" in config["target_parameters"]
        with inside(folder):
            loaded = load_for_inference(str(run.path))
        sequence = json.loads(run.verification.read_text())["sequences"][0]
        with torch.no_grad():
            tuned = loaded.model(input_ids=torch.tensor([sequence])).logits
            with loaded.use_base():
                base = loaded.model(input_ids=torch.tensor([sequence])).logits
        assert (tuned - base).abs().max() > 1e-3
