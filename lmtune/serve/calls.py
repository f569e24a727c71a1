"""What a request with a body and a call of one of the page's functions have to hold: checked before Gradio sees them.

Gradio looks the function up and counts the values where a fault ends in a traceback on the terminal, and for a question
only when its turn has come. An object that looks like its file data it takes for a file, wherever it stands: it copies
what `path` names, without end if that is a device, and lets the caller know. A body that it refuses it sends back,
which fails for what JSON cannot hold. A page sends what is right, so these are programs that speak to the app.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmtune.errors import LmtuneError

if TYPE_CHECKING:
    import gradio as gr

MAX_DEPTH = 16  # of lists and objects in each other; the page sends up to four
_FILE_KEYS = frozenset({"path", "url", "meta", "_type"})
_NAMED = re.compile(r"/gradio_api/call/([^/]+)/?")
Refusal = tuple[int, str]


@dataclass(frozen=True)
class Function:
    """One that the page can call.

    Attributes:
        name: by which programs call it.
        num_values: how many it takes.
        takes_event: also what was clicked, as `event_data`.
    """

    name: str
    num_values: int
    takes_event: bool


class Calls:
    """The functions of a page, by number."""

    def __init__(self, blocks: gr.Blocks) -> None:
        self._functions = {
            number: Function(str(function.api_name), len(function.inputs), bool(function.collects_event_data))
            for number, function in blocks.fns.items()
        }

    def refusal(self, path: str, call: dict[str, Any]) -> Refusal | None:
        """Status and reason; None for a call that may pass, or one without a list of values, as Gradio says itself."""
        if any(not _FILE_KEYS.isdisjoint(one) for one in _within(call) if isinstance(one, dict)):
            return 422, f"holds an object with one of the keys {', '.join(sorted(_FILE_KEYS))}; no file is taken here"
        if call.get("session_hash") == "":
            return 422, "session_hash: got ''; should be a name for the session, or null"
        if not isinstance(call.get("data"), list):
            return None
        if (named := _NAMED.fullmatch(path)) is not None:
            found = next((one for one in self._functions.values() if one.name == named[1]), None)
            if found is None:
                return 404, "there is no function of this name"
        else:
            number = call.get("fn_index")
            if isinstance(number, bool) or not isinstance(number, int):
                return 422, f"fn_index: got {repr(number)[:60]}; should be the number of a function"
            found = self._functions.get(number)
            if found is None:
                return 404, f"fn_index: got {number}; there is no function of this number"
        return _misfit(found, call)


def read_body(body: bytes) -> dict[str, Any]:
    """The JSON object that `body` is.

    Raises:
        LmtuneError: it is none, or holds what JSON and UTF-8 have no form for.
    """
    try:
        found = json.loads(body.decode())
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise LmtuneError("body: holds half a character (a lone surrogate)") from None
    except RecursionError:
        raise LmtuneError(f"body: nested too deep; may be {MAX_DEPTH} deep") from None
    except ValueError:
        raise LmtuneError("body: should be JSON in UTF-8, without NaN and numbers beyond 1e308") from None
    if not isinstance(found, dict):
        raise LmtuneError(f"body: got {repr(found)[:60]}; should be a JSON object")
    for _ in _within(found):
        pass
    return found


def _within(value: Any) -> Iterator[Any]:
    """Every list and object in `value`, and itself.

    Raises:
        LmtuneError: they are nested deeper than `MAX_DEPTH`.
    """
    level = [value]
    for _ in range(MAX_DEPTH):
        yield from level
        items = (item for one in level for item in (one.values() if isinstance(one, dict) else one))
        level = [item for item in items if isinstance(item, (dict, list))]
        if not level:
            return
    raise LmtuneError(f"body: nested too deep; may be {MAX_DEPTH} deep")


def _misfit(function: Function, call: dict[str, Any]) -> Refusal | None:
    """What is missing in the call, or more than any function takes."""
    if any(isinstance(one, dict) for one in _within(call["data"])):
        return 422, f"data: holds an object; {function.name} takes texts and numbers"
    if (got := len(call["data"])) < function.num_values:
        return 422, f"data: got {got} values; {function.name} takes {function.num_values}"
    if function.takes_event and not isinstance(event := call.get("event_data"), dict):
        return 422, f"event_data: got {repr(event)[:60]}; {function.name} takes an object that says what was clicked"
    return None
