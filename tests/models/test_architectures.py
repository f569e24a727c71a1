"""Architectures, each as a tiny random model: a packed step has the loss and gradients of a plain loop."""

from __future__ import annotations

import pytest
import torch

from lmtune.forward.packed import PackedForward
from lmtune.models.tuning.base import trainable
from tests.architectures import architecture
from tests.tiny import adapted, random_rows
from tests.training.test_gradients import by_hand, lmtune_step

FAST = ("gemma2", "gpt_oss", "qwen3_5_text")
PACKED = {"gemma2", "gpt_oss"}


@pytest.mark.parametrize("name", FAST)
def test_a_step_equals_a_plain_loop(name: str) -> None:
    model, rows = adapted(architecture(name)).eval(), random_rows(6)
    loss, gradients, _ = by_hand(model, rows)
    assert PackedForward(model).packs == (name in PACKED)
    assert lmtune_step(model, rows, 10**6).loss == pytest.approx(loss, abs=1e-5)
    for key, parameter in trainable(model).items():
        torch.testing.assert_close(parameter.grad, gradients[key], atol=1e-5, rtol=1e-3)
