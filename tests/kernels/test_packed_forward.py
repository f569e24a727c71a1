"""Packing changes nothing: each sequence scores as it does alone, whatever is beside it."""

import pytest
import torch
import torch.nn.functional as F

from lmtune.forward.capabilities import Capabilities
from lmtune.forward.packed import Outputs, PackedForward
from lmtune.objectives.sft import wrong_targets
from tests.tiny import KINDS, Rows, adapted, losses_of, pack_rows, random_rows, tiny_model


def losses_alone(model, rows: Rows) -> torch.Tensor:
    """The plain twin: each sequence in a forward pass of its own, with full logits."""
    base, losses = model.get_base_model(), []
    for row in rows.rows:
        for sequence in row.sequences:
            ids = torch.tensor(sequence.input_ids, dtype=torch.long)
            logits = base(input_ids=ids[None]).logits[0, :-1]
            kept = torch.tensor(sequence.loss_mask[1:])
            losses.append(F.cross_entropy(logits[kept], ids[1:][kept], reduction="none"))
    return torch.cat(losses)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_losses_equal_those_of_sequences_alone(kind: str) -> None:
    model, rows = adapted(tiny_model(kind)).eval(), random_rows(7)
    forward = PackedForward(model)
    assert forward.packs, forward.capabilities.packing
    torch.testing.assert_close(
        losses_of(forward, pack_rows(rows.rows)), losses_alone(model, rows), atol=1e-5, rtol=1e-5
    )


def test_a_sliding_window_shorter_than_the_rows() -> None:
    model, rows = adapted(tiny_model("mistral", sliding_window=6)).eval(), random_rows(5)
    forward = PackedForward(model)
    torch.testing.assert_close(
        losses_of(forward, pack_rows(rows.rows)), losses_alone(model, rows), atol=1e-5, rtol=1e-5
    )


def test_changing_one_sequence_leaves_the_others_alone() -> None:
    model, rows = adapted(tiny_model()).eval(), random_rows(4)
    forward = PackedForward(model)
    before = losses_of(forward, pack_rows(rows.rows))
    rows.rows[1].sequences[0].input_ids[:] = 5
    batch = pack_rows(rows.rows)
    after, other = losses_of(forward, batch), batch.example_of[batch.sequence_of] != 1
    assert torch.equal(before[other], after[other])
    assert not torch.equal(before[~other], after[~other])


def test_a_model_that_cannot_pack_runs_sequence_by_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = adapted(tiny_model()).eval(), random_rows(4)

    def leaking(module, query, key, value, mask, **kwargs):
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return output.transpose(1, 2).contiguous(), None

    monkeypatch.setattr("lmtune.kernels.attention.segment_attention", leaking)
    forward = PackedForward(model)
    assert not forward.packs
    assert "outputs differ" in str(forward.capabilities.packing)
    torch.testing.assert_close(
        losses_of(forward, pack_rows(rows.rows)), losses_alone(model, rows), atol=1e-5, rtol=1e-5
    )


def test_generation_finds_the_models_own_attention_again() -> None:
    model = adapted(tiny_model()).eval()
    before = model.get_base_model().config._attn_implementation
    forward = PackedForward(model)
    with forward.context():
        assert model.get_base_model().config._attn_implementation != before
    assert model.get_base_model().config._attn_implementation == before


def test_wrong_targets_are_counted_for_each_example() -> None:
    batch = pack_rows(random_rows(6).rows)
    logprobs, is_top1 = torch.zeros(len(batch.target_ids)), torch.ones(len(batch.target_ids), dtype=torch.bool)
    assert wrong_targets(Outputs(logprobs, is_top1), batch).tolist() == [0] * 6
    is_top1[(batch.example_of[batch.sequence_of] == 2).nonzero()[0]] = False
    assert wrong_targets(Outputs(logprobs, is_top1), batch).tolist() == [0, 0, 1, 0, 0, 0]


def test_what_one_rank_lacks_none_uses() -> None:
    one, other = Capabilities(), Capabilities(shared_prefixes="too little memory there")
    assert one.intersect(other) == other.intersect(one) == other
    assert Capabilities.none().intersect(one) == Capabilities.none()
