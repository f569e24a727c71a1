"""Runs that share a base: each is, bit for bit, the one that a process of its own makes, whatever ran before it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lmtune.config.schema import FinetuneConfig
from lmtune.models.copies import over_same_weights
from lmtune.runs.store import RunDirectory
from lmtune.training.run import run_finetune
from lmtune.training.shared import Shared
from tests.tiny import tiny_model
from tests.workplace import config_of, inside, lasting, make_workplace, write_rows

pytestmark = pytest.mark.slow  # seconds together; left out of `make test-fast`

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rank": {"tuning__rank": 8, "tuning__target_modules": ("q_proj",), "train__gradient_checkpointing": True},
    "dropout": {"tuning__dropout": 0.3, "train__seed": 3},
    "dora": {"tuning__use_dora": True},
    "pissa": {"tuning__init_lora_weights": "pissa"},
    "new_tokens": {"tuning__new_tokens": ("<note>",)},
    "whole": {"tuning__modules_to_save": ("head",)},
    "full": {"tuning__kind": "full", "train__learning_rate": 1e-3},
    "partial": {"tuning__kind": "partial", "tuning__parts": ("head", "last_1_layer")},
    "nf4": {"model__quantization": "nf4"},
    "int8": {"model__quantization": "int8", "tuning__target_modules": ("q_proj",)},
}  # fmt: skip
LABELLED = {"objective__kind": "classification", "data__validation": "texts.jsonl", "data__train": "texts.jsonl"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace with answers and labelled texts."""
    folder = make_workplace(tmp_path_factory.mktemp("shared") / "work")
    write_rows(folder / "texts.jsonl", [{"text": f"number {n} it is", "label": "ab"[n % 2]} for n in range(16)])
    return folder


def train(place: Path, name: str, shared: Shared | None, **changes: Any) -> dict[str, Any]:
    config: FinetuneConfig = config_of(**{"train__max_steps": 3, **changes, "run__name": name})
    with inside(place):
        run_finetune(config, RunDirectory.of(config.run), shared=shared)
    return lasting(place, name)


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Weights and every record, but for the names of the runs in the cards."""
    for part in ("adapter", "model"):
        assert one[part].keys() == other[part].keys()
        different = [name for name in one[part] if one[part][name] != other[part][name]]
        assert set(different) <= {"README.md"}
    assert one["metrics"] == other["metrics"]
    assert one["answers"] == other["answers"]
    assert one["scores"] == other["scores"]


def test_each_kind_of_tuning_is_as_alone_whatever_ran_before(place: Path) -> None:
    """All kinds one after another and back again, so that each follows others."""
    shared = Shared()
    alone = {name: train(place, f"alone-{name}", None, **changes) for name, changes in KINDS.items()}
    order = [*KINDS, *reversed(KINDS)]
    for number, name in enumerate(order):
        same(train(place, f"shared-{number}-{name}", shared, **KINDS[name]), alone[name])


def test_classifiers_have_heads_of_their_own(place: Path) -> None:
    """Heads differ by the seed; one learns with all weights, one alone, one beside an adapter."""
    shared = Shared()
    kinds: list[dict[str, Any]] = [
        {}, {"train__seed": 2}, {"tuning__kind": "partial", "tuning__parts": ("head",)}, {"tuning__kind": "full"}, {},
    ]  # fmt: skip
    for number, changes in enumerate(kinds):
        alone = train(place, f"alone-class-{number}", None, **LABELLED, **changes)
        same(train(place, f"class-{number}", shared, **LABELLED, **changes), alone)


def test_the_base_is_loaded_once_and_read_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmtune.training import compose
    from lmtune.training import shared as module

    loaded, read = [], []
    load_model, load_data = module.load_model, compose.load_data
    monkeypatch.setattr(module, "load_model", lambda *args: (loaded.append(1), load_model(*args))[1])
    monkeypatch.setattr(compose, "load_data", lambda *args: (read.append(1), load_data(*args))[1])
    shared = Shared()
    for number, rank in enumerate((4, 8, 2)):
        train(place, f"once-{number}", shared, tuning__rank=rank)
    assert (len(loaded), len(read)) == (1, 1)


def test_a_copy_holds_the_same_tensors_but_its_own(place: Path) -> None:
    base = tiny_model()
    own = base.get_output_embeddings().weight
    copied = over_same_weights(base, [own])
    assert type(copied) is type(base)
    for (name, one), (_, other) in zip(base.named_parameters(), copied.named_parameters(), strict=True):
        assert (one.data_ptr() == other.data_ptr()) is (one is not own), name
        assert torch.equal(one, other)
    assert all(layer.self_attn.config is copied.config for layer in copied.model.layers)
    assert copied.config is not base.config
