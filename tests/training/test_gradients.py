"""A step's loss and gradient are those of a hand-written loop, however the step is cut."""

import pytest
import torch
import torch.nn.functional as F

from lmtune.data.packing import fill, pack
from lmtune.kernels.packed_forward import PackedForward
from lmtune.models.adapters import trainable
from lmtune.training.gradients import find_offenders, step_gradients
from tests.tiny import KINDS, OneProcess, Rows, adapted, random_rows, tiny_model


def by_hand(model, rows: Rows) -> tuple[float, dict[str, torch.Tensor], float]:
    """Loss, gradients and their norm of all rows, one document at a time, in plain PyTorch."""
    parameters, base = trainable(model), model.get_base_model()
    model.zero_grad()
    num_trained, total = int(rows.num_trained.sum()), 0.0
    for row in rows.rows:
        for document in row.documents:
            ids = torch.tensor(document.input_ids, dtype=torch.long)
            kept = torch.tensor(document.trained[1:])
            logits = base(input_ids=ids[None]).logits[0, :-1]
            loss = F.cross_entropy(logits[kept], ids[1:][kept], reduction="sum") / num_trained
            loss.backward()
            total += loss.item()
    gradients = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    return total, gradients, float(torch.cat([g.flatten() for g in gradients.values()]).norm())


def lmtune_step(model, rows: Rows, budget: int):
    """The same through lmtune, in micro-batches of at most `budget` tokens."""
    forward = PackedForward(model)
    groups = fill(rows.num_tokens.tolist(), budget)
    batches = (pack([rows[row] for row in group], forward.shares_prefixes) for group in groups)
    return step_gradients(forward, trainable(model), batches, int(rows.num_trained.sum()), OneProcess())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [1, 60, 10**6])
def test_loss_and_gradients_equal_a_plain_loop(kind: str, budget: int) -> None:
    model, rows = adapted(tiny_model(kind)), random_rows(8)
    model.eval()  # GPT-2 has dropout of its own
    loss, gradients, norm = by_hand(model, rows)
    sums = lmtune_step(model, rows, budget)
    assert sums.loss == pytest.approx(loss, abs=1e-5)
    assert sums.grad_norm == pytest.approx(norm, rel=1e-5)
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-4)


def test_gradient_checkpointing_changes_nothing() -> None:
    model, rows = adapted(tiny_model()), random_rows(6)
    plain = lmtune_step(model, rows, 10**6)
    before = {name: parameter.grad.clone() for name, parameter in trainable(model).items()}
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    again = lmtune_step(model, rows, 10**6)
    assert again.loss == plain.loss
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(parameter.grad, before[name])


def test_a_row_with_an_infinite_loss_is_found() -> None:
    model, rows = adapted(tiny_model()), random_rows(6)
    poisoned = rows.rows[3].documents[0].input_ids
    poisoned[:] = 7
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.weight[7] = float("nan")
    share = fill(rows.num_tokens.tolist(), 10**6)
    sums = lmtune_step(model, rows, 10**6)
    assert not sums.is_finite
    offenders = find_offenders(PackedForward(adapted(tiny_model())), trainable(model), share, rows.__getitem__)
    assert offenders == []
    offenders = find_offenders(PackedForward(model), trainable(model), share, rows.__getitem__)
    assert "rows.jsonl:4" in offenders
    assert len(offenders) == sum(any(7 in d.input_ids for d in row.documents) for row in rows.rows)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, "what a CPU says"])
def test_out_of_memory_is_reported_not_raised(monkeypatch: pytest.MonkeyPatch, error: object) -> None:
    model, rows = adapted(tiny_model()), random_rows(4)

    def explode(self, batch):
        if isinstance(error, str):
            torch.empty(2**60)
        raise error

    monkeypatch.setattr(PackedForward, "__call__", explode)
    assert lmtune_step(model, rows, 100).out_of_memory


def test_another_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(self, batch):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(PackedForward, "__call__", explode)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        lmtune_step(adapted(tiny_model()), random_rows(4), 100)
