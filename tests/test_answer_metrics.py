"""Metrics of generated answers equal those of the libraries the field uses; intervals hold what they say."""

import json
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from scipy import stats

from lmtune.errors import ConfigError
from lmtune.evaluation.answer_metrics import METRICS, answer_metric, number_in, rouge_l
from lmtune.evaluation.intervals import difference, interval, interval_of, share_sentence, student, win_interval

PAIRS = [
    ("the cat sat on the mat", "a cat sat on the mat."),
    ("Yes, to 12 countries.", "Yes, to 12 countries."),
    ("It costs 1,200.50 EUR, i.e. 10-20 % more.", "That costs 1,200.50 EUR - 10 % more!"),
    ("no", "completely different words here"),
    ("an answer", ""),
    ("We ship & deliver &quot;soon&quot;.", 'We deliver "soon".'),
]


CALL = '<tool_call>\n{"name": "lamp", "arguments": {"on": true, "n": 1}}\n</tool_call>'


def scored(name: str, pairs=PAIRS) -> float:
    metric = answer_metric(name)
    return float(metric.score(metric.of_rows(pairs).sum(0)))


@pytest.mark.parametrize(("name", "theirs"), [("bleu", sacrebleu.BLEU), ("chrf", sacrebleu.CHRF)])
def test_n_gram_scores_are_those_of_sacrebleu(name: str, theirs) -> None:
    for pairs in (PAIRS, PAIRS[:1], PAIRS[2:3], PAIRS[3:], PAIRS[:4] * 3):
        wanted = theirs().corpus_score([answer for _, answer in pairs], [[reference for reference, _ in pairs]])
        assert 100 * scored(name, pairs) == pytest.approx(wanted.score, abs=1e-9)


def test_chinese_is_compared_by_its_letters() -> None:
    pairs = [("请在七天内退货。", "请在十天内退货。"), ("可以", "可以的")]
    theirs = sacrebleu.BLEU(tokenize="zh").corpus_score([a for _, a in pairs], [[r for r, _ in pairs]])
    assert 100 * scored("bleu", pairs) == pytest.approx(theirs.score, abs=1e-9)
    assert scored("f1", pairs[:1]) == pytest.approx(6 / 7)
    assert scored("rouge_l", pairs[:1]) == pytest.approx(6 / 7)
    assert scored("normalized", [("可以。", "可以")]) == 1


@pytest.mark.parametrize(
    ("name", "reference", "answer", "wanted"),
    [
        ("exact", "yes", " yes\n", 1), ("exact", "yes", "Yes", 0),
        ("normalized", "The answer.", "answer", 1), ("normalized", "Ｙｅｓ！", "yes", 1),
        ("normalized", "yes", "no", 0),
        ("contains", "12 countries", "Yes, to 12 countries.", 1), ("contains", "", "anything", 0),
        ("number", "so 3 + 4\n#### 7", "It is 7.0", 1), ("number", "#### 1,000", "… #### 1000", 1),
        ("number", "#### 7", "7 apples and 8", 0), ("number", "no figure", "nor here", 0),
        ("number:Answer:", "Answer: -3", "I think so. Answer: -3 units (of 5)", 1),
        (r"regex:\b([A-D])\)", "B) red", "I take B) red", 1), (r"regex:\b([A-D])\)", "B) red", "C)", 0),
        (r"regex:^\d+$", "any", "42", 1), (r"regex:^\d+$", "any", "forty", 0),
        ("json", '{"a": 1, "b": [2]}', '```json\n{"b": [2], "a": 1.0}\n```', 1), ("json", '{"a": 1}', '{"a": 2}', 0),
        ("json_valid", "", "[1]", 1), ("json_valid", "", "{broken", 0),
        ("tool_call", CALL, '{"name": "lamp", "parameters": {"on": true, "n": 1.0}}', 1),
        ("tool_call", CALL, 'I call {"name": "lamp", "arguments": "{\\"n\\": 1, \\"on\\": true}"} now', 1),
        ("tool_call", CALL, CALL.replace("true", "1"), 0), ("tool_call", CALL, CALL + CALL, 0),
        ("tool_call", CALL, "{broken {", 0), ("json", "[true]", "[1]", 0),
        ("f1", "red and blue", "blue", 0.5), ("f1", "red", "", 0), ("rouge_l", "a b", "b a", 1),
        ("rouge_l", "one two three", "one three", 0.8),
    ],
)  # fmt: skip
def test_what_counts_as_the_same(name: str, reference: str, answer: str, wanted: float) -> None:
    assert scored(name, [(reference, answer)]) == pytest.approx(wanted)


def test_every_metric_is_a_share_and_1_for_the_reference_itself() -> None:
    same = [(json.dumps({"name": "n", "arguments": {"text": "one two three four five"}, "n": 4}),) * 2]
    for name in METRICS:
        name = name.replace("PATTERN", ".")
        assert scored(name, same) == pytest.approx(1), name
        assert 0 <= scored(name) <= 1


def test_a_metric_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"--metric rouge: unknown; expected one of exact, .*did you mean rouge_l"):
        answer_metric("rouge")
    with pytest.raises(ConfigError, match="not a regular expression"):
        answer_metric("regex:(")
    for name in ("number:", "regex:"):
        with pytest.raises(ConfigError, match=f"--metric {name}: expected what to look for after the colon"):
            answer_metric(name)


def test_numbers_are_found_as_people_write_them() -> None:
    written = {
        "1 200": 1200, "1,234,567.5": 1234567.5, "-5.50 EUR": -5.5, "1e3": 1000, ".5": 0.5, "x=-7.": -7, "none": None,
        "a #### b": None, "#### 3 4": 3, "3 4": 4, "#### 1,2": 1, "10-20": 20, "#### 2024-05": 2024, "12 3456": 3456,
    }  # fmt: skip
    found = {text: number_in(text) for text in written}
    assert {text: None if one is None else float(one) for text, one in found.items()} == written
    assert rouge_l("", "") == 1


@pytest.mark.parametrize("rows", [10, 40])
@pytest.mark.parametrize("skewed", [False, True])
def test_intervals_hold_the_truth_in_95_of_100_cases(rows: int, skewed: bool) -> None:
    generator, inside, trials = np.random.default_rng(1), 0, 400
    score = lambda sums: sums[..., 0] / sums[..., 1]  # noqa: E731
    for trial in range(trials):
        values = generator.gamma(2.0, 1.0, rows) if skewed else generator.normal(2.0, 1.0, rows)
        found = interval(np.stack([values, np.ones(rows)], 1), score, seed=trial)
        inside += found.low <= 2.0 <= found.high
    least = 0.89 if skewed and rows == 10 else 0.925
    assert least <= inside / trials <= 0.975


def test_a_paired_difference_ignores_what_is_hard_for_both() -> None:
    generator = np.random.default_rng(0)
    hard, ones = generator.normal(0, 10, 80), np.ones(80)
    score = lambda sums: sums[..., 0] / sums[..., 1]  # noqa: E731
    first = np.stack([hard, ones], 1)
    better = difference(first, np.stack([hard + generator.normal(0.5, 0.5, 80), ones], 1), score)
    assert better.verdict == "better"
    assert better.value == pytest.approx(0.5, abs=0.2)
    assert better.interval.low == pytest.approx(better.value - 0.11, abs=0.05)
    assert better.sentence().startswith("tuned is better: it wins")
    same = difference(first, first, score)
    assert (same.verdict, same.ties, same.win_share) == ("not told apart", 80, 0.5)
    worse = difference(first, np.stack([hard + 1, ones], 1), score, higher_is_better=False)
    assert (worse.verdict, worse.losses) == ("worse", 80)
    assert worse.win_interval.low == 0
    assert 0 < worse.win_interval.high < 0.04, "80 of 80 is not for certain all"


@pytest.mark.parametrize("shares", [(0.5, 0.3, 0.2), (0.2, 0.05, 0.75), (0.8, 0.2, 0.0), (0.97, 0.02, 0.01)])
def test_the_share_of_wins_has_an_interval_that_holds_it(shares: tuple[float, float, float]) -> None:
    drawn = np.random.default_rng(0).multinomial(40, shares, 2000)
    found = [win_interval(*map(int, votes)) for votes in drawn]
    inside = np.mean([low <= shares[0] + shares[2] / 2 <= high for low, high in found])
    assert 0.93 <= inside <= (0.97 if max(shares) < 0.9 else 0.999)  # near the edge it is wide rather than narrow
    assert 0.93 <= covered(0.9, 40, 2000) <= 0.97, "of shares, too"


def covered(share: float, rows: int, trials: int) -> float:
    """How often the interval of right rows holds the share that they are drawn with."""
    drawn = np.random.default_rng(0).random((trials, rows)) < share
    found = [interval(np.stack([right, np.ones(rows)], 1), lambda sums: sums[..., 0] / sums[..., 1]) for right in drawn]
    return float(np.mean([low <= share <= high for low, high in found]))


def test_few_rows_on_one_side_tell_nothing() -> None:
    few, score = np.array([[1.0, 1.0]] * 5), lambda sums: sums[..., 0] / sums[..., 1]
    worst = np.array([[0.0, 1.0]] * 5)
    assert difference(worst, few, score).verdict == "not told apart", "of 5 coins all fall alike once in 16"
    assert difference(np.tile(worst, (2, 1)), np.tile(few, (2, 1)), score).verdict == "better"
    assert share_sentence("b", 5, 0, 0).startswith("b is not told apart")
    assert share_sentence("b", 30, 5, 5) == "b is better: it wins 69 to 90 of 100 rows"
    assert share_sentence("b", 0, 0, 0) == "no row has a verdict"


def test_measures_that_are_no_sums_are_resampled_too() -> None:
    values = np.random.default_rng(0).normal(size=200)
    found = interval_of(lambda some: float(values[some].mean()), 200)
    wanted = interval(np.stack([values, np.ones(200)], 1), lambda sums: sums[..., 0] / sums[..., 1])
    assert found == pytest.approx(wanted, abs=0.02)
    assert interval_of(lambda some: None, 200) is None


def test_equal_seeds_draw_equal_rows_and_one_row_has_no_interval() -> None:
    rows = np.random.default_rng(0).random((30, 2))
    score = lambda sums: sums[..., 0]  # noqa: E731
    assert interval(rows, score, 3) == interval(rows, score, 3) != interval(rows, score, 4)
    assert interval(rows[:1], score) is None
    assert difference(rows[:0], rows[:0], score) is None


def test_the_quantiles_of_student() -> None:
    for freedom in (1, 2, 3, 5, 9, 30, 1000):
        assert student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=2e-3)


def test_scikit_learn_agrees_on_classes(tmp_path: Path) -> None:
    """The measures of classifiers, from their definitions, beside the library that everybody compares with."""
    from sklearn import metrics

    from lmtune.evaluation.measures import measure, roc_auc, spearman
    from lmtune.models.head import Head

    generator = np.random.default_rng(0)
    scores, right = generator.normal(size=(200, 4)), generator.integers(0, 4, 200).astype(float)
    found, each = measure(Head("single_label", ("a", "b", "c", "d")), scores, right)
    predicted = scores.argmax(-1)
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(right, predicted, average="macro"))
    assert np.array_equal(each.confusion, metrics.confusion_matrix(right, predicted))
    values, other = np.round(generator.random(50), 1), generator.random(50)
    assert roc_auc(values, other > 0.5) == pytest.approx(metrics.roc_auc_score(other > 0.5, values))
    assert spearman(values, other) == pytest.approx(stats.spearmanr(values, other).statistic)
