"""Architectures, each as a tiny random model: a packed step has the loss and gradients of a plain loop."""

from __future__ import annotations

import pytest
import torch

from lmtune.forward.packed import PackedForward
from lmtune.models.tuning.base import trainable
from tests.architecture_table import entries_of, stored_entries
from tests.architectures import ARCHITECTURES, architecture
from tests.tiny import adapted, rows_behind_a_prefix
from tests.training.test_gradients import by_hand, lmtune_step

FAST = ("gemma2", "gpt_oss", "phimoe", "llama4_text", "qwen3_5_text", "qwen3_next", "lfm2", "granitemoehybrid")


@pytest.mark.parametrize("name", FAST)
def test_a_step_equals_a_plain_loop(name: str) -> None:
    model, rows = adapted(architecture(name)).eval(), rows_behind_a_prefix()
    loss, gradients, _ = by_hand(model, rows)
    forward = PackedForward(model)
    assert forward.packs
    assert forward.shares_prefixes
    assert lmtune_step(model, rows, 10**6).loss == pytest.approx(loss, abs=1e-5)
    for key, parameter in trainable(model).items():
        torch.testing.assert_close(parameter.grad, gradients[key], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_5_text"])
def test_activation_checkpointing_changes_nothing(name: str) -> None:
    """Attention by blocks computes its scores a second time within a layer that is computed a second time."""
    model, rows = adapted(architecture(name)).eval(), rows_behind_a_prefix()
    plain = lmtune_step(model, rows, 10**6)
    before = {key: parameter.grad.clone() for key, parameter in trainable(model).items()}
    model.get_base_model().activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    assert lmtune_step(model, rows, 10**6).loss == plain.loss
    for key, parameter in trainable(model).items():
        torch.testing.assert_close(parameter.grad, before[key])


def test_the_table_of_the_docs_has_every_architecture() -> None:
    assert list(stored_entries()) == list(ARCHITECTURES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_5_moe_text", "gpt_oss"])
def test_the_table_of_the_docs_is_true_of(name: str) -> None:
    assert entries_of([name])[name] == stored_entries()[name]


@pytest.mark.long
def test_the_table_of_the_docs_is_true() -> None:
    found, stored = entries_of(ARCHITECTURES), stored_entries()
    assert {name: found[name] for name in found if found[name] != stored[name]} == {}
