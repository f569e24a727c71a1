"""What a call of one of the page's functions has to hold: checked before Gradio takes it up.

Gradio looks the function up and counts the values where a fault ends in a traceback on the terminal, and for a question
only when its turn has come. A page sends what is right, so these are programs that speak to the app.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gradio as gr

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

    def refusal(self, path: str, body: bytes) -> Refusal | None:
        """Status and reason; None for a call that may pass, or whose body is no JSON object with a list of values at
        all, as Gradio says itself."""
        call = parsed(body)
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


def parsed(body: bytes) -> dict[str, Any]:
    """The JSON object that `body` is; an empty one if it is none."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _misfit(function: Function, call: dict[str, Any]) -> Refusal | None:
    """What is missing in the call."""
    if (got := len(call["data"])) < function.num_values:
        return 422, f"data: got {got} values; {function.name} takes {function.num_values}"
    if function.takes_event and not isinstance(event := call.get("event_data"), dict):
        return 422, f"event_data: got {repr(event)[:60]}; {function.name} takes an object that says what was clicked"
    return None
