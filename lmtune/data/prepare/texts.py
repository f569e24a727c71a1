"""Steps that change texts: each a function from a text to the same text, or to a better one."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser

from lmtune.data.prepare.libraries import library

# Scripts without spaces between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese; what stands in brackets.
SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"

# --- encoding --------------------------------------------------------------------------------------------------------


def repair_encoding(text: str) -> str:
    """`cafÃ©` → `café`: text that was decoded with the wrong encoding, as ftfy recognizes it."""
    return text if text.isascii() else str(library("ftfy").fix_encoding(text))


# --- HTML ------------------------------------------------------------------------------------------------------------

_CODE = re.compile(r"(```.*?```|`[^`\n]+`)", re.DOTALL)  # in Markdown, where a tag is what the text is about
_TAGS = (
    "a|abbr|b|blockquote|body|center|code|div|em|font|h[1-6]|html|i|kbd|li|ol|p|pre|s|span|strong|sub|sup|table|td|th|"
    "tr|u|ul"
)
_CLOSED = re.compile(rf"<({_TAGS})(\s[^<>]*)?>.*</\1\s*>", re.IGNORECASE | re.DOTALL)
_ALONE = re.compile(r"<(br|hr|p)\s*/?>|<img\s[^<>]*>", re.IGNORECASE)
_ENTITY = re.compile(
    r"&(nbsp|amp|lt|gt|quot|apos|hellip|mdash|ndash|[lr][sd]quo|#\d{1,6}|#x[0-9a-f]{1,5});", re.IGNORECASE
)
_BLOCKS = {
    "p", "div", "br", "hr", "li", "ul", "ol", "table", "tr", "blockquote", "pre", "h1", "h2", "h3", "h4", "h5", "h6",
    "section", "article", "header", "footer", "title",
}  # fmt: skip
_PARAGRAPHS = {"p", "pre", "blockquote", "ul", "ol", "table", "h1", "h2", "h3", "h4", "h5", "h6"}
_UNSEEN = {"script", "style", "head", "template"}


def strip_html(text: str) -> str:
    """`<p>Ships in 2&nbsp;days.</p>` → `Ships in 2 days.`; code between backticks stays."""
    if "<" not in text and "&" not in text:
        return text
    return "".join(part if number % 2 else _plain(part) for number, part in enumerate(_CODE.split(text)))


def _plain(part: str) -> str:
    if _CLOSED.search(part) or _ALONE.search(part):
        return html_to_text(part)
    return html.unescape(part) if _ENTITY.search(part) else part


def html_to_text(markup: str) -> str:
    """The text of a piece of HTML: paragraphs apart, list items with a dash, code in fences."""
    reader = _TextOfHtml(any(tag.lower() in _BLOCKS for tag in re.findall(r"<(\w+)", markup)))
    reader.feed(markup)
    reader.close()
    return re.sub(r"\n{3,}", "\n\n", "".join(reader.parts)).strip("\n")


class _TextOfHtml(HTMLParser):
    def __init__(self, has_blocks: bool) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._has_blocks = has_blocks  # without any, line ends are those of the text
        self._verbatim = self._unseen = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._unseen += tag in _UNSEEN
        self._break(tag)
        if tag == "pre":
            self._verbatim += 1
            self.parts.append("```\n")
        elif tag == "code" and not self._verbatim:
            self.parts.append("`")
        elif tag == "li":
            self.parts.append("- ")
        elif tag in ("td", "th") and self.parts and not self.parts[-1].endswith("\n"):
            self.parts.append("\t")

    def handle_endtag(self, tag: str) -> None:
        self._unseen -= tag in _UNSEEN and self._unseen > 0
        if tag == "pre" and self._verbatim:
            self._verbatim -= 1
            self.parts.append("```" if self.parts[-1].endswith("\n") else "\n```")
        elif tag == "code" and not self._verbatim:
            self.parts.append("`")
        self._break(tag)

    def handle_data(self, data: str) -> None:
        if self._unseen:
            return
        if self._has_blocks and not self._verbatim:
            data = re.sub(r"[ \t\r\n]+", " ", data)
            if not self.parts or self.parts[-1].endswith("\n"):
                data = data.lstrip(" ")
        self.parts.append(data)

    def _break(self, tag: str) -> None:
        if tag not in _BLOCKS or self._verbatim or not self.parts:
            return
        self.parts[-1] = self.parts[-1].rstrip(" ")
        whole = "".join(self.parts[-3:])
        wanted = 2 if tag in _PARAGRAPHS else 1
        self.parts.append("\n" * (1 if tag == "br" else max(0, wanted - (len(whole) - len(whole.rstrip("\n"))))))


# --- white space and characters --------------------------------------------------------------------------------------

_UNWANTED = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff\ufff9-\ufffb]"
)
_SPACES = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f]")
_NEEDLESS = re.compile(
    rf"{_UNWANTED.pattern}|{_SPACES.pattern}|[\r\x85\u2028\u2029]|[ \t]$|\n\n\n|\A[\n ]|\n\Z", re.MULTILINE
)
_LINE_END = re.compile("\r\n?|\x85|\u2028|\u2029")
_TRAILING = re.compile(r"[ \t]+$", re.MULTILINE)
_MANY_LINES = re.compile(r"\n{3,}")


def clean_spaces(text: str) -> str:
    """Control and invisible characters go, unusual spaces and line ends become usual ones, and needless ones go.

    What carries meaning stays: indentation, tabs, blank lines one at a time, the joiners of Persian, Hindi and emoji.
    """
    if not _NEEDLESS.search(text):
        return text
    text = _LINE_END.sub("\n", text)
    text = _TRAILING.sub("", _SPACES.sub(" ", _UNWANTED.sub("", text)))
    text = _MANY_LINES.sub("\n\n", text).strip("\n")
    is_indented = "\n" in text or text.startswith("  ")
    return text if is_indented else text.removeprefix(" ")


_ASCII = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {
    0x3000: " ", 0x2018: "'", 0x2019: "'", 0x201A: "'", 0x201B: "'", 0x201C: '"', 0x201D: '"', 0x201E: '"', 0x2010: "-",
    0x2011: "-", 0x2013: "-", 0x2014: "-", 0x2015: "-", 0x2026: "...", 0x2032: "'", 0x2033: '"',
}  # fmt: skip


def plain_punctuation(text: str) -> str:
    """`“Ｙｅｓ”，…` → `"Yes",...`: full-width letters and typographic marks as ASCII has them."""
    return text if text.isascii() else text.translate(_ASCII)


_CASED = 20  # letters; fewer are an abbreviation
_SHARE = 0.8
_SENTENCE = re.compile(r"(^|[.!?]\s+|\n)([^\W\d_])")


def lower_capitals(text: str) -> str:
    """`WHERE IS MY ORDER? CALL ME!` → `Where is my order? Call me!`, if four in five letters are capitals."""
    upper = sum(map(str.isupper, text))
    if upper < _CASED or upper < _SHARE * (upper + sum(map(str.islower, text))):
        return text
    lower = _SENTENCE.sub(lambda found: found[1] + found[2].upper(), text.lower())
    return re.sub(r"\bi\b", "I", lower)
