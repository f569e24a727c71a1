"""The memory estimate: counted from the model's shape, and a micro-batch that fits it."""

import dataclasses
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmtune.config.schema import LoraConfig, ModelConfig
from lmtune.data.sequences import SequenceTable
from lmtune.forward.packed import PackedForward
from lmtune.models.base import load_model
from lmtune.models.device import free_memory, return_freed_memory
from lmtune.models.parameters import Parameters, count_parameters
from lmtune.models.tuning.base import trainable
from lmtune.models.tuning.lora import attach_adapter
from lmtune.training.estimate import Forecast, flop_per_token, forecast, planned_shape
from lmtune.training.memory import (
    GIB,
    ActivationBytes,
    ModelShape,
    estimate,
    fitting_micro_batch,
    longest_unit,
    measure_activations,
    shape_of,
)
from tests.tiny import EXPERT_KINDS, adapted, save_tiny, tiny_model
from tests.workplace import config_of

QWEN_LIKE = ModelShape(28, 1024, 2048, 3072, 151_936, 440_000_000, 155_000_000, 10_000_000)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama", {}), ("qwen3", {"tie_word_embeddings": True}), ("gpt2", {}), *((kind, {}) for kind in EXPERT_KINDS)],
)
def test_the_shape_counts_every_weight_once(kind: str, changes: dict[str, bool]) -> None:
    model = tiny_model(kind, **changes)
    shape = shape_of(model, counted(model))
    assert shape.linear_parameters + shape.expert_parameters + shape.other_parameters == all_of(model)
    assert (shape.num_layers, shape.hidden_size, shape.vocabulary_size) == (model.config.num_hidden_layers, 64, 128)


def counted(model: Any, **settings: Any) -> Parameters:
    """What an adapter of rank 4 over the model has."""
    return count_parameters(model, LoraConfig(**{"rank": 4, "alpha": 8, **settings}), "none", torch.float32)


def all_of(model: Any) -> int:
    """All parameters, each once."""
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2_moe"])
@pytest.mark.parametrize("targets", ["all-linear", r".*(up_proj|c_fc)"])
def test_the_planned_shape_is_the_loaded_ones(tmp_path: Path, kind: str, targets: str) -> None:
    """From config.json alone, as `lmtune plan` has it."""
    settings = LoraConfig(rank=4, alpha=8, target_modules=targets)
    base = ModelConfig(name=str(save_tiny(tmp_path, kind)), quantization="nf4")
    planned, parameters = planned_shape(base, settings, torch.float32)
    model = load_model(base, "cpu")
    loaded = count_parameters(model, settings, "nf4", torch.float32)
    assert loaded == parameters
    assert shape_of(model, loaded) == planned
    attached = trainable(attach_adapter(model, settings, 1, "x"))
    assert parameters.trained == sum(parameter.numel() for parameter in attached.values())


def test_activations_grow_with_tokens_and_shrink_by_recomputation() -> None:
    one = estimate(QWEN_LIKE, 1024, "nf4", torch.bfloat16, 0.5)
    two = estimate(QWEN_LIKE, 2048, "nf4", torch.bfloat16, 0.5)
    cheap = estimate(QWEN_LIKE, 1024, "nf4", torch.bfloat16, 0.5, 28)
    assert two.activations == pytest.approx(2 * one.activations)
    assert cheap.activations < one.activations / 5
    assert cheap.logits == one.logits
    assert estimate(QWEN_LIKE, 1024, "nf4", torch.bfloat16, 0.0).logits == 0


PER_TOKEN = ActivationBytes(layer=100_000.0, boundary=2_000.0, outside=4_000.0, num_layers=10)


@pytest.mark.parametrize("device", ["cpu", "mps", "cuda"])
@pytest.mark.parametrize("free_gib", [1, 80])
def test_the_micro_batch_fits_the_free_memory(free_gib: int, device: str) -> None:
    tokens, checkpointed = fitting_micro_batch(PER_TOKEN, 512, free_gib * GIB, device)
    assert tokens * PER_TOKEN.per_token(checkpointed) < free_gib * GIB
    assert 512 <= tokens <= 16384


def test_the_longest_row_always_fits_in_the_budget() -> None:
    assert fitting_micro_batch(PER_TOKEN, 100_000, 10**9, "cuda") == (100_000, 10)
    assert fitting_micro_batch(PER_TOKEN, 7, 0, "cpu") == (7, 10)


def test_layers_are_checkpointed_for_the_budget_that_is_asked_for() -> None:
    free = int(2000 * PER_TOKEN.per_token(4) / 0.6) + 10_000
    assert fitting_micro_batch(PER_TOKEN, 100, free, "cpu", 2000) == (2000, 4)
    assert fitting_micro_batch(PER_TOKEN, 100, free, "cpu", 150) == (150, 0)
    assert fitting_micro_batch(PER_TOKEN, 2000, free, "cpu", 100) == (2000, 4)  # a row is never cut


def test_pairs_on_a_cpu_take_no_more_memory_than_makes_them_fast() -> None:
    """Two pairs of 300 and 50, and of 700 and 60 tokens: the micro-batch holds the longest pair, or 512 tokens."""
    table = SequenceTable(np.array([300, 50, 700, 60], dtype=np.int32), np.ones(4, dtype=np.int32), np.array([0, 2, 4]))
    assert (longest_unit(table, "pair"), longest_unit(table, "answer")) == (760, 700)
    assert fitting_micro_batch(PER_TOKEN, 300, 80 * GIB, "cpu", rows="pair") == (512, 0)
    assert fitting_micro_batch(PER_TOKEN, 760, 80 * GIB, "cpu", rows="pair") == (760, 0)
    assert fitting_micro_batch(PER_TOKEN, 300, 80 * GIB, "cpu", 4000, rows="pair") == (4000, 0)
    assert fitting_micro_batch(PER_TOKEN, 300, 80 * GIB, "cpu") == (2048, 0)


def test_what_does_not_grow_with_the_tokens_is_subtracted_first() -> None:
    heavy = dataclasses.replace(PER_TOKEN, fixed=10**9)
    assert heavy.constant(0) == 10 * 10**9, "no more than all layers"
    assert (heavy.constant(4), heavy.constant(10)) == (7 * 10**9, 10**9)
    assert fitting_micro_batch(PER_TOKEN, 512, 8 * GIB, "cuda")[1] == 0
    tokens, checkpointed = fitting_micro_batch(heavy, 512, 8 * GIB, "cuda")
    assert tokens * heavy.per_token(checkpointed) + heavy.constant(checkpointed) < 8 * GIB * 0.75
    assert checkpointed >= 6


def test_processes_on_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmtune.models.device._available_ram", lambda: 12_000)
    assert free_memory(torch.device("cpu")) == 12_000
    assert free_memory(torch.device("cpu"), mapped=2_000) == 10_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert free_memory(torch.device("cpu")) == 4_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep less, and cannot be asked")
def test_what_was_freed_goes_back_to_the_system() -> None:
    """In pieces under glibc's limit for memory of their own, the last of them kept, as a step leaves them."""
    pieces = [torch.ones(2**14) for _ in range(3000)]  # 64 KiB each
    pieces = [pieces[-1]]
    before = resident()
    return_freed_memory()
    assert resident() < before - 100_000  # KiB
    assert len(pieces) == 1


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


# --- what `lmtune plan` says of a run


def test_the_work_of_a_token_is_the_designs_formula() -> None:
    """F = 4N + 4fH + 6P + 7saL."""
    work = 4 * 440e6 + 4 * 0.5 * 151_936 * 1024 + 6 * 10e6 + 7 * 300 * 2048 * 28
    assert flop_per_token(QWEN_LIKE, 0.5, 300.0) == pytest.approx(work)


def test_a_forecast_counts_steps_tokens_and_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = str(save_tiny(tmp_path))
    config = config_of(model__name=base, train__max_steps=None, train__epochs=2, train__batch_size=5)
    tokens, trained = np.full(10, 30, dtype=np.int32), np.full(10, 10, dtype=np.int32)
    found = forecast(config, SequenceTable.one_each(tokens, trained), torch.device("cpu"), 1)
    assert (found.steps, found.rows, found.tokens, found.trained_tokens) == (4, 10, 600, 200)
    assert found.parameters.trained == 8192
    assert found.advice == ()
    assert found.checkpointed_layers == 0
    assert 0 < found.seconds.training < 60
    assert (found.seconds.scoring, found.seconds.answers) == (0, 0)
    assert found.seconds.total == found.seconds.loading + found.seconds.training
    assert found.memory.total < found.free_gib
    assert dict(found.lines())["optimizer steps"] == "4"
    monkeypatch.setattr("lmtune.models.device._available_ram", lambda: 1000)
    full = forecast(config, SequenceTable.one_each(tokens, trained), torch.device("cpu"), 1)
    assert full.checkpointed_layers == 2
    assert "it does not fit the 0.0 GiB that are free: try model.quantization=nf4" in full.advice[0]


def test_a_forecast_names_the_longest_row_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = str(save_tiny(tmp_path))
    monkeypatch.setattr("lmtune.models.device._available_ram", lambda: 3 * 2**20)

    def planned(longest: int, **changes: Any) -> Forecast:
        tokens = np.array([30, 40, longest], dtype=np.int32)
        config = config_of(model__name=base, **changes)
        return forecast(config, SequenceTable.one_each(tokens, tokens // 3), torch.device("cpu"), 1)

    most = planned(50).longest_fitting
    fits = planned(most)
    assert dict(fits.lines())["longest row"] == f"{most:,} tokens; up to about {most:,} fit"
    assert fits.checkpointed_layers == 2
    assert not any("longest row" in one for one in fits.advice)
    assert f"set data.max_length={most}" in planned(most + 1).advice[-1]
    whole = planned(50, train__gradient_checkpointing=False).longest_fitting
    assert 0 < whole < most


def test_a_forecast_has_scoring_and_answers_beside_training(tmp_path: Path) -> None:
    base = str(save_tiny(tmp_path))
    tokens, trained = np.full(10, 30, dtype=np.int32), np.full(10, 10, dtype=np.int32)
    held_out = SequenceTable.one_each(tokens[:4], trained[:4])

    def planned(**changes: Any) -> dict[str, str]:
        config = config_of(model__name=base, **changes)
        found = forecast(config, SequenceTable.one_each(tokens, trained), torch.device("cpu"), 1, held_out)
        assert found.seconds.scoring > 0
        return dict(found.lines())

    lines = planned(evaluation__exact_match_rows=3, evaluation__max_new_tokens=100_000)
    assert {name for name in lines if name.startswith("time")} == {
        "time: loading", "time: training", "time: scoring validation rows", "time: generating answers",
        "time: total, estimated",
    }  # fmt: skip
    assert lines["time: generating answers"] != "about 1 s"
    assert "time: generating answers" not in planned(evaluation__exact_match_rows=0)


def test_a_forecast_has_the_dense_copies_that_a_run_keeps(tmp_path: Path) -> None:
    tokens = np.full(10, 30, dtype=np.int32)
    for quantization, kept in (("nf4", True), ("int8", True), ("none", False)):
        config = config_of(model__name=str(save_tiny(tmp_path)), model__quantization=quantization)
        found = forecast(config, SequenceTable.one_each(tokens, tokens // 3), torch.device("cpu"), 1)
        assert (found.memory.dense_copies > 0) is kept
        assert any("dense copies" in name for name, _ in found.lines()) is kept


def test_a_forecast_counts_what_is_there_of_a_mixture_of_experts(tmp_path: Path) -> None:
    tokens = np.full(10, 30, dtype=np.int32)
    config = config_of(model__name=str(save_tiny(tmp_path, "qwen3_moe")), model__quantization="nf4")
    found = forecast(config, SequenceTable.one_each(tokens, tokens // 3), torch.device("cpu"), 1)
    assert found.memory.expert_copies == pytest.approx(4 * 3 * 64 * 64 * 4 / GIB)
    assert found.memory.base_weights > 4 * 3 * 64 * 64 * 4 / GIB, "experts are not quantized"
    said = dict(found.lines())["parameters"]
    numbers = found.parameters
    assert (
        f"{numbers.trained:,} trained (LoRA r=4 on 11 modules and 2 expert tensors, over 98,304 of the base); " in said
    )
    assert f" frozen: {numbers.quantized:,} in nf4, {numbers.frozen - numbers.quantized:,} in float32 (experts " in said
    assert f"(experts 49,152: 0.188 MiB; embeddings, head and norms {numbers.other:,}); not adapted: router" in said
    assert not [value for _, value in found.lines() if value.startswith("0.0")]


def test_activations_of_texts_are_measured_though_nothing_predicts_their_first_token() -> None:
    assert measure_activations(PackedForward(adapted(tiny_model())), 1.0) is not None


def test_a_forecast_of_sharded_layers_is_of_one_process(tmp_path: Path) -> None:
    tokens = np.full(10, 30, dtype=np.int32)
    rows, base = SequenceTable.one_each(tokens, tokens // 3), str(save_tiny(tmp_path, num_hidden_layers=8))
    sharded = config_of(model__name=base, parallel__kind="fsdp")

    def planned(config: Any, processes: int) -> Any:
        return forecast(config, rows, torch.device("cpu"), processes)

    whole, alone = (planned(config, 1).memory.base_weights for config in (config_of(model__name=base), sharded))
    assert alone == whole
    assert planned(config_of(model__name=base), 4).memory.base_weights == whole
    found = {processes: planned(sharded, processes) for processes in (2, 4)}
    layers = (found[2].memory.base_weights - found[4].memory.base_weights) * 4
    # two layers of eight are whole at once; the vectors, which stay whole, count with the rest
    assert whole - found[2].memory.base_weights == pytest.approx(layers * (1 - 1 / 2 - 2 / 8))
    assert dict(found[4].lines())["sharding"].startswith("a process holds 1/4 of each layer")


def test_a_forecast_of_full_tuning_shares_out_what_learns(tmp_path: Path) -> None:
    tokens = np.full(10, 30, dtype=np.int32)
    config = config_of(
        model__name=str(save_tiny(tmp_path, num_hidden_layers=24)), tuning__kind="full", parallel__kind="fsdp"
    )
    one, two = (
        forecast(config, SequenceTable.one_each(tokens, tokens // 3), torch.device("cpu"), processes).memory
        for processes in (1, 2)
    )
    assert 0.5 < two.trained_and_optimizer / one.trained_and_optimizer < 0.65
    assert one.base_weights == pytest.approx(0, abs=1e-6)
    assert 0 < two.base_weights < one.trained_and_optimizer / 4  # the layers that are gathered
