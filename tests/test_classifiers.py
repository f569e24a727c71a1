"""Runs that train a classifier or a reward model, from the command to transformers' own pipeline."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lmtune.errors import DataError
from lmtune.evaluation.scoring import evaluate_loaded
from lmtune.export.merged import merge_run
from lmtune.inference.load import load_for_inference
from lmtune.runs.store import RunDirectory
from tests.processes import KILL, after_update
from tests.processes import lmtune as command
from tests.workplace import finetune, inside, lasting, make_workplace, write_config, write_rows

pytestmark = pytest.mark.slow  # a run each

COLOURS = {"red": "fire blood rose", "green": "grass leaf frog", "blue": "sea sky ice"}
TEXTS = [
    {"text": f"{word} number {n}", "label": colour}
    for n in range(6) for colour, words in COLOURS.items() for word in words.split()
]  # fmt: skip
PAIRS = [
    {"prompt": f"Say number {n}!", "chosen": f"It is {n}.", "rejected": f"No. {9 - n % 10}"} for n in range(24)
]  # fmt: skip
TUNINGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"tuning__kind": "full"},
    "head": {"tuning__kind": "partial", "tuning__parts": ["head"]},
}  # fmt: skip
CLASSIFY: dict[str, Any] = {"objective__kind": "classification", "train__learning_rate": 3e-3}


def classifier_place(folder: Path, rows: list[dict[str, Any]] | None = None, held_out: int = 9) -> Path:
    """A workplace with labelled rows."""
    place, rows = make_workplace(folder), rows or TEXTS
    write_rows(place / "train.jsonl", rows[:-held_out])
    write_rows(place / "validation.jsonl", rows[-held_out:])
    return place


def settings_of(name: str, **more: Any) -> dict[str, Any]:
    return {**CLASSIFY, **TUNINGS[name], **more}


@pytest.fixture(scope="module", params=TUNINGS)
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunDirectory, str]:
    """A workplace with a run, merged."""
    place = classifier_place(tmp_path_factory.mktemp("work"))
    run, _ = finetune(place, **settings_of(request.param, train__max_steps=20))
    with inside(place):
        merge_run(RunDirectory("runs/trial"), Path("runs/trial/merged"))
    return place, run, request.param


def test_the_pipeline_of_transformers_gives_the_same_classes(done: tuple[Path, RunDirectory, str]) -> None:
    from transformers import AutoModelForSequenceClassification, pipeline

    place, run, _ = done
    plain, info = AutoModelForSequenceClassification.from_pretrained(run.merged, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert plain.config.id2label == {0: "blue", 1: "green", 2: "red"}
    assert not (run.merged / "generation_config.json").exists()
    with inside(place):
        loaded = load_for_inference("trial")
    texts = [row["text"] for row in TEXTS[-9:]]
    classify = pipeline("text-classification", str(run.merged), device="cpu")
    ids = [classify.tokenizer(text)["input_ids"] for text in texts]
    with torch.no_grad():
        own = torch.cat([loaded.model(input_ids=torch.tensor([one])).logits for one in ids]).softmax(-1)
    for batch_size in (1, 4):  # padded too
        for found, wanted in zip(classify(texts, top_k=None, batch_size=batch_size), own, strict=True):
            scores = {one["label"]: one["score"] for one in found}
            assert scores == pytest.approx(dict(zip(("blue", "green", "red"), wanted.tolist(), strict=True)), abs=1e-5)


def test_plain_peft_loads_the_adapter_with_its_head(done: tuple[Path, RunDirectory, str]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    place, run, name = done
    if name != "lora":
        assert not run.adapter.exists()
        return
    base = AutoModelForSequenceClassification.from_pretrained(place / "base", num_labels=3)
    plain, merged = (
        PeftModel.from_pretrained(base, str(run.adapter)).eval(),
        AutoModelForSequenceClassification.from_pretrained(run.merged),
    )
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-5, rtol=1e-4)


def test_it_is_scored_as_the_run_said(done: tuple[Path, RunDirectory, str]) -> None:
    place, run, _ = done
    summary = json.loads(run.summary.read_text())
    with inside(place):
        scored = evaluate_loaded(load_for_inference("trial"), ["validation.jsonl"], 3, 8, 128)
        merged = evaluate_loaded(load_for_inference("runs/trial/merged"), ["validation.jsonl"], 3, 8, 128)
    assert scored.tuned.as_dict() == pytest.approx(summary["tuned"], abs=1e-5)
    assert merged.tuned.as_dict() == pytest.approx(summary["tuned"], abs=1e-4)
    assert scored.base is None
    assert scored.trained_rows == 0
    assert summary["base"]["accuracy"] == pytest.approx(1 / 3)
    assert summary["baseline"] == "the most frequent class"
    assert summary["classes"]["labels"] == ["blue", "green", "red"]
    assert sum(map(sum, summary["classes"]["confusion"])) == 9
    assert summary["tuned"]["loss"] < summary["base"]["loss"]
    assert {"accuracy", "loss"} <= json.loads(run.metrics.read_text().splitlines()[-1]).keys()


@pytest.mark.parametrize("name", TUNINGS)
def test_a_killed_run_ends_bit_for_bit_like_one_that_was_not(tmp_path: Path, name: str) -> None:
    whole, killed = (classifier_place(tmp_path / part) for part in ("whole", "killed"))
    for place in (whole, killed):
        write_config(place, **settings_of(name, evaluation__every_steps=2, run__checkpoint_every_steps=2))
    assert command(whole, "finetune", "run.yaml") == 0
    assert command(killed, "finetune", "run.yaml", trouble=after_update(5, KILL)) == -9
    assert command(killed, "finetune", "run.yaml") == 0
    assert lasting(killed) == lasting(whole)


@pytest.mark.parametrize("kind", ["classification", "regression", "reward"])
def test_two_processes_give_the_model_of_one(tmp_path: Path, kind: str) -> None:
    rows: list[dict[str, Any]] = {
        "classification": TEXTS, "reward": PAIRS,
        "regression": [{"text": f"number {n}", "label": n / 10} for n in range(20)],
    }[kind]  # fmt: skip
    place = classifier_place(tmp_path / "work", rows, 6)
    write_config(place, objective__kind=kind, train__learning_rate=1e-3)
    assert command(place, "finetune", "run.yaml", "run.name=one") == 0
    assert command(place, "finetune", "run.yaml", "run.name=two", "--processes", "2") == 0
    one, two = (load_file(place / "runs" / run / "adapter" / "adapter_model.safetensors") for run in ("one", "two"))
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, atol=1e-5, rtol=0)
    scores = [json.loads((place / "runs" / run / "summary.json").read_text())["tuned"] for run in ("one", "two")]
    assert scores[1] == pytest.approx(scores[0], abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "label", "said"),
    [
        ("classification", "pink", r"no training row has; known are blue, green, red\n.*validation.jsonl:9: 'pink'"),
        ("classification", ["red"], r"validation.jsonl:9: label is a list; the training rows have one class each"),
        ("regression", 1.5, r"labels that are no numbers; .*\n.*train.jsonl:1: label 'red'"),
    ],
)
def test_labels_that_cannot_be_used_are_named(tmp_path: Path, kind: str, label: Any, said: str) -> None:
    place = classifier_place(tmp_path, [*TEXTS[:-1], {"text": "candy", "label": label}])
    with pytest.raises(DataError, match=said):
        finetune(place, objective__kind=kind)
    assert not (place / "runs" / "trial" / "config.yaml").exists()
