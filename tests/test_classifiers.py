"""Runs that train a classifier or a reward model, from the command to transformers' own pipeline."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lmtune
from lmtune.errors import ConfigError, DataError, ModelError
from lmtune.evaluation.evaluate import evaluate_loaded
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
    said = [json.loads(line) for line in run.predictions.read_text().splitlines()]
    held_out = [json.loads(line) for line in (place / "validation.jsonl").read_text().splitlines()]
    assert [(row["question"], row["reference"]) for row in said] == [
        (row["text"], row["label"])
        for row in held_out[:3]  # evaluation.exact_match_rows
    ]
    assert [row["tuned"] for row in said] == [row.answer for row in scored.rows[:3]]
    report = run.report.read_text()
    assert 'class="answers sortable"' in report
    assert "It learns what to say of each row as a whole." in report
    picture = ET.parse(run.confusion)
    assert [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")][-9:] == [
        str(number) for row in summary["classes"]["confusion"] for number in row
    ]


def test_prediction_and_chat_say_what_the_pipeline_says(done: tuple[Path, RunDirectory, str]) -> None:
    from transformers import pipeline

    place, run, _ = done
    rows = [{"text": "fire leaf", "id": 3}, {"text": "sky number 9", "label": "green", "weight": 2}]
    classify = pipeline("text-classification", str(run.merged), device="cpu")
    wanted = classify([row["text"] for row in rows])
    with inside(place):
        write_rows(Path("new.jsonl"), rows)
        assert command(place, "predict", "trial", "new.jsonl", "-o", "out.jsonl") == 0
        found = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
        model = lmtune.load("trial")
        assert lmtune.predict(model, rows) == found
        said = model.chat(rows[0]["text"])
        session = model.session()
        assert [*session.stream("anything")], said == session.reply(rows[0]["text"])
        assert session.turns[-1][1].finish_reason == "stop"  # type: ignore[union-attr]
    for row, line, one in zip(rows, found, wanted, strict=True):
        assert row.items() <= line.items()
        assert (line["prediction"], line["probability"]) == (one["label"], pytest.approx(one["score"], abs=1e-5))
        assert sum(line["probabilities"].values()) == pytest.approx(1)
    assert said.startswith(f"{wanted[0]['label']} {wanted[0]['score']:.1%}, ")


def test_rewards_of_pairs_and_of_answers_are_the_same(tmp_path: Path) -> None:
    """And they are what transformers gives for the rendered text, though the tokenizer pads with the end of a turn."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    place = classifier_place(tmp_path, PAIRS, 6)
    config = json.loads((place / "base" / "tokenizer_config.json").read_text())
    (place / "base" / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "<|im_end|>"}))
    run, summary = finetune(place, objective__kind="reward", train__learning_rate=3e-3)
    pair = PAIRS[-1]
    with inside(place):
        merge_run(RunDirectory("runs/trial"), Path("runs/trial/merged"))
        loaded = lmtune.load("trial")
        both = lmtune.predict(loaded, [pair])[0]
        answers = [{"prompt": pair["prompt"], "completion": pair[key]} for key in ("chosen", "rejected")]
        alone = [row["prediction"] for row in lmtune.predict(loaded, answers)]
    assert alone == pytest.approx([both["reward_chosen"], both["reward_rejected"]], abs=1e-5)
    plain = AutoModelForSequenceClassification.from_pretrained(run.merged)
    tokenizer = AutoTokenizer.from_pretrained(run.merged)
    turns = [
        [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair[key]}]
        for key in ("chosen", "rejected")
    ]  # fmt: skip
    texts = [tokenizer.apply_chat_template(talk, tokenize=False).rstrip("\n") for talk in turns]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    assert tokenizer.pad_token_id == plain.config.pad_token_id != tokenizer.convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad():
        rewards = plain(**inputs).logits[:, 0].tolist()
    assert rewards == pytest.approx(alone, abs=1e-4)
    assert summary["tuned"]["pair_accuracy"] >= 0.5
    assert summary["base"] is None
    with pytest.raises(ConfigError, match=r"trial .*: a reward model, which scores an answer to a prompt; give"):
        loaded.chat("anything")


@pytest.mark.parametrize("name", TUNINGS)
def test_a_killed_run_ends_bit_for_bit_like_one_that_was_not(tmp_path: Path, name: str) -> None:
    whole, killed = (classifier_place(tmp_path / part) for part in ("whole", "killed"))
    for place in (whole, killed):
        write_config(place, **settings_of(name, evaluation__every_steps=2, run__checkpoint_every_steps=2))
    assert command(whole, "finetune", "run.yaml") == 0
    assert command(killed, "finetune", "run.yaml", trouble=after_update(5, KILL)) == -9
    assert command(killed, "finetune", "run.yaml") == 0
    assert lasting(killed) == lasting(whole)


@pytest.mark.parametrize(
    "kind", ["classification", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("regression", "reward"))]
)
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
        ("classification", ["red"], r"validation.jsonl:9: label is a list, but one label in 8 rows; write every label"),
        ("regression", 1.5, r"labels that are no numbers; .*\n.*train.jsonl:1: label 'red'"),
    ],
)
def test_labels_that_cannot_be_used_are_named(tmp_path: Path, kind: str, label: Any, said: str) -> None:
    place = classifier_place(tmp_path, [*TEXTS[:-1], {"text": "candy", "label": label}])
    with pytest.raises(DataError, match=said):
        finetune(place, objective__kind=kind)
    assert not (place / "runs" / "trial" / "config.yaml").exists()


def test_an_adapter_of_the_same_classes_is_trained_on(done: tuple[Path, RunDirectory, str], tmp_path: Path) -> None:
    place, run, name = done
    if name != "lora":
        return
    before = load_file(run.adapter / "adapter_model.safetensors")
    with inside(place):
        write_rows(Path("few.jsonl"), [{"text": "fire", "label": "red"}, {"text": "sky", "label": "blue"}])
    start: dict[str, Any] = {"tuning__adapter": "trial", "train__learning_rate": 1e-6, "train__max_steps": 1}
    more, _ = finetune(place, **settings_of("lora", run__name="more", **start))
    after = load_file(more.adapter / "adapter_model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.allclose(after[key], before[key], atol=1e-5) for key in before)
    other = {"data__train": "few.jsonl", "data__validation": None, "run__name": "no"}
    with pytest.raises(ConfigError, match=r"trial has the outputs blue, green, red; expected blue, red, as the rows"):
        finetune(place, **settings_of("lora", **start, **other))


def test_a_language_model_is_not_made_of_a_classifier(done: tuple[Path, RunDirectory, str]) -> None:
    place, _, _ = done
    with inside(place):
        write_rows(Path("answers.jsonl"), [{"prompt": "Hi", "completion": "Ho"}] * 4)
    with pytest.raises(ModelError, match=r"a classifier, which cannot write; expected a language model for .*: sft"):
        finetune(place, model__name="runs/trial/merged", data__train="answers.jsonl", data__validation=None)
    if done[2] != "lora":
        return
    with pytest.raises(ConfigError, match=r"tuning\.adapter: trial is of a classifier, which cannot write; expected"):
        finetune(
            place, run__name="writes", tuning__adapter="trial", data__train="answers.jsonl", data__validation=None
        )  # fmt: skip


def test_a_plan_counts_the_head() -> None:
    from lmtune.config.schema import FullConfig, ModelConfig, PartialConfig, RegressionConfig
    from lmtune.objectives.chosen import unread_head
    from lmtune.training.estimate import planned_shape

    tiny, head = ModelConfig(name="tiny", quantization="none"), unread_head(RegressionConfig())
    _, alone = planned_shape(tiny, PartialConfig(parts=("head",)), torch.float32, head)
    assert (alone.trained, alone.frozen) == (256, planned_shape(tiny, FullConfig(), torch.float32)[1].trained)
