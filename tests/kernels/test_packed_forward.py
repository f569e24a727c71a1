"""Packing changes nothing: each document scores as it does alone, whatever lies beside it."""

import pytest
import torch
import torch.nn.functional as F

from lmtune.batching.packing import pack
from lmtune.forward.packed import PackedForward, count_wrong_tokens
from tests.tiny import KINDS, Rows, adapted, random_rows, tiny_model


def losses_alone(model, rows: Rows) -> torch.Tensor:
    """The plain twin: each document in a forward pass of its own, with full logits."""
    base, losses = model.get_base_model(), []
    for row in rows.rows:
        for document in row.sequences:
            ids = torch.tensor(document.input_ids, dtype=torch.long)
            logits = base(input_ids=ids[None]).logits[0, :-1]
            kept = torch.tensor(document.loss_mask[1:])
            losses.append(F.cross_entropy(logits[kept], ids[1:][kept], reduction="none"))
    return torch.cat(losses)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_losses_equal_those_of_documents_alone(kind: str) -> None:
    model, rows = adapted(tiny_model(kind)).eval(), random_rows(7)
    forward = PackedForward(model)
    assert forward.packs, forward.reason
    with torch.no_grad(), forward.ready():
        packed = forward(pack(rows.rows)).losses
    torch.testing.assert_close(packed, losses_alone(model, rows), atol=1e-5, rtol=1e-5)


def test_a_sliding_window_shorter_than_the_rows() -> None:
    model, rows = adapted(tiny_model("mistral", sliding_window=6)).eval(), random_rows(5)
    forward = PackedForward(model)
    with torch.no_grad(), forward.ready():
        packed = forward(pack(rows.rows)).losses
    torch.testing.assert_close(packed, losses_alone(model, rows), atol=1e-5, rtol=1e-5)


def test_changing_one_document_leaves_the_others_alone() -> None:
    model, rows = adapted(tiny_model()).eval(), random_rows(4)
    forward = PackedForward(model)
    with torch.no_grad(), forward.ready():
        before = forward(pack(rows.rows))
        changed = rows.rows[1].sequences[0]
        changed.input_ids[:] = 5
        after = forward(pack(rows.rows))
    batch = pack(rows.rows)
    other = batch.examples != 1
    assert torch.equal(before.losses[other], after.losses[other])
    assert not torch.equal(before.losses[~other], after.losses[~other])


def test_a_model_that_cannot_pack_runs_document_by_document(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = adapted(tiny_model()).eval(), random_rows(4)

    def leaking(module, query, key, value, mask, **kwargs):
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return output.transpose(1, 2).contiguous(), None

    monkeypatch.setattr("lmtune.kernels.attention.attention_by_document", leaking)
    forward = PackedForward(model)
    assert not forward.packs
    assert "outputs would differ" in str(forward.reason)
    with torch.no_grad(), forward.ready():
        scores = forward(pack(rows.rows))
    torch.testing.assert_close(scores.losses, losses_alone(model, rows), atol=1e-5, rtol=1e-5)


def test_generation_finds_the_models_own_attention_again() -> None:
    model = adapted(tiny_model()).eval()
    before = model.get_base_model().config._attn_implementation
    forward = PackedForward(model)
    with forward.ready():
        assert model.get_base_model().config._attn_implementation != before
    assert model.get_base_model().config._attn_implementation == before


def test_wrong_tokens_are_counted_for_each_example() -> None:
    batch = pack(random_rows(6).rows)
    correct = torch.ones(len(batch.targets), dtype=torch.bool)
    assert count_wrong_tokens(correct, batch).tolist() == [0] * 6
    correct[(batch.examples == 2).nonzero()[0]] = False
    assert count_wrong_tokens(correct, batch).tolist() == [0, 0, 1, 0, 0, 0]


def test_what_one_process_does_without_all_do_without() -> None:
    one, other = PackedForward(adapted(tiny_model())), PackedForward(adapted(tiny_model()))
    other.prefix_reason = "too little memory there"
    for reasons in (one.reasons, other.reasons):
        one.disable(reasons)
    assert one.reasons == (None, None, None, "too little memory there")
    assert not one.shares_prefixes
