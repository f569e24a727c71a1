"""Architectures, each as a tiny random model: a packed step has the loss and gradients of a plain loop."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from lmtune.forward.packed import PackedForward
from lmtune.models.tuning.base import trainable
from tests.architectures import architecture
from tests.tiny import Rows, adapted, random_rows, token_sequence
from tests.training.test_gradients import by_hand, lmtune_step

FAST = ("gemma2", "gpt_oss", "qwen3_5_text", "qwen3_next", "lfm2", "granitemoehybrid")


def rows_behind_a_prefix() -> Rows:
    """Six rows, four of which begin alike for longer than a window of eight."""
    rows = random_rows(6).rows
    prefix = rows[0].sequences[0].input_ids[:1].repeat(18)
    for index in range(2, 6):
        sequences = [
            token_sequence(np.append(prefix, s.input_ids), np.append(np.zeros(18, dtype=bool), s.loss_mask))
            for s in rows[index].sequences
        ]
        rows[index] = dataclasses.replace(rows[index], sequences=tuple(sequences))
    return Rows(rows)


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
