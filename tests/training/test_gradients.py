"""A step's loss and gradient are those of a hand-written loop, however the step is cut."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmtune.batching.packing import pack_bins
from lmtune.batching.plan import Totals, Unit
from lmtune.batching.prefetch import pack_units
from lmtune.forward.packed import PackedForward
from lmtune.models.device import is_out_of_memory
from lmtune.models.structure import base_of
from lmtune.models.tuning.base import trainable
from lmtune.models.tuning.full import Full
from lmtune.objectives.sft import Sft
from lmtune.parallel.base import GradientBuffer
from lmtune.parallel.single import Single
from lmtune.training.optim import update
from lmtune.training.step import find_nonfinite_examples, step_gradients
from tests.tiny import KINDS, Rows, adapted, pack_rows, random_rows, tiny_model, weighted


def by_hand(model, rows: Rows) -> tuple[float, dict[str, torch.Tensor], float]:
    """Loss, gradients and their norm of all rows, one sequence at a time, in plain PyTorch."""
    parameters, base = trainable(model), base_of(model)
    model.zero_grad()
    denominator, total = sum(row.weight * sum(s.num_targets for s in row.sequences) for row in rows.rows), 0.0
    for row in rows.rows:
        for sequence in row.sequences:
            ids = torch.tensor(sequence.input_ids, dtype=torch.long)
            kept = torch.tensor(sequence.loss_mask[1:])
            logits = base(input_ids=ids[None]).logits[0, :-1]
            loss = row.weight * F.cross_entropy(logits[kept], ids[1:][kept], reduction="sum") / denominator
            loss.backward()
            total += loss.item()
    gradients = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    return total, gradients, float(torch.cat([g.flatten() for g in gradients.values()]).norm())


def totals_of(rows: Rows) -> Totals:
    """Of a step of all rows."""
    return Totals.of(rows.sequences, range(len(rows)))


def lmtune_step(model, rows: Rows, budget: int, parallel: Single | None = None):
    """The same through lmtune, in micro-batches of at most `budget` tokens."""
    forward, table = PackedForward(model), rows.sequences
    places = zip(table.row.tolist(), table.place_in_row.tolist(), strict=True)
    units = [Unit(row, row, (place,)) for row, place in places]
    batches = (
        pack_units(rows, [units[place] for place in group], len(rows), forward.shares_prefixes)
        for group in pack_bins(table.num_tokens.tolist(), budget)
    )
    return step_gradients(forward, Sft(), trainable(model), batches, totals_of(rows), parallel or Single())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [1, 60, 10**6])
@pytest.mark.parametrize("weigh", [False, True])
def test_loss_and_gradients_equal_a_plain_loop(kind: str, budget: int, weigh: bool) -> None:
    model, rows = adapted(tiny_model(kind)), random_rows(8)
    rows = weighted(rows) if weigh else rows
    model.eval()  # GPT-2 has dropout of its own
    loss, gradients, norm = by_hand(model, rows)
    sums = lmtune_step(model, rows, budget)
    assert sums.loss == pytest.approx(loss, abs=1e-5)
    assert sums.grad_norm == pytest.approx(norm, rel=1e-5)
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-4)


def test_a_row_of_weight_two_is_the_row_twice() -> None:
    model, (one, other) = adapted(tiny_model()), random_rows(2).rows
    twice = lmtune_step(model, Rows([one, one, other]), 10**6)
    expected = {name: parameter.grad.clone() for name, parameter in trainable(model).items()}
    weighted_once = lmtune_step(model, Rows([replace(one, weight=2.0), other]), 10**6)
    assert weighted_once.loss == pytest.approx(twice.loss, abs=1e-6)
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("qwen3", False), ("gpt2", True)])
@pytest.mark.parametrize("budget", [60, 10**6])
def test_gradients_of_every_weight_equal_a_plain_loop(kind: str, tied: bool, budget: int) -> None:
    model, rows = Full().apply(tiny_model(kind, tie_word_embeddings=tied), 0, "x").module, random_rows(8)
    loss, gradients, norm = by_hand(model, rows)
    sums = lmtune_step(model, rows, budget)
    assert sums.loss == pytest.approx(loss, abs=1e-5)
    assert sums.grad_norm == pytest.approx(norm, rel=1e-5)
    assert ("lm_head.weight" in gradients) is not tied
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=2e-6, rtol=1e-4)


def test_gradient_checkpointing_changes_nothing() -> None:
    model, rows = adapted(tiny_model()), random_rows(6)
    plain = lmtune_step(model, rows, 10**6)
    before = {name: parameter.grad.clone() for name, parameter in trainable(model).items()}
    model.get_base_model().activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    again = lmtune_step(model, rows, 10**6)
    assert again.loss == plain.loss
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(parameter.grad, before[name])


def test_a_row_with_an_infinite_loss_is_found() -> None:
    model, rows = adapted(tiny_model()), random_rows(6)
    poisoned = rows.rows[3].sequences[0].input_ids
    poisoned[:] = 7
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.weight[7] = float("nan")
    share = [[Unit(row, row, (place,)) for row in range(6) for place in range(len(rows[row].sequences))]]
    sums = lmtune_step(model, rows, 10**6)
    assert not sums.is_finite
    sound = PackedForward(adapted(tiny_model()))
    assert find_nonfinite_examples(sound, Sft(), trainable(model), share, rows, Single()) == []
    found = find_nonfinite_examples(PackedForward(model), Sft(), trainable(model), share, rows, Single())
    assert "rows.jsonl:4" in found
    assert len(found) == sum(any(7 in d.input_ids for d in row.sequences) for row in rows.rows)


# What libraries say when memory is too small for them; the words are theirs.
SHORT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", 2),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("HIP out of memory. Tried to allocate 1.00 GiB."),
    RuntimeError("MPS backend out of memory (MPS allocated: 5.05 GB, other allocations: 2.29 GB, max allowed: 7 GB)."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:75] data. DefaultCPUAllocator: not enough memory: you tried to"),
    MemoryError(),
]


@pytest.mark.parametrize("error", [*SHORT_OF_MEMORY, "what a CPU says"], ids=lambda error: str(error)[:40])
def test_out_of_memory_is_reported_not_raised(monkeypatch: pytest.MonkeyPatch, error: object) -> None:
    model, rows = adapted(tiny_model()), random_rows(4)

    def explode(self, batch):
        if isinstance(error, str):
            torch.empty(2**60)
        raise error

    monkeypatch.setattr(PackedForward, "__call__", explode)
    assert lmtune_step(model, rows, 100).out_of_memory


OTHER_FAULTS = [
    torch.AcceleratorError("CUDA error: device-side assert triggered", 710),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    ValueError("out of memory"),
]


@pytest.mark.parametrize("error", OTHER_FAULTS, ids=lambda error: str(error)[:40])
def test_another_fault_is_not_taken_for_a_lack_of_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_nothing_large_is_allocated_after_the_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ran out of memory there could not tell the others, who wait for its gradient."""
    model, rows = adapted(tiny_model()), random_rows(4)
    forward, parameters = PackedForward(model), trainable(model)
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
            made = [t for t in tree_leaves(result) if torch.is_tensor(t)]
            sizes.extend(t.numel() for t in made if t.untyped_storage().data_ptr() not in given)
            return result

    watching = Sizes()

    class TwoRanks(Single):
        world_size = 2

        def sum_gradients(self, buffer: GradientBuffer) -> None:
            storages = {p.grad.untyped_storage().data_ptr() for p in parameters.values()}
            assert storages == {buffer.flat.untyped_storage().data_ptr()}

    def batches():
        yield pack_rows(rows.rows)
        watching.__enter__()  # from here on

    try:
        step_gradients(forward, Sft(), parameters, batches(), totals_of(rows), TwoRanks())
    finally:
        watching.__exit__(None, None, None)
    assert max(sizes) < 100 < sum(parameter.numel() for parameter in parameters.values())


def test_a_step_computes_nothing_in_64_bit() -> None:
    """Not every device has it: Apple's has not."""
    model, rows = adapted(tiny_model()), random_rows(6)
    parameters = trainable(model)
    found: list[str] = []

    class Find64Bit(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if any(torch.is_tensor(t) and t.dtype == torch.float64 for t in tree_leaves(result)):
                found.append(str(func))
            return result

    optimizer = torch.optim.AdamW(parameters.values(), lr=0.0, fused=True)
    with Find64Bit():
        sums = lmtune_step(model, rows, 60)
        update(optimizer, parameters.values(), 1e-3, sums.grad_norm, 1.0)
    assert not found
