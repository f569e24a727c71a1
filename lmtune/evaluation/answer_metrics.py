"""How a generated answer is compared with its reference, and what many such comparisons add up to.

    metric = answer_metric("chrf")
    rows = np.array([metric.statistics(reference, answer) for …])       # [N, S]
    metric.score(rows.sum(0))                                           # of all rows; of a resample by its own sum

A metric gives of each row a few numbers that add up over rows, so that the score of any rows, a slice or a bootstrap
sample, is a function of their sum. Of most metrics these are a value and a 1; BLEU and chrF count n-grams. All scores
are shares from 0 to 1.

BLEU: https://aclanthology.org/P02-1040, with the tokens of mteval-v13a and exponential smoothing, as sacrebleu has it.
chrF: https://aclanthology.org/W15-3049. ROUGE-L: https://aclanthology.org/W04-1013.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation

import numpy as np
import numpy.typing as npt

from lmtune.errors import ConfigError

Float64 = npt.NDArray[np.float64]
_MARK = "####"  # before the result, in GSM8K's answers
_ORDERS = 4  # of BLEU's n-grams
_CHARACTERS = 6  # of chrF's
# Groups of three digits may be set apart; a dash behind a digit is no sign.
_NUMBER = re.compile(
    r"(?<![\d.])[-+]?(?:\d{1,3}(?:[,_ ]\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|(?<!\d)[-+]?\.\d+"
)
# Letters that are words by themselves: of scripts that put no spaces between words.
_UNSPACED = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f])")
_DECODER = json.JSONDecoder()
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class AnswerMetric:
    """One way to compare.

    Attributes:
        name: as it is asked for.
        statistics: of a reference and an answer, `[S]`.
        score: of sums of statistics `[..., S]`, from 0 to 1.
        applies: whether a row with this reference is one that the metric is about.
    """

    name: str
    statistics: Callable[[str, str], Sequence[float]]
    score: Callable[[Float64], Float64]
    applies: Callable[[str], bool] = lambda reference: True

    def of_rows(self, pairs: Iterable[tuple[str, str]]) -> Float64:
        """`[N, S]` of pairs of reference and answer."""
        return np.array([self.statistics(reference, answer) for reference, answer in pairs], dtype=np.float64)


def answer_metric(name: str) -> AnswerMetric:
    """The metric called `name`; some take what they look for after a colon: `regex:^\\d+$`, `number:Answer:`.

    Raises:
        ConfigError: there is none of that name, or its regular expression or mark is wrong or missing.
    """
    kind, given, argument = name.partition(":")
    if kind in ("regex", "number") and given and not argument:
        raise ConfigError(f"--metric {name}: expected what to look for after the colon, such as number:####")
    if kind == "regex":
        return _mean_of(name, _matches_pattern(argument))
    if kind == "number":
        mark = argument if given else _MARK
        return _mean_of(name, lambda reference, answer: _same_number(reference, answer, mark))
    if name == "bleu":
        return AnswerMetric(name, _bleu_statistics, _bleu)
    if name == "chrf":
        return AnswerMetric(name, _chrf_statistics, _chrf)
    if name == "tool_call":
        return replace(_mean_of(name, _same_calls), applies=lambda reference: bool(calls_in(reference)))
    if name in _OF_ROWS:
        return _mean_of(name, _OF_ROWS[name])
    near = difflib.get_close_matches(name, METRICS, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"--metric {name}: unknown; expected one of {', '.join(METRICS)}{meant}")


def answer_metrics(names: Sequence[str] | None, otherwise: Sequence[str]) -> list[AnswerMetric]:
    """The metrics that a command was asked for, or else those called `otherwise`."""
    return [answer_metric(name) for name in dict.fromkeys(names or otherwise)]


def _mean_of(name: str, compare: Callable[[str, str], float]) -> AnswerMetric:
    """A metric whose score is the mean of what it gives of each row."""
    return AnswerMetric(name, lambda reference, answer: (float(compare(reference, answer)), 1.0), mean_of_sums)


def mean_of_sums(sums: Float64) -> Float64:
    """The score of statistics that are a value and how much it counts, `[..., 2]`."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1e-300)


def exact(reference: str, answer: str) -> bool:
    """Whether both are the same text, but for white space at the ends."""
    return reference.strip() == answer.strip()


def normalized_text(text: str) -> str:
    """Without case, punctuation, articles, full-width forms and repeated white space, as SQuAD compares."""
    plain = unicodedata.normalize("NFKC", text).casefold().translate(_PUNCTUATION)
    letters = "".join(mark for mark in plain if not unicodedata.category(mark).startswith("P"))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", letters).split())


def words(text: str) -> list[str]:
    """The words of `normalized_text`; each letter is one in scripts without spaces between words."""
    return _UNSPACED.sub(r" \1 ", normalized_text(text)).split()


def _contains(reference: str, answer: str) -> bool:
    wanted = normalized_text(reference)
    return bool(wanted) and wanted in normalized_text(answer)


def _matches_pattern(pattern: str) -> Callable[[str, str], bool]:
    """Whether an answer has what the pattern finds in the reference; where that is nothing, whether it matches."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"--metric regex:{pattern}: not a regular expression: {error}") from None

    def compare(reference: str, answer: str) -> bool:
        wanted, found = compiled.search(reference), compiled.search(answer)
        if found is None or wanted is None:
            return found is not None
        return (found.groups() or found.group()) == (wanted.groups() or wanted.group())

    return compare


def number_in(text: str, mark: str = _MARK) -> Decimal | None:
    """The first number after the last `mark`, or the last number where there is no mark; None if there is none."""
    _, marked, after = text.rpartition(mark)
    found = _NUMBER.findall(after if marked else text)
    if not found:
        return None
    try:
        return Decimal(re.sub(r"[,_ ]", "", found[0] if marked else found[-1]))
    except InvalidOperation:
        return None


def _same_number(reference: str, answer: str, mark: str) -> bool:
    wanted = number_in(reference, mark)
    return wanted is not None and wanted == number_in(answer, mark)


def json_in(text: str) -> object:
    """The JSON value that the text is, alone or in a fence of three backticks; ValueError if it is not JSON."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", text, re.DOTALL)
    return json.loads(fenced.group(1) if fenced else text)


def _is_json(reference: str, answer: str) -> bool:
    try:
        json_in(answer)
    except ValueError:
        return False
    return True


def _same_json(reference: str, answer: str) -> bool:
    try:
        return _plain(json_in(reference)) == _plain(json_in(answer))
    except ValueError:
        return False


def _plain(value: object) -> str:
    """A JSON value as text, equal for equal values: keys in order, 1.0 as 1, and true not as 1."""

    def whole(one: object) -> object:
        if isinstance(one, dict):
            return {key: whole(item) for key, item in one.items()}
        if isinstance(one, list):
            return [whole(item) for item in one]
        return int(one) if isinstance(one, float) and one.is_integer() else one

    return json.dumps(whole(value), sort_keys=True)


def calls_in(text: str) -> list[str]:
    """The tool calls in an answer, whatever stands around their JSON, each as text that is equal for equal calls.

    A call is an object with a name, and arguments or parameters that are an object, or JSON text of one.
    """
    found, place = [], text.find("{")
    while place >= 0:
        try:
            value, end = _DECODER.raw_decode(text, place)
        except ValueError:
            value, end = None, place + 1
        call = value.get("function", value) if isinstance(value, dict) else None
        given = None if not isinstance(call, dict) else call.get("arguments", call.get("parameters"))
        if isinstance(given, str):
            with contextlib.suppress(ValueError):
                given = json.loads(given)
        if isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(given, dict):
            found.append(_plain([call["name"], given]))
        place = text.find("{", end)
    return sorted(found)


def _same_calls(reference: str, answer: str) -> bool:
    return calls_in(reference) == calls_in(answer)


def token_f1(reference: str, answer: str) -> float:
    """The harmonic mean of the shares of words that both have, of those of either, as of SQuAD."""
    wanted, said = words(reference), words(answer)
    common = sum((Counter(wanted) & Counter(said)).values())
    if not wanted or not said:
        return float(wanted == said)
    return 2 * common / (len(wanted) + len(said))


def rouge_l(reference: str, answer: str) -> float:
    """The harmonic mean of the shares of the longest common subsequence of words in either."""
    wanted, said = words(reference), words(answer)
    if not wanted or not said:
        return float(wanted == said)
    row = [0] * (len(said) + 1)
    for word in wanted:
        before = 0
        for index, other in enumerate(said, start=1):
            before, row[index] = row[index], before + 1 if word == other else max(row[index], row[index - 1])
    return 2 * row[-1] / (len(wanted) + len(said))


def _bleu_statistics(reference: str, answer: str) -> list[float]:
    """Matching and all n-grams of the answer, for n from 1 to 4, and both lengths."""
    wanted, said = _bleu_tokens(reference), _bleu_tokens(answer)
    counts: list[float] = []
    for order in range(1, _ORDERS + 1):
        mine, theirs = _ngrams(said, order), _ngrams(wanted, order)
        counts += [sum((mine & theirs).values()), max(0, len(said) - order + 1)]
    return [*counts, len(said), len(wanted)]


def _bleu(sums: Float64) -> Float64:
    matching, total, said, wanted = sums[..., 0:8:2], sums[..., 1:8:2], sums[..., 8], sums[..., 9]
    smoothing = 2.0 ** -np.cumsum((matching == 0) & (total > 0), -1)  # a precision of 0 counts as less and less
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(matching > 0, matching, smoothing) / total
        geometric = np.exp(np.log(precision).mean(-1))
        penalty = np.exp(np.minimum(0.0, 1 - wanted / said))
    usable = (matching[..., 0] > 0) & (total > 0).all(-1)
    return np.where(usable, geometric * penalty, 0.0)


def _chrf_statistics(reference: str, answer: str) -> list[float]:
    """N-grams of characters of the answer, of the reference, and of both, for n from 1 to 6."""
    said, wanted = ("".join(text.split()) for text in (answer, reference))
    counts: list[float] = []
    for order in range(1, _CHARACTERS + 1):
        mine, theirs = _ngrams(said, order), _ngrams(wanted, order)
        counts += [mine.total() if theirs else 0, theirs.total(), sum((mine & theirs).values())]
    return counts


def _chrf(sums: Float64, beta: float = 2.0) -> Float64:
    said, wanted, both = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
    there = (said > 0) & (wanted > 0)
    count = np.maximum(there.sum(-1), 1)
    precision = np.where(there, both / np.maximum(said, 1), 0).sum(-1) / count
    recall = np.where(there, both / np.maximum(wanted, 1), 0).sum(-1) / count
    weighted = beta**2 * precision + recall
    return np.where(weighted > 0, (1 + beta**2) * precision * recall / np.where(weighted > 0, weighted, 1), 0.0)


def _ngrams(items: Sequence[str], order: int) -> Counter[object]:
    return Counter(items[place : place + order] for place in range(len(items) - order + 1))


@functools.cache
def _bleu_rules() -> list[tuple[re.Pattern[str], str]]:
    """Spaces around symbols and punctuation, but not around a point or comma within a number, nor after its minus."""
    return [
        (re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "),
        (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),
        (re.compile(r"([\.,])([^0-9])"), r" \1 \2"),
        (re.compile(r"([0-9])(-)"), r"\1 \2 "),
    ]


def _bleu_tokens(text: str) -> tuple[str, ...]:
    plain = " " + _UNSPACED.sub(r" \1 ", text.rstrip()) + " "
    for entity, mark in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        plain = plain.replace(entity, mark)
    for pattern, instead in _bleu_rules():
        plain = pattern.sub(instead, plain)
    return tuple(plain.split())


_OF_ROWS: dict[str, Callable[[str, str], float]] = {
    "exact": exact,
    "normalized": lambda reference, answer: normalized_text(reference) == normalized_text(answer),
    "contains": _contains,
    "json_valid": _is_json,
    "json": _same_json,
    "f1": token_f1,
    "rouge_l": rouge_l,
}
METRICS = (*_OF_ROWS, "tool_call", "number", "regex:PATTERN", "bleu", "chrf")
