"""Each step of `prepare`: what it changes or drops, what it leaves alone, and how it counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmtune.data.prepare.found import Found
from lmtune.data.prepare.personal import mask_personal
from lmtune.data.prepare.rows import Row
from lmtune.data.prepare.settings import Settings
from lmtune.data.prepare.spool import Spool
from lmtune.data.prepare.steps import STEPS, Context
from lmtune.data.types import RowKind

NUMBERS = "48/2 = 24, 1,234,567 in 2024-11-26, 3.14159265358979"
STEP = {step.name: step for step in STEPS}


def applied(
    name: str, folder: Path, rows: list[dict[str, Any]], kind: RowKind = "answer", **settings: Any
) -> tuple[list[dict[str, Any]], Found]:
    """The fields of the rows after a step, and what it found."""
    spool = Spool(folder / "rows", [Row(f"a.jsonl:{n}", fields) for n, fields in enumerate(rows, start=1)])
    found = Found()
    context = Context(Settings(**settings), kind)
    return [row.fields for row in STEP[name].apply(spool, context, found)], found


def asked(question: str, answer: str = "Yes.") -> dict[str, Any]:
    """A question and its answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("encoding", "cafÃ© â€œaâ€\x9d", "café “a”"),
        ("encoding", "æˆ‘ä»¬çš„è®¢å\x8d•", "我们的订单"),
        ("encoding", "café “Yes” 我们", "café “Yes” 我们"),
        (
            "html",
            "<p>Ships in 2&nbsp;days.</p><ul><li>one</li><li>two</li></ul>",
            "Ships in 2\xa0days.\n\n- one\n- two",
        ),
        ("html", "Use <b>this</b>,\nnot that &amp; not &#39;those&#39;.", "Use this,\nnot that & not 'those'."),
        (
            "html",
            "Run:<pre><code>if a &lt; b:\n    c()\n</code></pre>Done.",
            "Run:\n\n```\nif a < b:\n    c()\n```\n\nDone.",
        ),
        ("html", "How do I centre a <div> in `<p>text</p>`?", "How do I centre a <div> in `<p>text</p>`?"),
        ("html", "```html\n<b>bold</b>\n```", "```html\n<b>bold</b>\n```"),
        ("html", "if a < b and c > d: x &= y", "if a < b and c > d: x &= y"),
        ("html", "<script>x()</script>Hello<br>you", "Hello\nyou"),
        ("spaces", " a\u00a0b\u200b \r\n\r\n\r\n\r\nc\x07\t \n", " a b\n\nc"),
        ("spaces", " one line  ", "one line"),
        ("spaces", "    place = 2 ", "    place = 2"),
        ("spaces", "    x = 1\n    y = 2\n", "    x = 1\n    y = 2"),
        ("spaces", "👩\u200d💻 می\u200cخواهم", "👩\u200d💻 می\u200cخواهم"),
        ("punctuation", "“Ｙｅｓ”，… it’s", '"Yes",... it\'s'),
        ("links", "See https://shop.test/a?b=c, or www.shop.test。", "See [LINK] or [LINK]。"),
        ("capitals", "WHERE IS MY ORDER? I WANT IT NOW!", "Where is my order? I want it now!"),
        ("capitals", "I use NASA and ESA data.", "I use NASA and ESA data."),
    ],
)
def test_a_text_is_changed(name: str, before: str, after: str, tmp_path: Path) -> None:
    rows, found = applied(name, tmp_path, [asked(before, "Fine.")])
    assert rows == [asked(after, "Fine.")]
    assert found.count == (before != after)
    assert found.total == 1
    again, _ = applied(name, tmp_path, rows)
    assert again == rows  # what is clean stays as it is


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Write to ann.lee+x@shop.example.org.", "Write to [EMAIL]."),
        ("Card 4111 1111 1111 1111, order 4111 1111 1111 1112", "Card [CARD], order 4111 1111 1111 1112"),
        ("3782 822463 10005 and 355909190063-746 = x", "[CARD] and 355909190063-746 = x"),
        ("DE89 3704 0044 0532 0130 00 or DE89 3704 0044 0532 0130 01", "[IBAN] or DE89 3704 0044 0532 0130 01"),
        ("身份证11010519491231002X，编号110105194912310021", "身份证[ID]，编号110105194912310021"),
        ("电话13800138000，座机010-62345678", "电话[PHONE]，座机[PHONE]"),
        ("Call +49 30 1234567 or (212) 555-0147 or 212-555-0147.", "Call [PHONE] or [PHONE] or [PHONE]."),
        ("6000-600-150-1200-2000=2050, 150-1200-2000 = 1", "6000-600-150-1200-2000=2050, 150-1200-2000 = 1"),
        ("Call 150-1200-2000.", "Call [PHONE]."),
        ("From 8.8.8.8, not 192.168.0.1, version 1.2.3.4.5", "From [IP], not 192.168.0.1, version 1.2.3.4.5"),
        ("2001:4860:4860::8888 at 12:30:45", "[IP] at 12:30:45"),
        ("00:1B:44:11:3A:B7", "[MAC]"),
        (NUMBERS, NUMBERS),
        ("user@host, @name, 1234567890123", "user@host, @name, 1234567890123"),
    ],
)  # fmt: skip
def test_personal_data_is_masked_where_its_check_digits_hold(text: str, masked: str) -> None:
    assert mask_personal(text) == masked


@pytest.mark.parametrize(
    ("name", "good", "bad", "settings"),
    [
        ("unreadable", "a fine text", "a text with a lost � in it", {}),
        ("empty", "x", " \n", {}),
        ("short", "long enough", "a", {"min_characters": 8}),
        ("long", "short enough", "a" * 30, {"max_characters": 20}),
        ("language", "Where is the parcel of mine?", "Wo ist das Paket, das ich bestellt habe?", {"language": ("en",)}),
        ("language", "我上周订的包裹现在在哪里？", "先週注文した荷物はどこですか。", {"language": ("en", "zh")}),
        ("repetition", " ".join(f"item {n * n}" for n in range(60)), "buy it now " * 60, {}),
        ("profanity", "the assessment of Scunthorpe", "this is Bullshit", {}),
        ("profanity", "这个菜很好吃", "这他妈的太难吃了", {}),
    ],
)  # fmt: skip
def test_a_row_is_dropped(name: str, good: str, bad: str, settings: dict[str, Any], tmp_path: Path) -> None:
    rows, found = applied(name, tmp_path, [{"text": good}, {"text": bad}, {"text": good}], **settings)
    assert rows == [{"text": good}] * 2
    assert (found.count, found.total) == (1, 3)
    assert found.examples[0].startswith("a.jsonl:2: ")


def test_blocked_words_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("# ours\nacme corp\n绝密\n", encoding="utf-8")
    texts = ["We are not Acme  Corp.", "an acme corporation", "这是绝密文件", "秘密"]
    rows, found = applied("blocked", tmp_path, [{"text": text} for text in texts], blocked=str(tmp_path / "words.txt"))
    assert [row["text"] for row in rows] == [texts[1], texts[3]]
    assert dict(found.kinds) == {"Acme  Corp": 1, "绝密": 1}


@pytest.mark.parametrize(
    ("name", "question", "answer", "clean"),
    [
        ("beginnings", "Q: what is {}", " A: it is {}", ("what is {}", "it is {}")),
        ("ends", "what is {}\n\n###\n\n", "it is {} END", ("what is {}", "it is {}")),
        ("ends", "what is {} ->", "it is {}\n</s>", ("what is {}", "it is {}")),
        ("beginnings", "What is {}", "It is {}", ("What is {}", "It is {}")),
        ("ends", "what is {}?", "it is {}.", ("what is {}?", "it is {}.")),
    ],
)
def test_marks_that_most_rows_have_are_taken_off(
    name: str, question: str, answer: str, clean: tuple[str, str], tmp_path: Path
) -> None:
    values = [str(n * 37 % 101) + "x" for n in range(40)]
    given = [asked(question.format(value), answer.format(value)) for value in values]
    odd = asked("another one", "another answer")
    rows, found = applied(name, tmp_path, [*given, odd])
    assert rows == [*(asked(clean[0].format(value), clean[1].format(value)) for value in values), odd]
    assert found.count == (40 if clean[0] != question else 0)


def test_near_duplicates_are_those_that_share_their_phrases(tmp_path: Path) -> None:
    text = "You can return a lamp within thirty days if it is in its box and you have the receipt that came with it"
    texts = [
        text,
        text + " today",
        text.replace("lamp", "LAMP") + "!",
        "Something else is said in this row of the file",
    ]
    texts += [f"number {n} is not like number {n * 7} in any way that would count {n * n}" for n in range(200)]
    rows, found = applied("near", tmp_path, [{"text": text} for text in texts])
    assert [row["text"] for row in rows] == [texts[0], *texts[3:]]
    assert found.count == 2
    assert found.examples[0].endswith("(≈ a.jsonl:1)")
    assert applied("duplicates", tmp_path, [{"text": text} for text in texts])[1].count == 0


def test_the_answer_that_most_rows_give_stays(tmp_path: Path) -> None:
    rows = [
        {"text": "good", "label": "no"}, {"text": "good", "label": "yes"}, {"text": "good", "label": "yes"},
        {"text": "bad", "label": "no"}, {"text": "even", "label": 1}, {"text": "even", "label": 2},
    ]  # fmt: skip
    kept, found = applied("contradictions", tmp_path, rows, "labelled")
    assert kept == [rows[1], rows[2], rows[3], rows[4]]
    assert found.count == 2
    assert STEP["contradictions"].recommended(Context(Settings(), "labelled"))
    assert not STEP["contradictions"].recommended(Context(Settings(), "answer"))


def test_labels_are_balanced_to_twice_the_rarest(tmp_path: Path) -> None:
    rows = [{"text": f"row {n}", "label": "rare" if n % 10 == 0 else "often"} for n in range(30)]
    kept, found = applied("labels", tmp_path, rows, "labelled")
    assert [row["label"] for row in kept].count("often") == 6
    assert [row["label"] for row in kept].count("rare") == 3
    assert found.count == 21


def test_rows_near_to_a_validation_row_are_dropped(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "rows", [Row("a:1", asked("Where is my lamp?")), Row("a:2", asked("Do you ship?"))])
    held_out = Spool(tmp_path / "held", [Row("b:1", asked("where is my LAMP"))])
    found = Found()
    kept = list(STEP["leaks"].apply(spool, Context(Settings(), "answer", held_out), found))
    assert [row.place for row in kept] == ["a:2"]
