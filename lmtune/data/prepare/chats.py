"""Chats as programs export them: text with a name and a time on each line, and the fields of tables and JSON.

    [12.03.24, 18:05:33] Ann: Do you ship abroad?         12/03/2024, 18:05 - Ann: Do you ship abroad?
    2024-03-12 18:05:33 Ann                                Ann 2024-03-12 18:05:33
    Do you ship abroad?                                    Do you ship abroad?

`EXPORTS` says by which keys a record of a program is known, and where it keeps who said what and when. A further
program is one more entry.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from lmtune.data.prepare.pairing import Message
from lmtune.data.tables import TableRow

_DATE = r"(?P<date>\d{1,4}[./-]\d{1,2}[./-]\d{1,4})"
_TIME = r"(?P<time>\d{1,2}:\d{2}(?::\d{2})?(?:[\s\u202f]?[AaPp]\.?[Mm]\.?)?)"
# By where the name stands. What a line without a name says, a program has said.
_HEADS = tuple(
    re.compile(pattern)
    for pattern in (
        rf"[\u200e\u200f]?\[?{_DATE},?\s+{_TIME}\]?\s*(?:[-–]\s)?<?(?P<name>[^:<>]{{1,60}}?)(?::\s|>\s|:$)(?P<text>.*)$",
        rf"{_DATE}\s+{_TIME}\s+(?P<name>[^:]{{1,60}})(?P<text>)$",
        rf"(?P<name>\S[^:]{{0,60}}?)\s+{_DATE}\s+{_TIME}(?P<text>)$",
    )
)
_NOTICE = re.compile(rf"[\u200e\u200f]?\[?{_DATE},?\s+{_TIME}\]?\s*(?:[-–]\s)?\S")
_LOOKED_AT = 60  # lines
_LEAST = 3  # of them with a head
_NO_TEXT = re.compile(
    r"[\u200e\u200f]*(?:<[^<>]*omitted>|(?:image|video|audio|sticker|document|GIF|contact card) omitted|"
    r"(?:this message was deleted|you deleted this message|missed (?:voice|video) call)\.?|"
    r"(?:diese nachricht wurde gelöscht|du hast diese nachricht gelöscht|se eliminó este mensaje|"
    r"eliminaste este mensaje|ce message a été supprimé|vous avez supprimé ce message|"
    r"questo messaggio è stato eliminato|hai eliminato questo messaggio|mensagem apagada|"
    r"essa mensagem foi apagada|você apagou esta mensagem)\.?|"
    r"(?:此消息已删除|此訊息已刪除|(?:你|您)(?:已?删除了?此消息|已?刪除了?此訊息))。?|"
    r"<(?:Medien ausgeschlossen|(?:Archivo )?Multimedia omitido|Médias? omis|Media omessi|Mídia oculta|"
    r"Arquivo de mídia oculto|省略多媒体文件|媒体文件已省略|已省略多媒體檔案)>|"
    r"messages and calls are end-to-end encrypted.*|"
    r"\[(?:图片|表情|动画表情|语音|视频|文件|位置|链接|红包|转账|视频通话|语音通话|photo|sticker|voice|video|file|image)\]|null|)",
    re.IGNORECASE,
)

# What WhatsApp writes behind a message that was changed, by language.
_EDITED = re.compile(
    r"[\s\u200e\u200f]*<\u200e?(?:This message was edited|Diese Nachricht wurde bearbeitet|Se editó este mensaje|"
    r"Ce message a été modifié|Questo messaggio è stato modificato|Mensagem editada|Essa mensagem foi editada|"
    r"此消息已编辑|此消息已被编辑|此訊息已編輯|已編輯此訊息)[.。]?>[\s\u200e\u200f]*$",
    re.IGNORECASE,
)


@dataclass
class Skipped:
    """Records that are no message of a person, by reason."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, reason: str) -> None:
        """Count one."""
        self.counts[reason] = self.counts.get(reason, 0) + 1

    def describe(self) -> list[str]:
        """A line for each reason."""
        return [f"{count:,} left out: {reason}" for reason, count in self.counts.items()]


NO_TEXT = "without text (pictures, calls, deleted messages)"
NO_AUTHOR = "from nobody (deleted accounts)"
NOTICES = "said by the program"


def says_nothing(text: str) -> bool:
    """Whether a text stands for a picture, a call, or a message that was deleted."""
    return _NO_TEXT.fullmatch(text.strip()) is not None


# --- text ------------------------------------------------------------------------------------------------------------


def chat_head(lines: Iterable[str]) -> re.Pattern[str] | None:
    """The form of the lines with name and time, if the first `lines` of a file are a chat."""
    some = [line.rstrip("\r\n") for _, line in zip(range(_LOOKED_AT), lines, strict=False)]
    counts = [sum(head.match(line) is not None for line in some) for head in _HEADS]
    best = max(range(len(_HEADS)), key=lambda index: counts[index])
    filled = sum(bool(line.strip()) for line in some)
    return _HEADS[best] if counts[best] >= min(_LEAST, max(2, filled // 2)) else None


def text_messages(
    lines: Iterable[str], name: str, head: re.Pattern[str], month_first: bool, skipped: Skipped
) -> Iterator[Message]:  # fmt: skip
    """The messages of a text file; lines without a head belong to the message before. One without text has ""."""
    current: Message | None = None
    for number, line in enumerate(lines, start=1):
        line = line.rstrip("\r\n")
        found = head.match(line)
        if found is None and (current is None or _NOTICE.match(line)):
            if line.strip():
                skipped.add(NOTICES)
            continue
        if found is None:
            assert current is not None
            current = Message(current.place, current.author, f"{current.text}\n{line}", current.time)
            continue
        if current is not None:
            yield from _with_text(current, skipped)
        time = _seconds(found["date"], found["time"], month_first)
        current = Message(f"{name}:{number}", found["name"].strip(), found["text"], time)
    if current is not None:
        yield from _with_text(current, skipped)


def _with_text(message: Message, skipped: Skipped) -> Iterator[Message]:
    text = _EDITED.sub("", message.text).strip("\u200e\u200f\r\n ")
    if says_nothing(text):
        skipped.add(NO_TEXT)
        text = ""
    yield Message(message.place, message.author, text, message.time, message.conversation)


def has_month_first(lines: Iterable[str], head: re.Pattern[str]) -> bool:
    """Whether dates are written as 3/13/24, which shows when a part is above 12."""
    for line in lines:
        if found := head.match(line.rstrip("\r\n")):
            first, second, _ = (int(part) for part in re.split(r"[./-]", found["date"]))
            if first <= 31 and max(first, second) > 12:
                return second > 12
    return False


def _seconds(date: str, time: str, month_first: bool) -> float | None:
    """Seconds from a fixed start; None if there is no such day."""
    one, two, three = (int(part) for part in re.split(r"[./-]", date))
    year, month, day = (one, two, three) if one > 31 else (three, two, one)
    if one <= 31 and month_first:
        month, day = day, month
    clock = re.findall(r"\d+", time)
    hour, minute, second = (int(part) for part in (*clock, "0")[:3])
    if half := re.search("[AP]", time.upper()):
        hour = hour % 12 + 12 * (half[0] == "P")
    try:
        found = datetime(year + 2000 * (year < 100), month, day, hour, minute, second, tzinfo=UTC)
    except ValueError:
        return None
    return found.timestamp()


# --- tables and JSON -------------------------------------------------------------------------------------------------

Record = Mapping[str, Any]


def _at(*paths: str) -> Callable[[Record], Any]:
    """What stands at the first of `paths` that a record has; `author.name` is a field of a field."""

    def get(record: Record) -> Any:
        for path in paths:
            value: Any = record
            for key in path.split("."):
                value = value.get(key) if isinstance(value, Mapping) else None
            if value not in (None, ""):
                return value
        return None

    return get


def _nothing(record: Record) -> Any:
    return None


@dataclass(frozen=True)
class Export:
    """How a program writes a message.

    Attributes:
        name: of the program and its form.
        keys: by which its records are known.
        author, text, time: of a record.
        is_message: whether a person said it.
        id, parent: of posts, which answer each other.
        conversation: what tells conversations apart.
        score: how others liked a post.
    """

    name: str
    keys: frozenset[str]
    author: Callable[[Record], Any]
    text: Callable[[Record], Any]
    time: Callable[[Record], Any]
    is_message: Callable[[Record], bool] = lambda record: True
    id: Callable[[Record], Any] = _nothing
    parent: Callable[[Record], Any] = _nothing
    conversation: Callable[[Record], Any] = _nothing
    score: Callable[[Record], Any] = _nothing

    @property
    def is_of_program(self) -> bool:
        """Whether a program writes it, which has records of other forms for what it says itself."""
        return not self.name.startswith("columns ")

    @property
    def has_threads(self) -> bool:
        """Whether its records name the one that they answer."""
        return self.parent is not _nothing


def _telegram_text(record: Record) -> str:
    """Text, or pieces of text with their markup."""
    parts = record.get("text")
    if isinstance(parts, list):
        return "".join(str(part.get("text", "")) if isinstance(part, Mapping) else str(part) for part in parts)
    return str(parts or "")


def _slack_text(record: Record) -> str:
    """Without the brackets around names and links."""
    text = re.sub(r"<(?:https?://[^|>]+)\|([^>]+)>", r"\1", str(record.get("text") or ""))
    return re.sub(r"<(https?://[^>]+)>", r"\1", text).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def with_names(text: str, names: Mapping[str, str]) -> str:
    """`<@U123>` as `@Ann`."""
    return re.sub(r"<@(\w+)(?:\|[^>]*)?>", lambda found: f"@{names.get(found[1], found[1])}", text)


def _is_sent(record: Record) -> bool:
    return str(_at("IsSender", "is_sender", "isSend", "is_send")(record)).strip().lower() in ("1", "true")


def _wechat_author(record: Record) -> str:
    """Exports say whether the owner of the telephone sent it: `me`, or the other's name."""
    names = _at("Sender", "sender", "senderDisplayName", "Remark", "NickName", "talker", "StrTalker", "TalkerId")
    return "me" if _is_sent(record) else str(names(record))


def _is_wechat_text(record: Record) -> bool:
    kind = _at("Type", "type_name", "type", "localType")(record)
    return str(kind) in ("1", "text", "文本", "文本消息", "None")


_REMOVED = ("[deleted]", "[removed]")


def _reddit_text(record: Record) -> str:
    text = str(record.get("body") or "")
    if "title" in record:
        text = "\n\n".join(str(record[key]) for key in ("title", "selftext") if record.get(key))
    return "" if text in _REMOVED or str(record.get("selftext")) in _REMOVED else text


def _reddit_id(record: Record) -> str:
    name = record.get("name")
    kind = "t3" if "title" in record else "t1"
    return str(name) if name and re.match(r"t\d_", str(name)) else f"{kind}_{record.get('id')}"


def _replied_to(record: Record) -> Any:
    for other in record.get("referenced_tweets") or ():
        if isinstance(other, Mapping) and other.get("type") == "replied_to":
            return other.get("id")
    return _at("in_reply_to_status_id_str", "in_reply_to_status_id", "in_response_to_tweet_id")(record)


def _tweet_text(record: Record) -> str:
    """Without the names of those who are answered."""
    return re.sub(r"^(?:@\w+\s+)+", "", str(_at("full_text", "text")(record) or ""))


EXPORTS = (
    Export(
        "Telegram", frozenset({"id", "type", "date", "from", "text"}), _at("from", "from_id"), _telegram_text,
        _at("date_unixtime", "date"), lambda record: record.get("type") == "message",
    ),
    Export(
        "Discord", frozenset({"id", "type", "timestamp", "content", "author"}),
        _at("author.nickname", "author.name", "author.id"), _at("content"), _at("timestamp"),
        lambda record: record.get("type") in ("Default", "Reply", 0, 19),
    ),
    Export("Discord", frozenset({"Author", "Date", "Content"}), _at("Author", "AuthorID"), _at("Content"), _at("Date")),
    Export(
        "Slack", frozenset({"type", "user", "text", "ts"}),
        _at("user_profile.real_name", "user_profile.display_name", "user"), _slack_text, _at("ts"),
        lambda record: record.get("type") == "message" and not record.get("subtype"), conversation=_at("thread_ts"),
    ),
    Export(
        "WeChat", frozenset({"StrContent", "IsSender", "CreateTime"}), _wechat_author, _at("StrContent"),
        _at("CreateTime", "StrTime"), _is_wechat_text, conversation=_at("TalkerId", "StrTalker"),
    ),
    Export(
        "WeChat", frozenset({"is_sender", "talker", "msg", "CreateTime"}), _wechat_author, _at("msg"),
        _at("CreateTime"), _is_wechat_text, conversation=_at("room_name"),
    ),
    Export(
        "WeChat", frozenset({"isSend", "content", "createTime"}), _wechat_author, _at("content"), _at("createTime"),
        _is_wechat_text,
    ),
    Export(
        "Reddit", frozenset({"body", "parent_id", "author"}), _at("author"), _reddit_text, _at("created_utc"),
        id=_reddit_id, parent=_at("parent_id"), conversation=_at("link_id"), score=_at("score"),
    ),
    Export(
        "Reddit", frozenset({"title", "selftext", "author"}), _at("author"), _reddit_text, _at("created_utc"),
        id=_reddit_id, parent=lambda record: None, conversation=_reddit_id, score=_at("score"),
    ),
    Export(
        "Twitter", frozenset({"tweet_id", "author_id", "text", "in_response_to_tweet_id"}), _at("author_id"),
        _tweet_text, _at("created_at"), id=_at("tweet_id"), parent=_replied_to,
    ),
    Export(
        "Twitter", frozenset({"in_reply_to_status_id", "user"}), _at("user.screen_name", "user.id_str", "user.id"),
        _tweet_text, _at("created_at"), id=_at("id_str", "id"), parent=_replied_to,
        score=_at("favorite_count"),
    ),
    Export(
        "Twitter", frozenset({"id", "author_id", "conversation_id", "text"}), _at("author_id"), _tweet_text,
        _at("created_at"), id=_at("id"), parent=_replied_to, conversation=_at("conversation_id"),
        score=_at("public_metrics.like_count"),
    ),
    Export(
        "utterances", frozenset({"id", "speaker", "text", "reply-to"}), _at("speaker"), _at("text"), _at("timestamp"),
        id=_at("id"), parent=_at("reply-to"), conversation=_at("conversation_id", "root"),
    ),
    *(
        Export(f"columns {', '.join(names)}", frozenset(names), _at(names[0]), _at(names[2]), _at(names[1]))
        for names in (
            ("name", "time", "text"), ("author", "time", "text"), ("sender", "time", "text"),
            ("name", "time", "message"), ("author", "time", "message"), ("sender", "time", "message"),
            ("sender", "timestamp", "message"), ("sender", "timestamp", "content"), ("user", "timestamp", "message"),
            ("author", "date", "text"), ("sender", "date", "text"), ("sender", "date", "message"),
            ("from", "date", "text"), ("speaker", "time", "text"), ("sender_name", "timestamp_ms", "content"),
        )
    ),
)  # fmt: skip


def export_of(record: Any) -> Export | None:
    """The program that writes such records."""
    if not isinstance(record, Mapping):
        return None
    keys = record.columns if isinstance(record, TableRow) else record.keys()  # a table leaves empty cells out
    return next((export for export in EXPORTS if export.keys <= set(keys)), None)


def record_seconds(value: Any) -> float | None:
    """A point in time in seconds: a number of seconds or milliseconds, or a date as text."""
    if isinstance(value, str) and not re.fullmatch(r"\d+(\.\d+)?", value.strip()):
        return _parsed_time(value.strip())
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        return None
    return seconds / 1000 if seconds > 1e11 else seconds


_FORMS = ("%a %b %d %H:%M:%S %z %Y", "%d-%b-%y %I:%M %p", "%m/%d/%Y %I:%M %p", "%Y/%m/%d %H:%M:%S", "%Y/%m/%d %H:%M")


def _parsed_time(text: str) -> float | None:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        for form in _FORMS:
            try:
                found = datetime.strptime(text, form)
                break
            except ValueError:
                continue
        else:
            return None
    return found.timestamp() if found.tzinfo else found.replace(tzinfo=UTC).timestamp()


def record_message(place: str, record: Record, export: Export, skipped: Skipped) -> Message | None:
    """The message that a record holds, without text as ""; None for what a program says. Both are counted."""
    if not export.is_message(record):
        skipped.add(NOTICES)
        return None
    text, author = str(export.text(record) or "").strip(), export.author(record)
    if says_nothing(text):
        skipped.add(NO_TEXT)
        text = ""
    elif author is None:
        skipped.add(NO_AUTHOR)
        text = ""
    conversation = str(export.conversation(record) or "")
    return Message(place, str(author or ""), text, record_seconds(export.time(record)), conversation)
