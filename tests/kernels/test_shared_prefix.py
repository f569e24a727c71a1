"""A common beginning is packed once, and loss and gradients are those of separate rows."""

import numpy as np
import pytest
import torch

from lmtune.data.types import TokenizedExample
from lmtune.forward.packed import PackedForward
from lmtune.models.tuning.base import trainable
from tests.tiny import adapted, pack_rows, random_rows, tiny_model, token_sequence


def rows_with_prefix(count: int, shared: int, first_label: int = 0) -> list[TokenizedExample]:
    """Rows of `shared` equal tokens and some of their own; trained from `first_label` of the own tokens on."""
    generator = np.random.default_rng(3)
    prefix = generator.integers(3, 128, shared)
    rows = []
    for index in range(count):
        ids = np.concatenate([prefix, generator.integers(3, 128, 5 + index)])
        trained = np.arange(len(ids)) >= shared + first_label
        rows.append(TokenizedExample(f"rows.jsonl:{index + 1}", [token_sequence(ids, trained)]))
    return rows


def test_the_prefix_is_packed_once() -> None:
    rows = rows_with_prefix(4, 20)
    batch = pack_rows(rows, share_prefixes=True)
    assert batch.segments.prefixes == (None, 0, 0, 0, 0)
    assert batch.segments.lengths[0] == 20
    assert batch.input_ids.shape[1] == 20 + sum(5 + index for index in range(4))
    assert batch.num_tokens == pack_rows(rows).num_tokens == sum(25 + index for index in range(4))


def test_short_common_beginnings_and_trained_tokens_are_not_shared() -> None:
    assert pack_rows(rows_with_prefix(4, 10), share_prefixes=True).segments.is_plain
    same = rows_with_prefix(2, 40)
    for row in same:
        row.sequences[0].loss_mask[1:] = True  # nothing before the answer but one token
    assert pack_rows(same, share_prefixes=True).segments.is_plain


def test_layouts_without_a_common_beginning_stay_plain() -> None:
    rows = random_rows(9).rows
    shared, plain = (pack_rows(rows, share_prefixes=share).segments for share in (True, False))
    assert shared == plain
    assert shared.is_plain


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gpt2"])
@pytest.mark.parametrize("first_label", [0, 2])
def test_loss_and_gradients_are_those_of_separate_rows(kind: str, first_label: int) -> None:
    forward = PackedForward(adapted(tiny_model(kind)).eval())
    assert forward.shares_prefixes
    rows = [*rows_with_prefix(4, 30, first_label), *random_rows(3).rows]
    results = []
    for share in (False, True):
        batch = pack_rows(rows, share)
        assert batch.segments.is_plain is not share
        forward.model.zero_grad()
        with forward.context():
            total = forward(batch).logprobs.sum() * -0.01
            total.backward()
        results.append((total.item(), {n: p.grad.clone() for n, p in trainable(forward.model).items()}))
    (plain_loss, plain), (loss, shared) = results
    assert loss == pytest.approx(plain_loss, abs=1e-5)
    for name, gradient in plain.items():
        torch.testing.assert_close(shared[name], gradient, atol=1e-6, rtol=1e-4)
