"""`lmtune preview` shows what training will use, readable with and without color."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.text import Text

from lmtune.data.preview import show_tokens, token_text
from lmtune.data.types import TokenSequence
from lmtune.errors import ConfigError, DataError
from lmtune.recipes.preview import main
from tests.tokenizers import CHATML, make_tokenizer


def shown(ids: list[int], targets: list[bool], color: bool = False) -> Text:
    return show_tokens(make_tokenizer(CHATML), TokenSequence(np.array(ids), np.array(targets)), color)


def test_targets_are_marked_with_and_without_color() -> None:
    tokenizer = make_tokenizer(CHATML)
    ids = [3, *tokenizer.encode("is is\n"), 4]
    trained = [False] * (len(ids) - 2) + [True] * 2
    plain = shown(ids, trained).plain
    assert plain.startswith("<|im_start|> i")
    assert "|" not in plain.replace("<|im_start|>", "").replace("<|im_end|>", ""), "a bar stands beside <|im_end|>"
    assert plain.endswith("[⏎]\n[<|im_end|>]")
    colored = shown(ids, trained, color=True)
    assert colored.plain.endswith("is·is⏎\n<|im_end|>")
    targets = [colored.plain[span.start : span.end] for span in colored.spans if "underline" in str(span.style)]
    assert targets == ["⏎\n", "<|im_end|>"]


def test_what_has_no_glyph_is_spelt_out() -> None:
    tokenizer = make_tokenizer()
    shown = "".join(token_text(tokenizer, token) for token in tokenizer.encode("a\t\x1b[2J é"))
    assert "⇥" in shown
    assert "\\x1b" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize("text", ["歷史", "naïve 😀 ok", "при​вет", "한국어"])
@pytest.mark.parametrize("is_target", [False, True])
def test_a_character_of_several_tokens_is_shown_as_itself(text: str, is_target: bool) -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    for color in (False, True):
        plain = shown(ids, [is_target] * len(ids), color).plain
        assert all(character in plain for character in text if character.isprintable() and character != " ")
        parts = [tokenizer.convert_ids_to_tokens(token) for token in ids if "\ufffd" in tokenizer.decode([token])]
        assert not any(part in plain for part in parts), "the bytes' stand-ins say nothing to a person"


def test_parts_of_a_character_are_shown_as_bytes() -> None:
    ids = make_tokenizer().encode("歷", add_special_tokens=False)
    assert shown(ids, [True] * 3).plain == "[歷]{3}"
    assert shown([*ids[:2], 4], [False, False, True]).plain == "\\xe6 \\xad [<|im_end|>]"
    assert shown(ids, [False, False, True]).plain == "\\xe6 \\xad [\\xb7]", "only a part of the character is trained"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_tokenizer(CHATML).save_pretrained("model")
    Path("model/config.json").write_text(json.dumps({"model_type": "llama"}))
    rows = [{"prompt": "q" * (1 + 50 * n), "completion": "answer"} for n in range(3)]
    Path("train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{}\n")
    Path("c.yaml").write_text("model: {name: ./model}\ndata: {train: train.jsonl, max_length: 64}\n")
    return tmp_path


def test_the_command_shows_the_rows_of_a_config(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(config=Path("c.yaml"), rows=3)
    printed = capsys.readouterr()
    assert "train.jsonl:1: 15 tokens, 4 trained" in printed.out
    assert "[<|im_end|>]" in printed.out
    assert printed.out.count("will be dropped: longer than data.max_length (64)") == 2
    assert "answers end in <|im_end|> (4)" in printed.err


def test_the_command_takes_any_file_and_model_and_tells_faults(folder: Path) -> None:
    with pytest.raises(DataError, match=r"train.jsonl:4: the row is empty"):
        main([Path("train.jsonl")], model="model", rows=9)
    with pytest.raises(ConfigError, match="--model NAME"):
        main([Path("train.jsonl")])
