"""Rows of tokens: kept on disk, cut or dropped as asked, split without a leak, every row counted."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmtune.config.schema import DataConfig
from lmtune.data.lengths import truncated
from lmtune.data.rendering import Renderer
from lmtune.data.report import PartReport, RowCounter, describe_part, describe_report
from lmtune.data.store import load_data, split, tokenize
from lmtune.data.types import Example, Message, TokenSequence
from lmtune.errors import DataError
from lmtune.io import atomic
from tests.tokenizers import CHATML, NO_SYSTEM, QWEN3, make_tokenizer


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(start, start + count)]


def config(**changes: Any) -> DataConfig:
    return DataConfig(**{"train": "train.jsonl", "validation_fraction": 0.0, **changes})


def renderer(template: str | None = CHATML, **options: Any) -> Renderer:
    return Renderer(make_tokenizer(template), **options)


def sequence(ids: Iterable[int], flags: str) -> TokenSequence:
    return TokenSequence(np.array(ids), np.array([flag == "1" for flag in flags]))


def no_rendering(self: Renderer, example: Example) -> tuple[TokenSequence, ...]:
    raise AssertionError("rendered again")


def test_rows_come_back_as_they_were_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmtune.data.store._BATCH_ROWS", 3)
    conversation = {"messages": [{"role": r, "content": f"{r} {i}"} for i, r in enumerate(["user", "assistant"] * 3)]}
    written("a.jsonl", rows(3))
    written("b.jsonl", [conversation])
    for template in (CHATML, QWEN3, None):
        if template is None:
            written("b.jsonl", [{"text": "a plain text"}])
        made = renderer(template)
        data = tokenize(["a.jsonl", "b.jsonl"], made, config())
        examples = list(_examples(["a.jsonl", "b.jsonl"]))
        assert len(data) == 4
        assert [data[i].location for i in range(4)] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "b.jsonl:1"]
        for index, example in enumerate(examples):
            expected = made.render(example)
            found = data[index].sequences
            assert found == expected
            assert found[0].input_ids.dtype == np.int32
            assert found[0].loss_mask.dtype == bool
            assert data.num_tokens[index] == sum(len(document.input_ids) for document in expected)
            assert data.num_targets[index] == sum(sum(document.loss_mask) for document in expected)
        assert data.num_tokens.dtype == data.num_targets.dtype == np.int32
        documents = [document for row in data for document in row.sequences]
        assert data.sequences.num_tokens.tolist() == [len(document.input_ids) for document in documents]
        assert data.sequences.num_targets.tolist() == [document.loss_mask.sum() for document in documents]
        assert np.diff(data.sequences.first).tolist() == [len(row.sequences) for row in data]


def _examples(paths: list[str]) -> list[Example]:
    from lmtune.data.reading import ReadReport, read_examples
    from lmtune.data.sources import find_files

    return list(read_examples(find_files(paths), ReadReport()))


class TestCache:
    def test_a_second_start_does_not_render(self, monkeypatch: pytest.MonkeyPatch) -> None:
        written("train.jsonl", rows(5))
        first = load_data(config(validation_fraction=0.2), renderer(), 0)
        monkeypatch.setattr(Renderer, "render", no_rendering)
        second = load_data(config(validation_fraction=0.2), renderer(), 0)
        assert first.key == second.key
        assert first.report == second.report
        assert [row.location for row in first.train] == [row.location for row in second.train]

    @pytest.mark.parametrize(
        "change",
        [{"max_length": 100}, {"too_long": "truncate"}, {"system": "s"}, {"template": None}, {"content": 6}],
    )
    def test_what_decides_the_tokens_decides_the_key(self, change: dict[str, Any]) -> None:
        written("train.jsonl", rows(5))
        before = tokenize(["train.jsonl"], renderer(), config()).key
        other = renderer(change.pop("template", CHATML), system=change.pop("system", None))
        if content := change.pop("content", None):
            written("train.jsonl", rows(content))
        assert tokenize(["train.jsonl"], other, config(**change)).key != before

    def test_the_name_of_a_file_is_not_in_the_key(self) -> None:
        written("a.jsonl", rows(5))
        written("b.jsonl", rows(5))
        a, b = (tokenize([name], renderer(), config()) for name in ("a.jsonl", "b.jsonl"))
        assert a.key == b.key
        assert (a[0].location, b[0].location) == ("a.jsonl:1", "b.jsonl:1")

    def test_a_file_that_changes_while_it_is_read_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        written("train.jsonl", rows(5))
        render = Renderer.render

        def meddling(self: Renderer, example: Example) -> tuple[TokenSequence, ...]:
            written("train.jsonl", rows(6))
            return render(self, example)

        monkeypatch.setattr(Renderer, "render", meddling)
        with pytest.raises(DataError, match="changed while it was read"):
            tokenize(["train.jsonl"], renderer(), config())


class TestTooLong:
    def long_rows(self) -> str:
        return written("train.jsonl", [*rows(2), {"prompt": "long " * 30, "completion": "answer"}, *rows(1, 9)])

    def test_drop(self) -> None:
        data = tokenize([self.long_rows()], renderer(), config(max_length=60))
        assert [row.location for row in data] == ["train.jsonl:1", "train.jsonl:2", "train.jsonl:4"]
        assert data.report.dropped == {"too_long": RowCounter(1, ["train.jsonl:3"])}
        assert (data.report.rows, data.report.kept) == (4, 3)
        assert "1 dropped, longer than data.max_length: train.jsonl:3" in "\n".join(describe_part(data.report))

    def test_truncate_keeps_the_answer_and_its_end(self) -> None:
        made = renderer()
        data = tokenize([self.long_rows()], made, config(max_length=60, too_long="truncate"))
        (document,) = data[2].sequences
        whole = made.render(_examples(["train.jsonl"])[2])[0]
        assert document == TokenSequence(whole.input_ids[-60:], whole.loss_mask[-60:])
        assert data.report.truncated == RowCounter(1, ["train.jsonl:3"])

    def test_error_names_every_line(self) -> None:
        written("train.jsonl", [*rows(1), *[{"prompt": "long " * 30, "completion": "a"}] * 2])
        with pytest.raises(
            DataError, match=r"2 faults(.|\n)*train.jsonl:2: \d+ tokens(.|\n)*train.jsonl:3: \d+ tokens"
        ):
            tokenize(["train.jsonl"], renderer(), config(max_length=60, too_long="error"))

    @pytest.mark.parametrize("too_long", ["drop", "truncate"])
    def test_no_row_left(self, too_long: str) -> None:
        written("train.jsonl", [{"prompt": "p", "completion": "a long answer without end"}] * 3)
        with pytest.raises(DataError, match=r"no row is left(.|\n)*max_length(.|\n)*the longest row has"):
            tokenize(["train.jsonl"], renderer(), config(max_length=8, too_long=too_long))

    def test_an_answer_that_lost_its_beginning_is_not_trained(self) -> None:
        document = sequence(range(10), "0011100011")
        assert truncated(document, 10, False) == document
        assert truncated(document, 9, False) == sequence(range(1, 10), "011100011")
        for length, flags in ((8, "00000011"), (7, "0000011"), (5, "00011"), (3, "011")):
            found = truncated(document, length, False)
            assert found == sequence(range(10 - length, 10), flags)
        assert truncated(document, 2, False) is None
        assert truncated(document, 2, True) == sequence((8, 9), "01")

    def test_a_text_may_begin_anywhere(self) -> None:
        written("train.jsonl", [{"text": "word " * 30}])
        data = tokenize(["train.jsonl"], renderer(), config(max_length=20, too_long="truncate"))
        assert data.num_tokens.tolist() == [20]
        assert data.num_targets.tolist() == [19]


def test_faults_of_reading_and_rendering_are_told_together() -> None:
    bad = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"},
                        {"role": "assistant", "content": "a"}]}  # fmt: skip
    written("a.jsonl", [*rows(1), {"prompt": 1, "completion": "c"}])
    written("b.jsonl", [bad])
    with pytest.raises(
        DataError, match=r"2 faults(.|\n)*a.jsonl:2: prompt(.|\n)*b.jsonl:1: .*System role not supported"
    ):
        tokenize(["a.jsonl", "b.jsonl"], renderer(NO_SYSTEM), config())
    assert not list(atomic.cache_folder().rglob("rows.arrow"))


class TestFaultyRows:
    def faulty(self) -> str:
        faulty = [{"prompt": 1, "completion": "c"}, {"prompt": "p", "completion": "c", "system": "s"}]
        return written("train.jsonl", [*rows(3), *faulty, *rows(1, 9)])

    def test_they_are_left_out_and_counted(self) -> None:
        data = tokenize([self.faulty()], renderer(NO_SYSTEM), config(faulty_rows="skip"))
        assert [row.location for row in data] == [f"train.jsonl:{line}" for line in (1, 2, 3, 6)]
        assert (data.report.rows, data.report.kept, data.report.faulty.count) == (6, 4, 2)
        described = "\n".join(describe_part(data.report))
        assert "6 rows, 4 kept" in described
        assert "2 faulty rows left out (data.faulty_rows: skip):" in described
        assert "1: prompt is a number (1); it must be a string: train.jsonl:4" in described
        assert "System role not supported: train.jsonl:5" in described
        with pytest.raises(DataError, match="2 faults"):
            tokenize(["train.jsonl"], renderer(NO_SYSTEM), config())

    def test_none_left_is_an_error_and_so_is_too_long_error(self) -> None:
        written("train.jsonl", [{"prompt": 1, "completion": "c"}] * 3)
        with pytest.raises(DataError, match=r"3 faults(.|\n)*must leave one"):
            tokenize(["train.jsonl"], renderer(), config(faulty_rows="skip"))
        written("train.jsonl", [*rows(1), {"prompt": "long " * 30, "completion": "a"}, {"prompt": "p"}])
        with pytest.raises(DataError, match=r"1 fault(.|\n)*train.jsonl:2: \d+ tokens"):
            tokenize(["train.jsonl"], renderer(), config(faulty_rows="skip", too_long="error", max_length=60))


class TestControlText:
    def test_rows_that_were_rendered_before_are_counted_with_their_tokens(self) -> None:
        written("train.jsonl", [{"text": "<|im_start|>user\nq<|im_end|>"}, {"text": "plain <b>text</b> [1]"}] * 3)
        (warning,) = tokenize(["train.jsonl"], renderer(), config()).report.warnings
        assert warning.startswith('3 rows with control tokens as text ("<|im_start|>", "<|im_end|>"): train.jsonl:1')
        assert '{"messages": [' in warning


def test_validation_rows_that_are_all_too_long_are_named_as_such() -> None:
    written("train.jsonl", rows(3))
    written("held.jsonl", [{"prompt": "long " * 60, "completion": "c"}])
    with pytest.raises(DataError, match=r"data\.validation: no row is left; raise data\.max_length \(60\)"):
        load_data(config(validation="held.jsonl", max_length=60), renderer(), 0)


def test_an_answer_without_weight_is_context_only() -> None:
    turns = [("user", "q"), ("assistant", "bad"), ("user", "r"), ("assistant", "good")]
    plain = {"messages": [{"role": role, "content": content} for role, content in turns]}
    weighted = json.loads(json.dumps(plain))
    weighted["messages"][1]["weight"] = 0
    for template in (CHATML, QWEN3):
        made = renderer(template)
        data = tokenize([written("train.jsonl", [plain, weighted])], made, config())
        assert data.content[0] != data.content[1]
        documents = data[1].sequences
        assert len(documents) == 1
        prompt = made.prompt_ids([Message(role, content) for role, content in turns[:3]])  # type: ignore[arg-type]
        assert documents[0].input_ids.tolist()[: len(prompt)] == prompt
        assert documents[0].loss_mask.tolist() == [index >= len(prompt) for index in range(len(documents[0].input_ids))]


class TestSplit:
    @settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        contents=st.lists(st.integers(0, 5), min_size=1, max_size=12), fraction=st.sampled_from([0.0, 0.01, 0.3, 0.9]),
        seed=st.integers(0, 3),
    )  # fmt: skip
    def test_no_content_is_on_both_sides(self, contents: list[int], fraction: float, seed: int) -> None:
        class Rows:
            content = prompt = np.array(contents, dtype=np.uint64)
            copies = np.zeros(len(contents), dtype=bool)

            def __len__(self) -> int:
                return len(contents)

        train, held_out = split(Rows(), fraction, seed)  # type: ignore[arg-type]
        assert sorted([*train, *held_out]) == list(range(len(contents)))
        assert not {contents[i] for i in train} & {contents[i] for i in held_out}
        assert len(train)
        assert bool(len(held_out)) == (fraction > 0 and len(set(contents)) > 1)

    def test_held_out_rows_are_views_of_the_same_file(self) -> None:
        written("train.jsonl", rows(10))
        loaded = load_data(config(validation_fraction=0.3), renderer(), 0)
        assert loaded.validation is not None
        assert (len(loaded.train), len(loaded.validation)) == (7, 3)
        wheres = {row.location for row in loaded.train} | {row.location for row in loaded.validation}
        assert len(wheres) == 10
        assert loaded.validation.num_tokens.tolist() == [len(row.sequences[0].input_ids) for row in loaded.validation]
        assert len({loaded.train.key, loaded.validation.key, loaded.key}) == 3
        assert "3 rows of these held out" in describe_report(loaded.report)
        assert loaded.key == load_data(config(validation_fraction=0.3), renderer(), 0).key
        assert loaded.key != load_data(config(validation_fraction=0.3), renderer(), 1).key

    def test_one_content_only_cannot_be_split(self) -> None:
        written("train.jsonl", rows(1) * 4)
        loaded = load_data(config(validation_fraction=0.3), renderer(), 0)
        assert loaded.validation is None
        assert len(loaded.train) == 4
        assert "no validation rows" in describe_report(loaded.report)

    def test_validation_files_are_read_for_themselves(self) -> None:
        written("train.jsonl", rows(10))
        written("validation.jsonl", [*rows(2, 100), *rows(1, 3)])
        loaded = load_data(config(validation="validation.jsonl", validation_fraction=0.5), renderer(), 0)
        assert loaded.validation is not None
        assert (len(loaded.train), len(loaded.validation)) == (10, 3)
        assert isinstance(loaded.report.validation, PartReport)
        assert loaded.report.validation.also_in_train == RowCounter(1, ["validation.jsonl:3"])
        assert "1 row also in train: validation.jsonl:3" in describe_report(loaded.report)
