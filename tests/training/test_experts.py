"""A run over a mixture of experts from its first line to a chat, without a warning of PEFT's."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from lmtune.inference.load import load_for_inference
from lmtune.models.structure import expert_tensors
from lmtune.models.tuning.lora import read_adapter
from tests.tiny import save_tiny, tiny_model
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
        assert "(LoRA r=4 on 8 modules and 2 expert tensors, over " in said
        assert said.count(" in float32 (experts ") == (quantization != "none")
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


def test_peft_gives_experts_in_4_bit_no_adapter() -> None:
    """Why nf4 leaves experts as they are, and says so; where this fails, they can be quantized too."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit
    from peft import LoraConfig, get_peft_model

    def adapted_experts(in_4_bit: bool) -> list[str]:
        model = tiny_model("qwen2_moe")
        for name in expert_tensors(model):
            module, _, leaf = name.rpartition(".")
            if in_4_bit:
                replace_parameter_4bit(model.get_submodule(module), leaf, quant_type="nf4")
        ids = torch.arange(5, 15)[None]
        assert model(input_ids=ids).logits.isfinite().all()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"])
            adapted = get_peft_model(model, config)
        return [name for name, _ in adapted.named_parameters() if "lora_" in name and "experts" in name]

    assert adapted_experts(in_4_bit=False)
    assert not adapted_experts(in_4_bit=True)
