"""What plain LoRA writes passes, whichever PEFT wrote it; what reaches beyond it is named."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig

from lmtune.models.tuning.adapter_files import USED, config_faults

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
    assert not list(config_faults({**PLAIN, **more}))


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
    assert not list(config_faults(written))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": None}, "r is None; should be 1 to 4096"),
        ({"lora_alpha": True}, "lora_alpha is True; should be a number above 0, at most 1e+30"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"lora_dropout": 1.5}, "lora_dropout is 1.5; should be 0 to below 1"),
        ({"target_modules": None}, "target_modules is None; should be a name or a list"),
        ({"target_modules": ["q"] * 2001}, "should be a name or a list of up to 2,000 names"),
        ({"rank_pattern": []}, "rank_pattern is []; should be names with 1 to 4096"),
        ({"rank_pattern": {f"q{n}": 1 for n in range(2001)}}, "should be names with 1 to 4096"),
        ({"layers_to_transform": "all"}, "layers_to_transform is 'all'; should be the number of a layer"),
        ({"layers_to_transform": [-1]}, "layers_to_transform is [-1]"),
        ({"layers_to_transform": list(range(10_001))}, "layers_to_transform is [0, 1, 2"),
        ({"bias": "lora_only"}, "bias is 'lora_only'; should be none: other biases belong to the base"),
        ({"init_lora_weights": "zzz"}, "init_lora_weights is 'zzz', under which the base's weights may be others"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": ["gaussian"]}, "init_lora_weights is ['gaussian']"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is set"),
        ({"use_qalora": True}, "use_qalora is set"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is set"),
        ({"a_key_of_nobody": 3}, "a_key_of_nobody is set, which a plain LoRA adapter does not need; remove it"),
        ({"use_dora": "yes"}, "use_dora is 'yes'; should be true or false"),
        ({"revision": 7}, "revision is 7; should be text"),
    ],
)
def test_what_is_more_than_plain_is_named(changes: dict[str, Any], said: str) -> None:
    (fault,) = config_faults({**PLAIN, **changes})
    assert said in fault


def test_peft_knows_every_key_that_it_is_given() -> None:
    assert set(USED) <= set(LoraConfig.__dataclass_fields__)
