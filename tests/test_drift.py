"""Drift from the base: equal to a plain loop, nothing for an adapter that does nothing, the same on every start."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lmtune.demo import drift_prompts
from lmtune.errors import ConfigError
from lmtune.evaluation.drift import drift_of
from lmtune.inference.load import LoadedModel, load_for_inference
from lmtune.recipes import evaluate
from tests.sample_run import write_base, write_run
from tests.workplace import write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a run over it, and prompts."""
    folder = tmp_path_factory.mktemp("drift")
    write_base(folder / "base")
    write_run(folder / "support", str(folder / "base"))
    write_rows(folder / "prompts.jsonl", [{"prompt": f"Tell me of {n}", "completion": "left out"} for n in range(6)])
    return folder


@torch.no_grad()
def by_hand(loaded: LoadedModel, prompt: str, max_new_tokens: int) -> tuple[float, int]:
    """The divergence a token along the base's greedy answer, token by token without a cache."""
    from lmtune.data.types import Message

    ids, stops = loaded.renderer.prompt_ids([Message("user", prompt)]), loaded.renderer.stop_token_ids
    total = count = 0.0
    for _ in range(max_new_tokens):
        found = loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        with loaded.use_base():
            wanted = loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        total, count = total + float((wanted.exp() * (wanted - found)).sum()), count + 1
        ids = [*ids, int(wanted.argmax())]
        if ids[-1] in stops:
            break
    return total / count, int(count)


def test_it_is_the_divergence_of_a_plain_loop(place: Path) -> None:
    loaded = load_for_inference(str(place / "support"))
    found = drift_of(loaded, place / "prompts.jsonl", 12)
    assert len(found.rows) == 6
    for row in found.rows:
        kl, tokens = by_hand(loaded, row.prompt, 12)
        assert row.tokens == tokens
        assert row.kl == pytest.approx(kl, rel=1e-4, abs=1e-6)
    assert [row.kl for row in found.rows] == sorted((row.kl for row in found.rows), reverse=True)
    assert found.kl.value == pytest.approx(sum(row.kl * row.tokens for row in found.rows) / sum(
        row.tokens for row in found.rows))  # fmt: skip
    assert found.kl.value > 0
    assert found.changed.value == sum(row.base.strip() != row.tuned.strip() for row in found.rows) / 6
    assert found.kl.interval is not None
    assert found.kl.interval.low <= found.kl.value <= found.kl.interval.high


def test_an_adapter_that_does_nothing_has_no_drift(place: Path) -> None:
    loaded = load_for_inference(str(place / "support"))
    with torch.no_grad():
        for name, tensor in loaded.model.named_parameters():
            if "lora_B" in name:
                tensor.zero_()
    found = drift_of(loaded, place / "prompts.jsonl", 8)
    assert (found.kl.value, found.changed.value) == (pytest.approx(0, abs=1e-6), 0)


@pytest.mark.slow
def test_the_command_needs_no_rows(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.main(str(place / "support"), drift_prompts=place / "prompts.jsonl", as_json=True)
    tree: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert tree.keys() == {"drift"}
    assert math.isfinite(tree["drift"]["kl"]["value"])
    assert {"prompt", "base", "tuned", "kl", "tokens", "changed"} <= tree["drift"]["rows"][0].keys()
    evaluate.main(str(place / "support"), drift=True)
    assert "drift from the base on 40 prompts: " in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no adapter to leave out"):
        evaluate.main(str(place / "base"), drift=True)


def test_the_prompts_that_ship_are_english_and_chinese() -> None:
    rows = [json.loads(line) for line in drift_prompts().read_text(encoding="utf-8").splitlines()]
    by_language = {
        language: [row["prompt"] for row in rows if row["language"] == language] for language in ("en", "zh")
    }
    assert [len(prompts) for prompts in by_language.values()] == [20, 20]
    assert all(prompt.isascii() for prompt in by_language["en"])
    assert all(any("\u4e00" <= letter <= "\u9fff" for letter in prompt) for prompt in by_language["zh"])
    assert len({row["prompt"] for row in rows}) == 40
