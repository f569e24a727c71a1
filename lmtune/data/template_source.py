"""The text of a chat template, changed before it is run: the time that it writes, and an end after every answer."""

from __future__ import annotations

import json
import re
from datetime import datetime

DATE_FORMATS = re.compile(r"strftime_now\(\s*(?:format\s*=\s*)?(?P<quote>['\"])(?P<format>.*?)(?P=quote)\s*\)")


def at_time(source: str, now: str) -> str:
    """The template with `now` for the time that `strftime_now` tells."""
    formats = {found["format"] for found in DATE_FORMATS.finditer(source)}
    if not formats:
        return source
    time = datetime.fromisoformat(now)
    told = "".join(
        f"{{% if format == {literal(form)} %}}{{{{ {literal(time.strftime(form))} }}}}{{% endif %}}"
        for form in sorted(formats)
    )
    return f"{{% macro strftime_now(format) %}}{told}{{% endmacro %}}{{{{ '' }}}}{source}"


def with_end(source: str, end: str) -> str:
    """The template with `end` written after every answer, by changing the messages before it begins."""
    return (
        "{% set amended = namespace(messages=[]) %}{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}"
        f"{{% set message = dict(message, content=message['content'] + {literal(end)}) %}}"
        "{% endif %}{% set amended.messages = amended.messages + [message] %}{% endfor %}"
        "{% set messages = amended.messages %}{{ '' }}" + source
    )


def literal(text: str) -> str:
    """`text` as a string in a Jinja expression."""
    return json.dumps(text, ensure_ascii=False)
