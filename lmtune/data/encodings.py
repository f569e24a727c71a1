"""What a file that is no UTF-8 probably is, so that the message can name the command that converts it."""

from __future__ import annotations

import codecs

# The hundred most common characters of Chinese, with some of questions: a third of any text, and of nothing else.
_COMMON_HANZI = frozenset(
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事成方多经么去法学如都同现当没动"
    "面起看定天分还进好小部其些主样理心本前开但因只从想实日军者意无力它与长把机十民第公此已工使情明性知全三又关点正业外将两高间由问很最重并物手应战向头"
    "请吗什怎谢您今号单货"
)


def encoding_advice(sample: bytes) -> str:
    """` (it looks like …: iconv …)` for the first bytes of a file that is no UTF-8; empty where nothing can be said.

    Lines of good UTF-8 beyond ASCII speak for a damaged file, not for another encoding.
    """
    if any(_is_utf8(line) and not line.isascii() for line in sample.splitlines()):
        return ""
    if _is_chinese(sample):
        return " (it looks like GB18030 or GBK: iconv -f GB18030 -t UTF-8 OLD > NEW)"
    if _is_western(sample):
        return " (it looks like Windows-1252 or Latin-1: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW)"
    return ""


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_chinese(sample: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("gb18030")().decode(sample)
    except UnicodeDecodeError:
        return False
    hanzi = [mark for mark in text if "\u4e00" <= mark <= "\u9fff"]
    return sum(mark in _COMMON_HANZI for mark in hanzi) > 0.1 * len(hanzi)


def _is_western(sample: bytes) -> bool:
    """Whether bytes beyond ASCII stand alone between letters, as accents and quotation marks do."""
    high = [index for index, byte in enumerate(sample) if byte > 127]
    alone = [i for i in high if not (i and sample[i - 1] > 127) and not (i + 1 < len(sample) and sample[i + 1] > 127)]
    return len(alone) > 0.7 * len(high)
