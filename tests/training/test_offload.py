"""Layer streaming: the result of a base that is held whole, bit for bit, with no more layers in memory than allowed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lmtune.config.schema import FinetuneConfig, LoraConfig, ModelConfig
from lmtune.errors import ConfigError, ModelError
from lmtune.forward.packed import PackedForward
from lmtune.kernels.lora_linear import fuse
from lmtune.models.base import load_model
from lmtune.models.offload import LayerStream, MappedFiles, PinnedMemory, reason_to_stream
from lmtune.models.tuning.base import trainable
from lmtune.runs.store import RunDirectory
from lmtune.training.memory import checkpoint_layers
from lmtune.training.run import run_finetune
from tests.tiny import adapted, losses_of, pack_rows, random_rows, save_tiny
from tests.tokenizers import CHATML
from tests.workplace import RESTLESS, config_of, inside, lasting, make_workplace, write_rows

# Wide enough that the weights of a layer are worth to be streamed
WIDE: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 5}
STREAMED: dict[str, Any] = {"model__offload": "layers", "model__resident_layers": 2}

RUNS: dict[str, dict[str, Any]] = {
    "sft": RESTLESS,
    "checkpointed": {"train__gradient_checkpointing": True, "train__micro_batch_tokens": 64},
    "one layer": {"model__resident_layers": 1, "train__micro_batch_tokens": 64},
    "three layers": {"model__resident_layers": 3},
    "last layer": {"tuning__target_modules": r".*\.layers\.4\..*(q|v)_proj"},
    "dora": {"tuning__use_dora": True, "tuning__modules_to_save": ("head",)},
    "nf4": {"model__quantization": "nf4"},
    "int8": {"model__quantization": "int8"},
    "dpo": {"objective__kind": "dpo", "data__train": "pairs.jsonl", "data__validation": "pairs.jsonl"},
    "classification": {
        "objective__kind": "classification", "data__train": "texts.jsonl", "data__validation": "texts.jsonl",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace with a base of five layers, answers behind a long prefix, pairs and labelled texts."""
    folder = make_workplace(tmp_path_factory.mktemp("offload") / "work")
    save_tiny(folder / "base", chat_template=CHATML, **WIDE)
    prefix = "In our shop all numbers are told by the one who asks for them. "
    write_rows(folder / "train.jsonl", [{"prompt": f"{prefix}{n}?", "completion": f"{7 * n % 10}."} for n in range(24)])
    pairs = [{"prompt": f"{prefix}{n}?", "chosen": f"{7 * n % 10}.", "rejected": f"{n % 7}!"} for n in range(12)]
    write_rows(folder / "pairs.jsonl", pairs)
    write_rows(folder / "texts.jsonl", [{"text": f"number {n} it is", "label": "ab"[n % 2]} for n in range(12)])
    return folder


def train(place: Path, name: str, **changes: Any) -> dict[str, Any]:
    """What lasts of a run of three steps."""
    config: FinetuneConfig = config_of(**{"train__max_steps": 3, **changes, "run__name": name})
    with inside(place):
        run_finetune(config, RunDirectory.of(config.run))
    kept = lasting(place, name)
    kept["adapter"].pop("README.md")  # names the run
    return kept


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_streamed_run_is_the_whole_one_bit_for_bit(place: Path, name: str) -> None:
    """Adapter, losses, scores, generated answers, and what is precomputed for preferences."""
    changes = RUNS[name]
    whole = train(place, f"whole-{name}".replace(" ", "-"), **changes, model__offload="none")
    streamed = train(place, f"streamed-{name}".replace(" ", "-"), **{**STREAMED, **changes, "model__offload": "layers"})
    for part in whole:
        assert streamed[part] == whole[part], part
