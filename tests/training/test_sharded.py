"""The layers shared out over processes: the same update, half the memory a process, and every way it ends."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from lmtune.models.tensor_shards import checkpoint_weights
from lmtune.parallel.sharded import _GatherInPlace
from lmtune.runs.store import checkpoint_folders
from lmtune.training.checkpoint import problem_of
from tests.faults.test_numbers import MARK, MARKED, no_loss_for_the_marked
from tests.processes import KILL, Trouble, at_call, at_step, completed, said, send, together, with_environment
from tests.tiny import save_tiny
from tests.tokenizers import CHATML
from tests.workplace import (
    QUESTIONS,
    checkpoints,
    finetune,
    make_workplace,
    trained_weights,
    write_config,
    write_rows,
    written_files,
)  # fmt: skip

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
    "dpo": {"data__train": "pairs.jsonl", "data__validation": None, "objective__kind": "dpo"},
    "kto": {"data__train": "judged.jsonl", "data__validation": None, "objective__kind": "kto"},
    "classification": {
        "data__train": "labels.jsonl", "data__validation": None, "objective__kind": "classification",
        "train__learning_rate": 1e-3,
    },
}  # fmt: skip
OF_PAIRS: dict[str, dict[str, Any]] = {
    kind: {
        "data__train": "pairs.jsonl",
        "data__validation": None,
        "objective__kind": kind,
        "train__learning_rate": 1e-3,
    }
    for kind in ("ipo", "orpo", "simpo", "reward")
}
OTHERS = {**OF_PAIRS, "regression": {**CASES["classification"], "data__train": "numbers.jsonl",
                                     "objective__kind": "regression"}}  # fmt: skip
ONE_TOKEN = ("classification", "reward", "regression")  # whose rows may be read as single tokens
FULL: dict[str, Any] = {"tuning__kind": "full", "train__learning_rate": 1e-3}
OWN_WEIGHTS: dict[str, dict[str, Any]] = {
    "full, not clipped": {"train__max_grad_norm": None},
    "full, clipped": {"train__max_grad_norm": 0.5, "train__weight_decay": 0.1},
    "full, checkpointed": {"train__gradient_checkpointing": True, "evaluation__every_steps": 2},
    "full, 16 bit": {"model__dtype": "bfloat16"},
    "partial": {"tuning__kind": "partial", "tuning__parts": ["last_1_layers", "norms"]},
    "full dpo": {"data__train": "pairs.jsonl", "data__validation": None, "objective__kind": "dpo"},
    "full classification": {
        "data__train": "labels.jsonl", "data__validation": None, "objective__kind": "classification"
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_workplace(tmp_path_factory.mktemp("work"))
    write_rows(folder / "pairs.jsonl", PAIRS)
    write_rows(folder / "labels.jsonl", LABELS)
    write_rows(folder / "numbers.jsonl", [{"text": f"number {n}", "label": n / 10} for n in range(12)])
    write_rows(folder / "judged.jsonl", [
        {"prompt": f"What is {n}?", "completion": f"It is {n}.", "label": bool(n % 2)} for n in range(12)
    ])  # fmt: skip
    return folder


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.long) for case in OTHERS)])
def test_two_processes_that_hold_the_model_together_learn_what_replicas_do(place: Path, case: str) -> None:
    # 3 examples a step in packs of one: the first process has two passes and the other one
    changes = {**CASES, **OTHERS}[case]
    changes = {**changes, "train__batch_size": 3, "train__micro_batch_tokens": 16, "train__max_steps": 4}
    name = case.replace(" ", "-")
    for kind in ("replicated", "fsdp"):
        write_config(place, **changes, run__name=f"{name}-{kind}")
        codes = together(place, "finetune", "run.yaml", f"parallel.kind={kind}")
        assert codes == [0, 0], said(place, "output0") + said(place, "output1")
    whole, parts = (trained_weights(place / "runs" / f"{name}-{kind}") for kind in ("replicated", "fsdp"))
    assert whole.keys() == parts.keys()
    # Products of one token alone depend, in the last bits, on where a weight begins: here in the file, there gathered.
    apart = 1e-5 if case in ONE_TOKEN else 0.0
    for key, tensor in whole.items():
        torch.testing.assert_close(parts[key], tensor, atol=apart, rtol=0)
    tuned, again = (
        json.loads((place / "runs" / f"{name}-{kind}" / "summary.json").read_text())["tuned"]
        for kind in ("replicated", "fsdp")
    )
    assert (tuned is None) == (again is None)
    if tuned is not None:
        assert again["loss"] == pytest.approx(tuned["loss"], abs=1e-5)
    assert "Warning" not in said(place, "output0")


def assert_close(one: Path, other: Path) -> None:
    """Two runs have learnt the same."""
    wanted, found = trained_weights(one), trained_weights(other)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", OWN_WEIGHTS)
def test_two_processes_that_share_out_what_learns_make_the_update_of_one(place: Path, case: str) -> None:
    changes = {"train__batch_size": 3, "train__micro_batch_tokens": 16, "train__max_steps": 4, **FULL}
    name = case.replace(" ", "-").replace(",", "")
    write_config(place, **{**changes, **OWN_WEIGHTS[case]}, run__name=f"{name}-one")
    assert completed(place, "finetune", "run.yaml").returncode == 0
    write_config(place, **{**changes, **OWN_WEIGHTS[case]}, run__name=f"{name}-two")
    assert together(place, "finetune", "run.yaml", FSDP) == [0, 0], said(place, "output0") + said(place, "output1")
    one, two = (place / "runs" / f"{name}-{count}" for count in ("one", "two"))
    assert_close(one, two)
    before = load_file(place / "base" / "model.safetensors")
    layer = "model.layers.1.mlp.up_proj.weight"
    assert float((trained_weights(two)[layer].float() - before[layer].float()).abs().max()) > 1e-3
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (one, two)]
    for whole, parts in zip(*lines, strict=True):
        for key in ("loss", "grad_norm"):
            assert json.loads(parts)[key] == pytest.approx(json.loads(whole)[key], rel=1e-3)
    assert sorted(path.name for path in (two / "merged").iterdir()) == sorted(
        path.name for path in (one / "merged").iterdir()
    )
    assert "Warning" not in said(place, "output0")


def note_bytes(name: str, frozen_alone: bool = False) -> None:
    """Write down how many bytes of tensors this process holds: weights, gradients, moments and all else."""
    held: dict[int, int] = {}
    for one in gc.get_objects():
        if isinstance(one, torch.Tensor) and one.device.type != "meta":
            if frozen_alone and (not isinstance(one, torch.nn.Parameter) or one.requires_grad):
                continue
            storage = (one.to_local() if isinstance(one, DTensor) else one).untyped_storage()
            if storage.nbytes():  # else it is gathered when its layer runs
                held[storage.data_ptr()] = storage.nbytes()
    Path(f"{name}{os.environ.get('RANK', '')}").write_text(str(sum(held.values())))


def test_each_process_holds_its_part_of_gradients_and_moments_too(tmp_path: Path) -> None:
    place = make_workplace(tmp_path)
    save_tiny(place / "base", chat_template=CHATML, num_hidden_layers=24)
    write_config(place, **FULL, train__max_steps=3, data__validation=None)
    troubles = {rank: at_step(3, partial(note_bytes, "tensors")) for rank in (0, 1)}
    assert together(place, "finetune", "run.yaml", FSDP, troubles=troubles) == [0, 0], said(place, "output0")
    whole = 4 * 4 * sum(tensor.numel() for tensor in load_file(place / "base" / "model.safetensors").values())
    for rank in (0, 1):
        assert int((place / f"tensors{rank}").read_text()) < 0.6 * whole


IN_A_PART = at_call("lmtune.training.checkpoint", "write_shards", KILL, 4)  # the moments of the second checkpoint
BEFORE_THE_MANIFEST = at_call("lmtune.training.checkpoint", "_finish", KILL, 2)


@pytest.mark.parametrize(
    ("before", "killed", "at", "after"),
    [(2, 0, BEFORE_THE_MANIFEST, 1), (1, 0, at_step(5, KILL), 2), (2, 1, IN_A_PART, 4)],
)
def test_full_tuning_goes_on_with_another_number_of_processes(
    tmp_path: Path, before: int, killed: int, at: Trouble, after: int
) -> None:
    """A process is killed while all write their second checkpoint, which then is none."""
    place, undisturbed = make_workplace(tmp_path / "work"), make_workplace(tmp_path / "other")
    finetune(undisturbed, **FULL)
    write_config(place, **FULL)
    codes = together(place, "finetune", "run.yaml", FSDP, troubles={killed: at}, processes=before)
    assert codes == [-9 if rank == killed else 1 for rank in range(before)]
    if at is IN_A_PART:
        assert "error: rank 0: a peer exited during saving step 6" in said(place, "output0")
    folder = place / "runs/trial/checkpoints"
    assert [path.name for path in checkpoint_folders(folder)] == ["step-000003"]
    assert problem_of(folder / "step-000003") is None
    codes = together(place, "finetune", "run.yaml", FSDP, processes=after)
    assert codes == [0] * after, said(place, "output0")
    assert "resumes after step 3" in said(place, "output0")
    assert_close(undisturbed / "runs" / "trial", place / "runs" / "trial")
    assert checkpoints(place) == ["step-000006", "step-000008"]


def test_the_best_step_is_kept_and_a_damaged_part_is_found(tmp_path: Path) -> None:
    place = make_workplace(tmp_path)
    write_config(place, **{**FULL, "train__learning_rate": 0.5}, evaluation__every_steps=1, run__keep_checkpoints=9)
    assert together(place, "finetune", "run.yaml", FSDP) == [0, 0], said(place, "output0")
    run = place / "runs" / "trial"
    best = json.loads((run / "summary.json").read_text())["best_step"]
    assert best < 8
    folder = run / "checkpoints" / f"step-{best:06d}"
    kept, saved = trained_weights(run), checkpoint_weights(folder)
    assert all(torch.equal(kept[key], tensor) for key, tensor in saved.items())
    damaged = folder / "optimizer" / "shard-00002-model-00001-of-00001.safetensors"
    damaged.unlink()
    assert problem_of(folder) == "optimizer/shard-00002-model-00001-of-00001.safetensors is missing"


def test_a_run_that_is_stopped_is_of_use_and_goes_on(tmp_path: Path) -> None:
    place = make_workplace(tmp_path)
    write_config(place, **FULL)
    assert together(place, "finetune", "run.yaml", FSDP, troubles={1: at_step(5, send(signal.SIGTERM))}) == [143, 143]
    assert checkpoints(place) == ["step-000003", "step-000005"]
    assert completed(place, "merge", "runs/trial", "--output", "so_far").returncode == 0
    saved = checkpoint_weights(place / "runs/trial/checkpoints/step-000005")
    assert all(torch.equal(saved[key], one) for key, one in load_file(place / "so_far/model.safetensors").items())


@pytest.mark.long
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_both_kinds_merge_to_the_same_model(tmp_path: Path, quantization: str) -> None:
    place, merged = make_workplace(tmp_path), list[dict[str, bytes]]()
    for kind in ("replicated", "fsdp"):
        write_config(place, run__name=kind, parallel__kind=kind, model__quantization=quantization, train__max_steps=3)
        assert together(place, "finetune", "run.yaml") == [0, 0], said(place, "output0")
        assert completed(place, "merge", f"runs/{kind}", "--output", kind).returncode == 0
        merged.append(written_files(place / kind))
    weights = [name for name in merged[0] if name.endswith(".safetensors")]
    assert weights
    assert all(merged[0][name] == merged[1][name] for name in weights)


def test_the_row_whose_gradient_is_no_number_is_named_alone(tmp_path: Path) -> None:
    """Gradients are summed over processes in the backward pass, but a row that is fine is not blamed for another's."""
    place = make_workplace(tmp_path)
    rows = [dict(row) for row in QUESTIONS]
    rows[MARKED]["prompt"] += MARK
    write_rows(place / "train.jsonl", rows)
    write_config(place, **FULL)
    troubles = dict.fromkeys((0, 1), no_loss_for_the_marked)
    assert together(place, "finetune", "run.yaml", FSDP, troubles=troubles) == [1, 1]
    for output in ("output0", "output1"):
        found = re.findall(r"^  (train\.jsonl:\d+)$", said(place, output), re.MULTILINE)
        assert found == [f"train.jsonl:{MARKED + 1}"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")
@pytest.mark.parametrize("case", ["sft", "nf4", "checkpointed"])
def test_two_cards_that_hold_the_model_together_learn_what_replicas_do(place: Path, case: str) -> None:
    found, cards = [], {rank: with_environment(ACCELERATE_USE_CPU="false") for rank in (0, 1)}
    for kind in ("replicated", "fsdp"):
        changes = {**CASES[case], "train__batch_size": 3, "train__micro_batch_tokens": 16, "train__max_steps": 4}
        write_config(place, **changes, run__name=f"cards-{case}-{kind}", model__dtype="float32")
        codes = together(place, "finetune", "run.yaml", f"parallel.kind={kind}", troubles=cards)
        assert codes == [0, 0], said(place, "output0") + said(place, "output1")
        found.append(trained_weights(place / "runs" / f"cards-{case}-{kind}"))
    for key, tensor in found[0].items():
        torch.testing.assert_close(found[1][key], tensor, atol=1e-5, rtol=0)


def test_each_process_holds_its_part(tmp_path: Path) -> None:
    place = make_workplace(tmp_path)
    save_tiny(place / "base", chat_template=CHATML, num_hidden_layers=24)
    write_config(place, train__max_steps=2, data__validation=None)
    troubles = {rank: at_step(2, partial(note_bytes, "weights", frozen_alone=True)) for rank in (0, 1)}
    assert together(place, "finetune", "run.yaml", FSDP, troubles=troubles) == [0, 0], said(place, "output0")
    whole = (place / "base" / "model.safetensors").stat().st_size
    for rank in (0, 1):
        assert int((place / f"weights{rank}").read_text()) < 0.6 * whole


def note_mapped() -> None:
    """Write down how many bytes of frozen weights are pages of the base's file."""
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "model.safetensors" in line]
    spans = [[int(end, 16) for end in line[0].split("-")] for line in maps]
    frozen = [one for one in gc.get_objects() if isinstance(one, torch.nn.Parameter) and not one.requires_grad]
    mapped = (one.nbytes for one in frozen if any(start <= one.data_ptr() < end for start, end in spans))
    Path(f"mapped{os.environ['RANK']}").write_text(str(sum(mapped)))


def test_replicas_on_a_cpu_map_one_file(tmp_path: Path) -> None:
    """None has a copy of its own of weights that are stored as they are computed with."""
    place = make_workplace(tmp_path)
    write_config(place, train__max_steps=1, data__validation=None, model__dtype="float32")
    noted = {rank: at_step(1, note_mapped) for rank in (0, 1)}
    assert together(place, "finetune", "run.yaml", troubles=noted) == [0, 0], said(place, "output0")
    whole = (place / "base" / "model.safetensors").stat().st_size
    for rank in (0, 1):
        assert int((place / f"mapped{rank}").read_text()) > 0.9 * whole


def note_peak() -> None:
    """Write down the most memory that this process has held since it was forked."""
    status = Path("/proc/self/status").read_text().splitlines()
    kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    Path(f"peak{os.environ['RANK']}").write_text(str(kib * 1024))


@pytest.mark.slow
@pytest.mark.parametrize("stored", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long)])
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
    assert peaks[1] - peaks[0] < 0.62 * (sizes[1] - sizes[0])


def test_layers_are_gathered_into_the_same_memory() -> None:
    gather, device = _GatherInPlace(), torch.device("cpu")
    sizes = [((64,), torch.float32), ((32,), torch.bfloat16), ((256,), torch.uint8)]
    found = [gather.allocate(size, dtype=dtype, device=device) for size, dtype in sizes]
    assert [(one.shape, one.dtype) for one in found] == [(torch.Size(size), dtype) for size, dtype in sizes]
    assert len({one.data_ptr() for one in found}) == 1


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
    one, two = (trained_weights(folder / "runs" / "trial") for folder in (place, undisturbed))
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
        ({"tuning__kind": "full", "train__optimizer": "adamw_8bit"}, "cannot share out; expected adamw"),
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
