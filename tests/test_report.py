"""Model cards and tables of scores: valid front matter, measured numbers only, nothing private."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from lmtune.config.load import build_config
from lmtune.config.schema import FinetuneConfig
from lmtune.data.report import DataReport
from lmtune.runs.cards import adapter_card, is_hub_id, merged_card
from lmtune.runs.history import list_runs
from lmtune.runs.store import Summary
from lmtune.runs.tables import (
    describe_scores,
    interval,
    predictions_shown,
    runs_table,
    scores_table,
    wilson,
)
from tests.sample_run import DATA as DATA_TREE
from tests.sample_run import SUMMARY, write_records

MERGE = {
    "into": "trained", "dtype": "bfloat16", "rows": 16, "tokens": 300, "logits_difference": 0.0012, "bound": 0.02,
    "top1_agreement": 0.9975, "kl": 1.5e-4, "update_kept": 0.998, "difference_to_trained": None,
}  # fmt: skip
RUN = Summary.parse(SUMMARY)
DATA = DataReport.from_dict(DATA_TREE)


def settings(name: str = "lab/base", **sections: Any) -> FinetuneConfig:
    tree = {
        "model": {"name": name, "quantization": "nf4", "revision": "abc123"},
        "data": {"train": "private-customers.jsonl", "system": "private words", **sections.pop("data", {})},
        "run": {"name": "support"}, **sections,
    }  # fmt: skip
    return build_config(FinetuneConfig, tree, where="test")


def front_matter(card: str) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    assert card.startswith("---\n")
    return dict(ModelCard(card).data.to_dict())  # parsed as the Hub's own library does


def printed(table: Any, width: int) -> str:
    console = Console(width=width, soft_wrap=True)
    with console.capture() as capture:
        console.print(table, soft_wrap=False)
    return capture.get()


def test_front_matter_is_what_the_hub_reads() -> None:
    head = front_matter(adapter_card(settings(), RUN, DATA, "me/support"))
    assert (head["base_model"], head["library_name"], head["pipeline_tag"]) == ("lab/base", "peft", "text-generation")
    assert {"lora", "lmtune"} <= set(head["tags"])
    assert head["base_model_relation"] == "adapter"


def test_scores_are_read_back_by_the_hubs_library() -> None:
    from huggingface_hub.repocard_data import model_index_to_eval_results

    own = {**DATA_TREE["train"], "sha256": ["ab" * 32], "files": ["private-validation.jsonl"], "rows": 40}
    for validation, what, identity in (
        ({"held_out": 40}, "rows held out of the training data", "sha256-0"),
        (own, "held-out rows", f"sha256-{'ab' * 32}"),
    ):
        data = DataReport.from_dict({**DATA_TREE, "validation": validation})
        name, results = model_index_to_eval_results(
            front_matter(adapter_card(settings(), RUN, data, "me/support"))["model-index"]
        )
        assert name == "support"
        assert {(one.task_type, one.dataset_name, one.dataset_type) for one in results} == {
            ("text-generation", what, identity)
        }
        assert results[0].dataset_args == {"rows": 40}
        found = {one.metric_name: (one.metric_type, one.metric_value) for one in results}
        assert found["Exact match"] == ("exact_match", 0.925)
        assert found["Exact match (base model)"] == ("exact_match", 0.025)
        assert len(found) == 10


def test_a_classifiers_scores_have_the_hubs_names() -> None:
    scores = {"loss": 0.1, "accuracy": 0.9, "macro_f1": 0.8, "rows": 40}
    config = settings(objective={"kind": "classification"})
    card = adapter_card(config, Summary(base=None, tuned=scores), DATA, "me/mood")
    (result,) = front_matter(card)["model-index"][0]["results"]
    assert result["task"]["type"] == "text-classification"
    assert {one["type"]: one["value"] for one in result["metrics"]} == {"loss": 0.1, "accuracy": 0.9, "f1": 0.8}
    assert "lmtune pull me/mood\nlmtune predict adapters/me--mood ROWS.jsonl" in card


def test_card_tells_scores_settings_and_counts() -> None:
    card = adapter_card(settings(adapter={"target_modules": ".*(q|v)_proj"}), RUN, DATA, "me/support")
    for line in (
        "| Exact match | 2.5 % | 92.5 % |",
        "| Loss | 3.5000 | 0.0200 |",
        "| `tuning.rank` | `16` |",
        "| `tuning.target_modules` | `.*(q\\|v)_proj` |",  # no text breaks the table
        "| train: file, SHA-256 | `0` |",
        "| train: kept | 480 |",
        "| train: dropped, too long | 3 |",
        "| validation: held out | 40 |",
        "on 40 rows",
        "4-bit NF4",
        'AutoModelForCausalLM.from_pretrained("lab/base", revision="abc123")',
        'PeftModel.from_pretrained(base, "me/support")',
        "lmtune pull me/support\nlmtune chat adapters/me--support",
        "trained with a system prompt",
    ):
        assert line in card, line


def test_card_tells_nothing_of_the_data_or_the_machine() -> None:
    config = settings(str(Path.home()))
    card = adapter_card(config, RUN, DATA) + merged_card(config, RUN, MERGE)
    for private in ("private", "customers", ".jsonl", str(Path.home()), str(Path.cwd()), "../"):
        assert private not in card


def test_absent_numbers_are_said_to_be_absent() -> None:
    card = adapter_card(settings(), Summary(base={"loss": 3.5}, tuned={"exact_match": None, "loss": 1.0}), None)
    assert "| Exact match | not measured | not measured |" in card
    assert "number of rows was not recorded" in card
    assert [m["name"] for m in front_matter(card)["model-index"][0]["results"][0]["metrics"]] == [
        "Loss", "Loss (base model)",
    ]  # fmt: skip
    bare = adapter_card(settings(), Summary(), None)
    assert "The scores were not measured." in bare
    assert "model-index" not in front_matter(bare)


def test_base_that_is_not_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = adapter_card(settings("tiny"), RUN, DATA, "me/support")
    assert front_matter(demo)["base_model"] == "tiny"
    assert "AutoModelForCausalLM.from_pretrained(tiny_path())" in demo
    assert "no general ability" in demo

    monkeypatch.chdir(tmp_path)
    assert is_hub_id("models/mine")
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert not is_hub_id("models/mine")
    local = adapter_card(settings("models/mine"), RUN, DATA)
    assert "base_model" not in front_matter(local)
    assert "you need that very model" in local
    assert "huggingface.co" not in local


@pytest.mark.parametrize("template", ["auto", "plain", "thinking"])
@pytest.mark.parametrize("base", ["tiny", "lab/base", "../base"])
def test_every_code_block_is_python(base: str, template: str) -> None:
    config = settings(base, data={"template": template})
    for card in (adapter_card(config, RUN, DATA, "me/support"), merged_card(config, RUN, MERGE)):
        blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        assert blocks
        for block in blocks:
            ast.parse(block)
        assert ("apply_chat_template" in card) == (template != "plain")
        assert ("enable_thinking=True" in card) == (template == "thinking")


def test_merged_card_tells_how_the_merge_was_checked() -> None:
    card = merged_card(settings(), RUN, MERGE, "me/whole")
    head = front_matter(card)
    assert (head["library_name"], head["base_model_relation"]) == ("transformers", "finetune")
    assert "| Largest difference of a logit, as a share of the largest logit | 0.0012 |" in card
    assert "| Top-1 agreement | 99.75 % |" in card
    assert "| Weights merged into | the weights that were trained over, dequantized |" in card
    assert "base_model_relation" not in yaml.safe_load(merged_card(settings("tiny"), RUN, MERGE).split("---")[1])


@pytest.mark.parametrize("width", [50, 145])
def test_tables_fit(tmp_path: Path, width: int) -> None:
    write_records(tmp_path / "support", "Qwen/Qwen3-0.6B")
    write_records(tmp_path / ("long-name-" * 6))
    scores = printed(scores_table(SUMMARY["base"], {**SUMMARY["tuned"], "exact_match": None}), width)
    lines = [line.split() for line in scores.splitlines()]
    assert lines[0] == ["base", "tuned"]
    assert ["Loss", "3.5000", "0.0200"] in lines
    assert "base" not in printed(scores_table(None, SUMMARY["tuned"]), width)
    runs = printed(runs_table(list_runs(tmp_path), width), width)
    assert max(map(len, (scores + runs).splitlines())) <= width
    if width == 145:
        line = next(line for line in runs.splitlines() if line.startswith("support"))
        assert re.search(r"complete +Qwen/Qwen3-0.6B +none +120 +0\.0272 +0\.0200 +exact match 2\.5 → 92\.5 %", line)


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    [(0.0, 10, 0.0, 0.2775), (1.0, 3, 0.4385, 1.0), (0.5, 100, 0.4038, 0.5962), (0.81, 263, 0.7583, 0.8529)],
)
def test_wilsons_interval(share: float, count: int, low: float, high: float) -> None:
    """Values of Wilson's formula as tables of statistics give them."""
    assert wilson(share, count) == pytest.approx((low, high), abs=5e-4)


def test_intervals_of_scores() -> None:
    scores = {"loss": 1.0, "perplexity": 2.7, "token_accuracy": 0.9, "sequence_accuracy": 0.5, "exact_match": None,
              "rows": 40, "exact_match_rows": 0}  # fmt: skip
    assert interval("exact_match", scores, {}) is None
    assert interval("loss", scores, {}) is None
    assert interval("loss", scores, {"loss": 0.1}) == pytest.approx((0.804, 1.196), abs=1e-3)
    low, high = interval("perplexity", scores, {"loss": 0.1}) or (0, 0)
    assert low < 2.7 < high
    low, high = interval("token_accuracy", scores, {"token_accuracy": 0.02}) or (0, 0)
    assert 0.85 < low < 0.9 < high < 0.94
    low, high = interval("token_accuracy", {**scores, "token_accuracy": 1.0}, {"token_accuracy": 0.0}) or (0, 0)
    assert low < 0.95  # of 40 rows without an error not everything is known
    assert high == 1.0


def test_few_rows_are_said_to_be_few() -> None:
    few = {**SUMMARY["tuned"], "rows": 3, "exact_match_rows": 3}
    text = "\n".join(describe_scores({**SUMMARY["base"], "rows": 3, "exact_match_rows": 3}, few))
    assert text.startswith("over 3 rows; 95 % intervals, base and tuned:")
    assert "exact match: " in text
    assert "fewer than 30 rows" in text
    assert describe_scores(None, {}) == []


def test_some_answers_are_shown_with_their_reference() -> None:
    rows = [{"question": f"Q{n} [x]", "reference": "W", "base": "", "tuned": "W" if n else "T"} for n in range(10)]
    lines = predictions_shown(rows, 3)
    assert len(lines) == 12
    assert lines[0] == "\n[bold]Q0 \\[x][/]"
    assert "(nothing)" in lines[2]
    assert lines[7].endswith("W  [green]✓[/]")
    assert predictions_shown(rows, 0) == predictions_shown([], 3) == []
