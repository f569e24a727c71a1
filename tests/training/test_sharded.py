"""The frozen weights shared out over processes: the same update, half the weights a process, and every way it ends."""

from __future__ import annotations

import gc
import json
import os
import re
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from lmtune.training.checkpoint import problem_of
from tests.processes import KILL, at_step, completed, said, together
from tests.tiny import save_tiny
from tests.tokenizers import CHATML
from tests.workplace import finetune, make_workplace, write_config, write_rows

FSDP = "parallel.kind=fsdp"
PAIRS = [
    {"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No idea, ask someone else."} for n in range(9)
]
LABELS = [{"text": f"{'good' if n % 2 else 'bad'} number {n}", "label": "yes" if n % 2 else "no"} for n in range(12)]
CASES: dict[str, dict[str, Any]] = {
    "sft": {},
    "nf4": {"model__quantization": "nf4"},
    "int8 and DoRA": {"model__quantization": "int8", "tuning__use_dora": True},
    "checkpointed": {"train__gradient_checkpointing": True, "evaluation__every_steps": 2},
    "partial": {"tuning__kind": "partial", "tuning__parts": ["last_1_layers", "norms"]},
    "dpo": {"data__train": "pairs.jsonl", "data__validation": None, "objective__kind": "dpo"},
    "kto": {"data__train": "judged.jsonl", "data__validation": None, "objective__kind": "kto"},
    "classification": {"data__train": "labels.jsonl", "data__validation": None, "objective__kind": "classification"},
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_workplace(tmp_path_factory.mktemp("work"))
    write_rows(folder / "pairs.jsonl", PAIRS)
    write_rows(folder / "labels.jsonl", LABELS)
    write_rows(folder / "judged.jsonl", [
        {"prompt": f"What is {n}?", "completion": f"It is {n}.", "label": bool(n % 2)} for n in range(12)
    ])  # fmt: skip
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    """What a run has trained."""
    adapter, model = run / "adapter" / "adapter_model.safetensors", run / "merged" / "model.safetensors"
    return load_file(adapter if adapter.exists() else model)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_that_hold_the_model_together_learn_what_replicas_do(place: Path, case: str) -> None:
    # 3 examples a step in packs of one: the first process has two passes and the other one
    changes = {**CASES[case], "train__batch_size": 3, "train__micro_batch_tokens": 16, "train__max_steps": 4}
    name = case.replace(" ", "-")
    for kind in ("replicated", "fsdp"):
        write_config(place, **changes, run__name=f"{name}-{kind}")
        codes = together(place, "finetune", "run.yaml", f"parallel.kind={kind}")
        assert codes == [0, 0], said(place, "output0") + said(place, "output1")
    whole, parts = (weights(place / "runs" / f"{name}-{kind}") for kind in ("replicated", "fsdp"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(parts[key], tensor) for key, tensor in whole.items())  # which is that of one process
    tuned, again = (
        json.loads((place / "runs" / f"{name}-{kind}" / "summary.json").read_text())["tuned"]
        for kind in ("replicated", "fsdp")
    )
    assert (tuned is None) == (again is None)
    if tuned is not None:
        assert again["loss"] == pytest.approx(tuned["loss"], abs=1e-5)
    assert "Warning" not in said(place, "output0")


def note_weights() -> None:
    """Write down how many bytes of frozen weights this process holds."""
    held: dict[int, int] = {}
    for one in gc.get_objects():
        if isinstance(one, torch.nn.Parameter) and not one.requires_grad and one.device.type != "meta":
            storage = (one.to_local() if isinstance(one, DTensor) else one).untyped_storage()
            if storage.nbytes():  # else it is gathered when its layer runs
                held[storage.data_ptr()] = storage.nbytes()
    Path(f"weights{os.environ['RANK']}").write_text(str(sum(held.values())))


def test_each_process_holds_its_part(tmp_path: Path) -> None:
    place = make_workplace(tmp_path)
    save_tiny(place / "base", chat_template=CHATML, num_hidden_layers=24)
    write_config(place, train__max_steps=2, data__validation=None)
    troubles = {rank: at_step(2, note_weights) for rank in (0, 1)}
    assert together(place, "finetune", "run.yaml", FSDP, troubles=troubles) == [0, 0], said(place, "output0")
    whole = (place / "base" / "model.safetensors").stat().st_size
    for rank in (0, 1):
        assert int((place / f"weights{rank}").read_text()) < 0.6 * whole


def note_peak() -> None:
    """Write down the most memory that this process has held since it was forked."""
    status = Path("/proc/self/status").read_text().splitlines()
    kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    Path(f"peak{os.environ['RANK']}").write_text(str(kib * 1024))


@pytest.mark.slow
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_no_process_ever_holds_much_more_than_its_part(tmp_path: Path, stored: torch.dtype) -> None:
    """Of 14 layers of 12 MB each a process takes about half, until the first step, mapped or converted as it loads."""
    shape = {"hidden_size": 512, "intermediate_size": 1280, "num_attention_heads": 8, "num_key_value_heads": 8,
             "head_dim": 64}  # fmt: skip
    sizes, peaks = list[float](), list[int]()
    for layers in (2, 16):  # what the process holds beside is in both
        place = make_workplace(tmp_path / str(layers))
        save_tiny(place / "base", chat_template=CHATML, dtype=stored, num_hidden_layers=layers, **shape)
        write_config(place, train__max_steps=1, data__validation=None, model__dtype="float32")
        noted = {rank: at_step(1, note_peak) for rank in (0, 1)}
        assert together(place, "finetune", "run.yaml", FSDP, troubles=noted) == [0, 0], said(place, "output0")
        sizes.append((place / "base" / "model.safetensors").stat().st_size * 4 / stored.itemsize)
        peaks.append(max(int((place / f"peak{rank}").read_text()) for rank in (0, 1)))
    assert peaks[1] - peaks[0] < 0.8 * (sizes[1] - sizes[0])


def test_one_that_is_killed_ends_the_other_and_one_process_goes_on(tmp_path: Path) -> None:
    place = make_workplace(tmp_path)
    write_config(place)
    began = time.monotonic()
    codes = together(place, "finetune", "run.yaml", FSDP, troubles={1: at_step(5, KILL)})
    assert codes == [1, -9]
    assert time.monotonic() - began < 60
    assert "error: rank 0: a peer exited during step 5" in said(place, "output0")
    assert problem_of(place / "runs/trial/checkpoints/step-000003") is None
    assert completed(place, "finetune", "run.yaml").returncode == 0
    undisturbed = make_workplace(tmp_path / "other")
    finetune(undisturbed)
    one, two = (weights(folder / "runs" / "trial") for folder in (place, undisturbed))
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, atol=1e-5, rtol=0)


def test_one_that_hangs_is_named(tmp_path: Path) -> None:
    place = make_workplace(tmp_path)
    write_config(place, run__process_timeout_seconds=5)
    codes = together(place, "finetune", "run.yaml", FSDP, troubles={0: at_step(5, partial(time.sleep, 1000))})
    assert codes == [1, 1]
    assert re.search(r"timed out after 5 s .*; missing ranks: 0 \(phase: step 5\)", said(place, "output1"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tuning__kind": "full"}, "it shares out weights that are not trained; expected replicated"),
        ({"model__offload": "layers"}, "each process holds a part of the base"),
    ],
)
def test_what_is_not_shared_out_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    place = make_workplace(tmp_path)
    write_config(place, **change)
    assert together(place, "finetune", "run.yaml", FSDP) == [2, 2]
    assert says in said(place, "output0")


def test_a_model_whose_sequences_run_one_by_one_is_refused(tmp_path: Path) -> None:
    """Its processes would make as many passes as they have sequences, and wait for each other for ever."""
    place = make_workplace(tmp_path)
    rope = {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 16}
    save_tiny(place / "base", chat_template=CHATML, max_position_embeddings=64, rope_parameters=rope)
    write_config(place, train__batch_size=3, run__process_timeout_seconds=10)
    assert together(place, "finetune", "run.yaml", FSDP) == [2, 2], said(place, "output0")
    assert "parallel.kind: fsdp; sequence packing disabled" in said(place, "output0")
