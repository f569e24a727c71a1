"""Chats and corpora as programs and publishers write them, each made up here, and the rows that they become."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from lmtune.data.prepare.reading import Reading
from lmtune.data.prepare.settings import Settings
from lmtune.errors import ConfigError, DataError

Rows = list[dict[str, Any]]


def read(folder: Path, *paths: str, **settings: Any) -> tuple[Rows, Reading, list[str]]:
    """The fields of the rows, what is said about them, and their places."""
    reading, scratch = Reading(), folder / "scratch"
    scratch.mkdir(exist_ok=True)
    rows = list(reading.rows(paths or tuple(map(str, sorted(folder.glob("in*")))), Settings(**settings), scratch))
    return [row.fields for row in rows], reading, [row.place for row in rows]


def pairs(*texts: str) -> Rows:
    """Rows of a question and an answer each."""
    return [talk(*two) for two in zip(texts[::2], texts[1::2], strict=True)]


def talk(*texts: str) -> dict[str, Any]:
    """A conversation that the user begins."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]}


def write_csv(path: Path, *rows: dict[str, Any]) -> None:
    """A table with a header."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# What each export below says: Ann asks, Ben answers in two messages, hours later Ann says something else to Ben.
ASKED, ANSWERED, LATER = "Do you ship abroad?", "Yes,\nto 12 countries.", "Is the lamp back?"
ANSWER = "Since Monday.\nTwo are left."

ANDROID = """12/03/2024, 18:05 - Messages and calls are end-to-end encrypted. Only people in this chat can read them.
12/03/2024, 18:05 - Ann Lee: Do you ship abroad?
12/03/2024, 18:06 - Ben: Yes,
12/03/2024, 18:06 - Ben: to 12 countries.
12/03/2024, 18:07 - Ben: <Media omitted>
13/03/2024, 09:00 - Ann Lee changed the group description
13/03/2024, 09:00 - Ann Lee: Is the lamp back?
13/03/2024, 09:01 - Ben: Since Monday.
Two are left.
"""
IPHONE = """[3/12/24, 6:05:33 PM] Ann Lee: Do you ship abroad?
[3/12/24, 6:06:00 PM] Ben: Yes,
[3/12/24, 6:06:10 PM] Ben: to 12 countries.
\u200e[3/12/24, 6:07:00 PM] Ben: \u200eimage omitted
[3/13/24, 9:00:00 AM] Ann Lee: Is the lamp back?
[3/13/24, 9:01:00 AM] Ben: Since Monday.
Two are left.
"""
WECHAT = """2024-03-12 18:05:33 Ann Lee
Do you ship abroad?

2024-03-12 18:06:00 Ben
Yes,

2024-03-12 18:06:10 Ben
to 12 countries.

2024-03-12 18:07:00 Ben
[图片]

2024-03-13 09:00:00 Ann Lee
Is the lamp back?

2024-03-13 09:01:00 Ben
Since Monday.
Two are left.
"""
NAME_FIRST = WECHAT
for name in ("Ann Lee", "Ben"):
    NAME_FIRST = "\n".join(
        f"{name} {line.removesuffix(name).strip()}" if line.endswith(f" {name}") else line
        for line in NAME_FIRST.split("\n")
    )


@pytest.mark.parametrize(
    "text", [ANDROID, IPHONE, WECHAT, NAME_FIRST], ids=["android", "iphone", "wechat", "name first"]
)
def test_a_chat_as_text(text: str, folder: Path) -> None:
    (folder / "in.txt").write_text(text, encoding="utf-8")
    rows, reading, places = read(folder)
    assert rows == pairs(ASKED, ANSWERED, LATER, ANSWER)
    assert "in.txt: chat: 2 rows" in reading.notes
    assert any("1 left out: without text" in note for note in reading.notes)
    lines = text.splitlines()
    assert [lines[int(place.removeprefix("in.txt:")) - 1 + (text in (WECHAT, NAME_FIRST))] for place in places] == [
        next(line for line in lines if line.endswith(end)) for end in ("Yes,", "Since Monday.")
    ]


@pytest.mark.parametrize(
    "mark",
    [
        "<This message was edited>", "\u200e<This message was edited>", "<Diese Nachricht wurde bearbeitet.>",
        "<Se editó este mensaje.>", "<Ce message a été modifié>", "<此消息已编辑>",
    ],
)  # fmt: skip
def test_the_mark_of_an_edited_message_is_taken_off(folder: Path, mark: str) -> None:
    text = ANDROID.replace("abroad?", f"abroad? {mark}").replace("Two are left.", f"Two are left. {mark}")
    (folder / "in.txt").write_text(text, encoding="utf-8")
    assert read(folder)[0] == pairs(ASKED, ANSWERED, LATER, ANSWER)


@pytest.mark.parametrize("gone", ["This message was deleted", "<Media omitted>", "Diese Nachricht wurde gelöscht."])
def test_a_message_without_text_does_not_join_those_around_it(folder: Path, gone: str) -> None:
    said = [
        ("Ann", "Where?"),
        ("Ben", gone),
        ("Ann", "And when?"),
        ("Ben", gone),
        ("Ben", "On Monday."),
        ("Ann", "Hm."),
    ]
    lines = [f"12/03/2024, 18:0{minute} - {who}: {text}\n" for minute, (who, text) in enumerate(said)]
    (folder / "in.txt").write_text("".join(lines), encoding="utf-8")
    rows, reading, _ = read(folder)
    assert rows == pairs("And when?", "On Monday.", "On Monday.", "Hm.")
    assert any("1 of 4 messages are in no row" in note for note in reading.notes)
    assert read(folder, pair="conversations")[0] == pairs("And when?", "On Monday.")
    assert read(folder, assistant="Ben")[0] == pairs("And when?", "On Monday.")


def test_what_a_deleted_account_says_is_not_counted_as_without_text(folder: Path) -> None:
    messages = [
        {"id": n, "type": "message", "date": f"2024-03-12T18:0{n}:00", "from": who, "text": text}
        for n, (who, text) in enumerate([("Ann", "Where?"), (None, "Here."), ("Ann", "When?"), ("Ben", "Now.")])
    ]
    (folder / "in.json").write_text(json.dumps({"name": "x", "messages": messages}))
    rows, reading, _ = read(folder)
    assert rows == pairs("When?", "Now.")
    assert "  1 left out: from nobody (deleted accounts)" in reading.notes


def test_a_message_without_a_time_is_named(folder: Path) -> None:
    said = [("Ann", "Where?"), ("Ben", "Here."), ("Ann", "When?"), ("Ben", "Now.")]
    chat = [{"sender": who, "timestamp": 1767261600 + n, "message": text} for n, (who, text) in enumerate(said)]
    del chat[2]["timestamp"]
    (folder / "in.json").write_text(json.dumps(chat))
    _, reading, _ = read(folder)
    assert reading.faults == ["in.json:1 (item 3): the message has no timestamp, as others of this chat have"]


def test_a_place_in_an_export_of_several_chats_names_the_chat(folder: Path) -> None:
    def message(n: int, who: str) -> dict[str, Any]:
        return {"id": n, "type": "message", "date": f"2024-03-12T18:0{n}:00", "from": who, "text": f"text {n}"}

    chats = [{"name": name, "id": 1, "messages": [message(1, "Ann"), message(2, name)]} for name in ("Ben", "Cem")]
    (folder / "in.json").write_text(json.dumps({"chats": {"list": chats}}))
    assert read(folder)[2] == ['in.json:chat "Ben", message 2', 'in.json:chat "Cem", message 2']


def test_a_chat_becomes_conversations_of_whom_the_model_shall_be(folder: Path) -> None:
    (folder / "in.txt").write_text(ANDROID + "13/03/2024, 09:02 - Ann Lee: Thanks!\n", encoding="utf-8")
    assert read(folder, pair="conversations")[0] == [talk(ASKED, ANSWERED), talk(LATER, ANSWER)]
    rows, reading, _ = read(folder, pair="conversations", gap_minutes=10_000.0)
    assert rows == [talk(ASKED, ANSWERED, LATER, ANSWER)]
    assert any("1 of 6 messages are in no row" in note for note in reading.notes)
    assert read(folder, assistant="Ann Lee", gap_minutes=10_000.0)[0] == pairs(ANSWERED, LATER, ANSWER, "Thanks!")
    rows, reading, _ = read(folder, assistant="Ann Lee", pair="conversations")
    assert rows == [talk(ANSWER, "Thanks!")]
    assert any("4 of 6 messages are in no row" in note for note in reading.notes)
    with pytest.raises(ConfigError, match=r"--assistant: Bob: nobody.*Ann Lee"):
        read(folder, assistant="Bob")


def seconds(text: str) -> int:
    """Of a time on the two days."""
    from datetime import UTC, datetime

    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


SAID = [
    ("Ann", "2024-03-12T18:05:33", ASKED), ("Ben", "2024-03-12T18:06:00", "Yes,"),
    ("Ben", "2024-03-12T18:06:10", "to 12 countries."), ("Ann", "2024-03-13T09:00:00", LATER),
    ("Ben", "2024-03-13T09:01:00", ANSWER),
]  # fmt: skip


def telegram(folder: Path) -> None:
    """A list of pieces is text with markup."""
    messages: list[dict[str, Any]] = [
        {"id": n, "type": "message", "date": time, "from": who, "from_id": f"user{who}", "text": text}
        for n, (who, time, text) in enumerate(SAID)
    ]
    messages[0]["text"] = ["Do you ", {"type": "bold", "text": "ship"}, " abroad?"]
    messages.insert(2, {"id": 9, "type": "service", "date": SAID[1][1], "actor": "Ben", "action": "pin", "text": ""})
    messages.append({"id": 10, "type": "message", "date": SAID[1][1], "from": "Ben", "photo": "a.jpg", "text": ""})
    tree = {"name": "Ben", "type": "personal_chat", "id": 1, "messages": messages}
    (folder / "in.json").write_text(json.dumps(tree, indent=1), encoding="utf-8")


def telegram_of_all(folder: Path) -> None:
    """All chats of a person in one document."""
    telegram(folder)
    chat = json.loads((folder / "in.json").read_text())
    (folder / "in.json").write_text(json.dumps({"about": "…", "chats": {"list": [chat]}}))


def discord(folder: Path) -> None:
    """The newest first."""
    messages = [
        {"id": str(n), "type": "Default", "timestamp": f"{time}+00:00", "content": text,
         "author": {"id": who, "name": who.lower(), "nickname": who, "isBot": False}}
        for n, (who, time, text) in enumerate(SAID)
    ]  # fmt: skip
    (folder / "in.json").write_text(json.dumps({"guild": {}, "channel": {"name": "help"}, "messages": messages[::-1]}))


def discord_csv(folder: Path) -> None:
    """A table."""
    rows = [{"AuthorID": who, "Author": who, "Date": f"{time}.0000000+00:00", "Content": text, "Attachments": "",
             "Reactions": ""} for who, time, text in SAID]  # fmt: skip
    write_csv(folder / "in.csv", *rows)


def slack(folder: Path) -> None:
    """A folder of channels, a file for each day, names in a file of their own."""
    (folder / "in" / "help").mkdir(parents=True)
    users = [{"id": f"U{who}", "name": who.lower(), "real_name": who} for who in ("Ann", "Ben")]
    (folder / "in" / "users.json").write_text(json.dumps(users))
    days: dict[str, list[dict[str, Any]]] = {}
    for who, time, text in SAID:
        record = {"type": "message", "user": f"U{who}", "text": text, "ts": f"{seconds(time)}.000200"}
        days.setdefault(time[:10], []).append(record)
    days["2024-03-12"].append(
        {"type": "message", "subtype": "channel_join", "user": "UAnn", "text": "<@UAnn> has joined", "ts": "1"}
    )
    for day, records in days.items():
        (folder / "in" / "help" / f"{day}.json").write_text(json.dumps(records, indent=1))


def wechat_csv(folder: Path) -> None:
    """Who sent it is a number; pictures have another type."""
    rows = [
        {"localId": n, "TalkerId": 3, "Type": 1, "SubType": 0, "IsSender": int(who == "Ben"),
         "CreateTime": seconds(time), "StrContent": text, "StrTime": time, "Remark": who, "NickName": who, "Sender": ""}
        for n, (who, time, text) in enumerate(SAID)
    ]  # fmt: skip
    write_csv(folder / "in.csv", *rows, {**rows[1], "Type": 3, "StrContent": "<img/>"})


def wechat_json(folder: Path) -> None:
    """A list of records."""
    rows = [{"id": n, "type_name": "文本", "is_sender": int(who == "Ben"), "talker": who, "room_name": "r", "msg": text,
             "src": "", "CreateTime": time.replace("T", " ")} for n, (who, time, text) in enumerate(SAID)]  # fmt: skip
    (folder / "in.json").write_text(json.dumps(rows, ensure_ascii=False))


def messenger(folder: Path) -> None:
    """Milliseconds, the newest first."""
    rows = [{"sender_name": who, "timestamp_ms": seconds(time) * 1000, "content": text} for who, time, text in SAID]
    (folder / "in.json").write_text(json.dumps({"participants": [], "messages": rows[::-1]}))


def plain_table(folder: Path) -> None:
    """A table of who, when and what."""
    write_csv(
        folder / "in.csv", *({"name": who, "time": time.replace("T", " "), "text": text} for who, time, text in SAID)
    )


EXPORTS = [telegram, telegram_of_all, discord, discord_csv, slack, wechat_csv, wechat_json, messenger, plain_table]


@pytest.mark.parametrize("write", EXPORTS)
def test_a_chat_as_a_program_exports_it(write: Any, folder: Path) -> None:
    write(folder)
    rows, reading, places = read(folder)
    assert rows == pairs(ASKED, ANSWERED, LATER, ANSWER)
    assert "chat (" in reading.notes[0]
    assert len(set(places)) == 2
    assert read(folder, pair="conversations", gap_minutes=10_000.0)[0] == [talk(ASKED, ANSWERED, LATER, ANSWER)]


def test_cornell(folder: Path) -> None:
    sign = " +++$+++ "
    lines = [("L1", "u0", "Do you ship?"), ("L2", "u1", "Café\x92s closed."), ("L3", "u0", "Oh."), ("L9", "u2", "Hm.")]
    text = "".join(sign.join((id, who, "m0", "NAME", said)) + "\n" for id, who, said in lines[::-1])
    (folder / "movie_lines.txt").write_bytes(text.encode("latin-1"))
    (folder / "movie_conversations.txt").write_text(sign.join(("u0", "u1", "m0", "['L1', 'L2', 'L3']")) + "\n")
    for given in (".", "movie_lines.txt"):
        rows, _, places = read(folder, given)
        assert rows == pairs("Do you ship?", "Café’s closed.", "Café’s closed.", "Oh.")[::-1]
        assert places == ["movie_lines.txt:2", "movie_lines.txt:3"]
    assert read(folder, ".", pair="conversations")[0] == [talk("Do you ship?", "Café’s closed.")]


POSTS = """<?xml version="1.0" encoding="utf-8"?>
<posts>
  <row Id="1" PostTypeId="1" AcceptedAnswerId="3" Score="5" Title="How do I quit?"
    Body="&lt;p&gt;From &lt;code&gt;vi&lt;/code&gt;.&lt;/p&gt;" OwnerUserId="7" />
  <row Id="2" PostTypeId="2" ParentId="1" Score="90" Body="&lt;p&gt;Use another.&lt;/p&gt;" OwnerUserId="8" />
  <row Id="3" PostTypeId="2" ParentId="1" Score="2"
    Body="&lt;pre&gt;&lt;code&gt;:q!&lt;/code&gt;&lt;/pre&gt;" OwnerUserId="7" />
  <row Id="4" PostTypeId="1" Score="1" Title="Why?" Body="&lt;p&gt;No reason.&lt;/p&gt;" />
  <row Id="5" PostTypeId="2" ParentId="6" Score="1" Body="&lt;p&gt;Both.&lt;/p&gt;" />
  <row Id="7" PostTypeId="2" ParentId="6" Score="4" Body="&lt;p&gt;Tabs.&lt;/p&gt;" />
  <row Id="6" PostTypeId="1" Title="Tabs or spaces?" Body="" />
  <row Id="8" PostTypeId="5" Body="a wiki" />
</posts>
"""


def test_stack_exchange(folder: Path) -> None:
    (folder / "Posts.xml").write_text(POSTS, encoding="utf-8")
    for pair, lines in (("qa", (6, 10)), ("conversations", (3, 11))):
        rows, _, places = read(folder, "Posts.xml", pair=pair)
        assert places == [f"Posts.xml:{line}" for line in lines]
        assert rows == pairs("How do I quit?\n\nFrom `vi`.", "```\n:q!\n```", "Tabs or spaces?", "Tabs.")
    (folder / "Posts.xml").write_text(POSTS[:-20], encoding="utf-8")
    with pytest.raises(DataError, match=r"Posts\.xml:12: not XML"):
        read(folder, "Posts.xml")
    (folder / "Posts.xml").write_text(POSTS.replace("<posts>", '<!DOCTYPE p [<!ENTITY a "b">]><posts>'))
    with pytest.raises(DataError, match="declares entities"):
        read(folder, "Posts.xml")


def jsonl(path: Path, rows: Rows) -> None:
    """One row a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_reddit_over_two_files(folder: Path) -> None:
    def comment(id: str, parent: str, body: str, score: int = 1, author: str = "") -> dict[str, Any]:
        return {"id": id, "parent_id": parent, "link_id": "t3_s", "author": author or f"by_{id}", "body": body,
                "score": score, "created_utc": 1700000000}  # fmt: skip

    post = {
        "id": "s",
        "title": "Which lamp?",
        "selftext": "For reading.",
        "author": "by_s",
        "score": 9,
        "created_utc": 1,
    }
    comments = [
        comment("b", "t1_a", "How much?"), comment("a", "t3_s", "The blue one.", 5), comment("c", "t1_b", "Nine."),
        comment("d", "t3_s", "Any.", 2), comment("e", "t1_x", "[deleted]"),
        comment("f", "t1_a", "I add: see page 2.", 50, "by_a"),
    ]  # fmt: skip
    jsonl(folder / "RC.jsonl", comments)
    jsonl(folder / "RS.jsonl", [post])
    rows, reading, places = read(folder, "RC.jsonl", "RS.jsonl")
    first = pairs("Which lamp?\n\nFor reading.", "The blue one.", "The blue one.", "How much?", "How much?", "Nine.")
    assert sorted(map(str, rows)) == sorted(map(str, first))
    assert "RC.jsonl:1" in places
    assert "RC.jsonl and 1 more: posts of Reddit: 3 rows" in reading.notes
    assert read(folder, "RC.jsonl", "RS.jsonl", pair="conversations")[0] == [
        talk("Which lamp?\n\nFor reading.", "The blue one.", "How much?", "Nine.")
    ]


def twitter(folder: Path, form: str) -> None:
    """A customer asks, a shop answers."""
    said = [
        (11, "ann", None, "@shop where is it?"),
        (12, "shop", 11, "@ann @ben On its way."),
        (13, "ann", 12, "@shop Thanks"),
    ]
    if form == "table":
        write_csv(folder / "in.csv", *(
            {"tweet_id": id, "author_id": who, "inbound": who != "shop", "created_at": "Tue Oct 31 22:10:47 +0000 2017",
             "text": text, "response_tweet_id": "", "in_response_to_tweet_id": parent or ""}
            for id, who, parent, text in said
        ))  # fmt: skip
    elif form == "old":
        jsonl(folder / "in.jsonl", [
            {"id": id, "id_str": str(id), "user": {"screen_name": who}, "full_text": text,
             "in_reply_to_status_id": parent, "in_reply_to_status_id_str": str(parent) if parent else None}
            for id, who, parent, text in said
        ])  # fmt: skip
    else:
        jsonl(folder / "in.jsonl", [
            {"id": str(id), "author_id": who, "conversation_id": "11", "text": text,
             **({"referenced_tweets": [{"type": "replied_to", "id": str(parent)}]} if parent else {})}
            for id, who, parent, text in said
        ])  # fmt: skip


@pytest.mark.parametrize("form", ["table", "old", "new"])
def test_twitter(form: str, folder: Path) -> None:
    twitter(folder, form)
    assert read(folder)[0] == pairs("where is it?", "On its way.", "On its way.", "Thanks")


def test_plain_text_and_labelled_lines(folder: Path) -> None:
    (folder / "book.txt").write_text("A line\nand one.\n\n\nA second.\n", encoding="utf-8")
    assert read(folder, "book.txt")[0] == [{"text": "A line\nand one."}, {"text": "A second."}]
    (folder / "lines.txt").write_bytes("first\nsecond é\nthird ".encode() + b"caf\xe9\n")
    rows, _, places = read(folder, "lines.txt")
    assert rows == [{"text": text} for text in ("first", "second é", "third café")]
    assert places == ["lines.txt:1", "lines.txt:2", "lines.txt:3"]
    (folder / "rt.pos").write_text("good .\n")
    (folder / "rt.neg").write_text("bad .\n\nworse .\n")
    rows, _, places = read(folder, "rt.pos=positive", "rt.neg=negative")
    assert rows == [
        {"text": "good .", "label": "positive"},
        *({"text": t, "label": "negative"} for t in ("bad .", "worse .")),
    ]
    assert places[-1] == "rt.neg:3"
    with pytest.raises(ConfigError, match="no label after ="):
        read(folder, "rt.pos=")


def test_columns_are_renamed(folder: Path) -> None:
    write_csv(folder / "in.csv", {"label": "1", "review": "good"}, {"label": "0", "review": "bad"})
    assert [row["text"] for row in read(folder, columns=("review=text",))[0]] == ["good", "bad"]
    with pytest.raises(ConfigError, match="--columns: expected COLUMN=KEY"):
        read(folder, columns=("review",))


def test_rows_that_look_like_a_chat_stay_rows(folder: Path) -> None:
    (folder / "in.json").write_text(json.dumps({"messages": talk("a", "b")["messages"]}))
    assert read(folder)[0] == [talk("a", "b")]
    (folder / "in.json").write_text(json.dumps([{"prompt": "a", "completion": "b", "author": "c", "time": 3}]))
    assert read(folder)[0] == [talk("a", "b")]


@pytest.mark.parametrize("keys", [("sender", "time", "text"), ("id", "author_id", "conversation_id", "text")])
def test_records_that_cannot_be_read_are_counted_as_such(keys: tuple[str, ...], folder: Path) -> None:
    """In a chat and among posts; they are no messages of the program."""
    lines = [",".join(keys), ",".join(map(str, range(len(keys)))), "too,many,cells,by,far", '9,9,"no end']
    (folder / "in.csv").write_text("\n".join(lines[:3]) + "\n")
    _, reading, _ = read(folder)
    assert reading.unusable.count == 1
    assert reading.faults[0].startswith("in.csv:3: 5 cells")
    assert not any("said by the program" in note for note in reading.notes)
    (folder / "in.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"in\.csv:4: a cell that begins here"):
        read(folder)


def test_a_renamed_column_is_read_as_the_key_that_it_becomes(folder: Path) -> None:
    turns = talk("a", "b")["messages"]
    write_csv(folder / "in.csv", {"chat": json.dumps(turns), "stars": "5"})
    (row,) = read(folder, columns=("chat=messages", "stars=weight"))[0]
    assert row == {"messages": turns, "weight": 5}


@pytest.mark.parametrize(("text", "codec"), [("Łódź jest łatwa\n", "cp1250"), ("Привет\n", "cp1251")])
def test_text_in_an_encoding_that_cannot_be_told_is_a_fault(folder: Path, text: str, codec: str) -> None:
    for before in ("", "Ein Satz über etwas.\n"):
        (folder / "in.txt").write_bytes(before.encode() + text.encode(codec))
        with pytest.raises(DataError, match=r"in\.txt:\d: byte \d+ .*iconv -f"):
            read(folder)


def test_a_guessed_encoding_is_warned_of(folder: Path) -> None:
    (folder / "in.txt").write_bytes("Größe und Straße\n".encode("cp1252"))
    _, reading, _ = read(folder)
    assert any("warning: the encoding is a guess: Windows-1252; it reads" in note for note in reading.notes)


def test_lines_in_another_encoding_are_said(folder: Path) -> None:
    (folder / "in.txt").write_bytes("Ein Satz über etwas.\n".encode() * 3 + "Größe\n".encode("cp1252"))
    rows, reading, _ = read(folder)
    assert rows[-1] == {"text": "Größe"}
    assert "  1 of the lines are not UTF-8 and are read as Windows-1252" in reading.notes


def test_posts_without_an_id_and_with_one_that_was_there_are_said(folder: Path) -> None:
    posts = [{"id": id, "author_id": who, "conversation_id": "1", "text": id, "referenced_tweets": [
        {"type": "replied_to", "id": before}]} for id, who, before in (("1", "a", None), ("2", "b", "1"))]  # fmt: skip
    lines = [*posts, posts[1], {**posts[1], "id": None}]
    (folder / "in.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    rows, reading, _ = read(folder)
    assert rows == [talk("1", "2")]
    assert reading.faults == ["in.jsonl:4: the post has no id"]
    assert "  1 left out: posts with the id of an earlier one" in reading.notes


def test_what_a_corpus_leaves_out_is_said(folder: Path) -> None:
    (folder / "Posts.xml").write_text(POSTS, encoding="utf-8")
    sign = " +++$+++ "
    lines = [sign.join((id, "u", "m", "N", text)) for id, text in (("L1", "A"), ("L2", "B"), ("L3", "C"), ("L4", ""))]
    (folder / "movie_lines.txt").write_text("\n".join([*lines, "L5 torn"]) + "\n")
    (folder / "movie_conversations.txt").write_text(
        sign.join(("u", "v", "m", "['L1', 'L2']")) + "\n" + sign.join(("u", "v", "m", "[")) + "\n"
    )
    _, reading, _ = read(folder, "Posts.xml", "movie_lines.txt")
    said = [note.strip() for note in reading.notes if "left out" in note]
    assert sorted(said) == [
        "1 left out: conversations without the ids of their lines, in movie_conversations.txt",
        "1 left out: lines of no conversation, in movie_lines.txt",
        "1 left out: lines without five fields, in movie_lines.txt",
        "1 left out: neither a question nor an answer (wikis, notices)",
        "1 left out: without text (pictures, calls, deleted messages)",
    ]


def test_one_row_that_cannot_be_used_is_one_row(folder: Path) -> None:
    (folder / "in.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "x"}\n')
    _, reading, _ = read(folder)
    with pytest.raises(DataError, match=r"^1 row cannot be used.*\n.*in\.jsonl:2: completion missing"):
        reading.raise_for_faults()
