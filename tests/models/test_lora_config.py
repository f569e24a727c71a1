"""What plain LoRA writes passes, whichever PEFT wrote it; what reaches beyond it is named."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig

from lmtune.models.tuning.adapter_files import LoraSettings, config_problems

PLAIN: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "bias": "none",
    "target_modules": ["q_proj", "v_proj"], "modules_to_save": None, "base_model_name_or_path": "a/b",
    "inference_mode": True, "fan_in_fan_out": False,
    # of one version of PEFT and another
    "enable_lora": None, "merge_weights": False, "layers_pattern": "", "auto_mapping": None, "loftq_config": {},
    "megatron_core": "megatron.core", "rank_pattern": {}, "qalora_group_size": 16, "a_key_of_a_later_version": False,
}  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"use_dora": True, "use_rslora": True, "target_modules": r".*\\.q_proj"},
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 8.5}, "init_lora_weights": "gaussian"},
        {"layers_to_transform": [0, 1], "layers_pattern": "layers"}, {"layers_to_transform": 1},
        {"modules_to_save": ["lm_head"], "init_lora_weights": False},
    ],
)  # fmt: skip
def test_what_peft_writes_passes(settings: dict[str, Any]) -> None:
    written = LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], **settings}).to_dict()
    written = {key: sorted(value) if isinstance(value, set) else value for key, value in written.items()}
    assert not list(config_problems(written))
    assert not list(config_problems({**PLAIN, **settings}))
    assert set(LoraSettings.__annotations__) <= set(LoraConfig.__dataclass_fields__)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": None}, "r: missing"),
        ({"r": True}, "r: True; expected a valid integer"),
        ({"lora_alpha": float("inf")}, "lora_alpha: inf; expected less than or equal to"),
        ({"target_modules": [{"a": 1}]}, "target_modules: [{'a': 1}]; expected a valid string"),
        ({"target_modules": "x{99999999999}"}, "target_modules: 'x{99999999999}' is not a regular expression"),
        ({"rank_pattern": {"q": 10**8}}, "rank_pattern: {'q': 100000000}; expected less than or equal to 4096"),
        ({"rank_pattern": {"(q": 4}}, "rank_pattern: '(q' is not a regular expression"),
        ({"bias": "lora_only"}, "bias: 'lora_only'; expected 'none'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa'; it may change the base's weights"),
        ({"layer_replication": [[0, 99]]}, "layer_replication: not a setting of a plain LoRA adapter; remove it"),
    ],
)
def test_what_is_more_than_plain_is_named(changes: dict[str, Any], said: str) -> None:
    (fault,) = config_problems({**PLAIN, **changes})
    assert said in fault
