"""Tasks of lm-eval on a loaded model: a task in a file against likelihoods by hand; what is missing is told."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from lmtune.config.yaml import write_yaml
from lmtune.errors import ConfigError, LmtuneError
from lmtune.evaluation import lm_eval_tasks
from lmtune.inference.load import LoadedModel, load_for_inference
from lmtune.recipes import evaluate
from tests.sample_run import write_base, write_run
from tests.workplace import write_rows

ROWS = [
    {"question": f"Say {n}", "choices": [f"word {m}" for m in range(4)], "label": n % 4} for n in range(12)
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a run over it, and a task."""
    folder = tmp_path_factory.mktemp("tasks")
    write_base(folder / "base")
    write_run(folder / "support", str(folder / "base"))
    (folder / "tasks").mkdir()
    write_rows(folder / "rows.jsonl", ROWS)
    task = {
        "task": "words", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}, "doc_to_text": "{{question}}",
        "doc_to_choice": "choices", "doc_to_target": "label", "target_delimiter": " ",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (folder / "tasks" / "words.yaml").write_text(write_yaml(task))
    return folder


@torch.no_grad()
def by_hand(loaded: LoadedModel) -> float:
    """The share of rows whose right choice is the likeliest."""
    right = 0
    for row in ROWS:
        scores = []
        for choice in row["choices"]:
            before = loaded.tokenizer(row["question"])["input_ids"]
            whole = loaded.tokenizer(f"{row['question']} {choice}")["input_ids"]
            logits = loaded.model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(float(sum(logits[place - 1, whole[place]] for place in range(len(before), len(whole)))))
        right += scores.index(max(scores)) == row["label"]
    return right / len(ROWS)


@pytest.mark.slow
def test_a_task_in_a_file_scores_the_model_and_its_base(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load_for_inference(str(place / "support"))
    (score,) = lm_eval_tasks.task_scores(loaded, str(place / "tasks" / "words.yaml"))
    assert (score.task, score.metric) == ("words", "acc")
    assert score.tuned == pytest.approx(by_hand(loaded))
    with loaded.use_base():
        assert score.base == pytest.approx(by_hand(loaded))
    assert score.tuned_error is not None
    evaluate.main(str(place / "support"), lm_eval=str(place / "tasks"), as_json=True)
    tree = json.loads(capsys.readouterr().out)
    assert tree == {"lm_eval": [score.as_dict()]}
    evaluate.main(str(place / "base"), lm_eval=str(place / "tasks"))
    assert "words" in capsys.readouterr().out


@pytest.mark.slow
def test_a_task_that_is_not_there_or_cannot_be_loaded_is_named(place: Path) -> None:
    loaded = load_for_inference(str(place / "base"))
    with pytest.raises(ConfigError, match=r"--lm-eval: hellaswagg: no such task or file; did you mean hellaswag"):
        lm_eval_tasks.task_scores(loaded, "hellaswagg")
    text = (place / "tasks" / "words.yaml").read_text()
    (place / "broken.yaml").write_text(text.replace("rows.jsonl", "nowhere.jsonl").replace("words", "broken"))
    with pytest.raises(LmtuneError, match=r"--lm-eval: .*broken\.yaml: .*nowhere"):
        lm_eval_tasks.task_scores(loaded, str(place / "broken.yaml"))
    with pytest.raises(ConfigError, match="no task named"):
        lm_eval_tasks.task_scores(loaded, " , ")


def test_without_the_package_its_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"the package lm-eval is missing; install it: pip install 'lmtune\[eval\]'"):
        lm_eval_tasks.require_lm_eval()
