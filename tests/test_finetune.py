"""`lmtune finetune` from its first file to its last."""

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmtune.config.load import load_config
from lmtune.config.schema import FinetuneConfig
from lmtune.evaluation.evaluate import evaluate_loaded
from lmtune.inference.load import load_for_inference
from tests.processes import at_call, lmtune, said, send
from tests.tiny import save_tiny
from tests.tokenizers import CHATML
from tests.workplace import (
    HELDOUT,
    QUESTIONS,
    config_of,
    environment,
    finetune,
    inside,
    make_workplace,
    write_config,
    write_rows,
    written_files,
)

pytestmark = pytest.mark.slow  # seconds together; left out of `make test-fast`

FILES = {
    "config.yaml", "environment.json", "data.json", "metrics.jsonl", "results.csv", "summary.json", "predictions.jsonl",
    "verification.json", "events.jsonl", "preview.json", "report.html", "loss.png",
    "adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter/lmtune.json", "adapter/README.md",
    "adapter/tokenizer.json", "adapter/tokenizer_config.json", "adapter/chat_template.jinja",
    "adapter/generation_config.json", ".lock", "local.json",
}  # fmt: skip
METRICS = [
    "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "trained_tokens", "examples", "seconds",
    "token_accuracy",
]  # fmt: skip
RESULTS = [
    "step", "elapsed_tokens", "elapsed_examples", "training_loss", "training_sequence_accuracy",
    "training_token_accuracy", "validation_loss", "validation_sequence_accuracy", "validation_token_accuracy",
]  # fmt: skip
SCORES = ["loss", "perplexity", "token_accuracy", "sequence_accuracy", "exact_match", "rows", "exact_match_rows"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run made by the installed command, over a base in nf4."""
    folder = make_workplace(tmp_path_factory.mktemp("work"))
    write_config(folder, evaluation__every_steps=4)
    command = [sys.executable, "-m", "lmtune", "finetune", "run.yaml", "model.quantization=nf4"]
    ended = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False)
    (folder / "stdout").write_text(ended.stdout)
    (folder / "stderr").write_text(ended.stderr)
    assert ended.returncode == 0, ended.stderr
    return folder


def test_all_documented_files_are_there(done: Path) -> None:
    run = done / "runs" / "trial"
    checkpoints = {name for name in written_files(run) if name.startswith("checkpoints/")}
    assert written_files(run).keys() - checkpoints == FILES
    parts = ("adapter_model.safetensors", "manifest.json", "optimizer.safetensors", "state.json")
    # the newest two, and that of the best step
    assert checkpoints == {f"checkpoints/step-{step:06d}/{part}" for step in (6, 8) for part in parts}


def test_every_step_is_recorded_with_the_documented_keys(done: Path) -> None:
    run = done / "runs" / "trial"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [list(line) for line in lines] == [METRICS] * 8
    assert [line["step"] for line in lines] == list(range(1, 9))
    with (run / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == RESULTS
    assert [bool(row["validation_loss"]) for row in rows] == [step in (4, 8) for step in range(1, 9)]
    assert sum(line["tokens"] for line in lines) == int(rows[-1]["elapsed_tokens"])
    assert sum(line["examples"] for line in lines) == int(rows[-1]["elapsed_examples"]) == 32
    assert all(abs(float(row["training_loss"]) - line["loss"]) < 1e-4 for row, line in zip(rows, lines, strict=True))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[5]["epoch"] == 1.0


def test_the_summary_has_the_scores_before_and_after(done: Path) -> None:
    summary = json.loads((done / "runs/trial/summary.json").read_text())
    assert summary["status"] == "complete"
    for part in ("base", "tuned"):
        assert list(summary[part]) == SCORES
    assert summary["tuned"]["loss"] < summary["base"]["loss"]
    assert (summary["steps"], summary["examples"], summary["processes"]) == (8, 32, 1)
    assert summary["tokens_per_second"] > 0
    assert 0.1 < summary["peak_memory_gib"] < 10
    answers = [json.loads(line) for line in (done / "runs/trial/predictions.jsonl").read_text().splitlines()]
    assert [list(answer) for answer in answers] == [["question", "reference", "base", "tuned"]] * 3
    assert [answer["question"] for answer in answers] == [f"Say number {n}!" for n in range(3)]


def test_what_the_user_saw(done: Path) -> None:
    """Results on stdout, progress and what comes next on stderr."""
    printed = (done / "stdout").read_text()
    assert "Exact match" in printed
    assert "over 6 rows; 95 % intervals, base and tuned:" in printed
    assert "fewer than 30 rows" in printed
    assert printed.count("reference:") == 3
    text = (done / "stderr").read_text()
    assert "runs/trial begins: base in nf4, 8 steps" in text
    assert "24 rows, 24 kept" in text
    assert "step 8/8" in text
    assert "lmtune chat runs/trial" in text
    assert "Warning" not in text
    assert "Traceback" not in text


def test_the_settings_and_the_surroundings_are_kept(done: Path) -> None:
    run = done / "runs" / "trial"
    wanted = config_of(evaluation__every_steps=4, model__quantization="nf4")
    assert load_config(FinetuneConfig, run / "config.yaml") == wanted
    made = json.loads((run / "environment.json").read_text())
    assert {"torch", "transformers", "peft", "accelerate", "bitsandbytes", "lmtune"} <= made["libraries"].keys()
    assert {"data_sha256", "base_fingerprint", "git_revision", "device", "processes"} <= made.keys()
    fates = json.loads((run / "data.json").read_text())
    assert (fates["train"]["rows"], fates["train"]["kept"]) == (24, 24)


@pytest.mark.slow
def test_the_run_can_be_evaluated_and_gives_the_same_scores(done: Path) -> None:
    assert lmtune(done, "evaluate", "trial", "validation.jsonl", "--json", "--max-new-tokens", "8") == 0
    text = said(done)
    scores, summary = json.loads(text[text.index("{") :]), json.loads((done / "runs/trial/summary.json").read_text())
    for part in ("base", "tuned"):
        assert scores[part]["loss"] == pytest.approx(summary[part]["loss"], abs=1e-5)
        assert scores[part]["token_accuracy"] == pytest.approx(summary[part]["token_accuracy"])


def test_rows_that_a_run_was_trained_on_are_counted(done: Path) -> None:
    """By their content, wherever they stand; the run's own held-out rows are none of them."""
    write_rows(done / "mixed.jsonl", [QUESTIONS[3], HELDOUT[0], {"prompt": "a new one", "completion": "It is 1."}])
    with inside(done):
        loaded = load_for_inference("trial")
        for data, trained in (("mixed.jsonl", 1), ("train.jsonl", 24), ("validation.jsonl", 0)):
            assert evaluate_loaded(loaded, [data], 0, 8, 128).trained_rows == trained
        write_rows(done / "train.jsonl", QUESTIONS[:4])  # no longer what was trained on, so nothing is known
        assert evaluate_loaded(loaded, ["mixed.jsonl"], 0, 8, 128).trained_rows is None
        write_rows(done / "train.jsonl", QUESTIONS)
        assert evaluate_loaded(load_for_inference("base"), ["mixed.jsonl"], 0, 8, 128).trained_rows is None


# --- stopped or failed outside of a step; within one, see tests/faults


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_outside_of_training_ends_at_once_and_is_told(tmp_path: Path, number: int, code: int) -> None:
    """While the base is scored, for example."""
    folder = make_workplace(tmp_path / "work")
    write_config(folder)
    trouble = at_call("lmtune.evaluation.scoring", "rows_teacher_forced", send(number))
    assert lmtune(folder, "finetune", "run.yaml", trouble=trouble) == code
    assert "Traceback" not in said(folder)
    assert json.loads((folder / "runs/trial/summary.json").read_text())["status"] == "interrupted"
    assert lmtune(folder, "finetune", "run.yaml") == 0, said(folder)


# --- wrong input


WRONG = {
    "model.name=./none": "model.name: ./none: no such folder",
    "tuning.target_modules=[qq]": "tuning.target_modules: nothing in this model is named qq",
    "data.max_length=8": "data.train: no row is left; raise data.max_length (8)",
    "data.template=thinking": "data.template",
}


@pytest.mark.parametrize("override", WRONG)
def test_wrong_input_is_code_2_and_nothing_is_written(tmp_path: Path, override: str) -> None:
    folder = make_workplace(tmp_path / "work", chat_template=None)
    write_config(folder)
    assert lmtune(folder, "finetune", "run.yaml", override) == 2
    assert WRONG[override] in said(folder)
    assert "Traceback" not in said(folder)
    assert not (folder / "runs").exists()


# --- it learns, and stops by itself


@pytest.fixture(scope="module", params=["chat template", pytest.param("plain", marks=pytest.mark.slow)])
def overfit(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Four rows learned by heart."""
    folder = tmp_path_factory.mktemp("overfit")
    save_tiny(folder / "base", chat_template=CHATML if request.param == "chat template" else None)
    state = load_file(folder / "base" / "model.safetensors")
    state["lm_head.weight"] *= 8  # as in trained models, whose logits can be far apart
    save_file(state, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    answers = ["Paris.", "It is a quick brown fox, and it sleeps.", "I am fine, thank you.\n\nHow are you?", "42"]
    rows = [{"prompt": f"Question {n}?", "completion": answer} for n, answer in enumerate(answers)]
    write_rows(folder / "train.jsonl", rows)
    _, summary = finetune(
        folder, data__validation="train.jsonl", train__max_steps=120, train__learning_rate=1e-2, tuning__rank=16,
        tuning__alpha=32, evaluation__exact_match_rows=4, evaluation__max_new_tokens=60,
        run__checkpoint_every_steps=1000,
    )  # fmt: skip
    assert summary["tuned"]["loss"] < 0.05
    return folder


def test_an_overfit_model_answers_exactly(overfit: Path) -> None:
    summary = json.loads((overfit / "runs/trial/summary.json").read_text())
    assert summary["base"]["exact_match"] == 0
    assert summary["tuned"]["exact_match"] == summary["tuned"]["sequence_accuracy"] == 1.0
    assert summary["tuned"]["token_accuracy"] == 1.0


def test_an_overfit_model_stops_by_itself(overfit: Path) -> None:
    """Within the budget, by the stop token, in lmtune's own generation and in plain transformers'."""
    from lmtune.data.types import Message
    from lmtune.inference.request import Request, Sampling

    with inside(overfit):
        loaded = load_for_inference("trial")
        tuned = loaded.model.generation_config.__class__.from_pretrained("runs/trial/adapter")
    for n in range(4):
        prompt = loaded.renderer.prompt_ids([Message("user", f"Question {n}?")])
        (given,) = loaded.engine.generate(
            [Request(prompt, Sampling(max_new_tokens=200, stop_token_ids=loaded.renderer.stop_token_ids))]
        )
        assert len(given) < 60
        ids = torch.tensor([prompt])
        plain = loaded.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=tuned, max_new_tokens=200
        )[0, len(prompt) :]
        assert int(plain[-1]) in loaded.renderer.stop_token_ids
        assert len(plain) < 60
        assert loaded.renderer.decode(plain.tolist()) == loaded.renderer.decode(given)


# --- variants of what is trained, each from start to chat


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"model__quantization": "int8"},
        {"tuning__use_dora": True, "model__quantization": "nf4"},
        {"tuning__init_lora_weights": "pissa"},
        {"tuning__use_rslora": True, "tuning__target_modules": ("q_proj", "v_proj")},
        {"train__gradient_checkpointing": True, "tuning__dropout": 0.1},
        {"data__validation": None, "data__validation_fraction": 0.0},
    ],
    ids=lambda changes: ",".join(f"{key.split('__')[1]}={value}" for key, value in changes.items()),
)  # fmt: skip
def test_every_variant_trains_and_its_adapter_says_what_the_run_scored(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    folder = make_workplace(tmp_path / "work")
    run, summary = finetune(folder, **changes)
    assert summary["status"] == "complete"
    if summary["tuned"] is not None:
        from lmtune.data.store import tokenize
        from lmtune.evaluation.scoring import teacher_forced
        from lmtune.forward.packed import PackedForward

        with inside(folder):
            loaded = load_for_inference("trial")
            rows = tokenize(["validation.jsonl"], loaded.renderer, config_of().data)
        scores = teacher_forced(PackedForward(loaded.model), rows, 1000)
        assert scores.loss == pytest.approx(summary["tuned"]["loss"], abs=2e-5)
        assert scores.loss < summary["base"]["loss"]
    state = load_file(run.adapter / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
