"""What plain LoRA writes passes, whichever PEFT wrote it; what reaches beyond it is named."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig

from lmtune.models.tuning.adapter_files import SETTINGS, config_problems

PLAIN: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "bias": "none",
    "target_modules": ["q_proj", "v_proj"], "modules_to_save": None, "base_model_name_or_path": "a/b",
    "inference_mode": True, "fan_in_fan_out": False,
}  # fmt: skip
# What versions of PEFT wrote beside these, from the first on
OLDER: list[dict[str, Any]] = [
    {"enable_lora": None, "merge_weights": False},
    {"init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None, "revision": None},
    {
        "alpha_pattern": {}, "auto_mapping": None, "loftq_config": {}, "megatron_config": None,
        "megatron_core": "megatron.core", "rank_pattern": {}, "use_rslora": False, "use_dora": False,
        "layer_replication": None,
    },
    {"eva_config": None, "corda_config": None, "exclude_modules": None, "lora_bias": False, "qalora_group_size": 16},
    {"a_key_of_a_later_version": None, "another": False, "a_third": {}},
]  # fmt: skip


@pytest.mark.parametrize("more", OLDER)
def test_a_plain_config_passes(more: dict[str, Any]) -> None:
    assert not list(config_problems({**PLAIN, **more}))


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"use_dora": True, "use_rslora": True},
        {"target_modules": "all-linear"}, {"target_modules": r".*\\.q_proj"},
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 8.5}}, {"init_lora_weights": "gaussian"},
        {"layers_to_transform": [0, 1], "layers_pattern": "layers"}, {"layers_to_transform": 1},
        {"modules_to_save": ["lm_head"]}, {"init_lora_weights": False},
    ],
)  # fmt: skip
def test_what_the_installed_peft_writes_passes(settings: dict[str, Any]) -> None:
    written = LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], **settings}).to_dict()
    written = {key: sorted(value) if isinstance(value, set) else value for key, value in written.items()}
    assert not list(config_problems(written))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": None}, "r: None; expected 1 to 4,096"),
        ({"r": True}, "r: True; expected 1 to 4,096"),
        ({"lora_alpha": float("inf")}, "lora_alpha: inf; expected a number above 0"),
        ({"lora_dropout": 1.5}, "lora_dropout: 1.5; expected 0 to below 1"),
        ({"target_modules": None}, "target_modules: None; expected a name or a list of names"),
        ({"target_modules": [{"a": 1}]}, "target_modules: [{'a': 1}]; expected a name or a list of names"),
        ({"target_modules": "x{99999999999}"}, "target_modules: 'x{99999999999}' is not a regular expression"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern: {'q': 0}; expected names with ranks"),
        ({"rank_pattern": {"(q": 4}}, "rank_pattern: '(q' is not a regular expression"),
        ({"layers_to_transform": [-1]}, "layers_to_transform: [-1]; expected a layer's number"),
        ({"bias": "lora_only"}, "bias: 'lora_only'; expected none: other biases belong to the base"),
        ({"task_type": "SEQ_CLS"}, "task_type: 'SEQ_CLS'; expected CAUSAL_LM"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa'; it may change the base's weights"),
        ({"init_lora_weights": ["gaussian"]}, "init_lora_weights: ['gaussian']"),
        ({"layer_replication": [[0, 99]]}, "layer_replication: not a setting of a plain LoRA adapter; remove it"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices: not a setting"),
        ({"use_dora": "yes"}, "use_dora: 'yes'; expected true or false"),
        ({"revision": 7}, "revision: 7; expected text"),
    ],
)
def test_what_is_more_than_plain_is_named(changes: dict[str, Any], said: str) -> None:
    (fault,) = config_problems({**PLAIN, **changes})
    assert said in fault


def test_peft_knows_every_key_that_it_is_given() -> None:
    assert set(SETTINGS) <= set(LoraConfig.__dataclass_fields__)
