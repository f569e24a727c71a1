"""Evaluation against a loop written by hand; base and tuned on one loaded model; answers the model gives itself."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from lmtune.data.rendering import Renderer
from lmtune.data.types import TokenizedExample
from lmtune.errors import ConfigError, LmtuneError
from lmtune.evaluation.generative import Answer, answers, split_prompt
from lmtune.evaluation.scoring import check_lengths, evaluate, standard_error, teacher_forced, with_exact_match
from lmtune.forward.packed import PackedForward
from lmtune.objectives.sft import Sft
from tests.tiny import SAVED_VOCABULARY, Rows, adapted, random_rows, tiny_model, token_sequence, weighted
from tests.tokenizers import CHATML, make_tokenizer


@torch.no_grad()
def by_hand(model, rows: Rows) -> dict[str, float]:
    """Each document alone, in plain PyTorch."""
    losses, weights, right, right_rows = [], [], [], 0
    for row in rows.rows:
        of_row = []
        for document in row.sequences:
            ids = torch.tensor(document.input_ids, dtype=torch.long)
            kept = torch.tensor(document.loss_mask[1:])
            logits = model(input_ids=ids[None]).logits[0, :-1][kept]
            losses += (row.weight * F.cross_entropy(logits, ids[1:][kept], reduction="none")).tolist()
            weights += [row.weight] * len(logits)
            of_row += (logits.argmax(-1) == ids[1:][kept]).tolist()
        right += of_row
        right_rows += all(of_row)
    loss = sum(losses) / sum(weights)
    return {
        "loss": loss, "perplexity": math.exp(loss), "token_accuracy": sum(right) / len(right),
        "sequence_accuracy": right_rows / len(rows),
    }  # fmt: skip


def rows_partly_right(model) -> Rows:
    """Random rows, some of whose trained tokens, and some rows wholly, are what the model would say."""
    rows = random_rows(12)
    for number, row in enumerate(rows.rows):
        for document in row.sequences:
            for place in np.flatnonzero(document.loss_mask):
                if number % 2 or place % 3 == 0:
                    ids = torch.tensor(document.input_ids[:place], dtype=torch.long)
                    with torch.no_grad():
                        document.input_ids[place] = int(model(input_ids=ids[None]).logits[0, -1].argmax())
    return rows


@pytest.mark.parametrize("budget", [1, 70, 10**6])
@pytest.mark.parametrize("weigh", [False, True])
def test_the_scores_are_those_of_a_plain_loop(budget: int, weigh: bool) -> None:
    """A row's weight counts in the loss, as in training, and not in the shares of right tokens and rows."""
    model = adapted(tiny_model()).eval()
    rows = rows_partly_right(model)
    rows = weighted(rows) if weigh else rows
    wanted = by_hand(model, rows)
    scores = teacher_forced(PackedForward(model), rows, budget)
    assert 0.3 < scores.sequence_accuracy < 1
    assert scores.sequence_accuracy < scores.token_accuracy < 1
    for name, value in wanted.items():
        assert getattr(scores, name) == pytest.approx(value, abs=1e-4 if name == "perplexity" else 1e-5)
    assert (scores.rows, scores.exact_match, scores.exact_match_rows) == (12, None, 0)


def test_where_memory_is_too_small_for_several_rows_they_are_scored_in_halves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forward, rows = PackedForward(adapted(tiny_model())), random_rows(9)
    wanted, real = teacher_forced(forward, rows, 10**6), PackedForward.__call__
    most = max(len(document.input_ids) for row in rows.rows for document in row.sequences)

    def small(self: PackedForward, batch: Any) -> Any:
        if batch.input_ids.numel() > most:
            raise torch.OutOfMemoryError("out of memory")
        return real(self, batch)

    monkeypatch.setattr(PackedForward, "__call__", small)
    got = teacher_forced(forward, rows, 10**6)
    assert got.loss == pytest.approx(wanted.loss, abs=1e-6)
    assert (got.rows, got.sequence_accuracy) == (wanted.rows, wanted.sequence_accuracy)


def test_without_the_adapter_it_scores_the_base_and_leaves_everything_as_it_was() -> None:
    model, rows = adapted(tiny_model(), dropout=0.5), random_rows(6)
    model.train()
    base = teacher_forced(PackedForward(tiny_model()), rows, 100)
    tuned = teacher_forced(PackedForward(model), rows, 100)
    with model.disable_adapter():
        alone = teacher_forced(PackedForward(model), rows, 100)
    assert alone.loss == pytest.approx(base.loss, abs=1e-6)
    assert abs(tuned.loss - base.loss) > 1e-3
    assert model.training
    assert teacher_forced(PackedForward(model), rows, 100) == tuned


class Share:
    """One of several processes, which keeps what it gives and takes `others` for what the others give."""

    def __init__(self, rank: int, world: int, others: tuple[Any, ...] = ()) -> None:
        self.rank, self.world_size, self.others = rank, world, others

    def gather(self, items: list[Any]) -> list[Any]:
        self.given = items
        return [*items, *self.others]


def test_processes_share_the_rows() -> None:
    """Each adds up its part; together they give what one gives for all."""
    model = adapted(tiny_model()).eval()
    forward, rows = PackedForward(model), rows_partly_right(model)
    whole, parts = teacher_forced(forward, rows, 100), []
    for rank in (0, 1):
        share = Share(rank, 3)
        teacher_forced(forward, rows, 100, share)
        parts += share.given
    together = teacher_forced(forward, rows, 100, Share(2, 3, tuple(parts)))
    assert together.loss == pytest.approx(whole.loss, abs=1e-6)
    assert (together.token_accuracy, together.sequence_accuracy) == (whole.token_accuracy, whole.sequence_accuracy)


def test_a_process_without_rows_has_nothing_to_add() -> None:
    model, rows = adapted(tiny_model()).eval(), random_rows(1)
    first = Share(0, 2)
    whole = teacher_forced(PackedForward(model), rows, 100, first)
    assert teacher_forced(PackedForward(model), rows, 100, Share(1, 2, tuple(first.given))) == whole


class Host(torch.Tensor):
    """What was copied to the host, and what comes of it."""


def test_scoring_computes_nothing_in_64_bit_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every device has it: Apple's has not."""
    forward, rows = PackedForward(adapted(tiny_model())), random_rows(4)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor.as_subclass(Host))

    class Find64Bit(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
                assert isinstance(args[0], Host), func
            return result

    with Find64Bit():
        assert teacher_forced(forward, rows, 100).rows == 4


@pytest.mark.parametrize("budget", [1, 10**6])
def test_rows_whose_loss_is_not_finite_are_named(budget: int) -> None:
    """Such a score could not be written to any file, and tells nothing of the other rows."""
    model, rows = adapted(tiny_model()), random_rows(8)
    for row in rows.rows:
        for document in row.sequences:
            document.input_ids[document.input_ids == 99] = 5
    rows[2].sequences[0].input_ids[0] = rows[6].sequences[0].input_ids[1] = 99
    model.get_base_model().model.embed_tokens.weight.data[99] = float("nan")
    model.train()
    with pytest.raises(
        LmtuneError, match=r"(?s)the loss of these rows is not finite:\n  rows.jsonl:3\n  rows.jsonl:7\n  "
    ):
        teacher_forced(PackedForward(model), rows, budget)
    assert model.training


# --- answers


def test_the_last_turn_is_the_question_that_is_asked() -> None:
    def row(*flags: int) -> TokenizedExample:
        ids = np.arange(10, 10 + len(flags), dtype=np.int32)
        return TokenizedExample("x:1", [token_sequence(ids, flags)])

    assert split_prompt(row(0, 0, 1, 1)) == ([10, 11], [12, 13])
    assert split_prompt(row(0, 0, 1, 1, 0, 0, 1)) == ([10, 11, 12, 13, 14, 15], [16])
    assert split_prompt(row(0, 1, 1)) == ([], [10, 11, 12])  # a plain text, trained from its second token on
    two = TokenizedExample("x:1", [row(0, 0, 1).sequences[0], row(0, 0, 0, 1).sequences[0]])
    assert split_prompt(two) == ([10, 11, 12], [13])


def test_exact_match_is_the_share_of_right_answers() -> None:
    scores = teacher_forced(PackedForward(tiny_model()), random_rows(2), 100)
    given = [Answer(0, "q", "a", "a"), Answer(1, "q", "a", "b"), Answer(2, "q", "a", "a ")]
    assert with_exact_match(scores, given).exact_match == pytest.approx(2 / 3)
    assert with_exact_match(scores, given).exact_match_rows == 3
    assert with_exact_match(scores, []).exact_match is None


def conversations(count: int) -> tuple[Renderer, Rows]:
    """Rows of a chat template, as tokens."""
    from lmtune.data.types import Example, Message

    renderer = Renderer(make_tokenizer(CHATML))
    rows = []
    for n in range(count):
        messages = (Message("user", f"What is number {n}?"), Message("assistant", f"It is {n}."))
        documents = [
            token_sequence(d.input_ids, d.loss_mask) for d in renderer.render(Example("x", n + 1, messages, None))
        ]
        rows.append(TokenizedExample(f"x:{n + 1}", documents))
    return renderer, Rows(rows)


def test_answers_are_greedy_in_row_order_with_question_and_right_answer() -> None:
    renderer, rows = conversations(4)
    model = adapted(tiny_model(vocab_size=SAVED_VOCABULARY))
    model.train()
    given = answers(model, renderer, rows, [2, 0, 3], 6)
    assert model.training
    assert [answer.row for answer in given] == [2, 0, 3]
    assert [answer.question for answer in given] == [f"What is number {n}?" for n in (2, 0, 3)]
    assert [answer.reference for answer in given] == [f"It is {n}." for n in (2, 0, 3)]
    prompt = split_prompt(rows[2])[0]
    model.eval()
    for _ in range(6):
        with torch.no_grad():
            prompt.append(int(model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax()))
        if prompt[-1] in renderer.stop_token_ids:
            break
    assert given[0].prediction == renderer.decode(prompt[len(split_prompt(rows[2])[0]) :])
    assert answers(model, renderer, rows, [], 6) == []


@pytest.mark.parametrize(("asked", "measured"), [(0, 0), (2, 2), (99, 3)])
def test_plain_texts_are_scored_but_not_asked(asked: int, measured: int) -> None:
    renderer, rows = conversations(3)
    text = token_sequence([5, 6, 7], [False, True, True])
    both = Rows([*rows.rows, TokenizedExample("x:9", [text])])
    model = adapted(tiny_model(vocab_size=SAVED_VOCABULARY))
    scores, given = evaluate(PackedForward(model), renderer, both, asked, 4, 1000, Sft())
    assert (scores.rows, scores.exact_match_rows, len(given)) == (4, measured, measured)
    assert (scores.exact_match is None) is (measured == 0)
    assert list(scores.as_dict()) == [
        "loss", "perplexity", "token_accuracy", "sequence_accuracy", "exact_match", "rows", "exact_match_rows"
    ]  # fmt: skip


class TestLengths:
    def test_a_rotary_model_reads_on_and_that_is_said(self, capsys: pytest.CaptureFixture[str]) -> None:
        check_lengths(tiny_model(max_position_embeddings=40), [random_rows(9, longest=40)], "data.max_length")
        assert not capsys.readouterr().err
        check_lengths(tiny_model(max_position_embeddings=30), [random_rows(9, longest=40)], "data.max_length")
        assert "tokens, but this model was made for at most 30" in " ".join(capsys.readouterr().err.split())

    @pytest.mark.parametrize("number", [0, 1])
    def test_position_tables_end(self, number: int) -> None:
        rows = [random_rows(9, longest=20), random_rows(9, longest=20)]
        check_lengths(tiny_model("gpt2", n_positions=20), rows, "data.max_length")
        rows[number] = random_rows(9, longest=40)
        with pytest.raises(ConfigError, match=r"^data\.max_length: rows\.jsonl:\d+ has \d+ tokens, but this model has"):
            check_lengths(tiny_model("gpt2", n_positions=20), rows, "data.max_length")

    def test_a_row_is_as_long_as_its_longest_sequence(self) -> None:
        rows = random_rows(20, longest=40)
        longest = max(len(document.input_ids) for row in rows.rows for document in row.sequences)
        assert max(sum(len(one.input_ids) for one in row.sequences) for row in rows.rows) > longest
        check_lengths(tiny_model("gpt2", n_positions=longest), [rows], "data.max_length")
        with pytest.raises(ConfigError, match=f"has {longest} tokens, but this model has positions for {longest - 1};"):
            check_lengths(tiny_model("gpt2", n_positions=longest - 1), [rows], "data.max_length")

    def test_a_question_without_room_for_an_answer_is_not_asked(self) -> None:
        model, rows = tiny_model(max_position_embeddings=16), random_rows(12, longest=60)
        renderer = Renderer(make_tokenizer(CHATML))
        roomy = [row for row in range(12) if 0 < len(split_prompt(rows[row])[0]) < 16]
        scores, given = evaluate(PackedForward(model), renderer, rows, 12, 2, 4096, Sft())
        assert [answer.row for answer in given] == roomy
        assert 0 < scores.exact_match_rows == len(roomy) < 12


def test_the_standard_error_takes_a_row_as_one_observation() -> None:
    """Against the spread of the score over many drawn sets of rows; a row's tokens are alike."""
    generator = np.random.default_rng(0)
    level = generator.normal(2.0, 0.5, (2000, 60))
    counts = generator.integers(1, 30, (2000, 60)).astype(float)
    drawn = (level * counts).sum(1) / counts.sum(1)
    estimated = [standard_error(one * count, count) for one, count in zip(level[:200], counts[:200], strict=True)]
    assert np.mean(estimated) == pytest.approx(drawn.std(), rel=0.05)
    assert standard_error(np.array([1.0]), np.array([2.0])) is None
    assert standard_error(np.array([2.0, 4.0]), np.array([1.0, 2.0])) == 0.0
