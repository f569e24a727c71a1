"""Pairs, judged and labelled rows as tokens: the same as those of answers, kept on disk with label and weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lmtune.config.schema import DataConfig
from lmtune.data.in_memory import paths_or_rows, rows_file
from lmtune.data.rendering import Renderer
from lmtune.data.report import PartReport, RowCounter, describe_part, describe_report, typed
from lmtune.data.store import TokenizedData, load_data, tokenize
from lmtune.data.types import Example, Message, RowKind, WithValues, content_hash, prompt_hash
from lmtune.errors import DataError
from tests.tokenizers import CHATML, QWEN3, make_tokenizer

PAIR = {"prompt": "Which city?", "chosen": "Paris.", "rejected": "I do not know."}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(*rows: dict[str, Any], name: str = "train.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def tokens_of(kind: RowKind, *rows: dict[str, Any], template: str | None = CHATML, **changes: Any) -> TokenizedData:
    config = DataConfig(train="train.jsonl", validation_fraction=0.0, **changes)
    return tokenize([written(*rows)], Renderer(make_tokenizer(template)), config, rows=kind)


@pytest.mark.parametrize("template", [CHATML, QWEN3, None])
def test_a_pair_is_two_answers_behind_one_prompt(template: str | None) -> None:
    renderer = Renderer(make_tokenizer(template))
    (pair,) = tokens_of("pair", PAIR, template=template)
    prompt = renderer.prompt_ids([Message("user", "Which city?")])
    for sequence, answer in zip(pair.sequences, ("Paris.", "I do not know."), strict=True):
        alone = Example("f", 1, (Message("user", "Which city?"), Message("assistant", answer)))
        assert (sequence,) == renderer.render(alone)
        assert sequence.input_ids[: len(prompt)].tolist() == prompt
        assert sequence.loss_mask.tolist() == [place >= len(prompt) for place in range(len(sequence))]


def test_earlier_answers_of_a_pair_and_of_a_judged_row_are_not_targets() -> None:
    turns = [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "good")]
    talk = [{"role": role, "content": content} for role, content in turns]
    (pair,) = tokens_of("pair", {"chosen": talk, "rejected": [*talk[:3], {"role": "assistant", "content": "bad"}]})
    (judged,) = tokens_of("judged", {"messages": talk, "label": False})
    prompt = Renderer(make_tokenizer(CHATML)).prompt_ids([Message(*turn) for turn in turns[:3]])  # type: ignore[arg-type]
    assert judged.sequences == pair.sequences[:1]
    assert judged.label is False
    for sequence in pair.sequences:
        assert sequence.loss_mask.argmax() == len(prompt)
        assert sequence.loss_mask[len(prompt) :].all()


def test_a_labelled_text_is_what_the_tokenizer_makes_of_it() -> None:
    """So that transformers' pipeline reads the same."""
    tokenizer = make_tokenizer(CHATML)
    for post in (None, "tail"):
        if post:
            from tokenizers.processors import TemplateProcessing

            ends = [(token, int(tokenizer.convert_tokens_to_ids(token))) for token in (tokenizer.eos_token,)]
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single=f"{tokenizer.eos_token} $A {tokenizer.eos_token}", special_tokens=ends
            )
        example = Example("f", 1, text="A fine film.", label="good", kind="labelled")
        (sequence,) = Renderer(tokenizer).render(example)
        assert sequence.input_ids.tolist() == tokenizer("A fine film.").input_ids
        assert not sequence.loss_mask.any()


@pytest.mark.parametrize("template", [CHATML, None])
def test_a_labelled_prompt_is_what_the_model_is_asked(template: str | None) -> None:
    (row,) = tokens_of("labelled", {"prompt": "Is it good?", "label": ["yes", "warm"]}, template=template)
    asked = Renderer(make_tokenizer(template)).prompt_ids([Message("user", "Is it good?")])
    assert row.sequences[0].input_ids.tolist() == asked
    assert not row.sequences[0].loss_mask.any()
    assert row.label == ("yes", "warm")


@pytest.mark.parametrize("labels", [["sport", 3, 0.25, True, "歷"], [["a", "b"], [], ["歷"]]])
def test_labels_come_back_as_they_were_given(labels: list[Any]) -> None:
    data = tokens_of("labelled", *({"text": f"row {n}", "label": label} for n, label in enumerate(labels)))
    expected = [tuple(label) if isinstance(label, list) else label for label in labels]
    assert data.labels == expected == [row.label for row in data]
    assert [type(label) for label in data.labels] == [type(label) for label in expected]
    assert data.select(np.array([2, 0])).labels == [expected[2], expected[0]]


def test_a_long_pair_falls_as_one_and_is_cut_as_one() -> None:
    short = {"prompt": "p", "chosen": "a", "rejected": "b"}
    one_long = {**short, "rejected": "long " * 30}
    data = tokens_of("pair", short, one_long, max_length=40)
    assert len(data) == 1
    assert data.report.dropped == {"too_long": RowCounter(1, ["train.jsonl:2"])}
    long_prompt = {"prompt": "long " * 30, "chosen": "Paris.", "rejected": "I do not know."}
    whole = tokens_of("pair", long_prompt)[0].sequences
    cut = tokens_of("pair", short, long_prompt, one_long, max_length=40, too_long="truncate")
    assert cut.report.dropped == {"answer_too_long": RowCounter(1, ["train.jsonl:3"])}
    chosen, rejected = cut[1].sequences
    assert max(len(chosen), len(rejected)) == 40
    assert [part.num_targets for part in (chosen, rejected)] == [part.num_targets for part in whole]
    prompt = int(chosen.loss_mask.argmax())
    assert prompt == rejected.loss_mask.argmax()
    assert chosen.input_ids[:prompt].tolist() == rejected.input_ids[:prompt].tolist()


def test_a_long_labelled_text_is_cut_at_its_beginning() -> None:
    row = {"text": "long " * 30 + "end", "label": "x"}
    (whole,) = tokens_of("labelled", row)
    (cut,) = tokens_of("labelled", row, max_length=20, too_long="truncate")
    assert cut.sequences[0].input_ids.tolist() == whole.sequences[0].input_ids[-20:].tolist()


def test_rows_of_another_kind_are_faults_with_their_line() -> None:
    with pytest.raises(DataError, match=r"train.jsonl:1: the row is a preference pair(.|\n)*objective.kind: dpo"):
        tokens_of("answer", PAIR, PAIR)
    with pytest.raises(DataError, match=r"train.jsonl:2: here messages rows begin|train.jsonl:2: the row is an answer"):
        tokens_of("pair", PAIR, {"prompt": "p", "completion": "c"})


def test_the_kind_and_the_labels_decide_key_and_signature() -> None:
    rows = [{"prompt": "p", "completion": "c", "label": label} for label in (True, False)]
    one, other = tokens_of("judged", rows[0]), tokens_of("judged", rows[1])
    assert one[0].sequences == other[0].sequences
    assert one.signature != other.signature
    plain = {"prompt": "p", "completion": "c"}
    assert tokens_of("answer", plain).signature != tokens_of("answer", {**plain, "weight": 2}).signature
    assert tokens_of("answer", plain).signature == tokens_of("answer", {**plain, "weight": 1}).signature


def test_hashes_tell_apart_what_is_not_the_same_row() -> None:
    turns, other = ((Message("user", "q"), Message("assistant", text)) for text in "ab")
    rows = [
        Example("f", 1, turns), Example("f", 1, other), Example("f", 1, turns, rejected=other, kind="pair"),
        Example("f", 1, turns, label=True, kind="judged"), Example("f", 1, turns, label=False, kind="judged"),
        Example("f", 1, turns, label="x", kind="labelled"), Example("f", 1, turns, label="y", kind="labelled"),
        Example("f", 1, text="t"), Example("f", 1, text="t", label="x", kind="labelled"),
    ]  # fmt: skip
    assert len({content_hash(row) for row in rows}) == len(rows)
    assert len({prompt_hash(row) for row in rows[:5]}) == 1
    assert prompt_hash(rows[5]) == prompt_hash(rows[6])
    assert prompt_hash(rows[7]) == prompt_hash(rows[8])


@pytest.mark.parametrize("kind", ["answer", "pair", "judged"])
def test_no_prompt_is_on_both_sides_of_the_split(kind: RowKind) -> None:
    halves: dict[RowKind, dict[str, Any]] = {
        "answer": {"completion": "c"}, "pair": {"chosen": "c", "rejected": "d"},
        "judged": {"completion": "c", "label": True},
    }  # fmt: skip
    first = "completion" if "completion" in halves[kind] else "chosen"
    rows = [{"prompt": f"p{n % 10}", **halves[kind], first: f"answer {n}"} for n in range(30)]
    config = DataConfig(train=written(*rows), validation_fraction=0.2)
    loaded = load_data(config, Renderer(make_tokenizer(CHATML)), 0, kind)
    assert loaded.validation is not None
    assert (len(loaded.train), len(loaded.validation)) == (24, 6)
    prompts = [{rows[int(row.location.partition(":")[2]) - 1]["prompt"] for row in part}  # type: ignore[attr-defined]
               for part in (loaded.train, loaded.validation)]  # fmt: skip
    assert not prompts[0] & prompts[1]


def test_rows_in_memory_carry_weights_labels_and_turns(tmp_path: Path) -> None:
    turns = np.array([{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}])
    worse = np.array([turns[0], {"role": "assistant", "content": "bad"}])
    tables: dict[RowKind, Any] = {
        "answer": pd.DataFrame({"prompt": ["a", "b", "c"], "completion": ["x", "y", "z"], "weight": [0.5, None, 0]}),
        "pair": pd.DataFrame({"chosen": [turns], "rejected": [worse], "weight": np.array([2], dtype=np.int64)}),
        "judged": pd.DataFrame({"prompt": ["a"], "completion": ["x"], "label": np.array([False])}),
        "labelled": [{"text": "a", "label": np.array(["x"])}, {"text": "b", "label": np.array(["x", "y"])}],
    }
    found = {}
    for kind, table in tables.items():
        path = rows_file(paths_or_rows(table), tmp_path)  # type: ignore[arg-type]
        config = DataConfig(train=str(path), validation_fraction=0.0)
        data = tokenize([path], Renderer(make_tokenizer(CHATML)), config, rows=kind)
        found[kind] = [(row.label, row.weight) for row in data]
    assert found == {
        "answer": [(None, 0.5), (None, 1)], "pair": [(None, 2)], "judged": [(False, 1)],
        "labelled": [(("x",), 1), (("x", "y"), 1)],
    }  # fmt: skip


def test_numbers_beside_the_tokens_may_be_several_a_row() -> None:
    from lmtune.batching.plan import Unit
    from lmtune.batching.prefetch import pack_units

    store = tokens_of("pair", *({**PAIR, "prompt": f"{n}?"} for n in range(3)))
    both = np.arange(6, dtype=np.float32).reshape(3, 2)
    data = WithValues(store, reference=both, margin=np.float32([5, 6, 7]))
    batch = pack_units(data, [Unit(0, 2, (0, 1)), Unit(1, 0, (0, 1))], 2)
    assert batch.values["reference"].tolist() == [[4, 5], [4, 5], [0, 1], [0, 1]]
    assert batch.values["margin"].tolist() == [7, 7, 5, 5]


def test_rows_of_weight_zero_are_counted_and_left_out() -> None:
    rows = [{"prompt": f"p {n}", "completion": "c", "weight": weight} for n, weight in enumerate([1, 0, 0.5, 0])]
    data = tokens_of("answer", *rows)
    assert [row.location for row in data] == ["train.jsonl:1", "train.jsonl:3"]
    assert [row.weight for row in data] == [1, 0.5]
    assert data.sequences.weights is not None
    assert data.sequences.weights.tolist() == [1, 0.5]
    assert (data.report.rows, data.report.kept, data.report.total_weight) == (4, 2, 1.5)
    assert data.report.zero_weight == RowCounter(2, ["train.jsonl:2", "train.jsonl:4"])
    described = "\n".join(describe_part(data.report))
    assert "2 left out, weight 0: train.jsonl:2, train.jsonl:4" in described
    assert "the weights of the 2 rows used sum to 1.5" in described
    with pytest.raises(DataError, match="no row is left; give rows a weight above 0"):
        tokens_of("answer", {**rows[0], "weight": 0})


def test_the_report_counts_labels() -> None:
    judged = tokens_of("judged", *({"prompt": f"p {n}", "completion": "c", "label": n < 5} for n in range(7)))
    assert judged.report.labels.counts == {"true": 5, "false": 2}
    assert "7 judged answers, 7 kept" in (described := "\n".join(describe_part(judged.report)))
    assert "2 labels: true 5, false 2" in described
    labelled = tokens_of("labelled", *({"text": f"t {n}", "label": ["a", "b"] if n else ["b"]} for n in range(3)))
    assert labelled.report.labels.counts == {"b": 3, "a": 2}
    assert "2 labels: b 3, a 2" in (described := "\n".join(describe_part(labelled.report)))
    assert "trained" not in described
    numbers = tokens_of("labelled", *({"text": f"t {n}", "label": n / 4} for n in range(41)))
    assert "labels: numbers from 0 to 10, mean 5" in "\n".join(describe_part(numbers.report))
    pairs = tokens_of("pair", PAIR)
    assert "1 pair, 1 kept" in "\n".join(describe_part(pairs.report))
    assert typed(PartReport, json.loads(json.dumps(labelled.report.to_dict()))) == labelled.report


class TestSplit:
    TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 20

    @pytest.mark.parametrize("length", [8, 20, 33, 1000])
    def test_every_token_of_a_text_is_a_target_once(self, length: int) -> None:
        (whole,) = tokens_of("answer", {"text": self.TEXT}, max_length=10_000)[0].sequences
        data = tokens_of("answer", {"text": self.TEXT, "weight": 2}, max_length=length, too_long="split")
        ids, targets = list(whole.input_ids[:1]), 0
        for row in data:
            (piece,) = row.sequences
            assert len(piece) <= length
            assert piece.loss_mask.tolist() == [False, *[True] * (len(piece) - 1)]
            assert piece.input_ids[0] == ids[-1], "each reads the last token of the one before"
            ids += piece.input_ids[1:].tolist()
            targets += piece.num_targets
            assert (row.weight, row.location) == (2, "train.jsonl:1")
        assert ids == whole.input_ids.tolist()
        assert targets == whole.num_targets == data.report.trained_tokens
        if len(data) > 1:
            assert (data.report.split, data.report.pieces) == (RowCounter(1, ["train.jsonl:1"]), len(data))
            assert f"1 split into {len(data)} pieces: train.jsonl:1" in "\n".join(describe_part(data.report))

    def test_pieces_can_be_held_out(self) -> None:
        config = DataConfig(
            train=written({"text": self.TEXT}), validation_fraction=0.2, max_length=20, too_long="split"
        )
        loaded = load_data(config, Renderer(make_tokenizer(CHATML)), 0)
        assert loaded.validation is not None
        held_out = len(loaded.validation)
        assert held_out == round(0.2 * (len(loaded.train) + held_out))
        assert f"  {held_out} rows and pieces of these held out for validation" in describe_report(loaded.report)

    @pytest.mark.parametrize(
        ("kind", "row"),
        [
            ("answer", {"prompt": TEXT, "completion": "c"}), ("pair", {**PAIR, "prompt": TEXT}),
            ("labelled", {"text": TEXT, "label": "x"}),
        ],
    )  # fmt: skip
    def test_other_rows_are_dropped(self, kind: RowKind, row: dict[str, Any]) -> None:
        short = json.loads(json.dumps(row).replace(self.TEXT, "short"))
        data = tokens_of(kind, short, row, max_length=60, too_long="split")
        assert len(data) == 1
        assert data.report.dropped == {"not_split": RowCounter(1, ["train.jsonl:2"])}
        assert "only plain text is split: train.jsonl:2" in "\n".join(describe_part(data.report))
