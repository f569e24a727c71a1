"""What a run is made of: every technique is switched on where it can be."""

import contextlib
from pathlib import Path

import pytest

from lmtune.runs import RunDirectory
from lmtune.training import loop, memory, session
from lmtune.training.forecast import token_cost
from tests.tiny import OneProcess
from tests.workplace import config_of, inside, make_workplace

SYSTEM = "You work in a shop for garden tools and answer every question of a customer kindly, in one short sentence."


class Alone(OneProcess):
    """One process, which need not wait for another to read the rows."""

    main_process_first = contextlib.nullcontext


def test_a_run_has_every_technique(tmp_path: Path) -> None:
    folder = make_workplace(tmp_path / "work")
    with inside(folder):
        config = config_of(data__system=SYSTEM, model__quantization="nf4")
        prepared = session.prepare(config, Alone())
        job = prepared.job(RunDirectory.of(config.run), None)
        with loop._feeder(job, prepared.micro_batch_tokens) as feeder:
            feeder.start(1)
            feeder.next_step()
            shared = [not batch.layout.is_plain for batch in feeder.batches()]
    forward = prepared.forward
    assert forward.notes == []
    layers = [module for module in forward.base.modules() if hasattr(module, "base_layer")]
    assert layers
    assert all(type(module).__name__.startswith("Fused") for module in layers)
    assert all(module.lmtune_weight.keep for module in layers)  # dequantised once
    assert shared
    assert all(shared)  # the system prompt is laid down once
    assert job.cost == token_cost(memory.shape_of(forward.model))
    assert min(job.cost.before, job.cost.trained) > 0


def test_layers_are_computed_twice_where_memory_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmtune.training.activations import is_checkpointed_throughout

    folder = make_workplace(tmp_path / "work")
    for free, twice in ((2**34, False), (2**16, True)):
        monkeypatch.setattr(session, "free_memory", lambda device, free=free: free)
        with inside(folder):
            prepared = session.prepare(config_of(), Alone())
        assert is_checkpointed_throughout(prepared.forward.base) is twice
